"""The engine: configuration, exact resuming, signals, NaN, precision, logs and the report."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from paths import ROOT
from rich.console import Console
from tiny_task import TinyTask
from torch import nn

from dcconv import DecoupledConv2d
from train.engine import checkpoint, config, distributed, loop
from train.engine.config import EngineOptions, from_mapping, option, parse, to_yaml
from train.engine.folder import RunFolder
from train.engine.histograms import collect
from train.engine.logs import RunLog, read_metrics
from train.engine.loop import Trainer
from train.engine.rng import rng_state, seed_all, set_rng_state
from train.engine.signals import StopSignals

CLOCKED = ("images_per_second", "step_seconds", "waiting_share", "peak_bytes")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options_of(**given: Any) -> EngineOptions:
    values = {"steps": 20, "evaluate_every": 8, "save_every": 5, "log_every": 4, "device": "cpu"}
    return EngineOptions(**{**values, **given})


def train(
    path: Path,
    before: dict | None = None,
    task: TinyTask | None = None,
    kind: type[Trainer] = Trainer,
    **given: Any,
) -> tuple[int, Trainer, str]:
    """Train the tiny task in a folder; return the status, the trainer and what it printed."""
    seed_all(0)
    task = task or TinyTask()
    task.before = before or {}
    output = io.StringIO()
    console = Console(file=output, width=300)
    trainer = kind(task, options_of(**given), RunFolder.at(path), console, program="prog")
    return trainer.run(), trainer, output.getvalue()


class PartOfARun(Trainer):
    def how_to_resume(self) -> str:
        return f"All of {self.folder.path.name} goes on"


def kill(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def records_of(path: Path, *, clocked: bool = False) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    if clocked:
        return records
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Compare nested states bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def final_state(trainer: Trainer) -> dict:
    return checkpoint.Checkpoints(trainer.folder.checkpoints).load_latest()[1]


# Resuming.


@pytest.mark.parametrize("given", [{}, {"accumulate": 2}, {"amp": "bf16"}, {"amp": "fp16"}])
@pytest.mark.parametrize("stop", [10, 8])
def test_20_steps_are_the_same_as_10_and_10(tmp_path, given, stop):
    # Step 8 has an evaluation that the signal puts off; step 10 is amid a log interval.
    status, straight, _ = train(tmp_path / "straight", **given)
    assert status == 0
    path = tmp_path / "parts"
    status, first, text = train(path, {stop - 1: kill(signal.SIGTERM)}, **given)
    assert status == 143 and first.step == stop
    assert f"Stopped by SIGTERM after step {stop}" in text
    assert f"Step {stop} is saved; resume with: prog --resume {path}" in text
    assert json.loads((path / "results.json").read_text())["status"] == "interrupted"
    status, second, text = train(path, **given)
    assert status == 0 and f"Resumed at step {stop}" in text
    assert second.task.steps == list(range(stop, 20))
    assert_same(final_state(second), final_state(straight))
    assert records_of(path) == records_of(tmp_path / "straight")
    assert_same(second.task.network.state_dict(), straight.task.network.state_dict())


class CrashError(Exception):
    pass


def crash() -> None:
    raise CrashError


def test_resuming_after_a_crash_drops_what_was_logged_since(tmp_path):
    _, straight, _ = train(tmp_path / "straight")
    path = tmp_path / "crashed"
    with pytest.raises(CrashError):
        train(path, {14: crash})
    assert records_of(path)[-1]["step"] == 12
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    status, second, text = train(path)
    assert status == 0 and "Resumed at step 10" in text
    assert f"dcconv: {path}/metrics.jsonl:5 must be a record of the log, got" in text
    assert records_of(path) == records_of(tmp_path / "straight")
    assert_same(final_state(second), final_state(straight))


def test_evaluation_that_a_signal_put_off_is_made_up_for_once(tmp_path):
    train(tmp_path / "straight", save_every=0)
    path = tmp_path / "run"
    train(path, {7: kill(signal.SIGTERM)}, save_every=0)
    assert [r["kind"] for r in records_of(path)] == ["train", "train"]
    with pytest.raises(CrashError):
        train(path, {9: crash}, save_every=0)
    train(path, save_every=0)
    assert records_of(path) == records_of(tmp_path / "straight")


def test_checkpoint_cut_in_half_costs_only_the_steps_since_the_one_before(tmp_path):
    _, straight, _ = train(tmp_path / "straight")
    path = tmp_path / "run"
    train(path, {14: kill(signal.SIGINT)})
    newest = path / "checkpoints" / "step-00000015.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    status, second, text = train(path)
    assert status == 0 and second.task.steps[0] == 10
    assert f"dcconv: checkpoint must be the intact file '{newest}', got 1000 of " in text
    assert_same(final_state(second), final_state(straight))


def test_more_steps_go_on_after_a_finished_run(tmp_path):
    train(tmp_path, steps=8)
    status, trainer, _ = train(tmp_path, steps=12)
    assert status == 0 and trainer.task.steps == [8, 9, 10, 11]
    with pytest.raises(
        ValueError, match="dcconv: steps must be at least the 12 that are done, got 8"
    ):
        train(tmp_path, steps=8)


def test_checkpoint_of_another_network_is_refused(tmp_path):
    train(tmp_path, steps=2)
    with pytest.raises(
        ValueError, match=r"dcconv: resume must be a run of the same network .* got"
    ):
        train(tmp_path, task=TinyTask(plain=True))


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dcconv: resume must be a run with a checkpoint, got"):
        train(tmp_path, resume=str(tmp_path))


def test_generators_of_every_library_are_restored():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.gauss(0, 1)  # noqa: NPY002

    seed_all(3)
    # A pair of normal numbers is drawn at once: the second is part of the state.
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002
    file = io.BytesIO()
    torch.save(rng_state(torch.device("cpu")), file)
    expected = draw()
    seed_all(4)
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True), torch.device("cpu"))
    assert draw() == expected
    seed_all(3)
    assert draw() != expected


# Signals.


def test_ctrl_c_saves_the_finished_step(tmp_path):
    status, trainer, text = train(tmp_path, {6: kill(signal.SIGINT)})
    assert status == 130 and "Stopped by Ctrl-C after step 7" in text
    assert final_state(trainer)["step"] == 7


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path, {2: kill(signal.SIGINT)})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_kills_at_once(number):
    code = (
        "import os, sys\n"
        "from train.engine.signals import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), int(sys.argv[1]))\n"
        "    print(stop.received, flush=True)\n"
        "    os.kill(os.getpid(), int(sys.argv[1]))\n"
        "    print('alive', flush=True)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    command = [sys.executable, "-c", code, str(int(number))]

    def run(**more):
        return subprocess.run(
            command,
            env=environment | {"PYTHONPATH": str(ROOT)} | more,
            capture_output=True,
            text=True,
        )

    done = run()
    assert done.returncode == -number and done.stdout == f"{int(number)}\n"
    # torchrun forwards signals: there a second one is the same one.
    assert run(TORCHELASTIC_RUN_ID="x").stdout == f"{int(number)}\nalive\n"


def test_only_the_main_thread_sets_handlers():
    import threading

    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, signal.getsignal(signal.SIGTERM))]


# NaN.


def poison(task: TinyTask, name: str) -> Any:
    parameter = dict(task.network.named_parameters())[name]

    def act():
        with torch.no_grad():
            parameter[0] = math.inf

    return act


def test_nan_names_the_layer_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    # From iteration 12 on the linear layer gives infinities; the log looks at step 16 only.
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += self.training
            return x / (self.calls < 13)

    task = TinyTask()
    task.network.insert(3, Broken())
    status, trainer, _ = train(tmp_path, task=task, evaluate_every=0, save_every=10, log_every=8)
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "dcconv: loss must be finite, got nan at step 13: "
        "the first that is not finite is the output of layer '3' (Broken)\n"
    )
    assert f"Step 10 is saved; resume with: prog --resume {tmp_path}" in error
    assert final_state(trainer)["step"] == 10
    assert records_of(tmp_path)[-1]["step"] == 8
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "failed" and "Broken" in results["reason"]


def test_subclass_says_how_to_resume(tmp_path, capsys):
    _, _, text = train(tmp_path / "stopped", {3: kill(signal.SIGINT)}, kind=PartOfARun)
    assert "Stopped by Ctrl-C after step 4. All of stopped goes on\n" in text

    def spoil():
        task.network[0].weight.data.fill_(torch.nan)

    task = TinyTask()
    train(tmp_path / "failed", {3: spoil}, task=task, kind=PartOfARun)
    assert capsys.readouterr().err.endswith("\nAll of failed goes on\n")


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (math.nan if ctx.bad else 1.0), None


class BadBackward(nn.Module):
    """Gradients through it are NaN from its 7th training step on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += self.training
        return BadGradient.apply(x, bool(self.calls >= 7))


def test_nan_gradient_names_the_first_parameter_on_the_way_back(tmp_path, capsys):
    task = TinyTask()
    task.network.insert(2, BadBackward())
    # The save of step 7 must not take the weights that iteration 6 has spoiled.
    status, trainer, _ = train(tmp_path, task=task, evaluate_every=0, save_every=7, log_every=20)
    assert status == 1
    error = capsys.readouterr().err
    assert "got nan at step 7: the first that is not finite is the gradient of '1.bias'" in error
    assert final_state(trainer)["step"] == 0
    for value in final_state(trainer)["network"].values():
        assert bool(value.isfinite().all())


def test_image_that_is_not_finite_is_named(tmp_path, capsys):
    task = TinyTask()
    following = task.stream.next

    def next_batch():
        images, labels = following()
        return images * math.nan if task.steps[-1] == 3 else images, labels

    task.stream.next = next_batch
    status, _, _ = train(tmp_path, task=task)
    assert status == 1
    error = capsys.readouterr().err
    assert "at step 4: the first that is not finite is an image of the batch\n" in error


def test_loss_that_is_not_finite_by_itself_is_named(tmp_path, capsys):
    task = TinyTask()
    loss = task.loss

    def broken(images, labels):
        total, terms = loss(images, labels)
        return total / (task.steps[-1] < 2), terms

    task.loss = broken
    assert train(tmp_path, task=task)[0] == 1
    error = capsys.readouterr().err
    assert " at step 3: the first that is not finite is the loss itself" in error


def test_layer_is_found_where_chance_decides(tmp_path, capsys):
    class Chance(nn.Module):
        def forward(self, x):
            return x / (torch.rand(()) > 0.2) if self.training else x

    task = TinyTask()
    task.network.insert(2, Chance())
    assert train(tmp_path, task=task, steps=100)[0] == 1
    assert "is the output of layer '2' (Chance)\n" in capsys.readouterr().err


def test_search_for_a_nan_can_be_stopped(tmp_path, capsys):
    task = TinyTask()
    task.before[6] = poison(task, "0.weight")
    task.before[2] = lambda: kill(signal.SIGTERM)() if task.steps.count(2) == 2 else None
    given = {"evaluate_every": 0, "save_every": 0, "log_every": 8}
    status, trainer, text = train(tmp_path, task.before, task, **given)
    assert status == 1 and trainer.step == 3
    assert "Something is not finite; repeating steps 1 to 8 to find what" in text
    error = capsys.readouterr().err
    assert " by step 8; SIGTERM ended the search for where it began\n" in error


def test_nan_that_does_not_come_again_is_not_blamed_on_anything(tmp_path, capsys):
    task = TinyTask()
    spoil = poison(task, "0.weight")
    task.before[6] = lambda: spoil() if task.steps.count(6) == 1 else None
    status, trainer, _ = train(tmp_path, task.before, task, evaluate_every=0)
    assert status == 1
    error = capsys.readouterr().err
    assert "by step 8; a replay from step 5 stayed finite\n" in error
    assert final_state(trainer)["step"] == 5


def test_gradient_overflow_under_fp16_is_skipped_and_no_error(tmp_path):
    task = TinyTask()
    task.network.insert(2, BadBackward())
    status, trainer, _ = train(tmp_path, task=task, amp="fp16", steps=12)
    assert status == 0
    scales = [r["loss_scale"] for r in records_of(tmp_path) if r["kind"] == "train"]
    # One halving for every skipped step: 7 to 12.
    assert scales == [65536.0, 65536.0 / 4, 65536.0 / 64]
    for value in trainer.task.network.parameters():
        assert bool(value.isfinite().all())


# Steps.


def test_accumulated_batches_are_one_large_batch(tmp_path):
    tasks = [TinyTask(8, plain=True), TinyTask(4, plain=True)]
    tasks[1].network.load_state_dict(tasks[0].network.state_dict())
    # Mean norms differ between halves of a batch: use one that does not depend on it.
    for task in tasks:
        task.network[0] = nn.Conv2d(2, 4, 3, padding=1)
        task.network[0].weight.data.fill_(0.1)
        task.network[0].bias.data.fill_(0.0)
        task.optimizer = torch.optim.SGD(task.network.parameters(), lr=0.1)
    # The small stream cuts every large batch in two.
    large = tasks[0].stream

    class Halves(type(large)):
        def next(self):
            if not getattr(self, "left", None):
                images, labels = large_copy.next()
                self.left = [(images[:4], labels[:4]), (images[4:], labels[4:])]
            return self.left.pop(0)

    large_copy = type(large)(8)
    tasks[1].stream = Halves(4)
    for task, accumulate, name in ((tasks[0], 1, "one"), (tasks[1], 2, "two")):
        train(tmp_path / name, task=task, accumulate=accumulate, steps=6)
    for one, two in zip(tasks[0].network.parameters(), tasks[1].network.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    losses = [[r["loss"] for r in records_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_log_has_means_of_the_interval(tmp_path):
    task = TinyTask()
    seen = []
    loss = task.loss

    def noted(images, labels):
        result = loss(images, labels)
        seen.append((float(result[0].detach()), float(result[1]["penalty"].detach())))
        return result

    task.loss = noted
    train(tmp_path, task=task, steps=10, evaluate_every=0)
    lines = [r for r in records_of(tmp_path, clocked=True) if r["kind"] == "train"]
    assert [r["step"] for r in lines] == [4, 8, 10]
    for line, part in zip(lines, (seen[:4], seen[4:8], seen[8:]), strict=True):
        assert line["loss"] == pytest.approx(sum(x for x, _ in part) / len(part), rel=1e-5)
        assert line["penalty"] == pytest.approx(sum(y for _, y in part) / len(part), rel=1e-5)
        assert line["lr"] == 1e-2 / line["step"]
        assert 0 <= line["waiting_share"] <= 1
        assert line["images_per_second"] == pytest.approx(8 / line["step_seconds"])
        assert line["peak_bytes"] > 2**20


def test_speed_counts_training_alone_and_the_wait_for_data(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    task = TinyTask()

    def slow(function, seconds, later):
        def slowed(*arguments):
            clock.now += seconds if not task.steps or task.steps[-1] < 4 else later
            return function(*arguments)

        return slowed

    task.stream.next = slow(task.stream.next, 2.0, 8.0)
    task.loss = slow(task.loss, 6.0, 8.0)
    task.evaluate = slow(task.evaluate, 1000.0, 1000.0)
    task.state_dict = slow(task.state_dict, 100.0, 100.0)
    # Evaluations after steps 3 and 6, saves after 5: amid the intervals of the log.
    train(tmp_path, task=task, steps=8, evaluate_every=3)
    lines = [r for r in records_of(tmp_path, clocked=True) if r["kind"] == "train"]
    assert [r["step"] for r in lines] == [4, 8]
    assert [r["step_seconds"] for r in lines] == [8.0, 16.0]
    assert [r["waiting_share"] for r in lines] == [0.25, 0.5]
    assert [r["images_per_second"] for r in lines] == [1.0, 0.5]


@pytest.mark.parametrize("given", [{"channels_last": True}, {"amp": "bf16"}])
def test_format_and_precision_reach_the_network(tmp_path, given):
    task = TinyTask()
    seen = []

    def hook(module, arguments, output):
        if module.training:
            seen.append(
                (arguments[0].is_contiguous(memory_format=torch.channels_last), output.dtype)
            )

    task.network[0].register_forward_hook(hook)
    train(tmp_path, task=task, steps=2, **given)
    dtype = torch.bfloat16 if "amp" in given else torch.float32
    assert seen == [("channels_last" in given, dtype)] * 2
    assert task.network[0].weight.dtype == torch.float32


def test_compiled_network_is_what_the_loss_calls(tmp_path, monkeypatch):
    compiled = []

    def fake(network):
        compiled.append(network)
        return lambda images: network(images)

    monkeypatch.setattr(torch, "compile", fake)
    status, trainer, _ = train(tmp_path, steps=1, compile=True)
    assert status == 0 and compiled == [trainer.task.network]
    assert trainer.task.forward_network is not trainer.task.network


def test_evaluation_and_best(tmp_path):
    task = TinyTask()
    accuracies = iter([50.0, 80.0, 70.0])
    modes = []

    def evaluate():
        modes.append(task.network.training)
        return {"accuracy": next(accuracies)}

    task.evaluate = evaluate
    status, _, text = train(tmp_path, task=task, keep_last=1)
    assert status == 0 and modes == [False] * 3 and task.network.training
    found = [(r["step"], r["accuracy"]) for r in records_of(tmp_path) if r["kind"] == "evaluate"]
    assert found == [(8, 50.0), (16, 80.0), (20, 70.0)]
    assert "step 16: accuracy 80" in text
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert [entry.step for entry in checkpoints.entries] == [16, 20]
    assert checkpoints.load_best()[1]["step"] == 16 and checkpoints.best_score == 80.0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"] == {"accuracy": 80.0} and results["final"] == {"accuracy": 70.0}
    assert results["parameters"] == sum(p.numel() for p in task.network.parameters())


def test_full_disk_ends_with_a_sentence_and_keeps_what_was_saved(tmp_path, monkeypatch, capsys):
    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        monkeypatch.setattr(os, "fsync", refuse)

    status, trainer, _ = train(tmp_path, {12: fill}, evaluate_every=0)
    monkeypatch.undo()
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "dcconv: out must have room for the checkpoint of step 15, got No space left on device "
        "(that of step 10 is kept)\n"
    )
    assert final_state(trainer)["step"] == 10
    assert not list(tmp_path.rglob("*.tmp"))
    # With room again the run goes on as if nothing had been.
    status, second, _ = train(tmp_path, evaluate_every=0)
    _, straight, _ = train(tmp_path / "straight", evaluate_every=0)
    assert status == 0
    assert_same(final_state(second), final_state(straight))


def test_full_disk_at_the_log_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    def refuse(self, kind, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLog, "write", refuse)
    status, trainer, _ = train(tmp_path)
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "dcconv: out must be a disk that takes the log of step 4, got No space left on device\n"
    )
    assert final_state(trainer)["step"] == 0


def test_histograms_of_decoupled_layers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, plain, _ = train(tmp_path / "plain", steps=8)
    _, trainer, _ = train(tmp_path / "with", steps=8, histogram_every=4)
    # Looking changes nothing.
    assert_same(final_state(trainer), final_state(plain))
    everything = {"histograms": 0, "scalars": 0}
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard"), everything)
    events.Reload()
    assert sorted(events.Tags()["histograms"]) == ["0/cosine", "0/patch_norm", "0/radius"]
    assert [event.step for event in events.Histograms("0/cosine")] == [4, 8]
    assert set(events.Tags()["scalars"]) >= {"train/loss", "train/lr", "evaluate/accuracy"}
    logged = {r["step"]: r["loss"] for r in records_of(tmp_path / "with") if r["kind"] == "train"}
    scalars = {event.step: event.value for event in events.Scalars("train/loss")}
    assert scalars == pytest.approx(logged)


def test_collected_values_are_norms_cosines_and_radii():
    layer = DecoupledConv2d(3, 5, 3, stride=2, padding="same", groups=1, magnitude="ball")
    network = nn.Sequential(layer, nn.ReLU(), DecoupledConv2d(5, 2, 1, magnitude="sphere"))
    x = torch.randn(4, 3, 7, 7)
    network(x)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = collect(network, x)
    assert network.training
    assert_same(dict(network.state_dict()), before)
    assert set(found) == {f"0/{n}" for n in ("patch_norm", "cosine", "radius")} | {
        f"2/{n}" for n in ("patch_norm", "cosine")
    }
    # 7 pixels at stride 2 are 4 outputs; one pixel of padding on each side.
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)
    b = (patches.square().sum(dim=1) + 1e-4).sqrt()
    w = layer.weight.detach().flatten(1)
    a = (w.square().sum(dim=1) + 1e-4).sqrt()
    c = (w @ patches) / a[:, None] / b[:, None]
    torch.testing.assert_close(found["0/patch_norm"].sort()[0], b.flatten().sort()[0])
    torch.testing.assert_close(
        found["0/cosine"].sort()[0], c.flatten().sort()[0].detach(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found["0/radius"], layer.radius.detach() * b.mean())


# Logs.


def test_log_lines_that_are_no_records_are_named_and_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "train", "step": 1, "loss": null}'
    bad = ["{", "[1]", '{"kind": "train"}', '{"kind": "train", "step": 2, "loss": "x"}', "\xff"]
    path.write_bytes("\n".join([good, *bad, good]).encode("latin-1"))
    said: list[str] = []
    assert read_metrics(path, said.append) == [json.loads(good)] * 2
    assert [text.partition(" must ")[0] for text in said] == [
        f"dcconv: {path}:{number}" for number in range(2, 7)
    ]
    with pytest.raises(ValueError, match=r"dcconv: run must have a readable metrics.jsonl, got"):
        read_metrics(tmp_path / "none", said.append)


def test_log_writes_null_for_what_is_no_number(tmp_path):
    log = RunLog(tmp_path, 0, print)
    log.write("evaluate", 3, {"accuracy": 1.5, "loss": math.nan})
    log.close()
    assert records_of(tmp_path) == [{"kind": "evaluate", "step": 3, "accuracy": 1.5, "loss": None}]


# Configuration.


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """Options of a runner."""

    data: str = option("here", "folder with 100 % of the data")
    preset: str = option("base", "where to start")
    lr: float = option(0.1, "learning rate")
    widths: tuple[int, ...] = option((8, 16), "filters")
    kind: Literal["a", "b"] = option("a", "of letter")


PRESETS = {"base": {}, "fast": {"lr": 0.5, "steps": 7, "widths": [4]}}


def parsed(*arguments: str, **given: Any) -> Options:
    return parse(Options, arguments, program="prog", description="Does.", presets=PRESETS, **given)


def test_flags_of_every_type():
    options = parsed(
        *("--lr", "1e-3", "--widths", "1", "2", "3", "--kind", "b", "--no-compile"),
        *("--channels-last", "--threads", "2", "--name", "x", "--save-every", "0"),
    )
    assert (options.lr, options.widths, options.kind) == (1e-3, (1, 2, 3), "b")
    assert (options.compile, options.channels_last, options.threads) == (False, True, 2)
    assert (options.name, options.save_every, options.data) == ("x", 0, "here")


def test_yaml_goes_out_and_in(tmp_path):
    options = parsed("--lr", "1e-5", "--widths", "3", "--threads", "1", "--data", "null hypothesis")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(options))
    assert parsed("--config", str(file)) == options
    assert from_mapping(Options, yaml.safe_load(file.read_text())) == options
    # YAML 1.1 reads this as text.
    file.write_text("lr: 1e-3\nthreads: null\n")
    assert parsed("--config", str(file)).lr == 1e-3


def test_later_sources_win(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("preset: fast\nlr: 0.3\n")
    assert (parsed().lr, parsed().steps) == (0.1, 1000)
    fast = parsed("--preset", "fast")
    assert (fast.lr, fast.steps, fast.widths) == (0.5, 7, (4,))
    assert parsed("--preset", "fast", "--lr", "0.2").lr == 0.2
    both = parsed("--config", str(file))
    assert (both.lr, both.steps) == (0.3, 7)
    assert parsed("--config", str(file), "--lr", "0.4").lr == 0.4


@pytest.mark.parametrize("flag", ["--resume", "--folder"])
def test_resumed_run_keeps_its_configuration(tmp_path, flag):
    stored = parsed("--preset", "fast", "--lr", "0.9", "--folder", str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(stored))
    again = parsed(flag, str(tmp_path), "--kind", "b")
    assert (again.lr, again.steps, again.kind, again.preset) == (0.9, 7, "b", "fast")
    given = asdict(again)
    assert given[flag[2:]] == str(tmp_path)
    assert given["folder" if flag == "--resume" else "resume"] is None


def test_dry_run_prints_yaml_and_what_would_run(capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed("--preset", "fast", "--dry-run", describe=lambda options: f"two\n{options.steps}")
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert output.endswith("# two\n# 7\n")
    assert from_mapping(Options, yaml.safe_load(output)) == parsed("--preset", "fast")


def test_action_runs_instead_and_help_has_every_flag(capsys):
    called = []
    with pytest.raises(SystemExit) as exit_:
        parsed("--list", "--steps", "0", actions={"list": ("all", lambda: called.append(1))})
    assert exit_.value.code == 0 and called == [1]
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--widths VALUE [VALUE ...] filters (default: 8 16)" in text
    assert "folder with 100 % of the data (default: here)" in text
    assert "--amp none|bf16|fp16" in text and "--compile, --no-compile" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpes", "3"], "dcconv: flags must be known, got '--stpes' (did you mean '--steps'?)"),
        (["--save_every=3"], "got '--save_every' (did you mean '--save-every'?)"),
        (["extra"], "dcconv: flags must be known, got 'extra'"),
        (["--steps", "x"], "dcconv: steps must be an integer, got 'x'"),
        (["--steps", "1.5"], "dcconv: steps must be an integer, got '1.5'"),
        (["--steps", "0"], "dcconv: steps must be an integer of at least 1, got 0"),
        (["--lr", "big"], "dcconv: lr must be a number, got 'big'"),
        (["--widths", "1", "y"], "dcconv: widths must be an integer, got 'y'"),
        (
            ["--amp", "bf61"],
            "dcconv: amp must be one of none, bf16, fp16, got 'bf61' (did you mean 'bf16'?)",
        ),
        (
            ["--preset", "fats"],
            "dcconv: preset must be one of base, fast, got 'fats' (did you mean 'fast'?)",
        ),
        (["--save-every", "-1"], "dcconv: save_every must be an integer of at least 0, got -1"),
        (["--seed", "4294967296"], "dcconv: seed must be below 2**32, got 4294967296"),
        (["--threads", "0"], "dcconv: threads must be an integer of at least 1, got 0"),
        (["--name", "a/b"], "dcconv: name must be a name without folders, got 'a/b'"),
        (["--resume", "none/such"], "dcconv: resume must be the folder of a run, got 'none/such'"),
        (["--resume", ".", "--folder", "."], "dcconv: resume must not be given together with"),
        (["--config", "none.yaml"], "dcconv: config must be a readable file, got 'none.yaml' (No"),
    ],
)
def test_wrong_flag_ends_with_the_house_sentence(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        parsed(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3", "be options of Options, got 'stpes' (did you mean 'steps'?)"),
        ("steps: [1", "dcconv: config must be valid YAML, got "),
        ("- 1", "dcconv: config must be a mapping of options, got "),
        ("compile: 1", "dcconv: compile must be true or false, got 1"),
        ("steps: true", "dcconv: steps must be an integer, got True"),
        ("steps: 1.5", "dcconv: steps must be an integer, got 1.5"),
        ("steps: null", "dcconv: steps must be an integer, got None"),
        ("data: [1]", "dcconv: data must be text, got [1]"),
        ("x: !!python/object/apply:os.getcwd []", "dcconv: config must be valid YAML, got "),
    ],
)
def test_wrong_file_ends_with_the_house_sentence(tmp_path, capsys, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parsed("--config", str(file))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# The whole command.


def test_launch_stores_everything_and_resumes(tmp_path, capsys):
    folder = tmp_path / "run"
    given = {"threads": 1, "folder": str(folder)}
    built = []

    def build(device):
        built.append(TinyTask())
        return built[-1]

    facts = {"operator": "tanh_cosine"}
    options = options_of(steps=6, **given)
    assert loop.launch(options, build, program="prog", name="x", facts=facts) == 0
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "results.json", "source"),
        *("tensorboard", "checkpoints"),
    }
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert from_mapping(EngineOptions, stored) == options
    assert json.loads((folder / "results.json").read_text())["operator"] == "tanh_cosine"
    output = capsys.readouterr().out
    assert f"Stored in {folder}" in output and "step 4/6: loss" in output and "left" in output
    options = options_of(steps=9, **given)
    assert loop.launch(options, build, program="prog", name="x") == 0
    assert built[1].steps == [6, 7, 8]
    assert json.loads((folder / "resumes.jsonl").read_text())["step"] == 6
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 9
    # The same seed builds the same network.
    assert loop.launch(options_of(steps=1, out=str(tmp_path)), build, program="p", name="y") == 0
    (other,) = tmp_path.glob("*_y")
    losses = [next(r for r in records_of(p) if r["step"] in (1, 4)) for p in (other, folder)]
    assert losses[0]["lr"] != losses[1]["lr"]


def test_folder_without_a_checkpoint_stays_as_it_was(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine")
    options = options_of(resume=str(tmp_path))
    assert loop.launch(options, lambda device: TinyTask(), program="p", name="x") == 2
    error = capsys.readouterr().err
    assert error == f"dcconv: resume must be a run with a checkpoint, got '{tmp_path}'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_launch_speaks_of_refusals_and_shows_mistakes(tmp_path, capsys):
    def refuse(device):
        raise ValueError("dcconv: data must be there, got nothing")

    def mistake(device):
        raise ValueError("a mistake")

    def stop(device):
        raise KeyboardInterrupt

    options = options_of(out=str(tmp_path))
    assert loop.launch(options, refuse, program="p", name="x") == 2
    assert capsys.readouterr().err == "dcconv: data must be there, got nothing\n"
    with pytest.raises(ValueError, match="a mistake"):
        loop.launch(options, mistake, program="p", name="x")
    assert loop.launch(options, stop, program="p", name="x") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is refused CUDA")
def test_cuda_without_a_gpu_is_refused(tmp_path, capsys):
    options = options_of(out=str(tmp_path), device="cuda")
    assert loop.launch(options, lambda device: TinyTask(), program="p", name="x") == 2
    assert "dcconv: device must be cpu or auto where PyTorch sees no GPU" in capsys.readouterr().err


def test_one_process_is_its_own_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.sums(x), x) and torch.equal(distributed.means(x), x)
    assert distributed.largest(3) == 3 and distributed.broadcast("a") == "a"
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_close_match_is_silent_about_strangers():
    assert config.close_match("zzz", ["steps"]) == ""
