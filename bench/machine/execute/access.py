"""Loads, stores and copies to shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.machine.execute.grid import LANES, SHARED_WINDOW, Mask
from bench.machine.execute.operands import LOW, U32, Action, Operands


def _warps(o: Operands) -> int:
    return o.grid.count // LANES


def load(o: Operands) -> Action:
    """LDG, LDS, and LD, which learns from its address which of both it is."""
    size, traffic = o.instruction.bytes, o.traffic
    address, rows = o.address(o.texts[1]), o.rows(o.texts[0], max(size // 4, 1))
    discards, memory = o.row(o.texts[0]) is None, o.memory
    extends = bool({"S8", "S16"} & set(o.modifiers))
    if extends and size < 4:
        o.refuse()

    def action(mask: Mask) -> None:
        at = np.flatnonzero(mask)
        if len(at) == 0 or (discards and o.name == "LDS"):
            return traffic.count_none(_warps(o))
        where = address()[at]
        shared = o.name == "LDS"
        if o.name == "LD" and (where >> 32 == SHARED_WINDOW).all():
            shared, where = True, where & LOW
        if shared:
            traffic.count_shared(where, size, at, _warps(o))
            found = memory.load_shared(where, size, at)
        else:
            traffic.count_global(where, size, at, _warps(o))
            found = memory.load(where, size, at)
        if discards:
            return None
        if size < 4:
            rows[0][at] = np.ascontiguousarray(found).view(f"<u{size}")[:, 0]
            return None
        for k, row in enumerate(rows):
            row[at] = np.ascontiguousarray(found[:, 4 * k : 4 * k + 4]).view(U32)[:, 0]
        return None

    return action


def store(o: Operands) -> Action:
    """STG, STS, ST."""
    size, traffic, memory = o.instruction.bytes, o.traffic, o.memory
    address, rows = o.address(o.texts[0]), o.rows(o.texts[1], max(size // 4, 1))

    def action(mask: Mask) -> None:
        at = np.flatnonzero(mask)
        if len(at) == 0:
            return traffic.count_none(_warps(o))
        where = address()[at]
        words = np.stack([row[at] for row in rows], 1)
        values = np.ascontiguousarray(words).view(np.uint8)[:, :size]
        shared = o.name == "STS"
        if o.name == "ST" and (where >> 32 == SHARED_WINDOW).all():
            shared, where = True, where & LOW
        if shared:
            traffic.count_shared(where, size, at, _warps(o))
            return memory.store_shared(where, values, at)
        traffic.count_global(where, size, at, _warps(o))
        return memory.store(where, values, at)

    return action


def copy(o: Operands) -> Action:
    """LDGSTS: 16 bytes a lane from global to shared memory, zeros where its predicate is false."""
    size, traffic, memory = o.instruction.bytes, o.traffic, o.memory
    to, source = o.address(o.texts[0]), o.address(o.texts[1])
    reads = o.predicate(o.texts[2]) if len(o.texts) > 2 else o.predicate("PT")

    def action(mask: Mask) -> None:
        at = np.flatnonzero(mask)
        traffic.count_none(_warps(o))
        if len(at) == 0:
            return
        values = np.zeros((len(at), size), np.uint8)
        valid = np.broadcast_to(reads(), mask.shape)[at]
        where = source()[at]
        if valid.any():
            values[valid] = memory.load(where[valid], size, at[valid])
            traffic.count_global(where[valid], size, at[valid], _warps(o))
        memory.store_shared(to()[at], values, at)

    return action


def load_stack(o: Operands) -> Action:
    size, memory = o.instruction.bytes, o.memory
    if {"S8", "S16"} & set(o.modifiers):
        o.refuse()
    address, rows = o.address(o.texts[1]), o.rows(o.texts[0], max(size // 4, 1))

    def action(mask: Mask) -> None:
        at = np.flatnonzero(mask)
        o.traffic.count_none(_warps(o))
        if len(at):
            found = memory.stack[memory.stack_places("load", address()[at], size, at)]
            if size < 4:
                rows[0][at] = np.ascontiguousarray(found).view(f"<u{size}")[:, 0]
                return
            for k, row in enumerate(rows):
                row[at] = np.ascontiguousarray(found[:, 4 * k : 4 * k + 4]).view(U32)[:, 0]

    return action


def store_stack(o: Operands) -> Action:
    size, memory = o.instruction.bytes, o.memory
    address, rows = o.address(o.texts[0]), o.rows(o.texts[1], max(size // 4, 1))

    def action(mask: Mask) -> None:
        at = np.flatnonzero(mask)
        o.traffic.count_none(_warps(o))
        if len(at):
            words = np.ascontiguousarray(np.stack([row[at] for row in rows], 1)).view(np.uint8)
            places = memory.stack_places("store", address()[at], size, at)
            memory.stack[places] = words[:, :size]

    return action


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **dict.fromkeys(("LDG", "LDS", "LD"), load),
    **dict.fromkeys(("STG", "STS", "ST"), store),
    **{"LDGSTS": copy, "LDL": load_stack, "STL": store_stack},
}
