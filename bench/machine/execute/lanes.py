"""Instructions of a whole warp: shuffles, votes, matrices of tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.machine.execute.access import _warps
from bench.machine.execute.grid import LANES, Array, Mask
from bench.machine.execute.operands import F32, F64, I64, U32, Action, Operands, Value

LANE = np.arange(LANES)
GROUP, MEMBER = LANE // 4, LANE % 4


def shuffle(o: Operands) -> Action:
    kind = o.modifiers[0]
    out, row = o.predicate_row(o.texts[0]), o.row(o.texts[1])
    value, by = o.u32(o.texts[2]), o.u32(o.texts[3])
    move: dict[str, Callable[[Array, Array], Array]] = {
        "BFLY": lambda lane, b: lane ^ b,
        "IDX": lambda lane, b: b & (LANES - 1) | lane & 0,
        "DOWN": lambda lane, b: lane + b,
        "UP": lambda lane, b: lane - b,
    }
    # Segments of a warp are in the upper half of the fifth operand; the package has none.
    if kind not in move or row is None:
        o.refuse()
    lane = o.grid.lane.astype(I64)
    first = np.arange(o.grid.count) - lane

    def action(mask: Mask) -> None:
        source = move[kind](lane, np.broadcast_to(by(), lane.shape).astype(I64))
        inside = (source >= 0) & (source < LANES)
        given = np.broadcast_to(value(), lane.shape)
        np.copyto(row, given[first + np.where(inside, source, lane)], where=mask)
        if out is not None:
            np.copyto(out, inside, where=mask)
        if o.traffic.wanted:
            o.traffic.count_none(_warps(o))
            o.traffic.amount = np.ones(_warps(o), I64)

    return action


def vote(o: Operands) -> Action:
    """VOTEU: the lanes of a warp for which a predicate holds, and whether any or all do."""
    value = o.predicate(o.texts[-1])
    registers = [o.row(t) for t in o.texts[:-1] if "R" in t]
    predicates = [o.predicate_row(t) for t in o.texts[:-1] if "P" in t]
    if not {"ANY", "ALL"} & set(o.modifiers):
        o.refuse()

    def action(mask: Mask) -> None:
        lanes = mask.reshape(-1, LANES)
        holds = np.broadcast_to(value(), mask.shape).reshape(-1, LANES) & lanes
        some = lanes.any(1)
        bits = (holds.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(U32)
        answer = np.asarray(holds.any(1) if "ANY" in o.modifiers else (holds == lanes).all(1))
        for row in registers:
            if row is not None:
                row.reshape(-1, LANES)[some] = bits[some, None]
        for row in predicates:
            if row is not None:
                row.reshape(-1, LANES)[some] = answer[some, None]

    return action


def _matrices(o: Operands) -> tuple[int, bool]:
    """Return how many matrices an instruction moves, and whether they are transposed."""
    if o.modifiers[0] != "16" or o.modifiers[1] not in ("M88", "MT88"):
        o.refuse()
    return int(o.modifiers[2]) if len(o.modifiers) > 2 else 1, o.modifiers[1] == "MT88"


def _rows_of_matrices(
    o: Operands, mask: Mask, address: Value, count: int
) -> tuple[Array, Array, Array]:
    """Return the whole warps, and the lanes and addresses that name rows; count their passes."""
    whole = np.flatnonzero(mask.reshape(-1, LANES).all(1))
    lanes = (whole[:, None] * LANES + np.arange(8 * count)).ravel()
    where = address()[lanes]
    if o.traffic.wanted:
        # A matrix is a pass over all banks if its rows do not meet in them.
        o.traffic.count_shared(where, 16, lanes, _warps(o), together=8)
    return whole, lanes, where


def load_matrices(o: Operands) -> Action:
    """LDSM: 8 x 8 matrices of 16-bit elements from shared memory, a row at each lane's address."""
    count, transposed = _matrices(o)
    address, rows = o.address(o.texts[1]), o.rows(o.texts[0], count)

    def action(mask: Mask) -> None:
        whole, lanes, where = _rows_of_matrices(o, mask, address, count)
        found = o.memory.load_shared(where, 16, lanes)
        matrices = np.ascontiguousarray(found).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(U32).reshape(-1, count, LANES)
        for k, row in enumerate(rows):
            row.reshape(-1, LANES)[whole] = pairs[:, k]

    return action


def store_matrices(o: Operands) -> Action:
    """STSM: what LDSM loads, the other way."""
    count, transposed = _matrices(o)
    address, rows = o.address(o.texts[0]), o.rows(o.texts[1], count)

    def action(mask: Mask) -> None:
        whole, lanes, where = _rows_of_matrices(o, mask, address, count)
        pairs = np.stack([row.reshape(-1, LANES)[whole] for row in rows], 1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        values = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        o.memory.store_shared(where, values, lanes)

    return action


def multiply_matrices(o: Operands) -> Action:
    """HMMA.16816.F32: 16 x 8 sums of 16 products each, exact products and sums in float64."""
    if o.modifiers[:2] != ("16816", "F32"):
        o.refuse()
    bfloat16 = "BF16" in o.modifiers
    into, a, b = o.rows(o.texts[0], 4), o.rows(o.texts[1], 4), o.rows(o.texts[2], 2)
    c = o.rows(o.texts[3], 4)

    def halves(words: Array) -> tuple[Array, Array]:
        if bfloat16:
            return (words << U32(16)).view(F32), (words & U32(0xFFFF0000)).view(F32)
        low, high = (words & U32(0xFFFF)).astype(np.uint16), (words >> U32(16)).astype(np.uint16)
        return low.view(np.float16), high.view(np.float16)

    def action(mask: Mask) -> None:
        whole = np.flatnonzero(mask.reshape(-1, LANES).all(1))
        left = np.zeros((len(whole), 16, 16), F64)
        right = np.zeros((len(whole), 16, 8), F64)
        total = np.zeros((len(whole), 16, 8), F64)
        for k in range(4):
            low, high = halves(a[k].reshape(-1, LANES)[whole])
            row, column = GROUP + 8 * (k & 1), 2 * MEMBER + 8 * (k >> 1)
            left[:, row, column], left[:, row, column + 1] = low, high
            sums = c[k].reshape(-1, LANES)[whole].view(F32)
            total[:, GROUP + 8 * (k >> 1), 2 * MEMBER + (k & 1)] = sums
        for k in range(2):
            low, high = halves(b[k].reshape(-1, LANES)[whole])
            row = 2 * MEMBER + 8 * k
            right[:, row, GROUP], right[:, row + 1, GROUP] = low, high
        result = (left @ right + total).astype(F32)
        for k in range(4):
            part = result[:, GROUP + 8 * (k >> 1), 2 * MEMBER + (k & 1)]
            into[k].reshape(-1, LANES)[whole] = np.ascontiguousarray(part).view(U32)

    return action


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **{"SHFL": shuffle, "VOTEU": vote, "LDSM": load_matrices, "STSM": store_matrices},
    "HMMA": multiply_matrices,
}
