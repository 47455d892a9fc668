"""Integer arithmetic, moves and selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.execute.grid import LANES, Array, Mask
from bench.machine.execute.operands import I32, I64, LOW, U32, U64, Action, Operands, Value

COMPARE: dict[str, Callable[..., Any]] = {
    **{"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal},
    **{"GT": np.greater, "GE": np.greater_equal},
}
COMBINE: dict[str, Callable[..., Any]] = {
    **{"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor},
}


def signed(x: Array) -> Array:
    """Return 32 bits as signed numbers."""
    return np.asarray(x).view(I32)


def move(o: Operands) -> Action:
    return o.write(o.texts[0], o.u32(o.texts[1]))


def clear(o: Operands) -> Action:
    if o.texts[1] != "SRZ":
        o.refuse()
    zero = np.asarray(U64(0))
    write = o.write if "32" in o.modifiers else o.write_pair
    return write(o.texts[0], lambda: zero)


def special(o: Operands) -> Action:
    value = o.grid.special(o.texts[1])
    if value is None:
        o.refuse()
    return o.write(o.texts[0], lambda: value)


def load_constant(o: Operands) -> Action:
    size = o.instruction.bytes
    value = o.constant(o.texts[1], size)
    if value is None:
        o.refuse()
    return (o.write_pair if size == 8 else o.write)(o.texts[0], value)


def to_uniform(o: Operands) -> Action:
    """The value of a warp's first active lane."""
    row, value = o.row(o.texts[0]), o.u32(o.texts[1])
    if row is None:
        o.refuse()

    def action(mask: Mask) -> None:
        warps = mask.reshape(-1, LANES)
        some = warps.any(1)
        given = np.broadcast_to(value(), mask.shape).reshape(-1, LANES)
        chosen = given[np.arange(len(warps)), warps.argmax(1)]
        row.reshape(-1, LANES)[some] = chosen[some, None]

    return action


def select(o: Operands) -> Action:
    a, b, which = o.u32(o.texts[1]), o.u32(o.texts[2]), o.predicate(o.texts[3])
    return o.write(o.texts[0], lambda: np.where(which(), a(), b()))


def permute(o: Operands) -> Action:
    if o.modifiers:
        o.refuse()
    a, selector, b = (o.u32(text) for text in o.texts[1:4])
    fixed = o.number(o.texts[2], floating=False)

    def any_order() -> Array:
        both = np.asarray(a()).astype(U64) | np.asarray(b()).astype(U64) << U64(32)
        chosen = np.asarray(selector()).astype(U64)
        value: Any = U64(0)
        for k in range(4):
            nibble = chosen >> U64(4 * k) & U64(15)
            byte = both >> (nibble & U64(7)) * U64(8) & U64(0xFF)
            sign = np.where(byte >> U64(7) != 0, U64(0xFF), U64(0))
            value = value | np.where(nibble >> U64(3) != 0, sign, byte) << U64(8 * k)
        return np.asarray(value).astype(U32)

    halves = {0x5410: (a, 0, b, 0), 0x7632: (a, 16, b, 16), 0x7610: (a, 0, b, 16)}
    halves[0x5432] = a, 16, b, 0
    if fixed in halves:
        low, low_shift, high, high_shift = halves[fixed]
        return o.write(
            o.texts[0],
            lambda: low() >> U32(low_shift) & U32(0xFFFF) | high() >> U32(high_shift) << U32(16),
        )
    return o.write(o.texts[0], any_order)


def add(o: Operands) -> Action:
    carries = o.takes_predicates()
    terms = o.texts[1:4]
    if not carries and "X" not in o.modifiers:
        a, b, c = (o.u32(text) for text in terms)
        if terms[2] in ("RZ", "URZ"):
            return o.write(o.texts[0], lambda: a() + b())
        return o.write(o.texts[0], lambda: a() + b() + c())
    wide = [o.addend(text) for text in terms]
    if "X" in o.modifiers:
        wide += [_as_u64(o.predicate(text)) for text in o.texts[4:]]
    into = o.write(o.texts[0], lambda: np.asarray(kept[0] & U64(LOW)))
    out = o.write_predicates(carries, lambda: [kept[0] >> U64(32) > k for k in range(2)])
    kept: list[Any] = [0]

    def action(mask: Mask) -> None:
        kept[0] = np.asarray(sum(term() for term in wide))
        into(mask)
        out(mask)

    return action


def _as_u64(value: Value) -> Value:
    return lambda: np.asarray(value()).astype(U64)


def add_two(o: Operands) -> Action:
    a, b = o.u32(o.texts[1]), o.u32(o.texts[2])
    return o.write(o.texts[0], lambda: a() + b())


def minimum(o: Operands) -> Action:
    """IMNMX, VIMNMX; VIADDMNMX with a sum before it."""
    smaller = o.predicate(o.texts[-1])
    values = [o.u32(text) for text in o.texts[1:-1]]
    view: Callable[[Array], Array] = np.asarray if "U32" in o.modifiers else signed

    def value() -> Array:
        given = [v() for v in values]
        first = given[0] + given[1] if len(given) == 3 else given[0]
        x, y = view(first), view(given[-1])
        return np.where(smaller(), np.minimum(x, y), np.maximum(x, y)).view(U32)

    return o.write(o.texts[0], value)


def magnitude(o: Operands) -> Action:
    a = o.u32(o.texts[1])
    return o.write(o.texts[0], lambda: np.abs(signed(a())).view(U32))


def extend(o: Operands) -> Action:
    """SGXT: the low bits of a number as a number of their own, with or without a sign."""
    if "W" in o.modifiers:
        o.refuse()
    a, width = o.u32(o.texts[1]), o.u32(o.texts[2])

    def value() -> Array:
        bits = np.minimum(np.asarray(width()), 32).astype(U64)
        unused = U64(64) - bits
        # Of no bits nothing is left: a shift by all 64 would leave them.
        raised = np.where(bits == 0, U64(0), a().astype(U64) << (unused & U64(63)))
        number = raised if "U32" in o.modifiers else raised.view(I64)
        return np.asarray((number >> (unused & U64(63)).astype(number.dtype)).astype(U32))

    return o.write(o.texts[0], value)


def multiply(o: Operands) -> Action:
    carries = o.takes_predicates()
    a, b = o.u32(o.texts[1]), o.u32(o.texts[2])
    view: Callable[[Array], Array] = np.asarray if "U32" in o.modifiers else signed

    def product() -> Array:
        x, y = view(a()).astype(I64), view(b()).astype(I64)
        return np.asarray((x * y).view(U64))

    if "WIDE" in o.modifiers or "HI" in o.modifiers:
        addend, shift = o.u64(o.texts[3]), U64(0 if "WIDE" in o.modifiers else 32)
        write = o.write_pair if "WIDE" in o.modifiers else o.write
        kept: list[Any] = [0, 0]
        into = write(o.texts[0], lambda: kept[1] >> shift)
        out = o.write_predicates(carries, lambda: [kept[1] < kept[0]])

        def action(mask: Mask) -> None:
            kept[0] = product()
            kept[1] = np.asarray(kept[0] + addend())
            into(mask)
            out(mask)

        return action
    c = o.u32(o.texts[3])
    if "X" in o.modifiers:
        carry = o.predicate(o.texts[4])
        return o.write(o.texts[0], lambda: a() * b() + c() + np.asarray(carry()).astype(U32))
    if o.texts[1] in ("RZ", "URZ"):
        return o.write(o.texts[0], c)
    if o.texts[3] in ("RZ", "URZ"):
        return o.write(o.texts[0], lambda: a() * b())
    return o.write(o.texts[0], lambda: a() * b() + c())


def scaled_add(o: Operands) -> Action:
    """LEA: a shifted number, or the upper half of a shifted pair, and another."""
    carries = o.takes_predicates()
    texts = o.texts
    high, extended = "HI" in o.modifiers, "SX32" in o.modifiers
    a, b = o.u32(texts[1]), o.addend(texts[2])
    upper = o.u32(texts[3]) if high and not extended else None
    at = 4 if upper is not None else 3
    shift = U64(int(texts[at], 16))
    carry = _as_u64(o.predicate(texts[at + 1])) if "X" in o.modifiers else None
    kept: list[Any] = [0]
    into = o.write(texts[0], lambda: np.asarray(kept[0] & U64(LOW)))
    out = o.write_predicates(carries, lambda: [kept[0] >> U64(32) != 0])

    def action(mask: Mask) -> None:
        if upper is not None:
            part = a().astype(U64) | upper().astype(U64) << U64(32)
        elif extended:
            part = signed(a()).astype(I64).view(U64)
        else:
            part = a().astype(U64)
        part = part << shift
        part = part >> U64(32) if high else part & U64(LOW)
        kept[0] = np.asarray(part + b() + (0 if carry is None else carry()))
        into(mask)
        out(mask)

    return action


def shift(o: Operands) -> Action:
    left, kind, high = o.modifiers[0] == "L", o.modifiers[1], "HI" in o.modifiers
    if kind not in ("U32", "S32", "U64", "S64") or o.modifiers[0] not in ("L", "R"):
        o.refuse()
    if kind == "S32" and left:
        o.refuse()
    a, by, c = (o.u32(text) for text in o.texts[1:4])
    limit = 64 if "64" in kind else 32

    def value() -> Array:
        count = np.asarray(by()).astype(U64)
        count = count & U64(limit - 1) if "W" in o.modifiers else np.minimum(count, U64(limit))
        over, count = count >= U64(64), np.minimum(count, U64(63))
        low, upper = np.asarray(a()).astype(U64), np.asarray(c()).astype(U64)
        both = low | upper << U64(32)
        if left:
            moved = both << count >> U64(32) if high or limit == 64 else low << count
            if limit == 64 and not high:
                moved = both << count
        elif kind == "S32":
            number = signed(c() if high else a()).astype(I64)
            moved = (number >> np.minimum(count, U64(31)).astype(I64)).view(U64)
        elif kind == "U32":
            moved = (upper if high else low) >> count
        else:
            pair = (both.view(I64) >> count.astype(I64)).view(U64) if kind == "S64" else None
            moved = both >> count if pair is None else pair
            moved = moved >> U64(32) if high else moved
        if kind in ("U32", "U64"):
            moved = np.where(over, U64(0), moved)
        return np.asarray(moved & U64(LOW)).astype(U32)

    return o.write(o.texts[0], value)


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **dict.fromkeys(("MOV", "UMOV"), move),
    **dict.fromkeys(("S2R", "S2UR"), special),
    **dict.fromkeys(("LDC", "ULDC"), load_constant),
    **dict.fromkeys(("SEL", "USEL"), select),
    **dict.fromkeys(("IADD3", "UIADD3"), add),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), minimum),
    **dict.fromkeys(("IMAD", "UIMAD"), multiply),
    **dict.fromkeys(("LEA", "ULEA"), scaled_add),
    **dict.fromkeys(("SGXT", "USGXT"), extend),
    **dict.fromkeys(("SHF", "USHF"), shift),
    **{"CS2R": clear, "R2UR": to_uniform, "PRMT": permute, "VIADD": add_two, "IABS": magnitude},
}
