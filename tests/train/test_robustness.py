"""The robustness runs: attacks against hand calculations, and runs end to end."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from data_files import write_cifar_folder
from torch import nn

from train.data.cifar import load_cifar
from train.engine.rng import seed_all
from train.networks import find_operator, small_network
from train.robustness import options as options_
from train.robustness import run as run_
from train.robustness import tables, training
from train.robustness.attacks import Attack, fgsm, margins, perturb
from train.robustness.options import PRESETS, RobustnessRun, fraction
from train.robustness.tables import Cell

CPU = torch.device("cpu")
BIM = Attack(0.1, 0.025, 10)
PGD = Attack(0.1, 0.025, 10, 3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear() -> tuple[nn.Module, torch.Tensor]:
    """Two classes by the sign of w x: the worst image for class 1 is x - epsilon sign(w)."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    w = torch.linspace(-1.0, 1.0, 16)
    network[1].weight.data.copy_(torch.stack((-w / 2, w / 2)))
    return network, w.reshape(1, 1, 4, 4)


def digits(operator: str, **changes) -> training.RobustTask:
    """A task on digits, its network narrower for speed."""
    values = PRESETS["digits"] | {"steps": 42, "warmup": 10} | changes
    options = RobustnessRun(**values)
    problem = replace(
        training.digits_problem(options, 0, CPU),
        build=lambda name: small_network(find_operator(name), 8, 10, (16, 24, 24)),
    )
    seed_all(0)
    attack = options.training_attack(options.trainings[0])
    return training.RobustTask(options, problem, operator, 0, attack)


def steps(task: training.RobustTask, count: int) -> None:
    task.network.train()
    for step in range(count):
        task.before_step(step)
        task.optimizer.zero_grad()
        loss, _ = task.loss(*task.stream.next())
        loss.backward()
        task.optimizer.step()


@pytest.fixture(scope="module")
def trained() -> training.RobustTask:
    task = digits("conv")
    steps(task, 42)
    task.network.eval()
    return task


def right(network: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return network(images).argmax(dim=1) == classes


def test_attacks_of_a_linear_network_are_the_known_optimum():
    network, w = linear()
    images = 0.2 + 0.6 * torch.rand(6, 1, 4, 4)
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    towards = torch.where(classes == 0, 1.0, -1.0)[:, None, None, None]
    optimum = images + 0.1 * towards * w.sign()
    # Four steps of 0.025 from the image reach the bound, eight from anywhere in it.
    for attack in (fgsm(0.1), Attack(0.1, 0.025, 4), Attack(0.1, 0.025, 8, 2)):
        torch.testing.assert_close(perturb(network, images, classes, attack), optimum)
    torch.testing.assert_close(
        perturb(network, images, classes, Attack(0.1, 0.025, 3)),
        images + 0.075 * towards * w.sign(),
    )


def test_pixel_range_cuts_the_optimum():
    network, w = linear()
    images = torch.full((1, 1, 4, 4), 0.05)
    found = perturb(network, images, torch.tensor([0]), fgsm(0.1))
    torch.testing.assert_close(found, (images + 0.1 * w.sign()).clamp(min=0.0))
    assert float(found.min()) == 0.0
    found = perturb(network, 1 - images, torch.tensor([0]), fgsm(0.1))
    torch.testing.assert_close(found, (1 - images + 0.1 * w.sign()).clamp(max=1.0))


@pytest.mark.parametrize("attack", [fgsm(0.1), BIM, PGD, Attack(0.1, 0.5, 3, 1)])
def test_bound_and_pixel_range_hold_and_nothing_else_changes(trained, attack):
    network, problem = trained.network, trained.problem
    images, classes = problem.images[:60], problem.classes[:60]
    kept = images.clone(), classes.clone()
    marks = [torch.rand_like(parameter) for parameter in network.parameters()]
    for parameter, mark in zip(network.parameters(), marks, strict=True):
        parameter.grad = mark.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    network[1].eval()
    found = perturb(network, images, classes, attack)
    # Evaluation mode is for the attack alone, and layers that were in it stay in it.
    assert network.training and network[0].training and not network[1].training
    network.eval()
    assert float((found - images).abs().max()) <= attack.epsilon + 1e-6
    assert float((found - images).abs().max()) >= attack.epsilon - 1e-6
    assert float(found.min()) >= 0.0 and float(found.max()) <= 1.0
    assert not found.requires_grad
    assert torch.equal(images, kept[0]) and torch.equal(classes, kept[1])
    assert not images.requires_grad
    for parameter, mark in zip(network.parameters(), marks, strict=True):
        assert torch.equal(parameter.grad, mark) and parameter.requires_grad
        parameter.grad = None
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_attack_is_made_on_the_network_in_evaluation_mode(trained):
    network, problem = trained.network, trained.problem
    images, classes = problem.images[:30], problem.classes[:30]
    expected = perturb(network.eval(), images, classes, BIM)
    assert torch.equal(perturb(network.train(), images, classes, BIM), expected)
    network.eval()
    # Images do not influence each other, as they would through the statistics of their batch.
    alone = perturb(network, images[:1], classes[:1], fgsm(0.1))
    torch.testing.assert_close(alone, perturb(network, images, classes, fgsm(0.1))[:1])


@pytest.mark.parametrize("attack", [fgsm(0.0), Attack(0.0, 0.1, 3), Attack(0.0, 0.1, 3, 2)])
def test_epsilon_0_is_the_identity(trained, attack):
    images, classes = trained.problem.images[:20], trained.problem.classes[:20]
    assert torch.equal(perturb(trained.network, images, classes, attack), images)


def test_bim_of_one_step_to_the_bound_is_fgsm(trained):
    images, classes = trained.problem.images[:50], trained.problem.classes[:50]
    one = perturb(trained.network, images, classes, Attack(0.1, 0.1, 1))
    assert torch.equal(one, perturb(trained.network, images, classes, fgsm(0.1)))
    x = images.clone().requires_grad_()
    F.cross_entropy(trained.network(x), classes).backward()
    assert torch.equal(one, (images + 0.1 * x.grad.sign()).clamp(0.0, 1.0))
    trained.network.zero_grad()


def test_random_starts_are_the_generators(trained):
    images, classes = trained.problem.images[:20], trained.problem.classes[:20]

    def pgd(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return perturb(trained.network, images, classes, Attack(0.1, 0.01, 1, 1), generator)

    assert torch.equal(pgd(1), pgd(1)) and not torch.equal(pgd(1), pgd(2))


def test_restarts_keep_the_worst_of_every_image(trained):
    network, problem = trained.network, trained.problem
    images, classes = problem.images[:200], problem.classes[:200]

    def errors(restarts: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        attack = Attack(0.12, 0.02, 3, restarts)
        found = perturb(network, images, classes, attack, generator)
        return ~right(network, found, classes), margins(network, found, classes)

    (one, margin), (many, most) = errors(1), errors(6)
    # The first start is the same, so no image that errs is lost, and no margin falls.
    assert bool((many | ~one).all()) and bool((most >= margin).all())
    assert int(many.sum()) > int(one.sum()) > 0
    # Who erred after one start was not attacked again.
    assert torch.equal(most[margin > 0], margin[margin > 0])


def test_margin_is_above_0_where_the_network_errs(trained):
    images, classes = trained.problem.images[:100], (trained.problem.classes[:100] + 1) % 10
    classes[:50] = trained.problem.classes[:50]
    wrong = ~right(trained.network, images, classes)
    assert torch.equal(margins(trained.network, images, classes) > 0, wrong)
    assert 45 <= int(wrong.sum()) <= 60
    network, w = linear()
    image = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(
        margins(network, image, torch.tensor([0])), (w * image).sum().reshape(1)
    )


def test_attacks_are_the_stronger_the_more_they_compute(trained):
    network, problem = trained.network, trained.problem
    images, classes = problem.images[:200], problem.classes[:200]
    scores = [
        int(right(network, perturb(network, images, classes, attack), classes).sum())
        for attack in (fgsm(0.0), fgsm(0.1), BIM, Attack(0.1, 0.025, 20, 3))
    ]
    assert scores[0] > 170
    assert scores[0] > scores[1] + 20 > scores[2] + 20 >= scores[3] + 20


def test_gradients_reach_the_pixels_through_every_backend(backend, device):
    torch.manual_seed(1)
    images, classes = torch.rand(8, 1, 8, 8, device=device), torch.arange(8, device=device)
    found = {}
    for operator in ("sphere_cosine", "ball_cosine", "tanh_cosine"):
        network = small_network(find_operator(operator), 8, 10, (4, 4, 4)).to(device).eval()
        x = images.clone().requires_grad_()
        F.cross_entropy(network(x), classes).backward()
        assert bool(x.grad.isfinite().all())
        assert float((x.grad != 0).float().mean()) > 0.9
        found[operator] = perturb(network, images, classes, BIM)
        with torch.no_grad():
            before, after = (
                float(F.cross_entropy(network(part), classes)) for part in (images, found[operator])
            )
        assert after > before + 1e-4


def test_images_that_are_normalised_already_are_refused():
    network, _ = linear()
    for wrong in (-0.1, 1.1, float("nan")):
        images = torch.full((1, 1, 4, 4), wrong)
        with pytest.raises(ValueError, match=r"dcconv: images must have pixels from 0 to 1, got"):
            perturb(network, images, torch.tensor([0]), fgsm(0.1))


def test_fractions_are_exact():
    assert fraction("epsilon", "8/255") == 8 / 255
    assert fraction("epsilon", "1e-1") == 0.1 and fraction("epsilon", "0") == 0.0
    options = RobustnessRun(**PRESETS["cifar10"])
    assert (options.bound, options.step) == (8 / 255, 2 / 255)
    assert options.attack("fgsm") == Attack(8 / 255, 8 / 255, 1)
    assert options.attack("bim") == Attack(8 / 255, 2 / 255, 10)
    assert options.attack("pgd") == Attack(8 / 255, 2 / 255, 20, 5)
    assert options.training_attack("natural") is None
    assert options.training_attack("fgsm") == options.attack("fgsm")
    assert options.training_attack("pgd") == Attack(8 / 255, 2 / 255, 7, 1)


def test_adversarial_loss_weighs_both_halves_of_one_batch():
    task = digits("conv", trainings=("fgsm",), adversarial_share=0.3)
    images, classes = task.stream.next()
    # Before the loss, which moves the statistics that the attack sees.
    adversarial = perturb(task.network, images, classes, fgsm(task.options.bound))
    loss, terms = task.loss(images, classes)
    torch.testing.assert_close(loss, 0.7 * terms["clean"] + 0.3 * terms["adversarial"])
    logits = task.network(torch.cat((images, adversarial)))
    torch.testing.assert_close(terms["clean"], F.cross_entropy(logits[: len(images)], classes))
    torch.testing.assert_close(
        terms["adversarial"], F.cross_entropy(logits[len(images) :], classes)
    )

    only = digits("conv", trainings=("fgsm",), adversarial_share=1.0)
    only.network.load_state_dict(task.network.state_dict())
    loss, terms = only.loss(images, classes)
    adversarial = perturb(task.network, images, classes, fgsm(task.options.bound))
    assert not terms
    torch.testing.assert_close(loss, F.cross_entropy(task.network(adversarial), classes))


def test_step_of_accumulated_batches_has_as_many_images():
    assert len(digits("conv", batch_size=16).stream.next()[1]) == 16
    assert len(digits("conv", batch_size=16, accumulate=2).stream.next()[1]) == 8
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes times acc"):
        digits("conv", batch_size=16, accumulate=3)


def test_adversarial_training_helps_against_the_attack():
    scores = []
    for name in ("natural", "fgsm"):
        changes = {"adversarial_share": 1.0, "epsilon": "0.1", "steps": 84, "warmup": 20}
        task = digits("conv", trainings=(name,), **changes)
        steps(task, 84)
        network = task.network.eval()
        images, classes = task.problem.images[:300], task.problem.classes[:300]
        found = perturb(network, images, classes, fgsm(0.15))
        scores.append(int(right(network, found, classes).sum()))
    assert scores[1] > scores[0] + 40


def test_bound_is_in_pixels_where_the_network_normalises(tmp_path):
    write_cifar_folder(tmp_path, 10, "python")
    values = PRESETS["cifar10"] | {"data": str(tmp_path), "verify": False, "batch_size": 8}
    options = RobustnessRun(**values)
    data = load_cifar(tmp_path, 10, verify=False)
    problem = training.cifar_problem(options, data, CPU)
    torch.testing.assert_close(problem.images * 255, data.test_images.float())
    images, _ = problem.stream(0).next()
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0.0 and 0.5 < float(images.max()) <= 1.0
    x = data.test_images[:2].float()
    torch.testing.assert_close(training.Normalise()(x / 255), (x - 127.5) / 128)
    assert isinstance(problem.build("conv")[0], training.Normalise)


# Runs.

QUICK = [
    "--steps",
    "3",
    "--warmup",
    "1",
    "--batch-size",
    "16",
    "--images",
    "40",
    "--pgd-steps",
    "2",
    "--bim-steps",
    "2",
]
QUICK += ["--restarts", "2", "--operators", "conv", "tanh_cosine"]


def quick(parent: Path, *arguments: str) -> list[str]:
    return [*QUICK, "--out", str(parent), *arguments]


def only_run(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_makes_both_tables_and_resumes_to_the_same(tmp_path, monkeypatch, capsys):
    assert run_.main(quick(tmp_path, "--repeats", "1")) == 0
    output = capsys.readouterr().out
    folder = only_run(tmp_path)
    assert folder.name.endswith("_robustness_digits")
    results = read_results(folder)
    assert results["status"] == "finished"
    assert (results["finished"], results["planned"]) == (4, 4)
    assert results["attacks"]["pgd"] == {
        "epsilon": 0.15,
        "step_size": 0.0375,
        "steps": 2,
        "restarts": 2,
    }
    for cell in results["cells"]:
        assert set(cell["white"]) == set(cell["black"]) == {"fgsm", "bim", "pgd"}
    keys = [(c["operator"], c["training"], c["seed"]) for c in results["cells"]]
    assert len(set(keys)) == 4 and keys[:2] == [("conv", "natural", 0), ("conv", "fgsm", 0)]
    text = (folder / "table.md").read_text()
    assert "White-box attacks" in output and "Black-box attacks" in output
    for cell in results["cells"]:
        for value in (cell["clean"], *cell["white"].values(), *cell["black"].values()):
            assert f"{value:.2f}" in text and f"{value:.2f}" in output
    assert (folder / "config.yaml").exists()
    assert (folder / "source" / "train" / "robustness" / "attacks.py").exists()

    # An interruption while the third network trains, then the rest.
    other = tmp_path / "other"
    step = run_.Trainer._step
    trainings, stored = set(), []

    def interrupted(self, watch: bool = False) -> None:
        step(self, watch)
        trainings.add(self.folder.path.name)
        if len(trainings) == 4 and self.step == 2:
            stored.append(read_results(other)["finished"])
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_.Trainer, "_step", interrupted)
        again = [*QUICK, "--folder", str(other), "--repeats", "1"]
        assert run_.main(again) == 130
    # Before the run knew that it would be stopped.
    assert stored == [2]
    stopped = read_results(other)
    assert stopped["status"] == "interrupted" and stopped["finished"] == 2
    assert stopped["cells"] == results["cells"][:2]
    assert f"--resume {other}" in capsys.readouterr().out
    # Of a finished network nothing but its figures is needed.
    shutil.rmtree(other / "trainings" / "conv_natural_0")
    assert run_.main(["--resume", str(other)]) == 0
    assert read_results(other)["cells"] == results["cells"]
    assert (other / "table.md").read_text() == text

    # A finished run only grows.
    trained = (other / "trainings" / "conv_fgsm_0" / "metrics.jsonl").read_bytes()
    assert run_.main(["--resume", str(other), "--repeats", "2"]) == 0
    grown = read_results(other)
    assert grown["finished"] == 8 and grown["cells"][:4] == results["cells"]
    assert (other / "trainings" / "conv_fgsm_0" / "metrics.jsonl").read_bytes() == trained


def test_sigterm_in_an_attack_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    attacked = run_.Run.attacked

    def terminated(self, network, problem, attack, seed, text):
        if text == "conv_fgsm_0":
            os.kill(os.getpid(), signal.SIGTERM)
        return attacked(self, network, problem, attack, seed, text)

    monkeypatch.setattr(run_.Run, "attacked", terminated)
    assert run_.main(quick(tmp_path, "--repeats", "1")) == 143
    assert "1 of 4 networks are finished and kept" in capsys.readouterr().out
    assert read_results(only_run(tmp_path))["finished"] == 1


def test_diverging_training_says_how_to_resume_the_run(tmp_path, monkeypatch, capsys):
    loss = training.RobustTask.loss

    def diverging(self, images, labels):
        value, terms = loss(self, images, labels)
        return (value * float("nan") if self.attack else value), terms

    monkeypatch.setattr(training.RobustTask, "loss", diverging)
    assert run_.main(quick(tmp_path, "--repeats", "1", "--no-black-box")) == 1
    folder = only_run(tmp_path)
    error = capsys.readouterr().err
    assert "dcconv: loss must be finite" in error
    assert f"--resume {folder}\n" in error
    results = read_results(folder)
    assert results["status"] == "failed" and results["finished"] == 1
    assert results["cells"][0]["black"] == {}


def test_cifar_runs_in_its_own_format(tmp_path):
    write_cifar_folder(tmp_path / "data", 10, "binary")
    arguments = ["--preset", "cifar10", "--data", str(tmp_path / "data"), "--no-verify"]
    arguments += ["--steps", "1", "--batch-size", "2", "--images", "2", "--operators", "conv"]
    arguments += ["--trainings", "fgsm", "--attacks", "bim", "--bim-steps", "1", "--repeats", "1"]
    arguments += ["--no-black-box", "--threads", "1", "--out", str(tmp_path / "runs")]
    assert run_.main(arguments) == 0
    (cell,) = read_results(only_run(tmp_path / "runs"))["cells"]
    assert set(cell["white"]) == {"bim"} and cell["training"] == "fgsm"
    text = (only_run(tmp_path / "runs") / "table.md").read_text()
    assert "l-infinity bound 8/255" in text and "masked" not in text


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "tahn_cosine"], "operators must be conv or <magnitude>_<angular>"),
        (["--operators", "tahn_cosine"], "(did you mean 'tanh_cosine'?)"),
        (["--operators", "conv", "conv"], "operators must be one or more, each once"),
        (["--substitute", "con"], "got 'con' (did you mean 'conv'?)"),
        (["--attacks", "fgms"], "attacks must be one of fgsm, bim, pgd, got 'fgms' (did you mean"),
        (["--trainings", "free"], "trainings must be one of natural, fgsm, pgd, got 'free'"),
        (["--network", "cnn9"], "network must be one of small, got 'cnn9'"),
        (["--preset", "mnist"], "preset must be one of digits, cifar10, got 'mnist'"),
        (["--epsilon", "-0.1"], "epsilon must be a number from 0 to 1 or a fraction such as 8/255"),
        (["--epsilon", "8"], "epsilon must be a number from 0 to 1 or a fraction"),
        (["--epsilon", "nan"], "epsilon must be a number from 0 to 1 or a fraction"),
        (["--epsilon", "8/0"], "a fraction such as 8/255, got '8/0'"),
        (["--step-size", "two"], "step_size must be a number from 0 to 1 or a fraction"),
        (["--restarts", "0"], "restarts must be an integer of at least 1, got 0"),
        (["--pgd-steps", "0"], "pgd_steps must be an integer of at least 1, got 0"),
        (["--repeats", "0"], "repeats must be an integer of at least 1, got 0"),
        (["--seed", "4294967295"], "seed must be below 2**32 with all repeats, got 4294967295"),
        (["--adversarial-share", "1.5"], "adversarial_share must be above 0 and at most 1"),
        (["--adversarial-share", "0"], "adversarial_share must be above 0 and at most 1"),
        (["--test-share", "1"], "test_share must be above 0 and below 1"),
        (["--lr", "0"], "lr must be a finite number above 0"),
    ],
)
def test_wrong_option_ends_with_the_house_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_.main([*arguments, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "dcconv: " in error
    assert not list(tmp_path.iterdir())


def test_missing_cifar_says_what_to_put_where(tmp_path, capsys):
    arguments = ["--preset", "cifar10", "--data", str(tmp_path / "none")]
    assert run_.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "dcconv: data must hold cifar-10-python.tar.gz or cifar-10-binary.tar.gz" in error
    assert not (tmp_path / "runs").exists()


def test_many_processes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_.main(quick(tmp_path)) == 2
    assert "dcconv: number of processes must be 1" in capsys.readouterr().err


def test_batch_larger_than_the_digits_is_refused(tmp_path, capsys):
    assert run_.main(quick(tmp_path, "--batch-size", "899")) == 2
    error = capsys.readouterr().err
    assert "batch_size must be at most the number of training images, 898, got 899" in error


def test_resumed_run_must_be_one_and_stay_itself(tmp_path, capsys):
    assert run_.main(["--resume", str(tmp_path)]) == 2
    assert "dcconv: resume must be a run with a config.yaml" in capsys.readouterr().err
    folder = tmp_path / "run"
    arguments = [*QUICK[:-3], "--operators", "conv", "--trainings", "natural", "--attacks", "fgsm"]
    arguments += ["--repeats", "1", "--no-black-box", "--folder", str(folder)]
    assert run_.main(arguments) == 0
    before = (folder / "results.json").read_bytes()
    capsys.readouterr()
    assert run_.main(["--resume", str(folder), "--epsilon", "0.2"]) == 2
    error = capsys.readouterr().err
    assert "dcconv: epsilon must stay 0.15 in a run that is resumed, got 0.2" in error
    assert (folder / "results.json").read_bytes() == before
    for damaged in (before[: len(before) // 2], b"[]", before.replace(b'"clean": ', b'"clean": -')):
        (folder / "results.json").write_bytes(damaged)
        assert run_.main(["--resume", str(folder)]) == 2
        assert "dcconv: resume must have a readable results.json" in capsys.readouterr().err
        assert (folder / "results.json").read_bytes() == damaged


def test_full_disk_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    write = run_.RunFolder.write_json

    def full(self, name, value):
        if name == "results.json" and "cells" in value:
            raise OSError(28, "No space left on device")
        write(self, name, value)

    monkeypatch.setattr(run_.RunFolder, "write_json", full)
    assert run_.main(quick(tmp_path, "--repeats", "1", "--no-black-box")) == 1
    error = capsys.readouterr().err
    assert "dcconv: out must be a disk that takes the results, got No space left" in error


def test_dry_run_of_the_command_shows_what_would_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["robustness", "--preset", "cifar10", "--dry-run"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("train.robustness", run_name="__main__")
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert "epsilon: 8/255" in output
    assert "# 24 trainings of cnn9 on cifar10 and 3 substitutes" in output


# Tables.


def cell(operator: str, seed: int, clean: float, white: list[float], black: list[float]) -> Cell:
    names = ("fgsm", "bim", "pgd")
    return Cell(
        operator,
        "natural",
        seed,
        clean,
        dict(zip(names, white, strict=True)),
        dict(zip(names, black, strict=True)),
    )


def test_table_has_trainings_and_attacks_down_and_operators_across():
    options = RobustnessRun(operators=("conv", "tanh_cosine"), repeats=2)
    cells = [
        cell("conv", 0, 90.0, [50.0, 40.0, 30.0], [80.0, 70.0, 60.0]),
        cell("conv", 1, 92.0, [54.0, 40.0, 30.0], [80.0, 70.0, 60.0]),
        cell("tanh_cosine", 0, 95.0, [60.0, 20.0, 25.0], [80.0, 70.0, 20.0]),
    ]
    text = tables.markdown(options, cells)
    assert "| training | attack | conv | tanh_cosine |" in text
    assert "| natural | none | 91.00 ± 1.41 | **95.00** |" in text
    assert "| natural | FGSM | 52.00 ± 2.83 | **60.00** |" in text
    assert "| natural | PGD | **30.00 ± 0.00** | 25.00 |" in text
    assert "| FGSM | none | – | – |" in text  # noqa: RUF001
    assert "| natural | BIM | **70.00 ± 0.00** | **70.00** |" in text
    assert "| natural | FGSM - PGD | 22.00 ± 2.83 | 35.00 |" in text
    assert "| natural | strongest black-box - PGD | 30.00 ± 0.00 | -5.00 |" in text
    assert text.endswith(
        "Signs of masked gradients, attacks stronger than PGD: "
        "tanh_cosine, natural training (BIM - PGD: -5.00); "
        "tanh_cosine, natural training (strongest black-box - PGD: -5.00).\n"
    )
    clean = tables.markdown(options, cells[:2])
    assert clean.endswith("No attack is stronger than PGD by more than its deviation.\n")
    # Less than half is left in the natural row too, where nothing was trained against FGSM.
    taught = [replace(cells[0], training="fgsm"), replace(cells[2], training="fgsm")]
    assert tables.markdown(options, taught).endswith(
        "under FGSM, which then overstates the robustness: tanh_cosine (60.00 to 25.00).\n"
    )


def test_tables_follow_the_options():
    options = RobustnessRun(operators=("conv",), attacks=("fgsm",), black_box=False)
    only = Cell("conv", "natural", 0, 90.0, {"fgsm": 50.0}, {})
    made = tables.report(options, [only])
    assert [title for title, _ in made.sections] == ["White-box attacks: accuracy in %"]
    assert made.sentence == ""
    assert [row[:2] for row in made.sections[0][1]] == [
        (training, attack) for training in ("natural", "FGSM") for attack in ("none", "FGSM")
    ]
    assert set(options_.TRAININGS) == {"natural", "fgsm", "pgd"}
