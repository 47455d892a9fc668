"""The ops of every backend, what tracing knows of them, and their composition."""
