"""Tables 7 and 8's layout: trainings and attacks down, operators across; and what they betray."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from train.robustness import attacks
from train.robustness.options import TRAININGS, RobustnessRun

CLEAN = "none"
NOTHING = "–"  # noqa: RUF001  (what a table shows where there is no figure)

WHITE, BLACK = "white-box", "black-box"


@dataclass(frozen=True)
class Cell:
    """One network that was trained and attacked; accuracies in %, by the attack's name."""

    operator: str
    training: str
    seed: int
    clean: float
    white: dict[str, float]
    black: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others."""
        return self.operator, self.training, self.seed

    def value(self, box: str, attack: str) -> float | None:
        """Return an accuracy, None where it was not measured."""
        if attack == CLEAN:
            return self.clean
        return (self.white if box == WHITE else self.black).get(attack)


@dataclass(frozen=True)
class Figure:
    """Mean and sample deviation over seeds; the deviation of a single one is None."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        text = f"{self.mean:.2f}"
        return text if self.deviation is None else f"{text} ± {self.deviation:.2f}"


def figure(values: Sequence[float | None]) -> Figure | None:
    """Return the mean and deviation of what there is, None for nothing.

    Example:
        >>> str(figure([97.0, None, 99.0])), figure([None])
        ('98.00 ± 1.41', None)
    """
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Figure(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None)


Row = tuple[str, str, list[Figure | None]]


def _rows(
    options: RobustnessRun,
    cells: Sequence[Cell],
    lines: Sequence[tuple[str, Callable[[Cell], float | None]]],
) -> list[Row]:
    rows = []
    for training in options.trainings:
        for label, value in lines:
            row = [
                figure([value(c) for c in cells if (c.operator, c.training) == (name, training)])
                for name in options.operators
            ]
            rows.append((TRAININGS[training], label, row))
    return rows


def accuracies(options: RobustnessRun, cells: Sequence[Cell], box: str) -> list[Row]:
    """Return the rows of Table 7 (``WHITE``) or Table 8 (``BLACK``)."""

    def reader(attack: str) -> Callable[[Cell], float | None]:
        return lambda cell: cell.value(box, attack)

    names = {CLEAN: CLEAN} | {name: attacks.labels[name] for name in options.attacks}
    return _rows(options, cells, [(label, reader(name)) for name, label in names.items()])


def masking(options: RobustnessRun, cells: Sequence[Cell]) -> list[Row]:
    """Return by how much PGD beats the attacks that must be weaker, in points, per seed.

    A negative figure means that gradients hide what an attack without them finds. There are no
    rows without PGD.
    """

    def over_pgd(cell: Cell, value: float | None) -> float | None:
        pgd = cell.white.get("pgd")
        return None if pgd is None or value is None else value - pgd

    lines: list[tuple[str, Callable[[Cell], float | None]]] = []
    if "pgd" in options.attacks:
        for name in ("fgsm", "bim"):
            if name in options.attacks:
                label = f"{attacks.labels[name]} - PGD"
                lines.append((label, lambda c, name=name: over_pgd(c, c.white.get(name))))  # type: ignore[misc]
        if options.black_box:
            label = "strongest black-box - PGD"
            lines.append((label, lambda c: over_pgd(c, min(c.black.values(), default=None))))
    return _rows(options, cells, lines)


def signs(options: RobustnessRun, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Return the two signs of masked gradients in sentences.

    An attack that must be weaker than PGD is stronger, by more than its deviation; or training
    against FGSM has taught little but FGSM.
    """
    stronger = [
        f"{operator}, {training} training ({label}: {value})"
        for training, label, values in rows
        for operator, value in zip(options.operators, values, strict=True)
        if value is not None and value.mean < -(value.deviation or 0.0)
    ]
    text = "No attack is stronger than PGD by more than its deviation."
    if stronger:
        text = f"Signs of masked gradients, attacks stronger than PGD: {'; '.join(stronger)}."
    fallen = []
    for operator in options.operators:
        own = [c for c in cells if (c.operator, c.training) == (operator, "fgsm")]
        one, many = (figure([c.white.get(name) for c in own]) for name in ("fgsm", "pgd"))
        if one is not None and many is not None and many.mean < one.mean / 2:
            fallen.append(f"{operator} ({one.mean:.2f} to {many.mean:.2f})")
    if fallen:
        text += (
            " After FGSM training, PGD leaves less than half of the accuracy under FGSM, which "
            f"then overstates the robustness: {'; '.join(fallen)}."
        )
    return text


def _best(values: Sequence[Figure | None]) -> float:
    return max((value.mean for value in values if value is not None), default=0.0)


def markdown_table(rows: Sequence[Row], operators: Sequence[str], *, best: bool) -> str:
    """Return rows as Markdown; ``best`` prints the highest mean of a row in bold."""
    lines = [
        "| training | attack | " + " | ".join(operators) + " |",
        "|---|---|" + "---:|" * len(operators),
    ]
    for training, label, values in rows:
        highest = _best(values)
        texts = []
        for value in values:
            text = NOTHING if value is None else str(value)
            bold = best and value is not None and value.mean == highest
            texts.append(f"**{text}**" if bold else text)
        lines.append(f"| {training} | {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def rich_table(title: str, rows: Sequence[Row], operators: Sequence[str]) -> Table:
    """Return rows for the console."""
    table = Table(title=title)
    for name in ("training", "attack"):
        table.add_column(name, no_wrap=True)
    for name in operators:
        table.add_column(name, justify="right")
    before = None
    for training, label, values in rows:
        if before not in (None, training):
            table.add_section()
        before = training
        texts = [NOTHING if value is None else str(value) for value in values]
        table.add_row(training, label, *texts)
    return table


@dataclass(frozen=True)
class Report:
    """What a run shows: a title and rows for each table, and the sentence on masked gradients."""

    sections: list[tuple[str, list[Row]]]
    sentence: str


def report(options: RobustnessRun, cells: Sequence[Cell]) -> Report:
    """Make the tables of what is finished."""
    sections = [("White-box attacks: accuracy in %", accuracies(options, cells, WHITE))]
    if options.black_box:
        title = f"Black-box attacks, made on a substitute with {options.substitute}: accuracy in %"
        sections.append((title, accuracies(options, cells, BLACK)))
    check = masking(options, cells)
    sentence = ""
    if check:
        sections.append(("Check for masked gradients: points of accuracy", check))
        sentence = signs(options, cells, check)
    return Report(sections, sentence)


def markdown(options: RobustnessRun, cells: Sequence[Cell]) -> str:
    """Return the whole report as Markdown."""
    made = report(options, cells)
    seeds = len({cell.seed for cell in cells})
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [
        f"# Robustness of network {options.network} on {options.dataset}",
        f"Accuracy on the test images, {over}. {options.settings()}. Adversarial training weighs "
        f"adversarial images with {options.adversarial_share:g} and attacks with the same bound. "
        "The highest mean of a row is bold.",
    ]
    for title, rows in made.sections:
        check = title.startswith("Check")
        parts += [f"## {title}", markdown_table(rows, options.operators, best=not check)]
    if made.sentence:
        parts.append(made.sentence)
    return "\n\n".join(parts) + "\n"
