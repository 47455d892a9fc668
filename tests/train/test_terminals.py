"""Terminals of any encoding: what they lack is spelled otherwise, and no command dies of it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
import yaml
from paths import ROOT
from rich.table import Table

from bench import __main__ as bench
from train import cifar, digits, imagenet
from train import report as train_report
from train.digits_report import Epoch, make_row, table
from train.engine import terminal
from train.engine.loop import new_console
from train.engine.terminal import ERRORS, SpellingConsole, spell
from train.report import NOTHING
from train.robustness import run as robustness
from train.robustness.options import PRESETS
from train.robustness.tables import Cell, report, rich_table


def printed(*things: object, encoding: str = "ascii", width: int = 60) -> str:
    """Return what a console of an encoding writes, which fails where a sign is missing."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=ERRORS)
    console = SpellingConsole(file=file, width=width)
    for thing in things:
        console.print(thing)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_signs_are_spelled_where_they_are_missing():
    text = f"a ± b † R² {NOTHING} é"
    assert spell(text, "ascii") == "a +- b * R^2 - \\xe9"
    assert spell(text, "latin-1") == "a ± b * R² - é"
    assert spell(text, "utf-8") == text
    assert spell("\udc80", "utf-8") == "\\udc80"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_are_straight_in_every_encoding(encoding):
    epochs = [Epoch("conv", seed, 1, 0.5, 90.0 + seed, 1.0) for seed in (0, 1)]
    lines = printed(table([make_row("conv", 1, 2, epochs)]), encoding=encoding).splitlines()
    figure = "90.50 +- 0.71" if encoding == "ascii" else "90.50 ± 0.71"
    assert sum(figure in line for line in lines) == 1
    assert len({len(line) for line in lines}) == 1


def test_what_rich_shortens_is_written_too():
    narrow = Table(width=10)
    narrow.add_column("a", no_wrap=True)
    narrow.add_row("a long word")
    assert "~" in printed(narrow)


def ascii_output(monkeypatch) -> Callable[[], str]:
    """Let standard output be that of an ASCII locale; what was written is returned by a call."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)

    def written() -> str:
        output.flush()
        return output.buffer.getvalue().decode("ascii")

    return written


def test_digits_print_their_last_table(tmp_path, monkeypatch):
    written = ascii_output(monkeypatch)
    threads = torch.get_num_threads()
    out = tmp_path / "Läufe"
    few = ["--test-share", "0.9", "--widths", "4", "4", "4", "--epochs", "1", "--seeds", "0", "1"]
    given = ["--quick", "--operators", "conv", *few, "--out", str(out), "--backend", "reference"]
    assert digits.main(given) == 0
    torch.set_num_threads(threads)
    (row,) = json.loads(next(out.glob("*/results.json")).read_text())["rows"]
    figures = f"{row['accuracy_mean']:.2f} +- {row['accuracy_deviation']:.2f}"
    text = written()
    assert text.count(figures) == 2 and "Stored in" in text and "L\\xe4ufe" in text


def test_robustness_prints_its_tables(monkeypatch):
    written = ascii_output(monkeypatch)
    options = robustness.RobustnessRun(operators=("conv",), repeats=2)
    cells = [
        Cell("conv", "natural", seed, 90.0 + seed, {"fgsm": 50.0, "bim": 40.0, "pgd": 30.0}, {})
        for seed in (0, 1)
    ]
    terminal.prepare()
    console = new_console()
    for title, rows in report(options, cells).sections:
        console.print(rich_table(title, rows, options.operators))
    text = written()
    assert "90.50 +- 0.71" in text and " - |" in text


def test_comparison_of_noisy_rows_is_printed(tmp_path, monkeypatch):
    written = ascii_output(monkeypatch)
    timing = {"low": 1.0, "median": 2.0, "high": 30.0, "rounds": 3}
    record = {"kind": "ops", "row": {"layer": "x"}, "results": {"dcconv": {"timing": timing}}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record | {"facts": {}, "environment": {}}) + "\n")
    same = str(tmp_path / "a.jsonl")
    assert bench.main(["compare", same, same]) == 0
    text = written()
    assert "1.000 *" in text and "* noisy in A or B: 1 of 1." in text


def test_every_sign_of_bench_and_train_can_be_spelled():
    """A sign in a text of the two packages has a spelling; another would become its number."""
    signs = set()
    for package in ("train", "bench"):
        for file in (ROOT / package).rglob("*.py"):
            signs |= {letter for letter in file.read_text("utf-8") if not letter.isascii()}
    assert signs and all(spell(sign, "ascii").isascii() for sign in signs)
    assert not [sign for sign in signs if spell(sign, "ascii").startswith("\\")]


def test_report_of_a_run_without_figures_is_printed(tmp_path, monkeypatch):
    written = ascii_output(monkeypatch)
    (tmp_path / "metrics.jsonl").write_text("")
    assert train_report.main([str(tmp_path)]) == 0
    assert train_report.main(["--markdown", str(tmp_path)]) == 0
    text = written()
    assert " -   " in text and "| - |" in text


def test_dry_run_can_be_read_back(monkeypatch):
    written = ascii_output(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        cifar.main(["--dry-run", "--out", "Läufe"])
    assert stop.value.code == 0
    assert yaml.safe_load(written())["out"] == "Läufe"


def test_name_that_is_no_text_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cifar.main(["--dry-run", "--out", b"a\xff".decode("utf-8", "surrogateescape")])
    assert stop.value.code == 2
    assert "dcconv: out must be text in UTF-8, got 'a\\udcff'" in capsys.readouterr().err


# Help.


def helped(main, capsys, *given: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*given, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def in_force(main, capsys, *given: str) -> dict:
    with pytest.raises(SystemExit):
        main([*given, "--dry-run"])
    return yaml.safe_load(capsys.readouterr().out)


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(
    ("main", "presets"),
    [
        (cifar.main, [None, "modern", "modern_adamw", "linear_sqcos_wo_bn", "table3/mix_sqcos"]),
        (imagenet.main, [None, *imagenet.imagenet_recipes]),
        (robustness.main, [None, *PRESETS]),
    ],
)
def test_help_shows_the_defaults_of_the_preset(main, presets, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for preset in presets:
        given = [] if preset is None else ["--preset", preset]
        values = in_force(main, capsys, *given)
        text = helped(main, capsys, *given)
        assert f"Defaults are those of preset '{values['preset']}'." in text
        begins, at = [], text.index(" options: ")
        for name in values:
            flag = "--" + name.replace("_", "-")
            found = re.compile(rf" {flag}(, --no-{flag[2:]})? ").search(text, at)
            at = found.start()
            begins.append(at)
        for name, begin, end in zip(values, begins, [*begins[1:], len(text)], strict=True):
            own, value = text[begin:end], values[name]
            if value in (None, []):
                assert "(default: None)" not in own and "(default: )" not in own, own
            else:
                assert own.endswith(f"(default: {shown(value)})"), (preset, own, value)


def test_help_shows_what_a_file_or_a_resumed_run_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.yaml").write_text("preset: modern\nlr: 0.75\n")
    for given in (("--config", str(tmp_path / "config.yaml")), ("--resume", str(tmp_path))):
        text = helped(cifar.main, capsys, *given)
        assert "preset 'modern'" in text and "largest learning rate (default: 0.75)" in text
    with pytest.raises(SystemExit) as stop:
        cifar.main(["--preset", "modrn", "--help"])
    assert stop.value.code == 2 and "did you mean 'modern'" in capsys.readouterr().err
