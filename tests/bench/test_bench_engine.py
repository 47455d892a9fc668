"""The measurement of the engine's cost: it runs, and its figures are those of its steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import engine


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_measurement_prints_both_networks(capsys):
    assert command.main(["engine", "--quick", "--threads", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert len(rows["conv"]) == len(rows["tanh_cosine"]) == 7
    assert rows["conv"][-2:] == ["x1.00", "x1.00"]
    for row in (rows["conv"], rows["tanh_cosine"]):
        bare, runner, _, waiting, peak = map(float, row[:5])
        assert bare > 0 and runner > 0 and 0 <= waiting < 100 and peak > 0


def test_table_has_the_medians():
    plain = engine.Costs([0.1, 0.2, 0.9], [0.2, 0.25, 0.3], [0.01, 0.5, 0.02], [0.001], 2**20)
    other = engine.Costs([1.0], [0.5], [-0.01], [0.02], 3 * 2**20)
    table = engine.table_of({"conv": plain, "x": other})
    columns = [list(column.cells) for column in table.columns]
    assert [cells[0] for cells in columns] == [
        *("conv", "200.0", "250.0", "+2.00", "0.10", "1", "x1.00", "x1.00")
    ]
    assert [cells[1] for cells in columns] == [
        *("x", "1000.0", "500.0", "-1.00", "2.00", "3", "x2.00", "x3.00")
    ]


def test_other_commands_do_without_the_packages_of_training():
    missing = "import sys; sys.modules |= dict.fromkeys(('yaml', 'safetensors', 'torchvision'))"
    script = f"{missing}; from bench.__main__ import parser; parser()"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--steps", "2"], "--steps must be an integer of at least 4, got 2"),
        (["--rounds", "0"], "--rounds must be an integer of at least 1, got 0"),
        (["--operator", "cosine"], "operators must be"),
        (["--device", "tpu"], "device must be"),
    ],
)
def test_wrong_options_are_refused(given, sentence, capsys):
    assert command.main(["engine", *given]) == 2
    assert sentence in capsys.readouterr().err
