"""float32 and packed 16-bit arithmetic, conversions, special functions.

Products with a sum go through float64, whose one rounding comes before that to float32: the result
is the right one but for cases of one in some 2^29. Special functions are rounded correctly, where
hardware is off by an ulp or two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.execute.grid import Array
from bench.machine.execute.integer import COMBINE, COMPARE, signed
from bench.machine.execute.operands import F32, F64, I64, U32, U64, Action, Operands, Value


def toward(value: Array, exact: Array, modifiers: tuple[str, ...]) -> Array:
    """Return float32 that an instruction rounds as it says: up, down, to zero or to nearest."""
    if not {"RP", "RM", "RZ"} & set(modifiers):
        return value
    wide = value.astype(F64)
    up, down = wide < exact, wide > exact
    if "RP" in modifiers:
        return np.where(up, np.nextafter(value, F32(np.inf)), value)
    if "RM" in modifiers:
        return np.where(down, np.nextafter(value, F32(-np.inf)), value)
    outward = np.abs(wide) > np.abs(exact)
    return np.where(outward, np.nextafter(value, F32(0)), value)


def add(o: Operands) -> Action:
    a, b = o.f32(o.texts[1]), o.f32(o.texts[2])
    return o.write_f32(o.texts[0], lambda: a() + b())


def multiply(o: Operands) -> Action:
    a, b = o.f32(o.texts[1]), o.f32(o.texts[2])
    return o.write_f32(o.texts[0], lambda: a() * b())


def multiply_add(o: Operands) -> Action:
    a, b, c = (o.f32(text) for text in o.texts[1:4])

    def value() -> Array:
        exact = a().astype(F64) * b() + c()
        return toward(np.asarray(exact).astype(F32), exact, o.modifiers)

    return o.write_f32(o.texts[0], value)


def select(o: Operands) -> Action:
    a, b, which = o.f32(o.texts[1]), o.f32(o.texts[2]), o.predicate(o.texts[3])
    return o.write_f32(o.texts[0], lambda: np.where(which(), a(), b()))


def minimum(o: Operands) -> Action:
    a, b, smaller = o.f32(o.texts[1]), o.f32(o.texts[2]), o.predicate(o.texts[3])
    keeps_nan = "NAN" in o.modifiers
    low: Callable[..., Array] = np.minimum if keeps_nan else np.fmin
    high: Callable[..., Array] = np.maximum if keeps_nan else np.fmax

    def value() -> Array:
        x, y = a(), b()
        return np.where(smaller(), low(x, y), high(x, y))

    return o.write_f32(o.texts[0], value)


def relation(name: str) -> Callable[[Any, Any], Any]:
    """Return a comparison of floating-point numbers; a final U holds where one of them is NaN."""

    def no_number(x: Any, y: Any) -> Any:
        return np.isnan(x) | np.isnan(y)

    if name == "NAN":
        return no_number
    if name == "NUM":
        return lambda x, y: ~no_number(x, y)
    ordered = COMPARE[name[:2]]
    if name.endswith("U"):
        return lambda x, y: ordered(x, y) | no_number(x, y)
    return lambda x, y: ordered(x, y) & ~no_number(x, y)


def comparison(o: Operands, a: Value, b: Value) -> Action:
    """Return the action of FSETP and DSETP."""
    compare, also = relation(o.modifiers[0]), o.predicate(o.texts[4])
    combine = COMBINE[next(m for m in o.modifiers if m in COMBINE)]

    def results() -> list[Array]:
        found, with_it = compare(a(), b()), also()
        return [combine(found, with_it), combine(~np.asarray(found), with_it)]

    return o.write_predicates(o.texts[:2], results)


def compare(o: Operands) -> Action:
    return comparison(o, o.f32(o.texts[2]), o.f32(o.texts[3]))


def division_check(o: Operands) -> Action:
    """Whether a quotient wants the slow path: exponents near the ends of the range."""
    a, b = o.f32(o.texts[1]), o.f32(o.texts[2])

    def results() -> list[Array]:
        x, y = np.asarray(a()), np.asarray(b())
        p, q = (signed(v.view(U32) >> U32(23)) & 255 for v in (x, y))
        far = (x != 0) & ((np.abs(p - q) > 125) | (p < 25))
        return [(p == 255) | (q == 255) | (q < 2) | (q > 252) | far]

    return o.write_predicates(o.texts[:1], results)


SPECIAL: dict[str, Callable[[Array], Any]] = {
    "RCP": lambda x: 1.0 / x,
    "RSQ": lambda x: 1.0 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "TANH": np.tanh,
    "SIN": np.sin,
    "COS": np.cos,
}


def special(o: Operands) -> Action:
    kind = o.modifiers[0]
    if kind in ("RCP64H", "RSQ64H"):
        upper = o.u32(o.texts[1])

        def half() -> Array:
            x = (np.asarray(upper()).astype(U64) << U64(32)).view(F64)
            return np.asarray(np.asarray(SPECIAL[kind[:3]](x)).view(U64) >> U64(32), U32)

        return o.write(o.texts[0], half)
    if kind not in SPECIAL:
        o.refuse()
    function = SPECIAL[kind]
    o.flushes = kind != "TANH"
    a = o.f32(o.texts[1])
    return o.write_f32(o.texts[0], lambda: function(np.asarray(a()).astype(F64)))


def bfloat16_bits(x: Array) -> Array:
    """Return float32 rounded to bfloat16, to nearest and even."""
    bits = np.asarray(x).view(U32)
    rounded = bits + U32(0x7FFF) + (bits >> U32(16) & U32(1)) >> U32(16)
    return np.asarray(np.where(np.isnan(x), U32(0x7FFF), rounded), U32)


def float16_bits(x: Array) -> Array:
    """Return float32 rounded to float16."""
    return np.asarray(x.astype(np.float16)).view(np.uint16).astype(U32)


def pack(o: Operands) -> Action:
    if "PACK_AB" not in o.modifiers:
        o.refuse()
    bits = bfloat16_bits if "BF16" in o.modifiers else float16_bits
    high, low = o.f32(o.texts[1]), o.f32(o.texts[2])
    positive = "RELU" in o.modifiers

    def half(x: Array) -> Array:
        # NaN stays.
        return bits(np.maximum(x, F32(0)) if positive else x)

    return o.write(o.texts[0], lambda: half(high()) << U32(16) | half(low()))


def unpack(o: Operands) -> Action:
    """HADD2.F32: half of a register as float32."""
    found = re.fullmatch(r"(-?)(R\w+)\.(H0_H0|H1_H1)", o.texts[2])
    if "F32" not in o.modifiers or o.texts[1] != "-RZ" or found is None:
        o.refuse()
    row, shift = o.rows(found[2], 1)[0], U32(16 * (found[3] == "H1_H1"))
    sign = F32(-1 if found[1] else 1)
    return o.write_f32(
        o.texts[0],
        lambda: (row >> shift).astype(np.uint16).view(np.float16).astype(F32) * sign,
    )


def immediate_halves(o: Operands) -> Action:
    """HFMA2 of zeros, which is how a compiler spells a constant; nothing else is known."""
    _, a, b, *halves = o.texts
    numbers = [o.number(text, floating=True) for text in halves]
    if a.lstrip("-") != "RZ" or b != "RZ" or len(halves) != 2 or None in numbers:
        o.refuse()
    values = np.array([float(text) for text in reversed(halves)], np.float16).view(U32)
    return o.write(o.texts[0], lambda: values[0])


def of_integer(o: Operands) -> Action:
    unsigned, wide = (
        bool({"U32", "U64"} & set(o.modifiers)),
        bool({"U64", "S64"} & set(o.modifiers)),
    )
    pair, word = (o.u64(o.texts[1]), None) if wide else (None, o.u32(o.texts[1]))

    def given() -> Array:
        if pair is not None:
            x = np.asarray(pair())
            return x if unsigned else x.view(I64)
        assert word is not None
        return np.asarray(word()) if unsigned else signed(word())

    if "F64" in o.modifiers:
        return o.write_pair(o.texts[0], lambda: given().astype(F64).view(U64))

    def value() -> Array:
        x = given()
        nearest = x.astype(F32)
        # Exact enough to tell on which side of x its nearest float32 is.
        return toward(nearest, x.astype(np.longdouble), o.modifiers)

    return o.write_f32(o.texts[0], value)


def to_integer(o: Operands) -> Action:
    if "F64" in o.modifiers:
        if "S64" not in o.modifiers:
            o.refuse()
        double = o.u64(o.texts[1])
        return o.write_pair(o.texts[0], lambda: np.rint(double().view(F64)).astype(I64).view(U64))
    if "TRUNC" not in o.modifiers:
        o.refuse()
    a = o.f32(o.texts[1])
    wide = "U64" in o.modifiers
    if not wide and "U32" not in o.modifiers:
        o.refuse()
    top = 2.0**64 if wide else 2.0**32

    def value() -> Array:
        x = np.nan_to_num(np.trunc(np.asarray(a()).astype(F64)))
        inside = np.clip(x, 0, np.nextafter(top, 0))
        return np.asarray(np.where(x >= top, U64(int(top) - 1), inside.astype(U64)))

    return (o.write_pair if wide else o.write)(o.texts[0], value)


def round_to_integer(o: Operands) -> Action:
    function = np.trunc if "TRUNC" in o.modifiers else np.rint
    if "F64" in o.modifiers:
        double = o.u64(o.texts[1])
        return o.write_pair(o.texts[0], lambda: function(double().view(F64)).view(U64))
    a = o.f32(o.texts[1])
    return o.write_f32(o.texts[0], lambda: function(a()))


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **{"FADD": add, "FMUL": multiply, "FFMA": multiply_add, "FSEL": select, "FMNMX": minimum},
    **{"FSETP": compare, "FCHK": division_check, "MUFU": special, "F2FP": pack, "HADD2": unpack},
    **{"HFMA2": immediate_halves, "I2F": of_integer, "I2FP": of_integer, "F2I": to_integer},
    **{"FRND": round_to_integer},
}
