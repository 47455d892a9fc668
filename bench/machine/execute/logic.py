"""Logic, comparisons and predicates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.execute.grid import Array, Mask
from bench.machine.execute.integer import COMBINE, COMPARE, signed
from bench.machine.execute.operands import U32, Action, Operands


def by_table(table: int, a: Any, b: Any, c: Any) -> Any:
    """Return a function of three bits that a table of eight gives, bit by bit."""
    simple = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x0C: lambda: ~a & b}
    simple |= {0x30: lambda: a & ~b, 0xEA: lambda: a & b | c, 0xFE: lambda: a | b | c}
    simple |= {0x80: lambda: a & b & c, 0x96: lambda: a ^ b ^ c, 0xF8: lambda: a | b & c}
    if table in simple:
        return simple[table]()
    result = a & ~a
    for k in range(8):
        if table >> k & 1:
            term = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
            result = result | term
    return result


def logic(o: Operands) -> Action:
    texts = list(o.texts)
    out = [texts.pop(0)] if re.fullmatch(r"U?P[0-6T]", texts[0]) else []
    a, b, c = (o.u32(text) for text in texts[1:4])
    table = int(texts[4], 16)
    also = o.predicate(texts[5]) if len(texts) > 5 else o.predicate("!PT")
    kept: list[Any] = [0]
    into = o.write(texts[0], lambda: kept[0])
    sets = o.write_predicates(out, lambda: [(kept[0] != 0) | also()])

    def action(mask: Mask) -> None:
        kept[0] = by_table(table, a(), b(), c())
        into(mask)
        sets(mask)

    return action


def logic_of_predicates(o: Operands) -> Action:
    values = [o.predicate(text) for text in o.texts[2:5]]
    tables = [int(text, 16) for text in o.texts[5:7]]

    def results() -> list[Array]:
        a, b, c = (v() for v in values)
        return [by_table(table, a, b, c) for table in tables]

    return o.write_predicates(o.texts[:2], results)


def compare(o: Operands) -> Action:
    relation = o.modifiers[0]
    combine = COMBINE[next(m for m in o.modifiers if m in COMBINE)]
    view: Callable[[Array], Array] = np.asarray if "U32" in o.modifiers else signed
    a, b, also = o.u32(o.texts[2]), o.u32(o.texts[3]), o.predicate(o.texts[4])
    # The upper halves of two pairs, whose lower halves were compared before.
    lower = o.predicate(o.texts[5]) if "EX" in o.modifiers else None

    def results() -> list[Array]:
        x, y = view(a()), view(b())
        if lower is None:
            found = COMPARE[relation](x, y)
        elif relation == "NE":
            found = (x != y) | lower()
        elif relation == "EQ":
            found = (x == y) & lower()
        else:
            found = COMPARE[relation[0] + "T"](x, y) | (x == y) & lower()
        with_it = also()
        return [combine(found, with_it), combine(~np.asarray(found), with_it)]

    return o.write_predicates(o.texts[:2], results)


def pack_predicates(o: Operands) -> Action:
    if o.texts[1] != "PR" or o.modifiers:
        o.refuse()
    rest, chosen = o.u32(o.texts[2]), o.u32(o.texts[3])
    predicates = o.grid.predicates

    def value() -> Array:
        bits = np.zeros(o.grid.count, U32)
        for k in range(len(predicates) - 1):
            bits |= predicates[k].astype(U32) << U32(k)
        mask = chosen()
        return bits & mask | rest() & ~mask

    return o.write(o.texts[0], value)


def unpack_predicates(o: Operands) -> Action:
    if o.texts[0] != "PR" or o.modifiers:
        o.refuse()
    value, chosen = o.u32(o.texts[1]), o.number(o.texts[2], floating=False)
    if chosen is None:
        o.refuse()
    which = [k for k in range(7) if chosen >> k & 1]
    texts = [f"P{k}" for k in which]
    return o.write_predicates(texts, lambda: [value() >> U32(k) & U32(1) != 0 for k in which])


BUILDERS: dict[str, Callable[[Operands], Action]] = {
    **dict.fromkeys(("LOP3", "ULOP3"), logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), logic_of_predicates),
    **dict.fromkeys(("ISETP", "UISETP"), compare),
    **{"P2R": pack_predicates, "R2P": unpack_predicates},
}
