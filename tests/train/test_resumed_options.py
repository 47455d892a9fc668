"""What defines a run stays as it was in a run that goes on, in every runner; the rest is noted."""

from __future__ import annotations

import json
from pathlib import Path

import data_files
import pytest
import torch
import yaml

from train import cifar, digits, features, imagenet
from train.engine.config import changes
from train.robustness import run as robustness


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SMALL = ("--batch-size", "4", "--threads", "1", "--device", "cpu", "--no-compile", "--steps", "2")


def cifar_run(parent: Path, run: Path) -> list[str]:
    data_files.write_cifar_folder(parent, 10, "binary")
    given = ["--data", str(parent), "--no-verify", "--classes", "10", "--folder", str(run)]
    return [*given, "--widths", "2", "2", "2", *SMALL]


def imagenet_run(parent: Path, run: Path) -> list[str]:
    data_files.write_image_folder(parent, train=4, val=1)
    given = ["--data", str(parent), "--classes", "3", "--folder", str(run), "--workers", "0"]
    return [*given, "--widths", "2", "2", "2", "2", "--image-size", "32", "--resize", "36", *SMALL]


def robustness_run(parent: Path, run: Path) -> list[str]:
    given = ["--operators", "conv", "--trainings", "natural", "--attacks", "fgsm", "--images", "9"]
    return [*given, "--repeats", "1", "--no-black-box", "--folder", str(run), *SMALL]


def digits_run(parent: Path, run: Path) -> list[str]:
    few = ["--test-share", "0.9", "--widths", "4", "4", "4", "--batch-size", "64"]
    return ["--quick", "--epochs", "1", "--operators", "conv", *few, "--out", str(run.parent)]


RUNNERS = {
    "cifar": (cifar.main, cifar_run, cifar.CifarRun),
    "imagenet": (imagenet.main, imagenet_run, imagenet.ImageNetRun),
    "robustness": (robustness.main, robustness_run, robustness.RobustnessRun),
    "digits": (digits.main, digits_run, digits.Config),
    "features": (features.main, digits_run, features.FeatureConfig),
}

# Where a run goes on, how long, how often something is done beside it, and how fast.
OFTEN = {"evaluate_every", "save_every", "keep_last", "log_every", "histogram_every"}
WHERE = {"device", "threads", "out", "name", "folder", "resume", "data"}
FAST = {"channels_last", "compile", "deterministic"}
RECIPE = {"steps", "length", "evaluation_batch"} | OFTEN | WHERE | FAST
NETWORKS = {"operators", "trainings", "repeats", "attacks", "black_box"}
TRAININGS = {"operators", "seeds", "quick", "threads", "backend", "out", "resume"}
FREE = {
    "cifar": RECIPE | {"verify"},
    "imagenet": RECIPE | {"format", "workers", "lanes", "skip_corrupt"},
    "robustness": NETWORKS | OFTEN | WHERE | {"verify", "attack_batch"},
    "digits": TRAININGS | {"histogram_every"},
    "features": TRAININGS | {"histogram_every"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a runner's finished run; each is made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            parent = tmp_path_factory.mktemp(name)
            run = parent / "runs" / "run"
            main, arguments, _ = RUNNERS[name]
            assert main(arguments(parent, run)) == 0
            (made[name],) = run.parent.iterdir()
        return made[name]

    return of


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(name: str, run: Path, *more: str) -> int:
    try:
        return RUNNERS[name][0](["--resume", str(run), *more])
    except SystemExit as stop:
        return int(stop.code)


@pytest.mark.parametrize("name", RUNNERS)
def test_free_options_are_those_that_change_no_result(name):
    kind = RUNNERS[name][2]
    assert kind.free == FREE[name]


@pytest.mark.parametrize(
    ("name", "option", "before", "now"),
    [
        ("cifar", "operator", "tanh_cosine", "ball_cosine"),
        ("cifar", "lr", 0.001, 0.5),
        ("cifar", "preset", "tanh_cos", "ball_cos"),
        ("cifar", "seed", 0, 1),
        ("cifar", "amp", "none", "bf16"),
        ("cifar", "weight_decay", 0.0, 0.1),
        ("cifar", "ema", 0.0, 0.9),
        ("cifar", "padding", 4, 2),
        ("imagenet", "operator", "tanh_cosine", "conv"),
        ("imagenet", "lr", 0.1, 0.5),
        ("imagenet", "buffer", 1000, 10),
        ("imagenet", "sync_norm", True, False),
        ("robustness", "operator", None, None),
        ("robustness", "lr", 0.003, 0.5),
        ("robustness", "epsilon", "0.15", "0.2"),
        ("robustness", "steps", 2, 3),
        ("digits", "lr", 0.003, 0.5),
        ("digits", "epochs", 1, 3),
        ("features", "classifier_lr", 0.1, 0.5),
        ("features", "norm_momentum", 0.1, 0.5),
    ],
)
def test_what_defines_a_run_is_refused_and_nothing_changes(
    finished, capsys, name, option, before, now
):
    if option == "operator" and name == "robustness":
        # Operators may join there, but the substitute's may not.
        option, before, now = "substitute", "conv", "ball_cosine"
    run = finished(name)
    content = content_of(run)
    flag = "--" + option.replace("_", "-")
    given = [flag, str(now)]
    if isinstance(now, bool):
        given = [flag if now else "--no-" + flag[2:]]
    capsys.readouterr()
    assert resume(name, run, *given) == 2
    sentence = f"dcconv: {option} must stay {before} in a run that is resumed, got {now}\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert content_of(run) == content


def test_two_changes_at_once_of_a_finished_run_are_refused(finished, capsys):
    run = finished("cifar")
    content = content_of(run)
    assert resume("cifar", run, "--operator", "ball_cosine", "--lr", "0.5") == 2
    assert "in a run that is resumed, got" in capsys.readouterr().err
    # The same through the folder that torchrun's restarts name, with everything spelled out.
    again = cifar_run(run.parent / "other", run)
    again[1] = str(run.parent.parent)
    assert cifar.main([*again, "--lr", "0.5"]) == 2
    assert "dcconv: lr must stay 0.001 in a run that is resumed" in capsys.readouterr().err
    assert content_of(run) == content


@pytest.mark.parametrize(
    ("name", "given", "noted"),
    [
        (
            "cifar",
            ("--steps", "3", "--log-every", "1"),
            {"steps": [2, 3], "log_every": [100, 1]},
        ),
        ("imagenet", ("--steps", "3", "--workers", "1"), {"steps": [2, 3], "workers": [0, 1]}),
        ("robustness", ("--attack-batch", "5"), {"attack_batch": [500, 5]}),
        (
            "digits",
            ("--operators", "conv", "log_cosine"),
            {"operators": [["conv"], ["conv", "log_cosine"]]},
        ),
        ("features", ("--threads", "2"), {"threads": [1, 2]}),
    ],
)
def test_what_may_change_is_noted_and_the_former_file_kept(finished, name, given, noted):
    run = finished(name)
    before = (run / "config.yaml").read_bytes()
    former = {path.name for path in run.glob("config.*.yaml")}
    assert resume(name, run, *given) == 0
    (kept,) = {path.name for path in run.glob("config.*.yaml")} - former
    assert (run / kept).read_bytes() == before
    record = json.loads((run / "resumes.jsonl").read_text().splitlines()[-1])
    assert record["changes"] == noted and record["former_config"] == kept
    now, then = (yaml.safe_load((run / file).read_text()) for file in ("config.yaml", kept))
    assert {key: [then[key], now[key]] for key in now if now[key] != then[key]} == noted
    # Once more with nothing new: noted, and no file kept.
    assert resume(name, run) == 0
    record = json.loads((run / "resumes.jsonl").read_text().splitlines()[-1])
    assert not record["config_changed"] and record["former_config"] is None
    assert {path.name for path in run.glob("config.*.yaml")} == former | {kept}


def test_accumulated_batches_may_change_with_the_processes_alone(finished, capsys):
    run = finished("imagenet")
    content = content_of(run)
    assert resume("imagenet", run, "--steps", "9", "--accumulate", "2") == 2
    sentence = "dcconv: accumulate must stay 1 in a run that is resumed by 1 processes, got 2"
    assert sentence in capsys.readouterr().err
    assert content_of(run) == content


def test_run_without_its_configuration_is_refused(finished, capsys):
    run = finished("cifar")
    config = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    content = content_of(run)
    try:
        given = ["--data", str(run.parent.parent), "--no-verify", "--classes", "10", *SMALL]
        assert resume("cifar", run, *given, "--widths", "2", "2", "2") == 2
        sentence = f"dcconv: resume must be a run with a config.yaml, got '{run}'"
        assert sentence in capsys.readouterr().err
        assert content_of(run) == content
    finally:
        (run / "config.yaml").write_bytes(config)


def test_stored_option_that_is_new_is_no_change(tmp_path):
    options = digits.Config(epochs=3, seeds=(0,))
    assert changes(options, options, ()) == {}
