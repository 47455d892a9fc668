"""The digits training: end to end, its errors, its interruption and its memory measure."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcconv import DecoupledConv2d, ops
from train import digits, runs
from train.memory import kept_bytes
from train.networks import find_operator, operators, small_network, start_statistics
from train.report import Epoch, draw_curves, make_row

ROOT = Path(__file__).resolve().parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def only_run(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run of one epoch of a few images."""
    monkeypatch.setitem(digits.QUICK, "test_share", 0.9)
    return ["--quick", "--epochs", "1", "--out", str(tmp_path), "--backend", "reference"]


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_command_trains_and_stores_everything(tmp_path):
    fastest = "cpu" if ops.missing is None else "reference"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "train.digits", "--quick", "--out", str(tmp_path)),
            *("--operators", "conv", "tanh_cosine", "--backend", fastest),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert folder.name.endswith("_digits")
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "source",
    }
    assert (folder / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    copied = folder / "source" / "train" / "digits.py"
    assert copied.read_bytes() == (ROOT / "train" / "digits.py").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["operators"] == ["conv", "tanh_cosine"]
    assert config["epochs"] == 3 and config["seeds"] == [0]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == config["threads"]
    assert environment["backend"] == fastest

    metrics = read_metrics(folder)
    assert [(m["operator"], m["epoch"]) for m in metrics] == [
        (operator, epoch) for operator in ("conv", "tanh_cosine") for epoch in (1, 2, 3)
    ]
    results = read_results(folder)
    assert results["status"] == "finished" and results["finished_trainings"] == 2
    for row, of_operator in zip(results["rows"], (metrics[:3], metrics[3:]), strict=True):
        losses = [m["loss"] for m in of_operator]
        assert losses[2] < losses[1] < losses[0] and losses[2] < 0.6
        assert row["accuracies"] == [of_operator[-1]["accuracy"]]
        assert row["accuracy_mean"] > 90
        assert row["accuracy_deviation"] is None
        # The row of the printed table: name, seeds, accuracy, seconds, kept memory.
        (line,) = [
            text for text in done.stdout.splitlines() if row["operator"] in text and "│" in text
        ]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells == [
            row["operator"],
            "1",
            f"{row['accuracy_mean']:.2f}",
            f"{row['seconds_mean']:.1f}",
            f"{row['kept_bytes'] / 2**20:.2f}",
        ]
    assert str(folder) in done.stdout


def test_interruption_keeps_what_is_finished(tmp_path, quick, monkeypatch, capsys):
    train = digits.train

    def interrupted(config, operator, seed):
        epochs = train(config, operator, seed)
        if operator == "sphere_cosine" and seed == 1:
            yield next(epochs)
            raise KeyboardInterrupt
        yield from epochs

    monkeypatch.setattr(digits, "train", interrupted)
    names = ["conv", "sphere_cosine", "log_cosine"]
    status = digits.main([*quick, "--seeds", "0", "1", "--operators", *names])
    assert status == 130
    folder = only_run(tmp_path)
    results = read_results(folder)
    assert results["status"] == "interrupted"
    assert (results["finished_trainings"], results["planned_trainings"]) == (3, 6)
    assert [(row["operator"], row["seeds"]) for row in results["rows"]] == [
        ("conv", [0, 1]),
        ("sphere_cosine", [0]),
    ]
    assert len(read_metrics(folder)) == 4
    assert (folder / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    assert not list(folder.glob("*.tmp"))
    output = capsys.readouterr().out
    assert "Interrupted: 3 of 6 trainings finished and kept" in output
    assert str(folder) in output


def test_interruption_before_the_first_training_is_clean(tmp_path, quick, monkeypatch, capsys):
    def interrupted(config, operator):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "measure", interrupted)
    assert digits.main(quick) == 130
    folder = only_run(tmp_path)
    assert read_results(folder)["rows"] == []
    assert not (folder / "curves.png").exists()
    assert "Interrupted: 0 of 8 trainings" in capsys.readouterr().out


def test_same_seed_trains_the_same(quick):
    config = digits.parse([*quick, "--threads", "1"])
    torch.set_num_threads(1)
    first, again, other = (next(digits.train(config, "ball_cosine", seed)) for seed in (3, 3, 4))
    assert (first.loss, first.accuracy) == (again.loss, again.accuracy)
    assert first.loss != other.loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--operators", "conv", "tahn_cosine"],
            "dcconv: operators must be conv or <magnitude>_<angular>",
        ),
        (["--operators", "conv", "conv"], "dcconv: operators must be one or more, each once"),
        (["--seeds", "1", "1"], "dcconv: seeds must be one or more, each once, got 1 1"),
        (["--seeds", "-1"], "dcconv: seeds must be an integer of at least 0, got -1"),
        (["--seeds", "4294967296"], "dcconv: seeds must be below 2**32, got 4294967296"),
        (["--epochs", "0"], "dcconv: epochs must be an integer of at least 1, got 0"),
        (["--threads", "0"], "dcconv: threads must be an integer of at least 1, got 0"),
        (["--batch-size", "1"], "dcconv: batch_size must be an integer of at least 2, got 1"),
        (
            ["--batch-size", "899"],
            "dcconv: batch_size must be at most the number of training images, 898, got 899",
        ),
        (["--lr", "nan"], "dcconv: lr must be a finite number above 0, got nan"),
        (["--backend", "gpu"], "dcconv: backend must be one of auto, cuda, triton, cpu, "),
    ],
)
def test_wrong_argument_ends_with_the_house_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        digits.main([*arguments, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_wrong_operator_name_lists_the_known_and_the_closest(capsys):
    with pytest.raises(SystemExit):
        digits.parse(["--operators", "tahn_cosine"])
    error = " ".join(capsys.readouterr().err.split())
    assert "magnitude: sphere, ball, tanh, linear, segmented, log, mix;" in error
    assert "angular: linear, cosine, sigmoid, square_cosine, power;" in error
    assert "weighting: linear, product, separate" in error
    assert "got 'tahn_cosine' (did you mean 'tanh_cosine'?)" in error


def test_refusing_backend_ends_with_its_sentence(tmp_path, capsys):
    assert digits.main(["--backend", "cuda", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "dcconv: backend 'cuda' cannot run this call: it runs on CUDA tensors" in error
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert digits.main(["--backend", "reference", "--out", str(file)]) == 2
    assert f"dcconv: out must be a folder, got '{file}'" in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_runs_of_the_same_second_have_their_own_folders(tmp_path):
    paths = {runs.RunFolder(tmp_path / "new", "digits").path for _ in range(3)}
    assert len(paths) == 3 and all(path.is_dir() for path in paths)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    runs.write_file(file, b"old")

    def full(self, data):
        with self.open("wb") as handle:
            handle.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_null_for_what_is_no_number(tmp_path):
    folder = runs.RunFolder(tmp_path, "digits")
    folder.write_json("results.json", {"a": (math.nan, {"b": -math.inf}), "c": 1.5})
    text = (folder.path / "results.json").read_text()
    assert json.loads(text) == {"a": [None, {"b": None}], "c": 1.5}


def test_every_operator_name_builds_its_network():
    # One plain convolution, 16 weighted magnitudes times 5 angles, each also without activation.
    assert len(operators) == 2 * (1 + 16 * 5)
    x = torch.rand(2, 1, 8, 8)
    for name, operator in operators.items():
        network = small_network(operator, 8, 10, widths=(4, 4, 4)).eval()
        kinds = [type(module) for module in network]
        plain = name.removesuffix("_no_activation") == "conv"
        assert kinds.count(nn.Conv2d) == (3 if plain else 0), name
        assert kinds.count(DecoupledConv2d) == (0 if plain else 3), name
        assert kinds.count(nn.ReLU) == (0 if name.endswith("_no_activation") else 3), name
        if not plain:
            layer = network[0]
            assert name.startswith(f"{layer.magnitude}_{layer.angular}"), name
            assert (layer.weighting == "none") == (f"_{layer.weighting}_weighting" not in name)
        assert network(x).shape == (2, 10)


def test_statistics_start_at_the_first_batch():
    torch.manual_seed(0)
    network = small_network(find_operator("tanh_cosine"), 8, 10, widths=(4, 4, 4))
    x = torch.rand(16, 1, 8, 8)
    start_statistics(network, x)
    first = network[0].eval()
    y = network[0](x)
    expected = y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(network[1].running_mean, expected.mean(dim=1))
    torch.testing.assert_close(network[1].running_var, expected.var(dim=1))
    assert network[1].momentum == 0.1 and int(first.norm_mean_steps) == 1


def test_shift_moves_images_whole_and_fills_with_background():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(200, 1, 5, 5)
    images[:, 0, 2, 2] = 1.0
    shifted = digits.random_shift(images, 1, generator)
    assert shifted.shape == images.shape
    positions = shifted.flatten(1).argmax(dim=1)
    found = {(int(p) // 5, int(p) % 5) for p in positions}
    assert found == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
    assert bool((shifted.flatten(1).sum(dim=1) == 1).all())
    assert torch.equal(digits.random_shift(images, 0, generator), images)


def test_split_is_stratified_disjoint_and_decided_by_the_seed():
    split, again, other = (digits.load_split(seed, 0.5) for seed in (0, 0, 1))
    assert len(split.train_images) + len(split.test_images) == digits.IMAGES == 1797
    counts = torch.bincount(split.train_classes) - torch.bincount(split.test_classes)
    assert int(counts.abs().max()) <= 1
    assert torch.equal(split.train_images, again.train_images)
    assert not torch.equal(split.train_images, other.train_images)
    images = torch.cat((split.train_images, split.test_images)).flatten(1)
    everything = torch.cat((other.train_images, other.test_images)).flatten(1)
    assert sorted(images.tolist()) == sorted(everything.tolist())
    assert float(images.min()) == 0.0 and float(images.max()) == 1.0


def test_kept_bytes_counts_a_storage_once():
    x = torch.ones(10, requires_grad=True)
    scale = torch.ones(10, requires_grad=True)

    # exp keeps its result; the product keeps that result again, and scale.
    def forward():
        return (x.exp() * scale).sum()

    assert kept_bytes(forward) == 40 + 40
    assert kept_bytes(forward, exclude=(scale,)) == 40
    # A view keeps the whole storage that it looks into.
    assert kept_bytes(lambda: (x[:5] * x[5:]).sum()) == 40
    assert kept_bytes(lambda: x.sum()) == 0


def test_kept_bytes_counts_only_what_the_result_still_needs():
    x = torch.ones(10, requires_grad=True)

    def forward():
        x.sin()
        with torch.no_grad():
            x.exp()
        return (x * 2.0).tanh()

    assert kept_bytes(forward) == 40
    assert kept_bytes(lambda: None) == 0


def test_kept_bytes_of_convolution_normalisation_activation():
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    norm = nn.BatchNorm2d(8)
    x = torch.rand(2, 3, 5, 5)
    exclude = (*conv.parameters(), *norm.parameters(), *norm.buffers())
    of_x, of_y = x.nbytes, 2 * 8 * 5 * 5 * 4
    # The convolution keeps x; the normalisation its input and two numbers per channel; the
    # activation its output.
    kept = kept_bytes(lambda: norm(conv(x)).relu(), exclude)
    assert kept == of_x + of_y + 2 * 8 * 4 + of_y


def test_row_has_the_sample_deviation():
    epochs = [Epoch("conv", seed, 2, 0.1, 97.0 + seed, 4.0 + seed) for seed in range(3)]
    row = make_row("conv", 5, 7, epochs)
    assert (row.accuracy_mean, row.accuracy_deviation, row.seconds_mean) == (98.0, 1.0, 5.0)
    assert row.seeds == (0, 1, 2) and row.parameters == 5 and row.kept_bytes == 7


@pytest.mark.parametrize("names", [["conv", "log_cosine"], ["log_cosine"]])
def test_figure_shows_perfect_and_diverged_trainings(names):
    epochs = [
        Epoch(name, 0, number, loss, accuracy, 1.0)
        for name, loss, accuracy in (("conv", 0.5, 100.0), ("log_cosine", math.nan, 10.0))
        if name in names
        for number in (1, 2)
    ]
    rows = [make_row(name, 1, 1, [e for e in epochs if e.operator == name][-1:]) for name in names]
    assert draw_curves(rows, epochs, 899).startswith(PNG_SIGNATURE)
