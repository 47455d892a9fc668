"""Chooses the plan of each direction of a call on the cuda backend: by measurement or by a rule."""

from dcconv.dispatch.choice import Plans, allowed, choose, describe, pin_table

__all__ = ["Plans", "allowed", "choose", "describe", "pin_table"]
