"""Chooses the plan of each direction of a call on the cuda backend: by measurement or by a rule."""

from dcconv.dispatch.choice import allowed, choose, describe, pin_table
from dcconv.dispatch.plans import Plans

__all__ = ["Plans", "allowed", "choose", "describe", "pin_table"]
