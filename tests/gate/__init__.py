"""The parts of ``tests/gpu_gate.py``: rows, reports, builds, workers, checks, measurements."""
