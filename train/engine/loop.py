"""The training loop under all runners: steps, and everything that happens between them."""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dcconv.operator.checks import value_error
from train.data.stream import Stream
from train.engine import distributed, histograms
from train.engine.checkpoint import Checkpoints, Entry, tidy_run
from train.engine.config import EngineOptions, as_stored, changes, read_stored, to_yaml
from train.engine.files import ContentError
from train.engine.folder import CONFIG, METRICS, RESULTS, RunFolder
from train.engine.logs import EVALUATE, TRAIN, RunLog, require_log
from train.engine.nonfinite import (
    NonFiniteError,
    all_finite,
    first_gradient,
    first_layer,
    first_state,
)
from train.engine.owner import owned
from train.engine.progress import TrainProgress, rate
from train.engine.rng import rng_state, seed_all, set_rng_state
from train.engine.signals import StopRequestedError, StopSignals, exit_status
from train.engine.state import check_optimizer, check_state
from train.engine.terminal import SpellingConsole

FINISHED = 0
FAILED = 1
REFUSED = 2

# The score of an evaluation; its highest value makes the best checkpoint.
SCORE = "accuracy"
# Seconds between two agreements of the processes on whether to stop.
AGREEMENT_PERIOD = 0.5

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol):
    """What a runner hands to the engine.

    Iterations count from 0. ``loss`` calls ``forward_network``, which the Trainer sets to the
    network or to its compiled or distributed wrapper. Every process calls every method;
    ``evaluate`` returns the same on all of them, or what rank 0 returns counts.
    """

    network: nn.Module
    forward_network: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    stream: Stream

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, differentiable, and scalar terms to log, the same always."""

    def before_step(self, step: int) -> None:
        """Prepare iteration ``step``: set its learning rate."""

    def after_step(self, step: int) -> None:
        """Finish iteration ``step``, after the optimiser: projection, averages of weights."""

    def evaluate(self) -> dict[str, float]:
        """Return figures of the current weights: ``accuracy`` in % and what else there is.

        The network is in evaluation mode, and in training mode again afterwards. It may raise
        ``StopRequestedError``, on every process; it is called again when the run goes on.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs besides network, optimiser and stream."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""


class _Interval:
    """What happened since the last line of the log: sums of the loss and its terms, and time."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: list[Tensor] = []
        self.batches = 0
        self.restart_clock(0.0)

    def add(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Add one batch; no value is read, so the device runs on."""
        values = [loss.detach(), *(term.detach() for term in terms.values())]
        if not self.sums:
            if "loss" in terms:
                raise value_error("terms", "leave the name 'loss' to the whole loss", "'loss'")
            self.names = ["loss", *terms]
            self.sums = [value.to(torch.float32, copy=True) for value in values]
        else:
            torch._foreach_add_(self.sums, [value.to(torch.float32) for value in values])
        self.batches += 1

    def restart_clock(self, now: float) -> None:
        """Begin to count time, images and steps."""
        self.start = now
        self.waiting = 0.0
        self.images = 0
        self.steps = 0

    def clear(self) -> None:
        self.sums = []
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "sums": self.sums, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.names = list(state["names"])
        self.sums = [value.to(device) for value in state["sums"]]
        self.batches = state["batches"]


class Trainer:
    """Trains a task to its last step, or until a signal or an error ends it.

    With a folder that has checkpoints the run goes on after the newest intact one: on one device
    the result is the same, bit for bit, as without the interruption. A subclass may override
    :meth:`how_to_resume`, and nothing else.

    Args:
        task: what to train; its network is on the device already.
        options: how; see there.
        folder: of the run; on ranks other than 0 nothing is written to it.
        console: where to speak; a quiet one on ranks other than 0.
        device: where the stream's batches are; None for what ``options.device`` says.
        program: the command that resumes the run, for the message, ``python -m train.x``.
        facts: what the results shall say besides, ``{"operator": "tanh_cosine"}``.
        begin: called on every process when everything is restored and nothing written yet, with
            the step that is done and the number of processes that saved it, None and 0 for a new
            training. What it raises ends the run.

    Example:
        ``Trainer(task, EngineOptions(steps=9), RunFolder.create(out, "x"), Console()).run()``
    """

    def __init__(
        self,
        task: Task,
        options: EngineOptions,
        folder: RunFolder,
        console: Console,
        *,
        device: torch.device | None = None,
        program: str = "python -m train",
        facts: dict[str, Any] | None = None,
        begin: Callable[[int | None, int], None] = lambda step, processes: None,
    ) -> None:
        self.task = task
        self.options = options
        self.folder = folder
        self.console = console
        self.device = device or distributed.choose_device(options.device)
        self.program = program
        self.facts = facts or {}
        self.main = distributed.is_main()
        self.step = 0
        self.begin = begin
        self.checkpoints = Checkpoints(
            folder.checkpoints, options.keep_last, self._say, check_state
        )
        if options.resume is not None and self.checkpoints.last_step is None:
            raise value_error("resume", "be a run with a checkpoint", repr(options.resume))
        self.signals = StopSignals()
        self._interval = _Interval()
        self._log: RunLog | None = None
        self._progress: TrainProgress | None = None
        self._evaluation: dict[str, float] = {}
        self._speed: dict[str, float] = {}
        self._pending = False
        self._images: Tensor | None = None
        self._agree_every = 1
        # Processes that saved the checkpoint which was loaded.
        self._saved_by = 0
        self._wrap()

    # Set-up.

    def _wrap(self) -> None:
        options, network = self.options, self.task.network
        if options.channels_last:
            # Parameters stay the objects that the optimiser has.
            network.to(memory_format=torch.channels_last)
        self._parallel: DistributedDataParallel | None = None
        wrapped: Any = network
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = self._parallel = DistributedDataParallel(network, device_ids=ids)
        if options.compile:
            wrapped = torch.compile(wrapped)
        self.task.forward_network = wrapped
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self._amp_dtype = AMP_DTYPES.get(options.amp)

    def _say(self, text: str) -> None:
        if not self.main:
            return
        if self._progress is not None:
            self._progress.say(text)
        else:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._amp_dtype)

    # Saving and restoring.

    def _state(self) -> dict[str, Any]:
        own = {
            "rng": rng_state(self.device),
            "stream": self.task.stream.state_dict(),
            "interval": self._interval.state_dict(),
        }
        return {
            "step": self.step,
            "network": self.task.network.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
            "optimizer_kind": type(self.task.optimizer).__name__,
            "optimizer_entries": len(self.task.optimizer.state),
            "scaler": self.scaler.state_dict(),
            "task": self.task.state_dict(),
            "pending": self._pending,
            "evaluation": self._evaluation,
            "ranks": distributed.gather(own),
        }

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """Turn the refusal of a state that is another training's into a sentence."""
        try:
            yield
        # What was made elsewhere can fail anywhere in what takes it.
        except Exception as error:
            if str(error).startswith("dcconv: "):
                raise
            first = " ".join(str(error).split())[:200] or type(error).__name__
            rule = f"be a run of the same {what}"
            raise value_error("resume", rule, f"'{self.folder.path}' ({first})") from error

    def _restore(self, state: dict[str, Any]) -> None:
        task = self.task
        self.step = state["step"]
        with self._fitting("network and optimiser"):
            task.network.load_state_dict(state["network"])
            own_kind = type(task.optimizer).__name__
            kind = state.get("optimizer_kind", own_kind)
            if kind != own_kind:
                raise ContentError(f"its optimiser is {kind}, not {own_kind}")
            check_optimizer(task.optimizer, state["optimizer"])
            task.optimizer.load_state_dict(state["optimizer"])
        ranks = state["ranks"]
        same = len(ranks) == distributed.world_size()
        own = ranks[distributed.rank() if same else 0]
        with self._fitting("recipe and data"):
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            task.load_state_dict(state["task"])
            task.stream.load_state_dict(own["stream"])
            self._interval.load_state_dict(own["interval"], self.device)
        self._pending = state["pending"]
        self._evaluation = state["evaluation"]
        if same:
            with self._fitting("device"):
                set_rng_state(own["rng"], self.device)
        else:
            self._say(
                f"Resuming {len(ranks)} processes with {distributed.world_size()}: "
                "random numbers of the network begin anew"
            )
            seed_all(self.options.seed + self.step + distributed.rank())
        self._saved_by = len(ranks)

    def _load(self) -> Entry | None:
        """Restore the newest intact checkpoint, the same on every process."""
        chosen, failure = "", ""
        found = None
        if self.main:
            try:
                found = self.checkpoints.load_latest()
            except ValueError as error:
                failure = str(error)
            chosen = found[0].file if found is not None else ""
        chosen, failure = distributed.broadcast((chosen, failure))
        if failure:
            raise ValueError(failure)
        if not chosen:
            return None
        if found is None:
            # The other ranks read what rank 0 has found intact, and verify it themselves.
            others = Checkpoints(self.folder.checkpoints, check=check_state)
            (entry,) = (entry for entry in others.entries if entry.file == chosen)
            found = entry, others.load(entry)
        self._restore(found[1])
        return found[0]

    def _save(self, score: float | None = None) -> None:
        state = self._state()
        error = ""
        if self.main:
            try:
                self.checkpoints.save(state, self.step, score)
            except OSError as failure:
                error = failure.strerror or str(failure)
        error = distributed.broadcast(error)
        if error:
            last = self.checkpoints.last_step
            kept = "none was saved before" if last is None else f"that of step {last} is kept"
            rule = f"have room for the checkpoint of step {self.step}"
            raise UnsavedError(f"{value_error('out', rule, error)} ({kept})")

    # One step.

    def _step(self, watch: bool = False) -> None:
        """Do one step; with ``watch`` look at every value and raise where one is not finite."""
        task, interval, accumulate = self.task, self._interval, self.options.accumulate
        task.before_step(self.step)
        task.optimizer.zero_grad(set_to_none=True)
        for micro in range(accumulate):
            before = time.perf_counter()
            images, labels = task.stream.next()
            interval.waiting += time.perf_counter() - before
            if self.options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            # Gradients travel between processes once, with the last batch.
            alone = self._parallel is not None and micro + 1 < accumulate
            if watch:
                self._before_loss = rng_state(self.device)
            with self._parallel.no_sync() if alone and self._parallel else nullcontext():
                with self._autocast():
                    loss, terms = task.loss(images, labels)
                interval.add(loss, terms)
                if watch:
                    self._require_finite_loss(images, labels, loss)
                if accumulate > 1:
                    loss = loss / accumulate
                self.scaler.scale(loss).backward()
            interval.images += images.shape[0]
        if self.options.histogram_every:
            self._images = images
        # What a scaled gradient overflows in is the scaler's to skip.
        if watch and not self.scaler.is_enabled():
            self._require_finite_gradients()
        self.scaler.step(task.optimizer)
        self.scaler.update()
        task.after_step(self.step)
        self.step += 1
        interval.steps += 1

    # Between steps.

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stop_signal(self) -> int:
        """Return the signal that asks to stop, 0 for none, the same on every process."""
        if distributed.world_size() == 1:
            return self.signals.received
        if self.step % self._agree_every and self.step < self.options.steps:
            return 0
        return distributed.largest(self.signals.received)

    def _write_log(self) -> None:
        """Write the means since the last line; this is where the device is waited for."""
        interval = self._interval
        means = torch.stack(interval.sums) / interval.batches
        values = distributed.means(means).tolist()
        now = time.perf_counter()
        record: dict[str, float] = dict(zip(interval.names, values, strict=True))
        if not math.isfinite(record["loss"]):
            raise NonFiniteError(f"{record['loss']}")
        record["lr"] = float(self.task.optimizer.param_groups[0]["lr"])
        if self.scaler.is_enabled():
            record["loss_scale"] = float(self.scaler.get_scale())
        if interval.steps:
            seconds = max(now - interval.start, 1e-9)
            own = torch.tensor(
                [seconds / interval.steps, interval.waiting / seconds, interval.images / seconds],
                dtype=torch.float64,
            )
            step_seconds, waiting, images = distributed.means(own).tolist()
            record["step_seconds"] = step_seconds
            record["images_per_second"] = images * distributed.world_size()
            record["waiting_share"] = waiting
            record["peak_bytes"] = peak_bytes(self.device)
            self._speed = {name: record[name] for name in ("step_seconds", "images_per_second")}
            self._agree_every = min(max(round(AGREEMENT_PERIOD / step_seconds), 1), 100)
            if self._progress is not None:
                self._progress.record(
                    self.step, record["loss"], record["images_per_second"], step_seconds
                )
        if self._log is not None:
            with writing(self.step):
                self._log.write(TRAIN, self.step, record)
        interval.clear()
        interval.restart_clock(time.perf_counter())

    def _require_finite(self) -> None:
        """Refuse to save or to evaluate what a NaN has reached."""
        network = self.task.network
        fine = all_finite([*network.parameters(), *network.buffers(), *self._interval.sums[:1]])
        bad = distributed.largest(0 if bool(fine) else 1)
        if bad:
            raise NonFiniteError("nan")

    def _evaluate(self) -> float | None:
        """Evaluate and log; return the score where it is the best so far."""
        network = self.task.network
        network.eval()
        try:
            values = self.task.evaluate()
        finally:
            network.train()
        self._evaluation = {name: float(value) for name, value in values.items()}
        if self._log is not None:
            with writing(self.step):
                self._log.write(EVALUATE, self.step, self._evaluation)
        text = ", ".join(f"{name} {value:.4g}" for name, value in self._evaluation.items())
        self._say(f"step {self.step}: {text}")
        score = self._evaluation.get(SCORE)
        if score is None or not self.checkpoints.is_better(score):
            score = None
        best: float | None = distributed.broadcast(score)
        return best

    def _write_histograms(self) -> None:
        # The network runs on rank 0 alone: in evaluation nothing of it speaks to other ranks.
        if self._log is None or self._images is None:
            return
        with self._autocast():
            found = histograms.collect(self.task.network, self._images)
        with writing(self.step):
            for name, values in found.items():
                self._log.histogram(name, values, self.step)

    def _between(self, stop: int) -> int:
        """Do what is due after a step: log, evaluate, save; return the signal to stop at, else 0.

        An evaluation that a signal leaves no time for is pending in the checkpoint, and is done
        first when the run goes on.
        """
        options = self.options
        last = self.step == options.steps
        if self._due(options.log_every) or last:
            self._write_log()
        evaluate = self._due(options.evaluate_every) or last
        histogram = self._due(options.histogram_every)
        save = self._due(options.save_every) or last
        if not (evaluate or histogram or save or stop):
            return 0
        self._synchronise()
        before = time.perf_counter()
        self._require_finite()
        if histogram:
            self._write_histograms()
        score = None
        if evaluate and not stop:
            try:
                score = self._evaluate()
            except StopRequestedError:
                stop = distributed.largest(self.signals.received)
        self._pending = bool(stop) and evaluate
        if save or stop or score is not None:
            self._save(score)
            self._write_results("running")
        self._interval.start += time.perf_counter() - before
        return stop

    def _make_up(self) -> int:
        """Do the evaluation that a signal put off; return the signal that does so again, else 0."""
        options = self.options
        if self._pending and (self._due(options.evaluate_every) or self.step == options.steps):
            try:
                score = self._evaluate()
            except StopRequestedError:
                return distributed.largest(self.signals.received)
            self._pending = False
            self._save(score)
        self._pending = False
        return 0

    def _write_results(self, status: str, reason: str | None = None) -> None:
        if not self.main:
            return
        network = self.task.network
        results = {
            "status": status,
            "reason": reason,
            "step": self.step,
            "steps": self.options.steps,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "images_per_epoch": self.task.stream.images_per_epoch,
            "world_size": distributed.world_size(),
            "device": str(self.device),
            "peak_bytes": peak_bytes(self.device),
            **self._speed,
            "final": self._evaluation,
            "best": {SCORE: self.checkpoints.best_score},
            **self.facts,
        }
        with writing(self.step):
            self.folder.write_json(RESULTS, results)

    # The run.

    def run(self) -> int:
        """Train and return the exit status: 0, 1 for an error, 130 or 143 for a signal."""
        try:
            with self.signals:
                return self._run()
        except NonFiniteError as error:
            return self._fail(self._diagnosis(str(error)))
        except UnsavedError as error:
            return self._fail(str(error))
        finally:
            self._close()

    def _close(self) -> None:
        if self._log is not None:
            log, self._log = self._log, None
            try:
                log.close()
            except OSError as error:
                self._say(str(value_error("out", "take the end of the log", error.strerror)))

    def _fail(self, text: str) -> int:
        """Say why the run ends; what was saved stays."""
        if self.main:
            sys.stderr.write(text + "\n")
            if self.checkpoints.entries:
                sys.stderr.write(self.how_to_resume() + "\n")
            sys.stderr.flush()
            try:
                self._write_results("failed", text)
            except UnsavedError as error:
                sys.stderr.write(f"{error}\n")
        return FAILED

    def how_to_resume(self) -> str:
        """Return the sentence that tells how to go on after a signal or an error.

        This one names this training's command and folder. Where a larger run is resumed instead, a
        subclass names that.
        """
        return (
            f"Step {self.checkpoints.last_step} is saved; resume with: "
            f"{self.program} --resume {os.fspath(self.folder.path)}"
        )

    def _run(self) -> int:
        options = self.options
        resumed = self._load()
        start = self.step
        if start > options.steps:
            raise value_error("steps", f"be at least the {start} that are done", options.steps)
        if self.main:
            require_log(self.folder.path / METRICS)
        self.begin(None if resumed is None else start, self._saved_by)
        if self.main:
            with writing(self.step):
                tidy_run(self.folder.path)
                self._log = RunLog(self.folder.path, start, self._say)
            self._progress = TrainProgress(self.console, options.steps, start)
        network = self.task.network
        network.train()
        with self._progress or nullcontext():
            if resumed is None:
                # A run that ends in NaN is replayed from a checkpoint to find where it began.
                self._save()
            else:
                self._say(f"Resumed at step {start}")
            stop = self._make_up()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            if not stop:
                stop = self._loop()
        if stop:
            self._write_results("interrupted", signal.Signals(stop).name)
            if self.main:
                name = "Ctrl-C" if stop == signal.SIGINT else "SIGTERM"
                self._say(f"Stopped by {name} after step {self.step}. {self.how_to_resume()}")
            return exit_status(stop)
        self._write_results("finished")
        if self._speed:
            self._say(f"Trained {options.steps} steps, {rate(self._speed['images_per_second'])}")
        self._say(f"Stored in {self.folder.path}")
        return FINISHED

    def _loop(self) -> int:
        """Do the steps; return the signal that ended them early, else 0."""
        options, progress = self.options, self._progress
        self._interval.restart_clock(time.perf_counter())
        while self.step < options.steps:
            self._step()
            stop = self._between(self._stop_signal())
            if stop:
                return stop
            if progress is not None:
                progress.move(self.step, time.perf_counter())
        return 0

    # After a NaN.

    def _require_finite_gradients(self) -> None:
        name = first_gradient(self.task.network)
        self._agree_on(f"the gradient of {name}, the first on the way back" if name else "")

    def _agree_on(self, finding: str) -> None:
        """Stop every process where any has found something; the lowest rank's finding counts."""
        for found in distributed.gather(finding):
            if found:
                raise _FoundError(found)

    def _require_finite_loss(self, images: Tensor, labels: Tensor, loss: Tensor) -> None:
        if not distributed.largest(0 if bool(loss.detach().isfinite()) else 1):
            return
        # Every process repeats its forward, as layers may speak to those of other processes.
        self._agree_on(self._locate(images, labels))
        raise _FoundError("the loss itself, every layer's output being finite")

    def _locate(self, images: Tensor, labels: Tensor) -> str:
        """Return what is not finite in a forward pass that is repeated; nothing if all is."""
        task, wrapped = self.task, self.task.forward_network
        task.forward_network = task.network
        set_rng_state(self._before_loss, self.device)
        try:
            with self._autocast():
                layer = first_layer(task.network, lambda: task.loss(images, labels))
        finally:
            task.forward_network = wrapped
        if not bool(images.isfinite().all()):
            return "an image of the batch"
        return f"the output of layer {layer}" if layer is not None else ""

    def _diagnosis(self, value: str) -> str:
        """Replay the steps since the last checkpoint, each checked, and say what went wrong first.

        Training reads no value from the device between two lines of the log, so by now the NaN is
        everywhere. A step that is repeated from the same state gives the same numbers.
        """
        noticed = self.step
        last = self._load()
        start = self.step
        self._say(f"Something is not finite; repeating steps {start + 1} to {noticed} to find what")
        self._interval.restart_clock(0.0)
        finding, stop = "", 0
        try:
            with self.signals:
                while last is not None and self.step < noticed and not stop:
                    self._step(watch=True)
                    stop = distributed.largest(self.signals.received)
        except _FoundError as found:
            finding = str(found)
        sentence = str(value_error("loss", "be finite", value))
        if stop:
            name = signal.Signals(stop).name
            return f"{sentence} by step {noticed}; {name} ended the search for where it began"
        if not finding:
            state = first_state(self.task.network)
            finding = f"{state} of the network" if state else ""
        if finding:
            return f"{sentence} at step {self.step + 1}: the first that is not finite is {finding}"
        return f"{sentence} by step {noticed}; a replay from step {start} stayed finite"


class UnsavedError(Exception):
    """Something of the run could not be written; the message says what."""


@contextmanager
def writing(step: int) -> Iterator[None]:
    """Turn the refusal of a disk into a sentence."""
    try:
        yield
    except OSError as error:
        rule = f"be a disk that takes the log of step {step}"
        raise UnsavedError(str(value_error("out", rule, error.strerror or error))) from error


class _FoundError(Exception):
    """What is not finite, found in a replay."""


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: by PyTorch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def open_folder(options: EngineOptions, name: str) -> RunFolder:
    """Return the run's folder, the same on every process: a new one, a given one, a resumed one."""
    path = ""
    failure = ""
    if distributed.is_main():
        try:
            if options.resume is not None:
                path = options.resume
            elif options.folder is not None:
                path = os.fspath(RunFolder.at(Path(options.folder)).path)
            else:
                path = os.fspath(RunFolder.create(Path(options.out), options.name or name).path)
        except ValueError as error:
            failure = str(error)
    failure = distributed.broadcast(failure)
    if failure:
        raise ValueError(failure)
    return RunFolder(Path(distributed.broadcast(path)))


def folder_argument(options: EngineOptions) -> str:
    """Return the name of the option that says which folder a run has."""
    return "resume" if options.resume else "folder" if options.folder else "out"


def new_console() -> Console:
    """Return the console of a command; rank 0 alone speaks."""
    console = SpellingConsole(markup=False, highlight=False, quiet=not distributed.is_main())
    # Output that is no terminal has no width; tables need this much.
    if not console.is_terminal:
        console.width = 100
    return console


def _begin(
    folder: RunFolder,
    options: EngineOptions,
    device: torch.device,
    differences: dict[str, tuple[Any, Any]],
) -> Callable[[int | None, int], None]:
    """Return what rank 0 writes at the beginning of a run or where it goes on."""

    def begin(step: int | None, processes: int) -> None:
        if "accumulate" in differences:
            # As many batches in a step as before, of as many images: nothing else has changed.
            before, now = differences["accumulate"]
            if before * processes != now * distributed.world_size():
                rule = f"stay {before} in a run that is resumed by {processes} processes"
                raise value_error("accumulate", rule, now)
        if not distributed.is_main():
            return
        with writing(step or 0):
            if step is None:
                folder.start(to_yaml(options), device, distributed.world_size())
            else:
                folder.restart(to_yaml(options), device, step, differences)

    return begin


def _require_same(
    folder: RunFolder, options: EngineOptions
) -> tuple[EngineOptions, dict[str, tuple[Any, Any]]]:
    """Require a run with checkpoints to be the one that the options describe.

    Returns:
        The options as they are kept, and those that differ, former and new value by name.

    Raises:
        ValueError: the run is another one, or cannot tell; every process raises it.
    """
    failure, found, kept = "", dict[str, tuple[Any, Any]](), options
    if distributed.is_main():
        try:
            path = folder.path / CONFIG
            if not path.exists():
                got = repr(os.fspath(folder.path))
                raise value_error("resume", f"be a run with a {CONFIG}", got)
            stored = read_stored(path, options)
            found = changes(stored, options, options.free | {"accumulate"})
            kept = as_stored(stored, options)
            folder.history()
        except (TypeError, ValueError) as error:
            if not str(error).startswith("dcconv: "):
                raise
            failure = str(error)
    failure = distributed.broadcast(failure)
    if failure:
        raise ValueError(failure)
    return kept, distributed.broadcast(found)


def launch(
    options: EngineOptions,
    build: Callable[[torch.device], Task],
    *,
    program: str,
    name: str,
    facts: dict[str, Any] | None = None,
) -> int:
    """Do a whole run as a command: processes, seed, folder, task, training; return the exit status.

    Args:
        options: the runner's configuration, a subclass of the engine's options.
        build: makes the task on a device, after everything is seeded; ranks build the same weights.
        program: the command, ``python -m train.x``.
        name: of the run's folder, where the options give none.
        facts: what the results shall say besides, ``{"operator": "tanh_cosine"}``.
    """
    try:
        return _launched(options, build, program, name, facts)
    finally:
        # The frames of an error, and what they knew, are gone only now.
        distributed.forget()


def _launched(
    options: EngineOptions,
    build: Callable[[torch.device], Task],
    program: str,
    name: str,
    facts: dict[str, Any] | None,
) -> int:
    """Do a run in the processes that were started together, and say what it is refused for."""
    try:
        with distributed.started(options.device) as device:
            return _train(options, build, device, program, name, facts)
    except UnsavedError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    except (NotImplementedError, TypeError, ValueError) as error:
        # Any other is a mistake in the program, and shows where.
        if not str(error).startswith("dcconv: "):
            raise
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("Stopped by Ctrl-C before the first step\n")
        return exit_status(signal.SIGINT)


def _train(
    options: EngineOptions,
    build: Callable[[torch.device], Task],
    device: torch.device,
    program: str,
    name: str,
    facts: dict[str, Any] | None,
) -> int:
    """Do a run in the group of processes that there is; nothing that knows the group stays."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    seed_all(options.seed)
    task = build(device)
    if distributed.world_size() > 1:
        seed_all(options.seed + distributed.rank())
    folder = open_folder(options, name)
    console = new_console()
    with owned(folder.path, folder_argument(options), console.print):
        kept, differences = options, dict[str, tuple[Any, Any]]()
        if Checkpoints(folder.checkpoints).last_step is not None:
            kept, differences = _require_same(folder, options)
        trainer = Trainer(
            task,
            options,
            folder,
            console,
            device=device,
            program=program,
            facts=facts,
            begin=_begin(folder, kept, device, differences),
        )
        return trainer.run()
