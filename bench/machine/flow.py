"""Control flow of a kernel: basic blocks, natural loops, and the ways through a loop."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from bench.machine.disassemble import Kernel

ENDS = frozenset({"BRA", "JMP", "BRX", "BRXU", "EXIT", "RET", "CALL"})


def successors(kernel: Kernel, n: int) -> list[int]:
    """Return where control can go after instruction n; calls are taken as returning."""
    instruction = kernel.code[n]
    following = [n + 1] if n + 1 < len(kernel.code) else []
    if instruction.name == "RET" or (instruction.name == "EXIT" and not instruction.guard):
        return []
    if instruction.name in ("BRA", "JMP"):
        if "DIV" in instruction.modifiers:
            return following  # taken by warps that have diverged
        assert instruction.target is not None
        # A branch may have a second condition among its operands.
        conditional = bool(instruction.guard) or len(instruction.operands) > 1
        return [kernel.at[instruction.target], *(following if conditional else [])]
    if instruction.name in ("BRX", "BRXU"):
        words = [w for (w,) in struct.iter_unpack("<I", kernel.tables[: len(kernel.tables) & -4])]
        return sorted({kernel.at[w] for w in words if w in kernel.at})
    return following


@dataclass
class Loop:
    """A natural loop: its header and all of its instructions, those of inner loops included."""

    header: int
    body: frozenset[int]
    depth: int = 0
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> list[int]:
        """Instructions that are in no loop inside of this one."""
        inside = frozenset[int]().union(*(loop.body for loop in self.inner))
        return sorted(self.body - inside)


class Graph:
    """Basic blocks, named by their first instructions, and loops, in order of their headers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        code = kernel.code
        starts = {0}
        for n, instruction in enumerate(code):
            if instruction.name in ENDS:
                starts.update(successors(kernel, n), [n + 1])
            if instruction.target in kernel.at:
                starts.add(kernel.at[instruction.target])
        ordered = sorted(n for n in starts if n < len(code))
        self.ends = dict(zip(ordered, [*ordered[1:], len(code)], strict=True))
        self.next = {b: successors(kernel, end - 1) for b, end in self.ends.items()}
        self.order = list(reversed(_postorder(0, self.next.__getitem__)))
        self.loops = self._loops()

    def _dominators(self, before: dict[int, list[int]]) -> dict[int, int]:
        """Return the immediate dominator of every block that can be reached.

        Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001.
        """
        rank = {b: i for i, b in enumerate(self.order)}
        above = {0: 0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                known = [p for p in before[b] if p in above]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        while rank[best] > rank[other]:
                            best = above[best]
                        while rank[other] > rank[best]:
                            other = above[other]
                if above.get(b) != best:
                    above[b] = best
                    changed = True
        return above

    def _loops(self) -> list[Loop]:
        before: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for s in self.next[b]:
                before[s].append(b)
        above = self._dominators(before)

        def dominates(a: int, b: int) -> bool:
            while b not in (a, 0):
                b = above[b]
            return a == b

        bodies: dict[int, set[int]] = {}
        for b in self.order:
            for header in self.next[b]:
                if not dominates(header, b):
                    continue
                body = bodies.setdefault(header, {header})
                work = [b]
                while work:
                    if (one := work.pop()) not in body:
                        body.add(one)
                        work.extend(before[one])
        found = [
            Loop(header, frozenset(n for b in body for n in range(b, self.ends[b])))
            for header, body in bodies.items()
        ]
        found.sort(key=lambda loop: -len(loop.body))
        for i, loop in enumerate(found):
            outer = [o for o in found[:i] if loop.body < o.body]
            loop.depth = len(outer)
            if outer:
                outer[-1].inner.append(loop)
        return sorted(found, key=lambda loop: loop.header)

    def ways(self, loop: Loop) -> tuple[list[int], list[int]]:
        """Return the instructions of the shortest and the longest way through one trip.

        Loops inside count as nothing. The longest way leaves out the call of a slow path, such as
        that of a division, where another way is there.
        """
        code = self.kernel.code
        inside = {n: inner for inner in loop.inner for n in inner.body}

        def following(b: int) -> Iterator[int]:
            for s in self.next[b]:
                after: Iterable[int] = [s]
                if s in inside:
                    within = [n for n in inside[s].body if n in self.next]
                    after = [x for n in within for x in self.next[n] if x not in inside[s].body]
                yield from (x for x in after if x in loop.body and x not in inside)

        def forward(b: int) -> list[int]:
            return sorted({s for s in following(b) if s != loop.header})

        order = _postorder(loop.header, forward)
        calls = {
            b
            for b in order
            if any(code[n].name == "CALL" and not code[n].guard for n in range(b, self.ends[b]))
        }

        def walk(better: Callable[..., tuple[int, list[int]]], without: set[int]) -> list[int]:
            best: dict[int, tuple[int, list[int]]] = {}
            for b in order:
                own = self.ends[b] - b
                options = [(own, [b])] if loop.header in following(b) else []
                options += [(own + best[s][0], [b, *best[s][1]]) for s in forward(b) if s in best]
                if options and b not in without:
                    best[b] = better(options, key=lambda option: option[0])
            way = best.get(loop.header, (0, []))[1]
            return [n for b in way for n in range(b, self.ends[b])]

        return walk(min, set()), walk(max, calls) or walk(max, set())


def _postorder(start: int, following: Callable[[int], Iterable[int]]) -> list[int]:
    order, seen = [], {start}
    stack = [(start, iter(following(start)))]
    while stack:
        block, rest = stack[-1]
        for s in rest:
            if s not in seen:
                seen.add(s)
                stack.append((s, iter(following(s))))
                break
        else:
            order.append(block)
            stack.pop()
    return order
