"""The CIFAR runner by its command line, on tiny files in the official formats."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import data_files
import pytest
import torch
import yaml
from paths import ROOT

from dcconv import project_weights
from dcconv.optim import decoupled_layers
from train import cifar
from train.data.augment import Augment
from train.data.stream import TensorBatches
from train.engine.checkpoint import Checkpoints
from train.recipes import build, cifar_recipes, find_recipe, loss_terms, paper_cells
from train.task import ImageTask

WIDTHS = (4, 6, 8)
OFFICIAL = ("tanh_cos", "ball_cos", "seg_cos", "linear_cos", "linear_sqcos_wo_bn")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with both data sets, each in another version."""
    folder = tmp_path_factory.mktemp("data")
    data_files.write_cifar_folder(folder, 100, "python", train=200, test=100)
    data_files.write_cifar_archive(folder, 10, "binary", train=100, test=40)
    return folder


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(data: Path, folder: Path, *more: object) -> list[str]:
    given = ["--data", data, "--no-verify", "--folder", folder, "--widths", *WIDTHS]
    given += ["--batch-size", 10, "--threads", 1, "--device", "cpu", "--no-compile", *more]
    return [str(item) for item in given]


def train(data: Path, folder: Path, *more: object) -> int:
    return cifar.main(arguments(data, folder, *more))


def options_of(capsys, *given: object) -> dict:
    """Return the configuration that a dry run prints."""
    with pytest.raises(SystemExit) as stop:
        cifar.main([*map(str, given), "--dry-run"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *given: object) -> str:
    """Return the sentence that a command line is refused with."""
    try:
        status = cifar.main([str(item) for item in given])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def newest(folder: Path) -> dict:
    return Checkpoints(folder / "checkpoints").load_latest()[1]


def assert_same(a, b, where: str = "") -> None:
    """Require equal nested states, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# Presets.


@pytest.mark.parametrize("preset", [*OFFICIAL, "modern", "modern_adamw", "table3/mix_sqcos"])
def test_preset_trains(preset, data, tmp_path, capsys):
    classes = 10 if preset in ("ball_cos", "modern") else 100
    more = ("--preset", preset, "--classes", classes, "--steps", 3, "--log-every", 1)
    assert train(data, tmp_path, *more) == 0
    lines = records(tmp_path, "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    recipe = dataclasses.replace(find_recipe(cifar_recipes, preset), classes=classes, widths=WIDTHS)
    terms = ["fit", "l2", "orthogonality"] if recipe.loss.l2 else ["fit", "orthogonality"]
    for step, line in enumerate(lines):
        assert math.isfinite(line["loss"])
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
        assert line["lr"] == pytest.approx(dataclasses.replace(recipe, steps=3).lr_at(step))
        assert 0 <= line["waiting_share"] < 1 and line["images_per_second"] > 0
    # What the first step logged are the terms of the weights that the run began with.
    first = Checkpoints(tmp_path / "checkpoints")
    begin = next(entry for entry in first.entries if entry.step == 0)
    network = build(recipe)
    network.load_state_dict(first.load(begin)["network"])
    labels = torch.zeros(2, dtype=torch.int64)
    expected = loss_terms(network, torch.zeros(2, classes), labels, recipe.loss)
    assert list(expected) == terms
    for term in terms[1:]:
        assert lines[0][term] == pytest.approx(expected[term].item(), rel=1e-5)
    (evaluation,) = records(tmp_path, "evaluate")
    assert evaluation["step"] == 3 and 0 <= evaluation["accuracy"] <= evaluation["accuracy_top5"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "finished" and results["data"] == f"CIFAR-{classes}"
    assert results["operator"] == recipe.operator and results["network"] == recipe.network
    assert results["images_per_epoch"] == (100 if classes == 10 else 200)


def test_every_version_gives_the_same_training(tmp_path):
    losses = []
    made = (
        data_files.write_cifar_folder(tmp_path / "a", 10, "python"),
        data_files.write_cifar_archive(tmp_path / "b", 10, "python"),
        data_files.write_cifar_folder(tmp_path / "c", 10, "binary"),
        data_files.write_cifar_archive(tmp_path / "d", 10, "binary"),
    )
    for path in made:
        folder = path.parent / "run"
        more = ("--classes", 10, "--steps", 2, "--log-every", 1)
        assert train(path.parent, folder, *more) == 0
        losses.append([line["loss"] for line in records(folder, "train")])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][0] != losses[0][1]


def test_training_learns(data, tmp_path):
    # Brightness gives the class away. Of the networks, the one of fewest layers.
    more = ("--classes", 10, "--network", "cnn9", "--log-every", 10, "--evaluation-batch", 40)
    tanh = ("--preset", "tanh_cos", "--lr", 0.04, "--steps", 80)
    assert train(data, tmp_path / "a", *tanh, *more) == 0
    fits = [line["fit"] for line in records(tmp_path / "a", "train")]
    assert fits[-1] < 0.75 * fits[0], fits
    sgd = ("--warmup", 0, "--cutout", 0, "--ema", 0.8, "--lr", 0.1, "--steps", 120)
    assert train(data, tmp_path / "b", "--preset", "modern", *sgd, *more) == 0
    fits = [line["fit"] for line in records(tmp_path / "b", "train")]
    assert fits[-1] < 0.9 * fits[0], fits
    # The averaged weights are evaluated, and know more than chance, which has half of them right.
    assert records(tmp_path / "b", "evaluate")[-1]["accuracy_top5"] >= 80


def test_filters_are_projected_where_the_recipe_says(data, tmp_path):
    more = ("--steps", 5, "--project-every", 4, "--log-every", 5, "--preset", "tanh_cos")
    assert train(data, tmp_path, *more) == 0
    recipe = dataclasses.replace(cifar_recipes["tanh_cos"], widths=WIDTHS)
    network = build(recipe)
    # After iteration 4, the fifth.
    network.load_state_dict(newest(tmp_path)["network"])
    before = [layer.weight.detach().clone() for layer in decoupled_layers(network)]
    assert len(before) == 31
    project_weights(network)
    for layer, weight in zip(decoupled_layers(network), before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-3, atol=1e-6)


def test_averaged_weights_are_evaluated(data, tmp_path, monkeypatch):
    seen = []
    evaluate = ImageTask.evaluate

    def spy(task: ImageTask) -> dict[str, float]:
        values = evaluate(task)
        with torch.no_grad():
            task.network.classifier.weight.fill_(float("inf"))
        seen.append((values, evaluate(task)))
        return values

    monkeypatch.setattr(ImageTask, "evaluate", spy)
    monkeypatch.setattr("train.engine.loop.all_finite", lambda tensors: torch.tensor(True))
    train(data, tmp_path, "--preset", "modern", "--steps", 2)
    ((first, second),) = seen
    assert first == second


def test_uneven_batches_count_every_image_once(data, tmp_path, monkeypatch):
    tasks = []
    evaluate = ImageTask.evaluate
    monkeypatch.setattr(ImageTask, "evaluate", lambda task: (tasks.append(task), evaluate(task))[1])
    # 40 test images in batches of 12.
    more = ("--classes", 10, "--steps", 2, "--evaluation-batch", 12, "--preset", "modern")
    assert train(data, tmp_path, *more, "--amp", "none") == 0
    (task,) = tasks
    images, labels = (torch.cat(parts) for parts in zip(*task.batches, strict=True))
    assert len(labels) == 40
    network = task.average.eval()
    # It is in the format of the images, like the network itself.
    for weight in (network.root[0].weight, task.network.root[0].weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    with torch.no_grad():
        logits = network(images)
    (line,) = records(tmp_path, "evaluate")
    right = logits.argmax(dim=1) == labels
    assert line["accuracy"] == pytest.approx(100 * float(right.double().mean()))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert line["loss"] == pytest.approx(float(loss), rel=1e-4)
    top5 = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
    assert line["accuracy_top5"] == pytest.approx(100 * float(top5.double().mean()))


# Options.


def test_list_shows_every_preset_and_cell(capsys):
    with pytest.raises(SystemExit) as stop:
        cifar.main(["--list"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" --preset ")[1].split()[0]: line for line in lines if "--preset" in line}
    assert list(rows) == list(cifar_recipes)
    for name, cell in paper_cells.items():
        assert f"Table {cell.table}" in rows[name]
        assert cell.recipe.operator in rows[name]
        error = "not converged" if cell.error is None else f"{cell.error:.2f}"
        assert rows[name].rstrip().endswith(error)
    for name in OFFICIAL:
        assert " official" in rows[name]


def test_dry_run_survives_its_yaml(tmp_path, capsys):
    given = ("--preset", "table1/weighted_gradients", "--lr", "2e-3", "--widths", 4, 6, 8)
    given += ("--classes", 10, "--length", 0.5, "--mean", 120, 121, 122)
    first = options_of(capsys, *given)
    assert first["weighted_gradients"] is True and first["lr"] == 2e-3
    assert first["widths"] == [4, 6, 8] and first["mean"] == [120.0, 121.0, 122.0]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first))
    assert options_of(capsys, "--config", file) == first
    assert options_of(capsys, "--config", file, "--lr", 1) == first | {"lr": 1.0}


def test_length_scales_steps_drops_and_warmup(capsys):
    options = cifar.parse(
        cifar.CifarRun,
        ["--length", "0.1"],
        program="x",
        description="y",
        presets=cifar.presets(cifar_recipes),
    )
    done = options.resolved()
    assert done.steps == 4250 and done.drops == (2000, 3000, 3750) and done.length is None
    recipe = done.recipe()
    rates = [recipe.lr_at(step) for step in (1999, 2000, 3000, 3750)]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    # Once more is not a tenth of a tenth.
    again = dataclasses.replace(done, length=0.1)
    assert again.resolved() == done
    with pytest.raises(SystemExit):
        cifar.main(["--length", "0.1", "--preset", "modern", "--dry-run"])
    assert "7800 steps of 128 images" in capsys.readouterr().out
    error = refusal(capsys, "--length", 0.1, "--steps", 100)
    assert "length must be left out where steps, drops or warmup are not" in error


def test_shortened_run_in_a_given_folder_goes_on_as_long_as_it_was(data, tmp_path, capsys):
    # What torchrun does when it restarts a process: the same command once more.
    more = ("--length", 4 / 42_500)
    assert train(data, tmp_path, *more) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 4
    assert train(data, tmp_path, *more) == 0
    assert "Resumed at step 4" in capsys.readouterr().out
    # And on, if one wants.
    assert train(data, tmp_path, "--steps", 5) == 0
    assert records(tmp_path, "train")[-1]["step"] == 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--preset", "tanh_co"], "did you mean 'tanh_cos'"),
        (["--classes", 20], "classes must be 10 or 100, got 20"),
        (["--betas", 0.9], "betas must be two numbers, got (0.9,)"),
        (["--mean", 1, 2], "mean must be one number, or one for each of three channels"),
        (["--std", 0], "std must be a finite number above 0"),
        (["--widths", 4, 6], "widths must be 3 numbers for network 'resnet32', got (4, 6)"),
        (["--block4"], "block4 must be left out for network 'resnet32', got True"),
        (["--operator", "tanh_cosin"], "tanh_cosine"),
        (["--batch-size", 10, "--accumulate", 3], "batch_size must be a multiple of"),
        (["--length", 0], "length must be a finite number above 0"),
        (["--pretrained", "nowhere.pt"], "pretrained must be a file of a network's tensors"),
    ],
)
def test_wrong_options_are_refused(given, sentence, data, tmp_path, capsys):
    folder = tmp_path / "run"
    error = refusal(capsys, *arguments(data, folder), "--steps", 1, *given)
    assert "dcconv: " in error and sentence in error
    # No run was begun.
    assert not (folder / "checkpoints").exists()


# Data.


def test_missing_data_says_which_file_to_put_where(tmp_path, capsys):
    error = refusal(capsys, "--data", tmp_path, "--classes", 10, "--device", "cpu")
    assert "cifar-10-python.tar.gz" in error and str(tmp_path) in error
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in error
    error = refusal(capsys, "--data", tmp_path / "none", "--device", "cpu")
    assert "cifar-100-python.tar.gz" in error and "does not exist" in error


def test_other_files_than_the_official_are_refused(data, capsys):
    error = refusal(capsys, "--data", data, "--device", "cpu")
    assert "MD5 checksum 16019d7e3df5f24257cddd939b257f8d" in error
    error = refusal(capsys, "--data", data, "--classes", 10, "--device", "cpu")
    assert "cifar-10-binary.tar.gz" in error and "c32a1d4ab5d03f1284b67883e8d87530" in error


def test_truncated_data_are_named(tmp_path, capsys):
    archive = data_files.write_cifar_archive(tmp_path, 100, "binary")
    archive.write_bytes(archive.read_bytes()[:-2000])
    error = refusal(capsys, *arguments(tmp_path, tmp_path / "run"))
    assert str(archive) in error and "be a whole gzip-compressed tar archive" in error


# Stopping and going on.


def stop_after(monkeypatch, step: int) -> None:
    """Let the next run get SIGTERM in its iteration ``step``, counted from 0."""
    after = ImageTask.after_step

    def stopping(task: ImageTask, number: int) -> None:
        after(task, number)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ImageTask, "after_step", stopping)


@pytest.mark.parametrize("preset", ["tanh_cos", "modern"])
def test_20_steps_are_10_and_10(preset, data, tmp_path, monkeypatch):
    more = ("--preset", preset, "--steps", 20, "--log-every", 4, "--evaluate-every", 10)
    if preset == "tanh_cos":
        more += ("--drops", 6, 14, "--project-every", 7)
    else:
        more += ("--ema", 0.9)
    assert train(data, tmp_path / "straight", *more) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        assert train(data, tmp_path / "parts", *more) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "parts" / "checkpoints").last_step == 10
    # Everything else comes from the run's own configuration.
    assert cifar.main(["--resume", str(tmp_path / "parts")]) == 0
    a, b = newest(tmp_path / "straight"), newest(tmp_path / "parts")
    assert ("average" in a["task"]) == (preset != "tanh_cos")
    assert_same(a, b)
    logs = []
    for name in ("straight", "parts"):
        lines = records(tmp_path / name, "train"), records(tmp_path / name, "evaluate")
        losses = [(line["step"], line["loss"], line["fit"], line["lr"]) for line in lines[0]]
        assert len(losses) == 5
        logs.append((losses, lines[1]))
    assert_same(*logs)


def test_evaluation_that_a_signal_breaks_off_is_done_when_the_run_goes_on(
    data, tmp_path, monkeypatch
):
    more = ("--steps", 4, "--log-every", 2, "--evaluate-every", 2, "--evaluation-batch", 10)
    assert train(data, tmp_path / "straight", *more) == 0
    served = []
    every = TensorBatches.__iter__

    def stopping(batches: TensorBatches):
        for number, batch in enumerate(every(batches)):
            served.append(number)
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TensorBatches, "__iter__", stopping)
        assert train(data, run, *more) == 128 + signal.SIGTERM
        assert served == [0, 1]
        # Once more, before anything else.
        assert train(data, run, *more) == 128 + signal.SIGTERM
        assert served == [0, 1, 0, 1]
    assert newest(run)["step"] == 2 and newest(run)["pending"]
    assert not records(run, "evaluate")
    assert train(data, run, *more) == 0
    assert_same(newest(tmp_path / "straight"), newest(run))
    found = [records(path, "evaluate") for path in (tmp_path / "straight", run)]
    assert [line["step"] for line in found[0]] == [2, 4] and found[0] == found[1]


def test_averaged_weights_must_be_on_both_sides(data, tmp_path):
    values = {"steps": 1, "widths": WIDTHS, "ema": 0.0, "classes": 10}
    recipe = dataclasses.replace(cifar_recipes["modern"], **values)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    stream = TensorBatches(images, torch.zeros(4), batch_size=2, augment=Augment())
    task = ImageTask(recipe, stream, stream, torch.device("cpu"))
    with pytest.raises(ValueError, match="ema must keep averaged weights as the resumed run did"):
        task.load_state_dict({"average": {}})


def test_optimiser_of_a_run_that_goes_on_has_the_recipes_constants(data, tmp_path):
    assert train(data, tmp_path, "--preset", "modern", "--steps", 1) == 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    _, state = checkpoints.load_latest()
    for group in state["optimizer"]["param_groups"]:
        group["weight_decay"], group["momentum"] = 0.25, 0.5
    checkpoints.save(state, 1)
    assert cifar.main([str(item) for item in ("--resume", tmp_path, "--steps", 2)]) == 0
    groups = newest(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert {group["momentum"] for group in groups} == {0.9}


def test_checkpoint_of_another_optimiser_is_refused(data, tmp_path, capsys):
    assert train(data, tmp_path, "--preset", "modern", "--steps", 1) == 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    _, state = checkpoints.load_latest()
    checkpoints.save(state | {"optimizer_kind": "AdamW"}, 1)
    error = refusal(capsys, "--resume", tmp_path, "--steps", 3)
    assert "dcconv: resume must be a run of the same network and optimiser, got" in error
    assert "its optimiser is AdamW, not SGD" in error


def test_checkpoint_cut_in_half_costs_only_the_steps_since_the_one_before(data, tmp_path, capsys):
    more = ("--steps", 6, "--save-every", 2, "--log-every", 2)
    assert train(data, tmp_path / "a", *more) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "checkpoints" / "step-00000006.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert cifar.main(["--resume", str(tmp_path / "b")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint must be the intact file '{file}', got" in output
    assert f"got {len(content) // 2} of {len(content)} bytes" in output
    assert "Resumed at step 4" in output
    assert_same(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_ctrl_c_saves_and_the_run_goes_on(data, tmp_path):
    command = [sys.executable, "-m", "train.cifar"]
    command += arguments(data, tmp_path, "--steps", 100_000, "--log-every", 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, error = (text.decode() for text in process.communicate(timeout=60))
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = Checkpoints(tmp_path / "checkpoints").last_step
    assert step >= 2 and f"Stopped by Ctrl-C after step {step}." in output
    assert f"resume with: python -m train.cifar --resume {tmp_path}" in output
    assert cifar.main(["--resume", str(tmp_path), "--steps", str(step + 1)]) == 0
    assert Checkpoints(tmp_path / "checkpoints").last_step == step + 1


# From a plain network.


def test_start_from_a_plain_runs_checkpoint(data, tmp_path, monkeypatch):
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train(data, plain, "--operator", "conv", "--steps", 3) == 0
    file = plain / "checkpoints" / "step-00000003.pt"
    monkeypatch.setattr("train.task.ESTIMATION_IMAGES", 40)
    more = ("--preset", "tanh_cos", "--no-official", "--log-every", 1)
    pretrained = ("--pretrained", file)
    assert train(data, run, "--steps", 1, *more, *pretrained) == 0
    saved = Checkpoints(run / "checkpoints")
    begun = saved.load(saved.entries[0])["network"]
    source = newest(plain)["network"]
    recipe = dataclasses.replace(cifar_recipes["tanh_cos"], widths=WIDTHS, official=False)
    network = build(recipe)
    decoupled = {name for name, module in network.named_modules() if hasattr(module, "radius_raw")}
    assert len(decoupled) == 31
    for name in decoupled:
        weight = source[f"{name}.weight"]
        unit = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-4).sqrt()
        torch.testing.assert_close(begun[f"{name}.weight"], unit)
        assert torch.equal(begun[f"{name}.radius_raw"], torch.ones(len(weight)))
        assert begun[f"{name}.norm_mean"] > 0
    assert torch.equal(begun["classifier.weight"], source["classifier.weight"])
    # The statistics were those of training images, and took nothing from the training itself.
    assert saved.load(saved.entries[0])["ranks"][0]["stream"]["position"] == 0
    assert float(begun["root.1.running_mean"].abs().sum()) > 0
    # Going on needs the plain network no more.
    file.unlink()
    assert train(data, run, "--steps", 2, *more, *pretrained) == 0
    assert newest(run)["step"] == 2


def test_plain_checkpoint_of_another_shape_is_refused(data, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert train(data, plain, "--operator", "conv", "--steps", 1, "--widths", 4, 6, 4) == 0
    file = plain / "checkpoints" / "step-00000001.pt"
    error = refusal(capsys, *arguments(data, tmp_path / "run", "--pretrained", file))
    assert "pretrained must hold '" in error and "of shape [" in error
