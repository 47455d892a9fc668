"""The parts of ``gpu_gate.py``: rows, reports, builds, workers, checks, measurements."""
