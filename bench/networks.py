"""Whole networks: one training step and one inference step, plain and converted.

A row is a network, an operator, a dtype, a layout and a pass. Its providers are the network as it
is (plain), the network with every convolution converted (dcconv.convert) on the plain PyTorch
reference, and the same on every backend of dcconv; all start from the same weights and statistics
and are timed in one run, in rounds (bench/timing.py holds the protocol). Pass train is forward,
cross entropy, backward and a step of SGD with momentum on one batch of random images; pass
inference is a forward in evaluation mode without gradients. Half precision is PyTorch's autocast.
Weights are random and the classifier stays plain; so do the shortcuts of CIFAR ResNet-32, as in the
official network.

Before a converted network is timed its logits, and in training the gradients of its first and last
decoupled filters, are compared with the same network in float64, on the first images of the batch
(the accuracy rule with a higher cap on the peer's error, since errors grow with depth; for
training, kinks such as ReLU are replaced by smooth functions, since at a kink rounding decides). A
wrong one gets its error printed in place of a time, and the exit status is 1. Peak memory is what
the step takes beyond the network, its images and the optimiser's state.

With --fuse-norms every backend has a second provider, converted with fuse_norms=True. Its ReLUs
belong to fused layers, which have no smooth stand-in: for both passes its logits in evaluation mode
are compared. Sums are handed on outside of inference mode, so its inference is under no_grad.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import dcconv
from bench import options as shared
from bench.accuracy import error
from bench.cases import OPERATORS, Operator, find_operator
from bench.memory import kept, peak_bytes
from bench.options import DTYPES, INTERRUPTED, LAYOUTS
from bench.records import Record
from bench.tables import Grid, badness, first_own, notes, number, print_grid, time_cell
from bench.timing import NOISY, Protocol, Stopwatch, uncertainty
from dcconv import backends
from dcconv.operator.checks import integer, value_error
from dcconv.operator.numerics import ACCURACY_FLOOR, PEER_FACTOR
from dcconv.optim import decoupled_layers

KIND = "networks"
QUICK_ROUNDS = 3
QUICK_NETWORKS = ("resnet18", "resnet32", "convnext")

TRAIN, INFERENCE = PASSES = ("train", "inference")
PLAIN, REFERENCE, OURS = "plain", "reference", "dcconv-"
# Behind a backend's name: with the batch normalisations fused that can be.
FUSED = "+fuse_norms"

# A step that leaves the weights where they are, but for rounding.
LEARNING_RATE = 1e-6
# As a gradient scaler does, so that float16 gradients are no zeros.
LOSS_SCALE = {"float16": 1024.0}

# The float64 network of a large batch would not fit; that of its first images does.
GATE_BATCH = 8

# A peer with a larger error shows nothing: the rule then allows what this one would.
WORST_PEER = 0.25

LEGEND = (
    "Times are medians in ms; * noisy: a median uncertain by more than 10 %. Peak: the most memory "
    "of a step beyond weights, images and optimiser state. Kept: "
    "between forward and backward, parameters apart. MiB."
)


def _models() -> ModuleType:
    return importlib.import_module("torchvision.models")


def resnet18() -> nn.Module:
    network: nn.Module = _models().resnet18()
    return network


def resnet50() -> nn.Module:
    network: nn.Module = _models().resnet50()
    return network


def convnext() -> nn.Module:
    """Return a ConvNeXt of half the width of its smallest published size, and fewer blocks."""
    block = importlib.import_module("torchvision.models.convnext").CNBlockConfig
    widths, depths = (48, 96, 192, 384), (2, 2, 4, 2)
    settings = [
        block(width, following, depth)
        for width, following, depth in zip(widths, (*widths[1:], None), depths, strict=True)
    ]
    network: nn.Module = _models().ConvNeXt(settings)
    return network


def resnet32() -> nn.Module:
    """Return the wide ResNet-32 of CIFAR-100 with 96, 192 and 384 filters.

    Its convolutions pad symmetrically and by themselves: an extra pass that pads would make the
    plain network look slower than it has to be.
    """
    from train.networks import ResNet32
    from train.networks.layers import SameConv2d
    from train.networks.operators import find_operator as find_training_operator

    network = ResNet32(find_training_operator("conv"), 100)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SameConv2d):
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    child.stride[0],
                    child.kernel_size[0] // 2,
                    bias=False,
                )
                plain.weight = child.weight
                parent.register_module(name, plain)
    return network


class Network(NamedTuple):
    """A network that is measured.

    Attributes:
        title: what it is, in a few words.
        build: makes it, with random weights.
        module: what must be installed for it.
        image_size: pixels, and with ``--quick``.
        batch: images by device, and with ``--quick``.
        plain: parts of names of convolutions that are not converted.
    """

    title: str
    build: Callable[[], nn.Module]
    module: str
    image_size: int
    quick_image_size: int
    batch: dict[str, int]
    quick_batch: int
    plain: tuple[str, ...] = ()


NETWORKS: dict[str, Network] = {
    "resnet18": Network("ResNet-18", resnet18, "torchvision", 224, 64, {"cpu": 8, "cuda": 128}, 2),
    "resnet50": Network("ResNet-50", resnet50, "torchvision", 224, 64, {"cpu": 8, "cuda": 64}, 2),
    "resnet32": Network(
        "CIFAR ResNet-32 (96, 192, 384)",
        resnet32,
        "train.networks",
        32,
        16,
        {"cpu": 16, "cuda": 128},
        2,
        ("classifier", "shortcut"),
    ),
    "convnext": Network(
        "ConvNeXt (2, 2, 4, 2 blocks; 48 to 384 wide)",
        convnext,
        "torchvision",
        224,
        64,
        {"cpu": 8, "cuda": 64},
        2,
    ),
}


def why_missing(name: str) -> str | None:
    """Return one sentence why a network cannot be built here, or None."""
    module = NETWORKS[name].module
    try:
        importlib.import_module(module)
    # Built for another PyTorch, torchvision raises a RuntimeError.
    except (ImportError, RuntimeError) as failure:
        return f"it needs {module.partition('.')[0]}, which cannot be imported ({failure})"
    return None


@dataclass(frozen=True)
class Case:
    """One configuration: everything of a row but its pass."""

    name: str
    operator: Operator
    dtype: str
    layout: str
    device: str
    batch: int
    image_size: int

    @property
    def label(self) -> str:
        """A readable id."""
        return f"{self.name} {self.operator.name} {self.dtype}"

    @property
    def network(self) -> Network:
        """What is measured."""
        return NETWORKS[self.name]

    def autocast(self) -> torch.autocast:
        """Return the context of a forward: half precision where the dtype is half."""
        half = self.dtype in ("bfloat16", "float16")
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=half)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the case's device, dtype and layout."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        layout: Any = {"memory_format": LAYOUTS[self.layout]}
        placed: nn.Module = network.to(device=self.device, dtype=dtype, **layout)
        return placed

    def convert(self, network: nn.Module, backend: str, fuse_norms: bool = False) -> nn.Module:
        """Convert a copy of a network to the case's operator."""
        with warnings.catch_warnings():
            # The caller estimates them, or loads estimated ones.
            warnings.filterwarnings("ignore", "dcconv: convert leaves the moving averages")
            return dcconv.convert(
                copy.deepcopy(network),
                select=lambda name, conv: not any(part in name for part in self.network.plain),
                heads="convert",
                magnitude=self.operator.magnitude,
                angular=self.operator.angular,
                backend=backend,
                fuse_norms=fuse_norms,
            )

    def data(self) -> tuple[Tensor, Tensor]:
        """Draw images and labels from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator)
        labels = torch.randint(100, (self.batch,), generator=generator)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        placed = images.to(self.device, dtype).contiguous(memory_format=LAYOUTS[self.layout])
        return placed, labels.to(self.device)


class Step:
    """The passes of one network on one batch."""

    def __init__(self, case: Case, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.case = case
        self.network = network
        self.images = images
        self.labels = labels
        self.optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def forward(self) -> Tensor:
        """Return the logits."""
        with self.case.autocast():
            logits: Tensor = self.network(self.images)
        return logits

    @property
    def scale(self) -> float:
        """What the loss is multiplied by."""
        return LOSS_SCALE.get(self.case.dtype, 1.0)

    def loss_of(self, logits: Tensor) -> Tensor:
        """Return the scaled loss of logits, at the images' precision."""
        return F.cross_entropy(logits.to(self.images.dtype), self.labels) * self.scale

    def loss(self) -> Tensor:
        """Return the scaled loss."""
        return self.loss_of(self.forward())

    def train(self) -> None:
        """Do one training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference(self) -> Tensor:
        """Return the logits, without anything kept for backward."""
        fused = any(isinstance(part, dcconv.BatchNormAct2d) for part in self.network.modules())
        with torch.no_grad() if fused else torch.inference_mode():
            return self.forward()

    def of(self, which: str) -> Callable[[], object]:
        """Return the call of a pass, with the network in its mode."""
        self.network.train(which == TRAIN)
        return self.train if which == TRAIN else self.inference


@dataclass(frozen=True)
class Gate:
    """What a converted network computes in float64, and how far off it may be in its dtype."""

    truth: dict[str, Tensor]
    allowed: dict[str, float]
    peer: dict[str, float]

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Return the error of every tensor."""
        return {name: error(found[name], truth) for name, truth in self.truth.items()}

    def refusal(self, errors: dict[str, float]) -> str | None:
        """Return one sentence naming the errors above what is allowed, or None."""
        wrong = [
            f"{name} off by {value:.1e}, allowed {self.allowed[name]:.1e}"
            for name, value in errors.items()
            if not value <= self.allowed[name]
        ]
        return "wrong: " + "; ".join(wrong) if wrong else None


def smooth(network: nn.Module) -> nn.Module:
    """Replace ReLU and maximum pooling by functions without kinks, in place.

    At a kink rounding decides about a gradient: one flipped ReLU in front of a nearly constant
    channel changes gradients by more than all rounding together, in any two correct programs.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                parent.register_module(name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                parent.register_module(name, pool)
    return network


def observe(
    case: Case, network: nn.Module, images: Tensor, labels: Tensor, which: str
) -> dict[str, Tensor]:
    """Return the logits of a pass, and in training two gradients of the unscaled loss.

    The network's mode, statistics and, in training, kinks are changed.
    """
    network.train(which == TRAIN)
    if which == INFERENCE:
        return {"logits": Step(case, network, images, labels).inference()}
    step = Step(case, smooth(network), images, labels)
    logits = step.forward()
    layers = list(decoupled_layers(network))
    weights = (layers[0].weight, layers[-1].weight)
    first, last = (grad / step.scale for grad in torch.autograd.grad(step.loss_of(logits), weights))
    return {"logits": logits.detach(), "grad_first": first, "grad_last": last}


def make_gate(case: Case, network: nn.Module, images: Tensor, labels: Tensor, which: str) -> Gate:
    """Evaluate a converted network on the reference in float64 and in the case's dtype."""
    exact = dataclasses.replace(case, dtype="float64")
    double = exact.place(copy.deepcopy(network))
    truth = observe(exact, double, images.double(), labels, which)
    own = observe(case, copy.deepcopy(network), images, labels, which)
    peer = {name: error(own[name], value) for name, value in truth.items()}
    floor = ACCURACY_FLOOR[DTYPES[case.dtype]]
    allowed = {n: PEER_FACTOR * min(value, WORST_PEER) + floor for n, value in peer.items()}
    return Gate(truth, allowed, peer)


def backend_of(provider: str) -> str:
    """Return the backend of one of our providers."""
    return provider.removeprefix(OURS).removesuffix(FUSED)


class Networks(NamedTuple):
    """The networks of one case, with the same weights and, converted, the same statistics."""

    plain: nn.Module
    converted: nn.Module

    def of(self, provider: str, case: Case) -> nn.Module:
        """Return a fresh copy of a provider's network."""
        if provider == PLAIN:
            return copy.deepcopy(self.plain)
        if provider == REFERENCE:
            return copy.deepcopy(self.converted)
        network = case.convert(self.plain, backend_of(provider), provider.endswith(FUSED))
        network.load_state_dict(self.converted.state_dict())
        return network


def make_networks(case: Case, images: Tensor) -> Networks:
    """Build the networks of a case from a fixed seed."""
    from train.networks import start_statistics

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        plain = case.place(case.network.build())
    converted = case.convert(plain, REFERENCE)
    with case.autocast():
        # Evaluation divides by these; as built they are constants that fit no operator.
        for network in (plain, converted):
            start_statistics(network, images)
    return Networks(plain, converted)


def prepare(
    case: Case, networks: Networks, gate: Gate, step: Step, provider: str, which: str
) -> dict[str, Any]:
    """Check a provider's results, call it once and measure its memory; return its result."""
    result: dict[str, Any] = {"timing": None, "note": None}
    if provider == REFERENCE:
        result["errors"] = gate.peer
    elif provider != PLAIN:
        some = step.images[:GATE_BATCH], step.labels[:GATE_BATCH]
        compared = INFERENCE if provider.endswith(FUSED) else which
        found = observe(case, networks.of(provider, case), *some, compared)
        errors = result["errors"] = gate.errors(found)
        result["note"] = gate.refusal(errors)
        if result["note"] is not None:
            return result
    call = step.of(which)
    # The optimiser's state is there after one step.
    call()
    result["peak"] = peak_bytes(call, case.device)
    if which == TRAIN:
        result["kept"] = asdict(kept(step.loss, step.images, step.network.parameters()))
    return result


def measure(
    case: Case, providers: list[str], passes: list[str], watch: Stopwatch, protocol: Protocol
) -> Iterator[Record]:
    """Measure the passes of one case."""
    images, labels = case.data()
    networks = make_networks(case, images)
    some = images[:GATE_BATCH], labels[:GATE_BATCH]
    for which in passes:
        gate = make_gate(case, networks.converted, *some, which)
        gate_of_fused = gate
        if which == TRAIN and any(name.endswith(FUSED) for name in providers):
            gate_of_fused = make_gate(case, networks.converted, *some, INFERENCE)
        results: dict[str, dict[str, Any]] = {}
        calls = {}
        for name in providers:
            reason = None
            if name.startswith(OURS):
                reason = backends.why_not(backend_of(name), images, *case.operator)
            if reason is not None:
                results[name] = {"timing": None, "note": f"missing: {reason}"}
                continue
            step = Step(case, networks.of(name, case), images, labels)
            try:
                own = gate_of_fused if name.endswith(FUSED) else gate
                results[name] = prepare(case, networks, own, step, name, which)
            # Out of memory, or a backend that refuses one of the layers.
            except RuntimeError as failure:
                text = str(failure).partition("\n")[0].removeprefix("dcconv: ")
                results[name] = {"timing": None, "note": f"failed: {text}"}
            if results[name]["note"] is None:
                calls[name] = step.of(which)
        for name, timing in watch.interleave(calls, protocol).items():
            results[name]["timing"] = asdict(timing)
            results[name]["images_per_s"] = case.batch / timing.median * 1e3
        yield Record(
            kind=KIND,
            row={
                "network": case.name,
                "operator": case.operator.name,
                "dtype": case.dtype,
                "layout": case.layout,
                "batch": case.batch,
                "image_size": case.image_size,
                "pass": which,
                "threads": torch.get_num_threads(),
            },
            results=results,
            facts={
                "title": case.network.title,
                "own": first_own(results),
                "convolutions": sum(isinstance(m, nn.Conv2d) for m in networks.plain.modules()),
                "converted": sum(1 for _ in decoupled_layers(networks.converted)),
                "parameters": sum(p.numel() for p in networks.plain.parameters()),
                "allowed": gate.allowed,
            },
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sub-command."""
    shared.add_common(parser)
    add, names = parser.add_argument, shared.names
    add(
        "--networks",
        type=names,
        metavar="A,B",
        help=f"{', '.join(NETWORKS)} (all; quick without resnet50)",
    )
    add("--batch", type=int, help="images of a step (by network and device)")
    add("--image-size", type=int, help="height and width in pixels (224; resnet32 32)")
    add(
        "--operators",
        type=names,
        metavar="A,B",
        help=f"<magnitude>-<angular> ({OPERATORS[0]})",
    )
    add("--layout", type=names, dest="layouts", metavar="A,B", help=", ".join(LAYOUTS))
    add("--passes", type=names, metavar="A,B", help=", ".join(PASSES))
    add("--fuse-norms", action="store_true", help="every backend with fused norms as well")


def complete(options: argparse.Namespace) -> None:
    """Fill in what was not given and check every value."""
    if options.quick and options.rounds is None:
        options.rounds = QUICK_ROUNDS
    shared.complete_common(options)
    if options.networks is None:
        options.networks = list(QUICK_NETWORKS if options.quick else NETWORKS)
    if options.dtypes is None:
        options.dtypes = ["float32"] if options.device == "cpu" else ["bfloat16"]
    if options.operators is None:
        options.operators = list(OPERATORS[:1])
    options.layouts = ["channels_last"] if options.layouts is None else options.layouts
    options.passes = list(PASSES) if options.passes is None else options.passes
    shared.check_names("--networks", options.networks, NETWORKS)
    shared.check_names("--layout", options.layouts, LAYOUTS)
    shared.check_names("--passes", options.passes, PASSES)
    for name in options.operators:
        find_operator(name)
    if not options.operators:
        shared.check_names("--operators", options.operators, OPERATORS)
    if options.batch is not None:
        integer("--batch", options.batch, 1)
    if options.image_size is not None:
        # The last layers see a pixel per 32; batch normalisation needs two values per channel.
        integer("--image-size", options.image_size, 64 if options.batch == 1 else 32)


def providers_of(options: argparse.Namespace) -> list[str]:
    """Return what is measured of every network; a refusing backend has a row with its sentence."""
    chosen = options.backends
    if chosen is None:
        chosen = shared.willing_backends(options.device) or backends.names
    own = [OURS + name for name in chosen if name != REFERENCE]
    fused = [name + FUSED for name in own if options.fuse_norms]
    return [PLAIN, REFERENCE, *own, *fused]


def cases_of(options: argparse.Namespace, names: list[str]) -> list[Case]:
    """Return what the options ask for."""
    cases = []
    for name in names:
        network = NETWORKS[name]
        size = network.quick_image_size if options.quick else network.image_size
        batch = network.quick_batch if options.quick else network.batch[options.device]
        cases += [
            Case(
                name,
                find_operator(operator),
                dtype,
                layout,
                options.device,
                options.batch or batch,
                options.image_size or size,
            )
            for dtype in options.dtypes
            for layout in options.layouts
            for operator in options.operators
        ]
    return cases


def grid(records: list[Record], worst: bool = False) -> Grid:
    """Return one line per network, pass and provider; what all rows share stands in the title."""
    fields = ("operator", "dtype", "layout")
    varying = [f for f in fields if len({record.row[f] for record in records}) > 1]
    common = [str(records[0].row[f]) for f in fields if f not in varying]

    def ratio(record: Record) -> float:
        own = [record.ratio(name, PLAIN) or 0.0 for name in record.results if OURS in name]
        return badness(record, max(own, default=0.0))

    cells = []
    for record in sorted(records, key=ratio, reverse=True) if worst else records:
        row = record.row
        names = [row["network"], *(row[f] for f in varying)]
        names += [f"{row['batch']} x {row['image_size']} px", row["pass"]]
        for provider, result in record.results.items():
            timing = result.get("timing")
            noisy = timing and uncertainty(**timing) > NOISY
            cells.append(
                [
                    *names,
                    provider,
                    time_cell(record, provider) + ("*" if noisy else ""),
                    number(record.ratio(provider, PLAIN)),
                    number(record.ratio(provider, REFERENCE)),
                    number(result.get("images_per_s"), 1),
                    mebibytes(result.get("peak")),
                    mebibytes((result.get("kept") or {}).get("total")),
                ]
            )
    header = ["network", *varying, "images", "pass", "provider"]
    titles = [*header, "ms", "/plain", "/reference", "images/s", "peak", "kept"]
    return Grid(", ".join(["Networks", *common]), titles, cells, len(header))


def mebibytes(value: int | None) -> str:
    """Return bytes as MiB."""
    return "" if value is None else number(value / 2**20, 1)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, print and store; return 1 if a row is wrong, 130 if interrupted."""
    complete(options)
    reasons = {name: why_missing(name) for name in options.networks}
    present = [name for name, reason in reasons.items() if reason is None]
    for reason in dict.fromkeys(r for r in reasons.values() if r is not None):
        left_out = ", ".join(name for name, why in reasons.items() if why == reason)
        console.print(f"Left out: {left_out}: {reason}.", style="yellow", soft_wrap=True)
    if not present:
        rule = "name a network that can be built here"
        raise value_error("--networks", rule, ", ".join(options.networks))
    cases, providers = cases_of(options, present), providers_of(options)
    sink = shared.Sink(KIND, options, console)
    watch, protocol = shared.stopwatch(options, ahead=False), shared.protocol(options)
    status = 0
    progress = shared.progress_bar()
    try:
        with progress:
            task = progress.add_task("", total=len(cases) * len(options.passes))
            for case in cases:
                progress.update(task, description=case.label)
                for record in measure(case, providers, options.passes, watch, protocol):
                    sink.add(record)
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(sink.records)} rows are finished.", style="yellow")
        status = INTERRUPTED
    if sink.records:
        print_grid(console, grid(sink.records, options.worst), LEGEND)
        for line in notes(sink.records):
            console.print(line, markup=False, highlight=False)
    if sink.path is not None:
        console.print(f"Appended to {sink.path}", soft_wrap=True, highlight=False)
    if any(record.wrong for record in sink.records):
        status = status or 1
    return status
