"""Chooses the plan of each direction of a call, on the cuda and triton backends.

By measurement, or by a rule.
"""

from dcconv.dispatch.choice import allowed, choose, describe, pin_table
from dcconv.dispatch.key import BACKENDS
from dcconv.dispatch.plans import Plans

__all__ = ["BACKENDS", "Plans", "allowed", "choose", "describe", "pin_table"]
