"""Training data: files of the real formats, augmentation, and resumable streams of batches."""
