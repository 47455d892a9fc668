"""Measurements of dcconv: time, accuracy and kept memory, beside what users have without it."""
