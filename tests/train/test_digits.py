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
import torch.nn.functional as F
import yaml
from cases import OPERATORS
from paths import ROOT
from rich.console import Console
from torch import nn

from dcconv import DecoupledConv2d, native
from dcconv.operator.functions import angulars, magnitudes
from train import digits
from train.data.digits import DigitsStream, random_shift
from train.digits_report import Epoch, draw_curves, make_row
from train.engine.folder import RunFolder
from train.memory import kept_bytes
from train.networks import find_operator, operators, small_network, start_statistics

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def only_run(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def read_epochs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """Arguments of a run of one epoch of a few images."""
    few = ["--test-share", "0.9", "--widths", "4", "4", "4"]
    return ["--quick", "--epochs", "1", *few, "--out", str(tmp_path), "--backend", "reference"]


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, number: int, at_step: int = 1) -> None:
    """Send this process a signal in a training, before it does a step."""
    task = digits.Run.task

    def signalling(self, operator, seed, *rest):
        result = task(self, operator, seed, *rest)
        if f"{operator}_seed{seed}" == name:
            before_step = result.before_step

            def kill(step):
                if step == at_step:
                    os.kill(os.getpid(), number)
                before_step(step)

            result.before_step = kill
        return result

    monkeypatch.setattr(digits.Run, "task", signalling)


def test_command_trains_and_stores_everything(tmp_path):
    fastest = "cpu" if native.missing is None else "reference"
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
    assert files_of(folder) == {
        "config.yaml",
        "curves.png",
        "environment.json",
        "epochs.jsonl",
        "results.json",
        "source",
        "trainings",
    }
    assert files_of(folder / "trainings") == {"conv_seed0", "tanh_cosine_seed0"}
    for training in (folder / "trainings").iterdir():
        assert files_of(training) == {"checkpoints", "metrics.jsonl", "results.json", "tensorboard"}
        own = json.loads((training / "results.json").read_text())
        assert own["status"] == "finished" and own["step"] == own["steps"] == 42
    assert (folder / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    copied = folder / "source" / "train" / "digits.py"
    assert copied.read_bytes() == (ROOT / "train" / "digits.py").read_bytes()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["operators"] == ["conv", "tanh_cosine"]
    assert config["epochs"] == 3 and config["seeds"] == [0]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == config["threads"]
    assert environment["backend"] == fastest

    epochs = read_epochs(folder)
    assert [(e["operator"], e["epoch"]) for e in epochs] == [
        (operator, epoch) for operator in ("conv", "tanh_cosine") for epoch in (1, 2, 3)
    ]
    results = read_results(folder)
    assert results["status"] == "finished" and results["finished_trainings"] == 2
    for row, of_operator in zip(results["rows"], (epochs[:3], epochs[3:]), strict=True):
        losses = [e["loss"] for e in of_operator]
        assert losses[2] < losses[1] < losses[0] and losses[2] < 0.6
        assert 0.0 < of_operator[0]["seconds"] < of_operator[1]["seconds"]
        assert row["seconds_mean"] == of_operator[-1]["seconds"]
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


def test_training_is_the_bare_loop(tmp_path, quick):
    """The engine adds nothing to what a loop of a few lines does."""
    config = digits_config([*quick, "--epochs", "3", "--operators", "ball_cosine"])
    run = digits.Run(config, Console(quiet=True))
    assert run.start() == 0
    last = read_epochs(run.folder.path)[2]

    split = digits.load_split(0, 0.9)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = small_network(find_operator("ball_cosine"), 8, 10, (4, 4, 4), 0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    start_statistics(network, split.train_images[:64])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=6, pct_start=0.25)
    for _ in range(3):
        losses = []
        order = torch.randperm(179, generator=generator)
        for batch in order[:128].split(64):
            images = random_shift(split.train_images[batch], 1, generator)
            loss = F.cross_entropy(network(images), split.train_classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    network.eval()
    right = network(split.test_images).argmax(dim=1) == split.test_classes
    assert last["accuracy"] == pytest.approx(100 * right.double().mean().item())
    assert last["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "Ctrl-C"), (15, 143, "SIGTERM")])
def test_interruption_keeps_what_is_finished_and_resumes(
    tmp_path, quick, monkeypatch, capsys, number, status, word
):
    names = ["conv", "sphere_cosine", "log_cosine"]
    arguments = [*quick, "--epochs", "3", "--seeds", "0", "1", "--operators", *names]
    with monkeypatch.context() as patch:
        # Three of six steps, in the middle of an epoch.
        interrupt(patch, "sphere_cosine_seed1", number, at_step=2)
        assert digits.main(arguments) == status
    folder = only_run(tmp_path)
    results = read_results(folder)
    assert results["status"] == "interrupted"
    assert (results["finished_trainings"], results["planned_trainings"]) == (3, 6)
    assert [(row["operator"], row["seeds"]) for row in results["rows"]] == [
        ("conv", [0, 1]),
        ("sphere_cosine", [0]),
    ]
    assert len(read_epochs(folder)) == 9
    assert (folder / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    assert not list(folder.rglob("*.tmp"))
    output = capsys.readouterr().out
    assert f"Interrupted by {word}: 3 of 6 trainings finished and kept." in output
    assert f"Resume with: python -m train.digits --resume {folder}" in output

    first = folder / "trainings" / "conv_seed0" / "results.json"
    untouched = first.stat().st_mtime_ns
    assert digits.main(["--resume", str(folder), "--backend", "reference"]) == 0
    assert first.stat().st_mtime_ns == untouched
    assert only_run(tmp_path) == folder
    resumed = read_results(folder)
    assert resumed["status"] == "finished" and resumed["finished_trainings"] == 6
    # The same figures as without any interruption.
    assert digits.main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    straight = read_epochs(only_run(tmp_path / "straight"))
    for one, other in zip(read_epochs(folder), straight, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_interruption_in_the_first_training_is_clean(tmp_path, quick, monkeypatch, capsys):
    interrupt(monkeypatch, "conv_seed0", 2, at_step=0)
    assert digits.main(quick) == 130
    folder = only_run(tmp_path)
    assert read_results(folder)["rows"] == []
    assert not (folder / "curves.png").exists()
    assert "Interrupted by Ctrl-C: 0 of 8 trainings" in capsys.readouterr().out


def test_interruption_between_trainings_stops(tmp_path, quick, monkeypatch, capsys):
    measure = digits.Run.measure

    def interrupted(self, operator):
        if operator == "sphere_cosine":
            os.kill(os.getpid(), 2)
        return measure(self, operator)

    monkeypatch.setattr(digits.Run, "measure", interrupted)
    assert digits.main(quick) == 130
    assert "Interrupted by Ctrl-C: 1 of 8 trainings" in capsys.readouterr().out


def test_nan_names_the_layer_and_keeps_what_is_finished(tmp_path, quick, monkeypatch, capsys):
    task = digits.Run.task

    def broken(self, operator, *rest):
        result = task(self, operator, *rest)
        if operator == "tanh_cosine":
            with torch.no_grad():
                result.network[3].weight[0, 0, 0, 0] = torch.nan
        return result

    monkeypatch.setattr(digits.Run, "task", broken)
    assert digits.main([*quick, "--operators", "conv", "tanh_cosine", "log_cosine"]) == 1
    said = capsys.readouterr()
    assert "dcconv: loss must be finite, got nan" in said.err
    assert "layer '3' (DecoupledConv2d)" in said.err
    assert f"--resume {only_run(tmp_path)}\n" in said.err
    assert "Failed in tanh_cosine, seed 0: 1 of 3 trainings finished and kept" in said.out
    results = read_results(only_run(tmp_path))
    assert results["status"] == "failed"
    assert [row["operator"] for row in results["rows"]] == ["conv"]


def test_damaged_checkpoint_of_a_training_is_spoken_of(tmp_path, quick, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, "conv_seed0", 2)
        assert digits.main([*quick, "--epochs", "3", "--operators", "conv"]) == 130
    folder = only_run(tmp_path)
    (file, *_) = sorted((folder / "trainings" / "conv_seed0" / "checkpoints").glob("*.pt"))
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    assert digits.main(["--resume", str(folder)]) == 2
    said = capsys.readouterr()
    assert f"dcconv: checkpoint must be the intact file '{file}'" in said.out
    assert "dcconv: resume must have an intact checkpoint" in said.err


def test_full_disk_is_one_sentence(tmp_path, quick, monkeypatch, capsys):
    write = digits.RunFolder.write

    def full(self, name, data):
        if name == "epochs.jsonl":
            raise OSError(28, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(digits.RunFolder, "write", full)
    assert digits.main([*quick, "--operators", "conv"]) == 1
    folder = only_run(tmp_path)
    sentence = f"dcconv: out must be a folder that takes the run '{folder}', got No space left"
    assert sentence in capsys.readouterr().err


def test_resume_refuses_other_trainings(tmp_path, quick, capsys):
    assert digits.main([*quick, "--operators", "conv"]) == 0
    folder = only_run(tmp_path)
    before = (folder / "config.yaml").read_bytes()
    resume = ["--resume", str(folder)]
    assert digits.main([*resume, "--lr", "0.1"]) == 2
    sentence = "dcconv: lr must stay 0.003 in a run that is resumed, got 0.1"
    assert sentence in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before
    # Operators may join; the stored backend and what else was given stay.
    assert digits.main([*resume, "--operators", "conv", "log_cosine"]) == 0
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["operators"] == ["conv", "log_cosine"] and stored["backend"] == "reference"
    assert stored["resume"] is None
    assert [row["operator"] for row in read_results(folder)["rows"]] == ["conv", "log_cosine"]
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"command": "another"}))
    assert digits.main(resume) == 2
    sentence = "dcconv: resume must be the folder of a run of python -m train.digits, got"
    assert sentence in capsys.readouterr().err


def digits_config(arguments: list[str]) -> digits.Config:
    return digits.parse(digits.Config, arguments, program="test", description="")


def test_quick_gives_way_to_what_is_given():
    full, quick = digits_config([]), digits_config(["--quick"])
    assert (full.epochs, full.seeds) == (12, (0, 1, 2))
    assert (quick.epochs, quick.seeds) == (3, (0,))
    assert digits_config(["--quick", "--seeds", "4", "5"]).seeds == (4, 5)
    assert digits_config(["--quick", "--epochs", "7"]).epochs == 7


def test_dry_run_prints_a_configuration_that_can_be_read(tmp_path, capsys):
    arguments = ["--quick", "--operators", "conv", "--lr", "0.01", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        digits.main([*arguments, "--dry-run"])
    assert exit_.value.code == 0 and not list(tmp_path.iterdir())
    output = capsys.readouterr().out
    assert "# 1 trainings of 3 epochs, each 14 steps of 64 of 898 images" in output
    file = tmp_path / "config.yaml"
    file.write_text(output)
    assert digits_config(["--config", str(file)]) == digits_config(arguments)


def test_seed_decides_the_weights(quick):
    run = digits.Run(digits_config(quick), Console(quiet=True))
    first, again, other = (run.task("conv", seed).network[0].weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_same_seed_trains_the_same(tmp_path, quick):
    torch.set_num_threads(1)
    losses = []
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = [*quick, "--operators", "ball_cosine", "--seeds", str(seed)]
        assert digits.main([*arguments, "--out", str(tmp_path / out)]) == 0
        (epoch,) = read_epochs(only_run(tmp_path / out))
        losses.append((epoch["loss"], epoch["accuracy"]))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]


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
        (["--epochs", "many"], "dcconv: epochs must be an integer, got 'many'"),
        (["--threads", "0"], "dcconv: threads must be an integer of at least 1, got 0"),
        (["--batch-size", "1"], "dcconv: batch_size must be an integer of at least 2, got 1"),
        (
            ["--batch-size", "899"],
            "dcconv: batch_size must be at most the number of training images, 898, got 899",
        ),
        (["--lr", "nan"], "dcconv: lr must be a finite number above 0, got nan"),
        (["--weight-decay", "-1"], "dcconv: weight_decay must be a finite number of at least 0"),
        (["--test-share", "1"], "dcconv: test_share must be between 0 and 1, got 1.0"),
        (["--test-share", "0.001"], "dcconv: test_share must leave 10 images or more for training"),
        (["--warmup-share", "0"], "dcconv: warmup_share must be between 0 and 1, got 0.0"),
        (
            ["--epochs", "1", "--batch-size", "200", "--warmup-share", "0.25"],
            "dcconv: warmup_share must not be exactly one step of 4, got 0.25",
        ),
        (["--shift", "-1"], "dcconv: shift must be an integer of at least 0, got -1"),
        (["--widths", "0"], "dcconv: widths must be an integer of at least 1, got 0"),
        (["--widths", "1", "1", "1", "1", "1"], "dcconv: widths must be four or fewer, got 5"),
        (["--norm-momentum", "2"], "dcconv: norm_momentum must be above 0 and at most 1, got 2.0"),
        (["--histogram-every", "-1"], "dcconv: histogram_every must be an integer of at least 0"),
        (["--resume", "nowhere"], "dcconv: resume must be the folder of a run, got 'nowhere'"),
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
        digits_config(["--operators", "tahn_cosine"])
    error = " ".join(capsys.readouterr().err.split())
    assert f"magnitude: {', '.join(magnitudes)};" in error
    assert f"angular: {', '.join(angulars)};" in error
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


def test_json_has_null_for_what_is_no_number(tmp_path):
    run = RunFolder.create(tmp_path, "digits")
    run.write_json("results.json", {"a": (math.nan, {"b": -math.inf}), "c": 1.5})
    text = (run.path / "results.json").read_text()
    assert json.loads(text) == {"a": [None, {"b": None}], "c": 1.5}


def test_stream_resumes_bit_for_bit():
    split = digits.load_split(0, 0.9)
    stream, other = DigitsStream(split, 64, 5), DigitsStream(split, 64, 6)
    for _ in range(3):
        stream.next()
    other.load_state_dict(stream.state_dict())
    for _ in range(4):
        for one, same in zip(stream.next(), other.next(), strict=True):
            assert torch.equal(one, same)
    with pytest.raises(ValueError, match="saved stream's batch_size must be 32 to resume"):
        DigitsStream(split, 32, 5).load_state_dict(stream.state_dict())


def test_stream_serves_an_epoch_without_repetition():
    split = digits.load_split(0, 0.9)
    stream = DigitsStream(split, 60, 5, shift=0)
    assert stream.images_per_epoch == 120
    batches = [stream.next() for _ in range(4)]
    first = torch.cat([images for images, _ in batches[:2]]).flatten(1)
    second = torch.cat([images for images, _ in batches[2:]]).flatten(1)
    known = {tuple(row) for row in split.train_images.flatten(1).tolist()}
    assert len({tuple(row) for row in first.tolist()}) == 120
    assert {tuple(row) for row in first.tolist()} < known
    assert not torch.equal(first, second)
    images, classes = batches[0]
    index = (split.train_images == images[:1]).flatten(1).all(dim=1).nonzero()[0]
    assert split.train_classes[index] == classes[0]


def test_every_operator_name_builds_its_network():
    # One plain convolution and the operators, 80 of them the paper's, each also without activation.
    assert len(operators) == 2 * (1 + len(OPERATORS))
    x = torch.rand(2, 1, 8, 8)
    for name, operator in operators.items():
        network = small_network(operator, 8, 10, widths=(4, 4, 4)).eval()
        kinds = [type(module) for module in network]
        convolutions = sum(isinstance(module, nn.Conv2d) for module in network)
        plain = name.removesuffix("_no_activation") == "conv"
        assert convolutions == (3 if plain else 0), name
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
    shifted = random_shift(images, 1, generator)
    assert shifted.shape == images.shape
    positions = shifted.flatten(1).argmax(dim=1)
    found = {(int(p) // 5, int(p) % 5) for p in positions}
    assert found == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
    assert bool((shifted.flatten(1).sum(dim=1) == 1).all())
    assert torch.equal(random_shift(images, 0, generator), images)


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
