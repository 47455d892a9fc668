"""float64 arithmetic. Products with a sum take an error term along, as fused ones have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.machine.execute.floating import bfloat16_bits, comparison
from bench.machine.execute.grid import Array
from bench.machine.execute.operands import _NUMBER, F64, U64, Action, Operands, Value


def f64(o: Operands, text: str) -> Value:
    """Return a float64."""
    if _NUMBER.match(text):
        number = np.asarray(F64(text.replace("INF", "inf").replace("QNAN", "nan")))
        return lambda: number
    negative, text = text.startswith("-"), text.removeprefix("-")
    absolute, text = text.startswith("|"), text.strip("|")
    pair = o.u64(text)

    def value() -> Array:
        x = np.asarray(pair()).view(F64)
        x = np.abs(x) if absolute else x
        return -x if negative else x

    return value


def product_error(a: Array, b: Array, product: Array) -> Array:
    """Return a b - product exactly: Dekker, "A floating-point technique", 1971."""
    factor = 2.0**27 + 1

    def halves(x: Array) -> tuple[Array, Array]:
        high = factor * x - (factor * x - x)
        return high, x - high

    (ah, al), (bh, bl) = halves(a), halves(b)
    return np.asarray(((ah * bh - product) + ah * bl + al * bh) + al * bl)


def fused(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c with one rounding, but for ties and the ends of the range."""
    product = a * b
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    exact = total + (lost + product_error(a, b, product))
    return np.where(np.isfinite(exact), exact, total)


def arithmetic(o: Operands) -> Action:
    if {"RP", "RM", "RZ"} & set(o.modifiers):
        # Directed rounding serves slow paths of roots; half an ulp less does no harm there.
        o.modifiers = ()
    values = [f64(o, text) for text in o.texts[1:]]

    def value() -> Array:
        given = [v() for v in values]
        if o.name == "DADD":
            found = given[0] + given[1]
        elif o.name == "DMUL":
            found = given[0] * given[1]
        else:
            found = fused(*given)
        return np.asarray(found, F64).view(U64)

    return o.write_pair(o.texts[0], value)


def compare(o: Operands) -> Action:
    return comparison(o, f64(o, o.texts[2]), f64(o, o.texts[3]))


def convert(o: Operands) -> Action:
    if o.modifiers[:2] == ("F32", "F64"):
        return o.write_f32(o.texts[0], f64(o, o.texts[1]))
    if o.modifiers[:2] not in (("F64", "F32"), ("BF16", "F32")):
        o.refuse()
    a = o.f32(o.texts[1])
    if o.modifiers[0] == "BF16":
        return o.write(o.texts[0], lambda: bfloat16_bits(a()))
    return o.write_pair(o.texts[0], lambda: np.asarray(a()).astype(F64).view(U64))


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **dict.fromkeys(("DADD", "DMUL", "DFMA"), arithmetic),
    **{"DSETP": compare, "F2F": convert},
}
