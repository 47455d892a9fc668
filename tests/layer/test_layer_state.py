"""A layer's state: averages that others cast, whole-layer casts, and states of other operators."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import check_equal
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import swap_tensors

from dcconv import DecoupledConv2d
from dcconv.functional import patch_norm

T = 1e-3


def images(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64).to(dtype)


def average(layer: DecoupledConv2d) -> Tensor:
    assert layer.norm_mean is not None
    return layer.norm_mean


def set_data(layer: DecoupledConv2d, half: torch.dtype) -> None:
    average(layer).data = average(layer).data.to(half)


def set_buffer(layer: DecoupledConv2d, half: torch.dtype) -> None:
    layer._buffers["norm_mean"] = average(layer).to(half)


def set_attribute(layer: DecoupledConv2d, half: torch.dtype) -> None:
    layer.norm_mean = average(layer).to(half)


def swap(layer: DecoupledConv2d, half: torch.dtype) -> None:
    swap_tensors(average(layer), average(layer).to(half))


CASTS: dict[str, Callable[[DecoupledConv2d, torch.dtype], None]] = {
    "data": set_data,
    "buffers": set_buffer,
    "attribute": set_attribute,
    "swap": swap,
}


def after(steps: int, start: float, x: Tensor) -> float:
    """Return the average after so many updates by one batch, in double precision."""
    mean = float(patch_norm(x.double(), 3).mean())
    return mean + (1 - T) ** steps * (start - mean)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_average_cast_before_every_step_keeps_its_digits(
    cast: Callable[[DecoupledConv2d, torch.dtype], None], half: torch.dtype, compiled: bool
) -> None:
    """A half buffer cannot hold an average that moves by a thousandth."""
    layer = DecoupledConv2d(3, 4, 3)
    layer(images())
    start = float(average(layer))
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for _ in range(20):
        cast(layer, half)
        call(2 * images())
    torch.compiler.reset()
    assert average(layer).dtype == torch.float32
    check_equal("average", average(layer), torch.tensor(after(20, start, 2 * images())))


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("how", ["evaluation", "state", "deepcopy", "pickle", "load", "moved"])
def test_cast_average_is_read_with_its_digits(
    how: str, cast: Callable[[DecoupledConv2d, torch.dtype], None]
) -> None:
    layer = DecoupledConv2d(3, 4, 3)
    layer(images())
    want = average(layer).clone()
    assert float(want) != float(want.bfloat16())
    y = copy.deepcopy(layer).eval()(images())
    cast(layer, torch.bfloat16)
    if how == "evaluation":
        assert torch.equal(layer.eval()(images()), y)
    elif how == "state":
        assert torch.equal(layer.state_dict()["norm_mean"], want)
    elif how == "load":
        # In place, so the buffer must have the digits before the state's come.
        state = layer.state_dict()
        state["norm_mean"] = 3 * want
        cast(layer, torch.bfloat16)
        layer.load_state_dict(state)
        assert torch.equal(average(layer), 3 * want)
        return
    elif how == "moved":
        layer.float()
    else:
        # The bytes were written on the same line.
        layer = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))  # noqa: S301
        layer.eval()(images())
    assert torch.equal(average(layer), want)


def test_value_set_after_a_cast_counts() -> None:
    layer = DecoupledConv2d(3, 4, 3).eval()
    set_data(layer, torch.bfloat16)
    average(layer).fill_(2.5)
    layer(images())
    assert average(layer).dtype == torch.float32
    assert float(average(layer)) == 2.5


def test_copies_look_at_their_own_average() -> None:
    layer = DecoupledConv2d(3, 4, 3)
    layer(images())
    # The bytes were written on the same line.
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        for _ in range(3):
            other(5 * images())
        want = average(other).clone()
        set_data(other, torch.bfloat16)
        assert torch.equal(other.state_dict()["norm_mean"], want)


def test_half_state_that_is_assigned_leaves_a_float32_average() -> None:
    source = DecoupledConv2d(3, 4, 3)
    source(images())
    state = source.state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    layer = DecoupledConv2d(3, 4, 3)
    layer.load_state_dict(half, assign=True)
    assert layer.weight.dtype == torch.float16
    assert average(layer).dtype == torch.float32
    assert float(average(layer)) == float(half["norm_mean"])
    start = float(average(layer))
    for _ in range(3):
        layer(2 * images(dtype=torch.float16))
    assert float(average(layer)) != start


def test_average_of_float64_layers_is_restored_to_float64() -> None:
    layer = DecoupledConv2d(3, 4, 3, dtype=torch.float64)
    layer(images(dtype=torch.float64))
    want = average(layer).clone()
    layer._buffers["norm_mean"] = want.float()
    layer.eval()(images(dtype=torch.float64))
    assert torch.equal(average(layer), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_average_of_a_pruned_layer_follows_a_cast(dtype: torch.dtype) -> None:
    """The pruned weight itself is a stale tensor until the next forward."""
    layer = DecoupledConv2d(3, 4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(images())
    layer.to(dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert average(layer).dtype == want
    y = layer(images(dtype=dtype))
    assert y.dtype == dtype and average(layer).dtype == want


def test_half_averages_of_an_ensemble_leave_no_trace_in_the_layer() -> None:
    """Under vmap the buffer is one of a stack, and is gone when the call returns."""
    layer = DecoupledConv2d(3, 4, 3).eval()
    want = average(layer).clone()
    means = torch.tensor([2.0, 3.0], dtype=torch.bfloat16)
    parameters = dict(layer.named_parameters())
    x = images()

    def call(mean: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, {**parameters, "norm_mean": mean}, (x,))
        assert isinstance(y, Tensor)
        return y

    ys = torch.vmap(call)(means)
    assert torch.equal(average(layer), want)
    copy.deepcopy(layer)
    for y, mean in zip(ys, means, strict=True):
        average(layer).fill_(float(mean))
        check_equal("y", y.detach(), layer(images()).detach())


def fsdp_worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=1)
    try:
        layer = DecoupledConv2d(3, 4, 3)
        layer(images())
        start = float(average(layer))
        precision = MixedPrecision(buffer_dtype=torch.bfloat16)
        wrapped = FullyShardedDataParallel(
            nn.Sequential(layer), mixed_precision=precision, device_id=torch.device("cpu")
        )
        for _ in range(3):
            for _ in range(10):
                wrapped(2 * images())
            # Evaluation casts the buffers up, the next training step down again.
            wrapped.eval()
            wrapped(images())
            wrapped.train()
        torch.save((start, average(layer)), Path(folder) / "average.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)
def test_average_under_fsdp_with_half_buffers_is_that_of_float32(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fsdp_worker, (str(tmp_path),), nprocs=1)
    start, got = torch.load(tmp_path / "average.pt", weights_only=True)
    assert got.dtype == torch.float32
    check_equal("average", got, torch.tensor(after(30, start, 2 * images())))


BAD_CASTS: dict[str, tuple[Callable[[nn.Module], object], torch.dtype]] = {
    "cfloat": (lambda c: c.to(torch.cfloat), torch.complex64),
    "cdouble": (lambda c: c.to(torch.cdouble), torch.complex128),
    "type": (lambda c: c.type(torch.complex64), torch.complex64),
    "frozen integers": (lambda c: c.requires_grad_(False).type(torch.int32), torch.int32),
    "float8": (lambda c: c.to(torch.float8_e4m3fn), torch.float8_e4m3fn),
    "apply": (lambda c: c._apply(lambda t: t.to(torch.complex64)), torch.complex64),
}


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("swapping", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("name", BAD_CASTS)
def test_cast_to_what_the_operator_cannot_be_is_refused_and_undone(
    name: str, swapping: bool
) -> None:
    cast, got = BAD_CASTS[name]
    layer = DecoupledConv2d(3, 4, 3, bias=True)
    if name != "frozen integers":
        layer(images()).sum().backward()
    held = {key: t.clone() for key, t in layer.state_dict().items()}
    parameters = list(layer.parameters())
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        with pytest.raises(TypeError) as caught:
            cast(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    rule = "be float16, bfloat16, float32 or float64"
    assert str(caught.value) == f"dcconv: dtype must {rule}, got {got}"
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    for key, value in layer.state_dict().items():
        assert value.dtype == held[key].dtype and torch.equal(value, held[key]), key
    for parameter in parameters:
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    layer(images())


BALL: dict[str, Any] = {"magnitude": "ball"}
# Pairs whose keys and shapes agree: without the operator's name they would load.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sphere into linear": (
        {"magnitude": "sphere"},
        {"magnitude": "linear"},
        "magnitude 'linear', got magnitude 'sphere'",
    ),
    "tanh into ball": ({}, BALL, "magnitude 'ball', got magnitude 'tanh'"),
    "sphere into ball": (
        {"magnitude": "sphere"},
        BALL,
        "magnitude 'ball', radius_unit 'mean_norm', radius 'learned', "
        "got magnitude 'sphere', radius_unit None, radius None",
    ),
    "angular": (
        {},
        {"angular": "square_cosine"},
        "angular 'square_cosine', got angular 'cosine'",
    ),
    "weighting": ({}, {"weighting": "linear"}, "weighting 'linear', got weighting 'none'"),
    "alpha": ({}, {"alpha": 2.0}, "alpha 2.0, got alpha 1.0"),
    "eps": ({}, {"eps": 1e-3}, "eps 0.001, got eps 0.0001"),
    "beta": (
        {"magnitude": "mix"},
        {"magnitude": "mix", "beta": 0.25},
        "beta 0.25, got beta 0.5",
    ),
    "power": (
        {"angular": "power"},
        {"angular": "power", "power": 3.0},
        "power 3.0, got power 2.0",
    ),
    "radius": (
        {"learn_radius": False},
        {"learn_radius": False, "radius": 2.0},
        "radius 2.0, got radius 1.0",
    ),
    "k": ({"angular": "sigmoid"}, {"angular": "sigmoid", "k": 0.5}, "k 0.5, got k 0.3"),
}


@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_operator_is_refused_by_name(
    name: str, strict: bool, through: str
) -> None:
    saved, own, text = OTHERS[name]
    state = nn.Sequential(DecoupledConv2d(3, 4, 3, **saved)).state_dict()
    assert not any("operator" in key for key in state)
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    network = nn.Sequential(DecoupledConv2d(3, 4, 3, **own))
    before = {key: t.clone() for key, t in network.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        network.load_state_dict(state, strict=strict)
    sentence = f"dcconv: state_dict of layer '0' must be of an operator with {text}"
    assert sentence in str(caught.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_states_that_differ_in_what_is_no_part_of_the_formula_load() -> None:
    options: dict[str, Any] = {"norm_momentum": 0.1, "norm_init": "zero", "sync_norm": True}
    options |= {"keep": "dot", "backend": "reference", "norm_mean_grad": False, "radius": 3.0}
    other = DecoupledConv2d(3, 4, 3, beta=0.3, power=3.0, k=0.5, **options)
    layer = DecoupledConv2d(3, 4, 3)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)
    plain = nn.Conv2d(3, 4, 3, bias=False)
    plain.load_state_dict(DecoupledConv2d(3, 4, 3, magnitude="sphere").state_dict())


OPTIONS: dict[str, Any] = {"bias": True, "angular": "sigmoid", "learn_k": True, "radius": 4.0}


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_plain_state_brings_a_layer_to_life_that_was_on_the_meta_device(how: str) -> None:
    torch.manual_seed(7)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict()
    with torch.device("meta"):
        network = nn.Sequential(DecoupledConv2d(3, 4, 3, **OPTIONS))
    if how == "to_empty":
        network.to_empty(device="cpu")
    result = network.load_state_dict(plain, assign=how == "assign")
    assert not result.missing_keys and not result.unexpected_keys
    want = nn.Sequential(DecoupledConv2d(3, 4, 3, **OPTIONS))
    want.load_state_dict(plain)
    for key, value in want.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    assert [p.requires_grad for p in network.parameters()] == [True] * 4
    assert torch.equal(network(images()), want(images()))
    assert torch.equal(average(network[0]), average(want[0]))  # type: ignore[arg-type]


def test_own_state_that_lacks_a_part_stays_missing_on_the_meta_device() -> None:
    state = DecoupledConv2d(3, 4, 3).state_dict()
    del state["radius_raw"]
    with torch.device("meta"):
        layer = DecoupledConv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match=r'Missing key.*"radius_raw"'):
        layer.load_state_dict(state, assign=True)
