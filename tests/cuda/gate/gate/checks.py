"""What is checked on a GPU. Every check also runs on CPU tensors where that makes sense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import Results, check, error, evaluate, limit, random_cotangent, reference_call
from cases import ANGULARS, CASES, OPERATORS, WEIGHTED_MAGNITUDES, Case, Inputs, _arrange, by_id
from cases import make_inputs as draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import dcconv
from dcconv import backends, functional
from dcconv.call import implementations
from dcconv.operator import reference
from dcconv.operator.numerics import ANGLE_DELTA
from gate.report import Figures, NotRun

ROOT = Path(__file__).resolve().parents[4]

LAYOUTS = ("contiguous", "channels_last", "sliced")
NORMS = ("batch", "given", "none")
# Of the ops that backends are made of.
NAMESPACES = {record.namespace for record in implementations.backends.values()}
REDUCED_CASES = ("1x1", "3x3-p1", "3x3-s2-p1", "groups3-odd", "same-s2-even", "n0")


@dataclass(frozen=True)
class Where:
    """The device and backend under test.

    Attributes:
        device: ``cuda`` or ``cpu``.
        backend: a name in ``dcconv.backends.names``.
        reduced: whether a small selection is enough.
    """

    device: str
    backend: str
    reduced: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def need_gpu(self, what: str) -> None:
        if not self.on_gpu:
            raise NotRun(f"{what} need a GPU")

    def need_compiled(self, what: str) -> None:
        """Leave out what is about the compiled library where another backend is under test."""
        if self.backend == "triton":
            raise NotRun(f"{what} are those of the compiled library")

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Return None if the backend takes a dtype, else its sentence."""
        return backends.why_not(self.backend, torch.zeros(1, dtype=dtype, device=self.device))

    def need_dtype(self, dtype: torch.dtype) -> None:
        reason = self.refusal(dtype)
        if reason is not None:
            raise NotRun(reason)


def placed(inputs: Inputs, layout: str, device: str) -> Inputs:
    """Return inputs on a device, x and weight in a layout there: a copy drops strides with gaps."""
    tensors = {name: t.to(device) for name, t in inputs.tensors.items()}
    tensors["x"] = _arrange(tensors["x"], layout)
    tensors["weight"] = _arrange(
        tensors["weight"], "contiguous" if layout == "expanded" else layout
    )
    return Inputs(tensors, inputs.options)


def cpu(results: Results) -> Results:
    return {name: t.cpu() for name, t in results.items()}


def compare(
    where: Where,
    name: str,
    inputs: Inputs,
    layout: str,
    rule: torch.dtype | None = None,
    call: Callable[..., Tensor] | None = None,
    **extra: Any,
) -> float:
    """Judge y and all gradients against the float64 reference on the CPU.

    Args:
        where: what is tested; the peer is the plain formula on the same device.
        name: shown in errors.
        inputs: contiguous, on the CPU.
        layout: of x and weight under test.
        rule: the dtype whose floor counts, when not that of x.
        call: the functional under test; None for the backend's.
        extra: its arguments.

    Returns:
        The largest share of its limit that an error takes.
    """
    dtype = inputs.tensors["x"].dtype
    cotangent = random_cotangent(inputs)
    wide = Inputs({key: t.double() for key, t in inputs.tensors.items()}, inputs.options)
    truth = evaluate(reference_call(ANGLE_DELTA[dtype]), wide, cotangent.double())
    here = placed(inputs, layout, where.device)
    dy = cotangent.to(where.device)
    peer = cpu(evaluate(reference_call(), here, dy))
    own = partial(functional.decoupled_conv2d, backend=where.backend)
    got = cpu(evaluate(own if call is None else call, here, dy, **extra))
    worst = 0.0
    for tensor, right in truth.items():
        check(f"{name}: {tensor}", got[tensor], right, peer[tensor], rule or dtype)
        allowed = limit(error(peer[tensor], right), rule or dtype)
        worst = max(worst, error(got[tensor], right) / allowed)
    return worst


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let float32 products of the library use TF32, or not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def accuracy(where: Where, dtype: torch.dtype, with_tf32: bool = False) -> Figures:
    """Every case in every layout with some operators, then every operator on one case."""
    where.need_dtype(dtype)
    # TF32 has the 10 bits of float16.
    rule = torch.float16 if with_tf32 else None
    worst, compared = 0.0, 0
    reduced = where.reduced or with_tf32
    cases = [by_id(name) for name in REDUCED_CASES] if reduced else CASES
    with tf32(with_tf32):
        for i, case in enumerate(cases):
            for j, layout in enumerate(LAYOUTS):
                for step in range(1 if reduced else 2):
                    at = 7 * i + 29 * j + 37 * step
                    magnitude, weighting, angular = OPERATORS[at % len(OPERATORS)]
                    inputs = draw(
                        case,
                        dtype,
                        magnitude=magnitude,
                        weighting=weighting,
                        angular=angular,
                        norm=NORMS[at % 3],
                        bias=at % 4 == 0,
                        scalar=at % 5 == 0,
                    )
                    name = f"{case.id} {layout} {magnitude} {weighting} {angular}"
                    worst = max(worst, compare(where, name, inputs, layout, rule))
                    compared += 1
        for i, (magnitude, weighting, angular) in enumerate(OPERATORS[:: 16 if reduced else 1]):
            layout = LAYOUTS[i % 2]
            inputs = draw(
                by_id("groups3-odd" if i % 3 == 0 else "3x3-p1"),
                dtype,
                magnitude=magnitude,
                weighting=weighting,
                angular=angular,
                norm=NORMS[i % 3],
                alpha=1.25,
                beta=0.75,
                power=2.5,
            )
            name = f"{layout} {magnitude} {weighting} {angular}"
            worst = max(worst, compare(where, name, inputs, layout, rule))
            compared += 1
        for angular in ("cosine", "square_cosine", "linear"):
            inputs = draw(by_id("3x3-p1"), dtype, angular=angular)
            for layout in LAYOUTS[:2]:
                worst = max(worst, compare(where, angular, inputs, layout, rule, keep="dot"))
                compared += 1
    return {"compared": compared, "error / limit": worst}


def wide_layers(where: Where, dtype: torch.dtype) -> Figures:
    """Channel counts that fill vectors and blocks, or just do not."""
    where.need_dtype(dtype)
    worst, compared = 0.0, 0
    for c, o, k in ((64, 64, 3), (257, 130, 1), (96, 520, 1), (1040, 24, 1), (33, 65, 3)):
        case = Case(f"{c}-{o}-{k}", 2, c, 9, 7, o, (k, k), padding=k // 2)
        for angular, layout in (("cosine", "channels_last"), ("sigmoid", "contiguous")):
            inputs = draw(case, dtype, angular=angular, bias=angular == "sigmoid")
            with tf32(False):
                worst = max(worst, compare(where, f"{case.id} {layout}", inputs, layout))
            compared += 1
    return {"compared": compared, "error / limit": worst}


def patch_norm(where: Where) -> Figures:
    """The norm map and its gradient, every case and dtype."""
    worst, compared = 0.0, 0
    cases = [by_id(name) for name in REDUCED_CASES] if where.reduced else CASES
    for case in cases:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            if where.refusal(dtype) is not None:
                continue
            plain = draw(case, dtype)
            for layout in LAYOUTS:
                x = placed(plain, layout, where.device).tensors["x"]
                results = []
                for function, value, extra in (
                    (reference.patch_norm, plain.tensors["x"].double(), {}),
                    (reference.patch_norm, x, {}),
                    (functional.patch_norm, x, {"backend": where.backend}),
                ):
                    leaf = value.detach().requires_grad_()
                    b = function(leaf, case.kernel, **case.geometry, **extra)
                    dy = torch.linspace(0.5, 1.5, b.numel(), dtype=torch.float64).reshape(b.shape)
                    (grad,) = torch.autograd.grad(b, leaf, dy.to(b.device, b.dtype))
                    results.append((b.detach().cpu(), grad.cpu()))
                for name, right, peer, got in zip(("b", "grad"), *results, strict=True):
                    check(f"{case.id} {layout} {dtype} {name}", got, right, peer, dtype)
                    worst = max(worst, error(got, right) / limit(error(peer, right), dtype))
                    compared += 1
    return {"compared": compared, "error / limit": worst}


def gradcheck(where: Where) -> Figures:
    """Analytic against numeric gradients, both layouts, groups, dilation, bias, mean norm."""
    where.need_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, low: float | None = None) -> Tensor:
        if low is None:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            values = low + torch.rand(shape, generator=generator, dtype=torch.float64)
        return values.to(where.device).requires_grad_()

    checked = 0
    chosen = WEIGHTED_MAGNITUDES[:: 5 if where.reduced else 1]
    for i, (magnitude, weighting) in enumerate(chosen):
        for layout in (torch.contiguous_format, torch.channels_last):
            angular = ANGULARS[(i + (layout == torch.channels_last)) % len(ANGULARS)]
            tensors = (
                leaf(2, 4, 5, 4).detach().contiguous(memory_format=layout).requires_grad_(),
                leaf(4, 2, 3, 2).detach().contiguous(memory_format=layout).requires_grad_(),
                leaf(4, low=0.5),
                leaf(4, low=0.5),
                leaf(4),
            )

            def call(*t: Tensor, operator: tuple[str, str, str] = (magnitude, weighting, angular)):
                return functional.decoupled_conv2d(
                    t[0],
                    t[1],
                    t[4],
                    1 + (operator[0] == "tanh"),
                    1,
                    (1, 2),
                    2,
                    radius=t[2],
                    k=t[3],
                    norm_mean="batch",
                    magnitude=operator[0],
                    weighting=operator[1],
                    angular=operator[2],
                    power=2.5,
                    backend=where.backend,
                )

            # The library's own choice of algorithms may add in another order each time. Second
            # derivatives are the reference's, some of whose steps have no deterministic form.
            with deterministic(fill=False, warn_only=True):
                assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
                if i % 5 == 0:
                    assert torch.autograd.gradgradcheck(
                        call, tensors, fast_mode=True, nondet_tol=1e-10
                    )
            checked += 1
    return {"operators": checked}


class OpRecorder(TorchDispatchMode):
    """Records every call of this project's ops: op, arguments as they were, results.

    Args:
        cloned: keep copies of the arguments; without, the arguments themselves.
    """

    def __init__(self, cloned: bool = True) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._cloned = cloned

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in NAMESPACES:
            return func(*args, **kwargs)
        before = tree_map_only(Tensor, torch.clone, (args, kwargs)) if self._cloned else None
        result = func(*args, **kwargs)
        kept_args, kept_kwargs = before or (args, kwargs)
        self.calls.append((func, kept_args, kept_kwargs, result))
        return result


def record(where: Where, inputs: Inputs, cloned: bool = True, **extra: Any) -> OpRecorder:
    """Run forward and backward and return the calls of this project's ops."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    with OpRecorder(cloned) as recorder:
        y = functional.decoupled_conv2d(**leaves, **inputs.options, backend=where.backend, **extra)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    return recorder


def opcheck(where: Where) -> Figures:
    """Schemas, fakes and registrations of every op, with the arguments that it really gets."""
    # test_aot_dispatch_dynamic differentiates; these ops have no autograd formula of their own.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    checked, names = 0, set()
    operators = (
        ("tanh", "cosine"),
        ("linear", "cosine"),
        ("segmented", "sigmoid"),
        ("log", "power"),
    )
    cases = ("3x3-p1", "groups3-odd", "reflect-same-s2", "1x1", "same-s2-odd")
    for i, name in enumerate(cases[:2] if where.reduced else cases):
        for j, (magnitude, angular) in enumerate(operators):
            for layout in LAYOUTS[:2]:
                dtype = (torch.float32, torch.bfloat16, torch.float64, torch.float16)[(i + j) % 4]
                if where.refusal(dtype) is not None:
                    continue
                inputs = draw(
                    by_id(name),
                    dtype,
                    magnitude=magnitude,
                    angular=angular,
                    bias=j == 2,
                    norm=NORMS[i % 3],
                )
                recorder = record(where, placed(inputs, layout, where.device))
                assert recorder.calls, f"{name}: no op of this project ran"
                for func, args, kwargs, _ in recorder.calls:
                    torch.library.opcheck(func, args, kwargs, test_utils=tests)
                    names.add(func._schema.name.partition("::")[2])
                    checked += 1
    return {"calls": checked, "ops": " ".join(sorted(names))}


def compiled(where: Where) -> Figures:
    """One graph by the default compiler, forward and backward, in a chain, train and eval."""
    results: list[dict[str, Tensor]] = []
    torch._dynamo.reset()
    torch.manual_seed(0)
    with dcconv.use_backend(where.backend), tf32(False):
        eager = nn.Sequential(
            dcconv.DecoupledConv2d(8, 16, 3, padding=1, keep="dot"),
            nn.ReLU(inplace=True),
            # Not scale-free: the gradient of the first radius would be a rest of cancelled terms.
            dcconv.DecoupledConv2d(16, 8, 3, stride=2, magnitude="log", angular="square_cosine"),
            nn.BatchNorm2d(8),
            nn.Softplus(),
        ).to(where.device, memory_format=torch.channels_last)
        truth, other = copy.deepcopy(eager).double(), copy.deepcopy(eager)
        fast = torch.compile(other, fullgraph=True)
        x = torch.randn(4, 8, 16, 16, device=where.device).to(memory_format=torch.channels_last)
        for model, network in ((truth, truth), (eager, eager), (other, fast)):
            y = network(x.to(model[0].weight.dtype))
            y.square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append({"y": y.detach(), "norm_mean": model[0].norm_mean.clone(), **grads})
        for name, right in results[0].items():
            got, peer = results[2][name], results[1][name]
            check(name, got.cpu(), right.double().cpu(), peer.cpu(), torch.float32)
    return {"tensors": len(results[0])}


@contextmanager
def deterministic(fill: bool = True, warn_only: bool = False) -> Iterator[None]:
    """Deterministic algorithms, and NaN in every torch.empty if ``fill``."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    settings.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


def _training_inputs(where: Where) -> Iterator[tuple[str, Inputs, Tensor]]:
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS[:2]:
            for magnitude, angular in (
                ("tanh", "cosine"),
                ("ball", "sigmoid"),
                ("linear", "cosine"),
            ):
                case = Case("train", 4, 48, 20, 20, 72, (3, 3), padding=1)
                inputs = draw(case, dtype, magnitude=magnitude, angular=angular)
                dy = random_cotangent(inputs).to(where.device)
                name = f"{dtype} {layout} {magnitude} {angular}"
                yield name, placed(inputs, layout, where.device), dy


def _equal(name: str, one: Results, two: Results) -> None:
    for tensor in one:
        assert torch.equal(one[tensor], two[tensor]), f"{name}: {tensor} differs"


def determinism(where: Where) -> Figures:
    """The same bits again, with other work on the device in between."""
    compared = 0
    with deterministic():
        for name, inputs, dy in _training_inputs(where):
            runs = []
            for _ in range(3):
                runs.append(
                    evaluate(functional.decoupled_conv2d, inputs, dy, backend=where.backend)
                )
                other = torch.ones(512, 512, device=where.device)
                other @ other
            _equal(name, runs[0], runs[1])
            _equal(name, runs[0], runs[2])
            compared += 2 * len(runs[0])
    return {"tensors": compared}


def unwritten(where: Where) -> Figures:
    """NaN in all memory that results are made in: nothing of it may be left."""
    compared = 0
    for name, inputs, dy in _training_inputs(where):
        with deterministic():
            got = evaluate(functional.decoupled_conv2d, inputs, dy, backend=where.backend)
        for tensor, value in got.items():
            assert bool(value.isfinite().all()), f"{name}: {tensor} is not finite"
            compared += 1
        if not where.on_gpu:
            continue
        # The same without the flag, where kernels may take another path: freed blocks of NaN.
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
            blocks = [torch.full((size,), float("nan"), device=where.device) for _ in range(4)]
            del blocks
        got = evaluate(functional.decoupled_conv2d, inputs, dy, backend=where.backend)
        for tensor, value in got.items():
            assert bool(value.isfinite().all()), f"{name}: {tensor} is not finite in reused memory"
            compared += 1
    return {"tensors": compared}


def graph(where: Where) -> Figures:
    """Capture of forward and backward, replayed on new inputs."""
    where.need_gpu("CUDA graphs")
    compared = 0
    for name, inputs, dy in _training_inputs(where):
        tensors = {key: t.clone() for key, t in inputs.tensors.items()}
        static = Inputs(tensors, inputs.options)
        call = functional.decoupled_conv2d
        with deterministic(fill=False):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    evaluate(call, static, dy, backend=where.backend)
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                replayed = evaluate(call, static, dy, backend=where.backend)
            for factor in (1.0, -0.5):
                static.tensors["x"].copy_(inputs.tensors["x"] * factor)
                for result in replayed.values():
                    result.fill_(float("nan"))
                captured.replay()
                _equal(name, evaluate(call, static, dy, backend=where.backend), replayed)
                compared += len(replayed)
    return {"tensors": compared}


def stream(where: Where) -> Figures:
    """Kernels run on the current stream, behind what it still has to do, and nobody waits."""
    where.need_gpu("streams")
    compared = 0
    call = functional.decoupled_conv2d
    for name, inputs, dy in _training_inputs(where):
        with deterministic(fill=False):
            right = evaluate(call, inputs, dy, backend=where.backend)
            late = {key: torch.full_like(t, float("nan")) for key, t in inputs.tensors.items()}
            late_dy = torch.full_like(dy, float("nan"))
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                # The stream gets its memory before it counts: an allocation may wait.
                evaluate(call, inputs, dy, backend=where.backend)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(400_000_000)  # about 0.2 s
                for key, t in inputs.tensors.items():
                    late[key].copy_(t)
                late_dy.copy_(dy)
                got = evaluate(call, Inputs(late, inputs.options), late_dy, backend=where.backend)
                waited = side.query()
            assert not waited, f"{name}: the call waited for the device"
            side.synchronize()
            _equal(name, right, got)
            compared += len(got)
    return {"tensors": compared}


def no_synchronisation(where: Where) -> Figures:
    """PyTorch's own watch: no call waits for the device."""
    where.need_gpu("synchronisation checks")
    calls = 0
    for _, inputs, dy in _training_inputs(where):
        evaluate(functional.decoupled_conv2d, inputs, dy, backend=where.backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(functional.decoupled_conv2d, inputs, dy, backend=where.backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        calls += 1
    return {"calls": calls}


def large(where: Where, layout: str) -> Figures:
    """More than 2^31 elements, judged image by image at both ends and around element 2^31.

    The mean norm is given, so that images do not depend on each other; the gradients of weight and
    radius are compared with those of parts that 32-bit offsets reach.
    """
    c = o = 64
    size = 64 if where.on_gpu else 8
    per_image = c * size * size
    n = (1 << 31) // per_image + 8 if where.on_gpu else 20
    needed = 9 * n * per_image * 2
    if where.on_gpu:
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            raise NotRun(f"it needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
    dtype = torch.bfloat16
    small = draw(Case("large", 2, c, size, size, o, (3, 3), padding=1), dtype, norm="given")
    base = placed(small, layout, where.device)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(where.device).manual_seed(0)

    def random() -> Tensor:
        t = torch.empty((n, c, size, size), dtype=dtype, device=where.device, memory_format=memory)
        return t.normal_(generator=generator)

    x, dy = random(), random()

    def run(part: slice) -> tuple[Tensor, list[Tensor]]:
        leaves = [
            t.detach().requires_grad_()
            for t in (x[part], base.tensors["weight"], base.tensors["radius"])
        ]
        y = functional.decoupled_conv2d(
            leaves[0],
            leaves[1],
            radius=leaves[2],
            norm_mean=base.tensors["norm_mean"],
            backend=where.backend,
            **base.options,
        )
        return y.detach(), list(torch.autograd.grad(y, leaves, dy[part]))

    y, (grad_x, *grads) = run(slice(None))
    assert y.numel() == x.numel() == n * per_image
    worst, middle = 0.0, n - 8
    images = sorted({0, 1, n // 2, max(middle - 1, 0), middle, middle + 1, n - 1})
    for i in images:
        one = Inputs(
            {"x": x[i : i + 1].cpu().contiguous()}
            | {key: t.cpu() for key, t in small.tensors.items() if key != "x"},
            small.options,
        )
        wide = Inputs({key: t.double() for key, t in one.tensors.items()}, one.options)
        cotangent = dy[i : i + 1].cpu().contiguous()
        truth = evaluate(reference_call(ANGLE_DELTA[dtype]), wide, cotangent.double())
        peer = evaluate(reference_call(), one, cotangent)
        for name, got in (("y", y[i : i + 1]), ("x", grad_x[i : i + 1])):
            check(f"image {i}: {name}", got.cpu(), truth[name], peer[name], dtype)
            allowed = limit(error(peer[name], truth[name]), dtype)
            worst = max(worst, error(got.cpu(), truth[name]) / allowed)
    del y, grad_x
    parts = 5
    sums = [torch.zeros(g.shape, dtype=torch.float64, device=where.device) for g in grads]
    for at in range(0, n, -(-n // parts)):
        _, (_, *some) = run(slice(at, at + -(-n // parts)))
        sums = [total + g.double() for total, g in zip(sums, some, strict=True)]
    for name, got, right in zip(("weight", "radius"), grads, sums, strict=True):
        check(name, got.cpu(), right.cpu(), right.to(got.dtype).cpu(), dtype)
    return {"elements": n * per_image, "images": len(images), "error / limit": worst}


def many_blocks(where: Where) -> Figures:
    """Groups, images or tiles beyond 65,535, the largest second dimension of a grid."""
    count = 70_000 if where.on_gpu else 40
    side = 2100 if where.on_gpu else 30
    shapes = (
        Case("groups", 1, count, 3, 4, count, (1, 1), groups=count),
        Case("images", count, 2, 2, 2, 3, (2, 2)),
        Case("filters", 1, 2, 2, 2, count, (1, 1)),
        Case("tiles", 1, 1, side, side, 2, (2, 2), padding=1),
    )
    worst = 0.0
    for case in shapes:
        # One channel and one tap: c is 1 or -1 then, fine for cosine alone.
        inputs = draw(case, torch.float32, norm="given")
        for layout in LAYOUTS[:2]:
            with tf32(False):
                worst = max(worst, compare(where, f"{case.id} {layout}", inputs, layout))
    return {"shapes": len(shapes), "count": count, "error / limit": worst}


def shared_memory(where: Where) -> Figures:
    """Every tile of the implicit GEMM gives the same bits; the largest needs more than 48 KB."""
    where.need_gpu("tiles of the implicit GEMM")
    where.need_compiled("tiles of the implicit GEMM")
    inputs = draw(Case("tiles", 8, 64, 28, 28, 256, (1, 1)), torch.bfloat16, norm="given")
    with backends.strategies("fused"):
        recorder = record(where, placed(inputs, "channels_last", where.device))
    (op, args, kwargs, first), *_ = [c for c in recorder.calls if "one_pass" in c[0].__name__]
    tile = [argument.name for argument in op._schema.arguments].index("tile")
    for other in range(3):
        again = op(*args[:tile], other, *args[tile + 1 :], **kwargs)
        assert all(map(torch.equal, first, again)), f"tile {other} gives other bits"
    return {"tiles": 3}


def refuses(name: str, call: Callable[[], object], kind: type[Exception], rule: str) -> int:
    """Require that a call raises an exception whose text begins with ``rule``; return 1."""
    try:
        call()
    except kind as refusal:
        if str(refusal).startswith(rule):
            return 1
        raise AssertionError(f"{name}: expected {rule!r}, got {str(refusal)!r}") from refusal
    raise AssertionError(f"{name} was not refused")


def other_devices(where: Where) -> Figures:
    """Operands on different devices are refused with the operator's own sentence."""
    case = by_id("3x3-p1")
    inputs = draw(case, torch.float32, angular="sigmoid", bias=True, norm="given")
    here = placed(inputs, "contiguous", where.device)
    call = functional.decoupled_conv2d
    elsewhere = ["cpu"] if where.on_gpu else ["meta"]
    if where.on_gpu and torch.cuda.device_count() > 1:
        elsewhere.append("cuda:1")
    refused = 0
    for other in elsewhere:
        for name in ("weight", "bias", "radius", "norm_mean", "k"):
            wrong = here.tensors | {name: here.tensors[name].to(other)} | here.options
            refused += refuses(
                f"{name} on {other}",
                lambda wrong=wrong: call(**wrong, backend=where.backend),
                ValueError,
                f"dcconv: {name} must be on x's device {here.tensors['x'].device}, got {other}",
            )
    if where.on_gpu:
        absent = f"cuda:{torch.cuda.device_count()}"
        make = dcconv.DecoupledConv2d
        refused += refuses(absent, lambda: make(3, 4, 3, device=absent), RuntimeError, "")
        refused += refuses(
            "CPU tensors",
            lambda: call(**inputs.tensors, **inputs.options, backend=where.backend),
            NotImplementedError,
            f"dcconv: backend '{where.backend}' cannot run this call: it runs on CUDA tensors",
        )
    return {"refused": refused}


def op_guards(where: Where) -> Figures:
    """The ops themselves refuse tensors of another device; a kernel must never see them."""
    where.need_gpu("the ops' own guards")
    inputs = draw(by_id("3x3-p1"), torch.float32, angular="sigmoid", bias=True)
    recorder = record(where, placed(inputs, "channels_last", where.device))
    refused = 0
    for func, args, kwargs, _ in recorder.calls:
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.numel() > 0]
        for i in tensors if len(tensors) > 1 else []:
            wrong = list(args)
            wrong[i] = wrong[i].cpu()
            named = f"{func}: {func._schema.arguments[i].name} on the CPU"

            def call(func: Any = func, wrong: Any = wrong, kwargs: Any = kwargs) -> None:
                func(*wrong, **kwargs)
                torch.cuda.synchronize()

            refused += refuses(named, call, RuntimeError, "dcconv: ")
    return {"refused": refused}


def own_launches(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call returns and how many kernels of this project it launched."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        result = call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [event.name for event in seen.events() if event.device_type == device]
    if not kernels:
        raise NotRun("the profiler sees no kernels on this machine")
    return result, sum("dcconv" in name for name in kernels)


def launches(where: Where) -> Figures:
    """At most 3 own launches forward and 4 backward; 4 and 5 with the mean norm of the batch."""
    where.need_compiled("launch counts")
    where.need_gpu("launch counts")
    figures: Figures = {}
    for norm, most in (("given", (3, 4)), ("batch", (4, 5))):
        for layout in LAYOUTS[:2]:
            case = Case("launches", 4, 64, 20, 20, 64, (3, 3), padding=1)
            inputs = draw(case, torch.bfloat16, norm=norm, bias=True, angular="sigmoid")
            here = placed(inputs, layout, where.device)
            leaves = {name: t.detach().requires_grad_() for name, t in here.tensors.items()}
            wanted = list(leaves.values())

            def forward(leaves: dict[str, Tensor] = leaves, here: Inputs = here) -> Tensor:
                return functional.decoupled_conv2d(**leaves, **here.options, backend=where.backend)

            y = forward()
            dy = torch.ones_like(y)
            torch.autograd.grad(y, wanted, dy)
            y, ahead = own_launches(forward)
            _, back = own_launches(lambda y=y, w=wanted, dy=dy: torch.autograd.grad(y, w, dy))
            figures[f"{norm} {layout}"] = f"{ahead} + {back}"
            assert 0 < ahead <= most[0], f"{norm} {layout}: {ahead} launches forward"
            assert 0 < back <= most[1], f"{norm} {layout}: {back} launches backward"
    return figures


def architecture(where: Where, expected: str) -> Figures:
    """Which of the compiled codes the GPU runs.

    Args:
        where: what is tested.
        expected: ``native``, or the target whose PTX must run, such as ``800``.
    """
    where.need_compiled("compiled architectures")
    where.need_gpu("compiled architectures")
    arch = torch.zeros(1, dtype=torch.int32, device=where.device)
    torch.ops.dcconv.cuda_arch(arch)
    ran = int(arch.item())
    major, minor = torch.cuda.get_device_capability()
    native = range(major * 100, major * 100 + minor * 10 + 1, 10)
    if expected == "native":
        assert ran in native, f"a {major}.{minor} GPU runs code for {ran}"
    else:
        assert ran == int(expected), f"the GPU runs code for {ran}, expected {expected}"
        if ran in native:
            raise NotRun(f"this GPU runs machine code for {ran}, not its PTX")
    return {"runs code for": ran, "built for": dcconv.native._build.ARCHS}


def small_cases(where: Where) -> Figures:
    """A few calls that reach every kernel, for tools that watch a process; results are checked."""
    worst, calls = 0.0, 0
    for dtype in (torch.float32, torch.bfloat16) if not where.reduced else (torch.bfloat16,):
        for name, layout, magnitude, angular, norm in (
            ("3x3-p1", "channels_last", "tanh", "cosine", "batch"),
            ("groups3-odd", "contiguous", "ball", "sigmoid", "given"),
            ("1x1-o515", "channels_last", "tanh", "power", "batch"),
            ("reflect-same-s2", "contiguous", "linear", "cosine", "none"),
            ("3x3-s2-p1", "contiguous", "segmented", "square_cosine", "batch"),
        ):
            bias = angular == "sigmoid"
            inputs = draw(
                by_id(name), dtype, magnitude=magnitude, angular=angular, norm=norm, bias=bias
            )
            with tf32(False):
                worst = max(worst, compare(where, name, inputs, layout))
            calls += 1
        if where.on_gpu and where.backend == "cuda":
            one_pass = (
                ("depthwise", 5, 5, 3, 1, 5),
                ("stem", 3, 24, 3, 1, 1),
                *([("1x1", 40, 72, 1, 0, 1), ("3x3", 24, 40, 3, 1, 1)] * (dtype.itemsize == 2)),
            )
            for name, c, o, kernel, padding, groups in one_pass:
                case = Case(name, 2, c, 7, 6, o, (kernel, kernel), padding=padding, groups=groups)
                with tf32(False), backends.strategies("fused"):
                    worst = max(
                        worst, compare(where, name, draw(case, dtype, norm="none"), "channels_last")
                    )
                calls += 1
        x = draw(by_id("dilation2"), dtype).tensors["x"].to(where.device).requires_grad_()
        b = functional.patch_norm(x, 3, padding=2, dilation=2, backend=where.backend)
        (grad,) = torch.autograd.grad(b.sum(), x)
        assert bool(b.isfinite().all()) and bool(grad.isfinite().all())
        calls += 1
    return {"calls": calls, "error / limit": worst}
