"""The GPU kernels' machine code on the CPU: loops, results, and speed that is to be expected.

Nothing here needs a GPU. docs/machine.md says what is counted, executed and simulated, and what
the figures rest on.
"""

from bench.machine.command import add_arguments, run

__all__ = ["add_arguments", "run"]
