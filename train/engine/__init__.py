"""The engine under all runners: configuration, checkpoints, logs and the training loop."""
