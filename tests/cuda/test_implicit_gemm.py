"""The implicit GEMM in the SIMT model: values, refusals, schedules, sanitizers, and faults."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builds
import pytest
import torch
from accuracy import Results, check_all, truth_and_peer
from builds import ADDRESS, FAST, ROOT, THREAD, Build
from calls import convolution
from cases import OPERATORS, Case, Inputs, make_inputs
from emulated import ops_library
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from dcconv import native
from dcconv.operator import reference
from dcconv.operator.records import NORM_BATCH, NORM_GIVEN, Operands, Problem

DTYPES = (torch.bfloat16, torch.float16)
TILES = (0, 1, 2)
# By tile, those of which one adds products in the same order: tiles of 128 rows may read a halo. -1
# is one of the three.
ORDERS = {0: (0,), 1: (0,), 2: (2,), -1: (0, 2)}
NORMS = ("batch", "given", "none")

# Rows, columns and depth that fill no tile; taps outside of the image; more steps than stages.
CASES = (
    Case("1x1", 2, 40, 9, 8, 72, (1, 1)),
    Case("1x1-s2", 3, 8, 7, 6, 136, (1, 1), stride=2),
    Case("1x1-one-pixel-each", 131, 8, 1, 1, 8, (1, 1)),
    Case("1x1-groups3", 1, 48, 5, 4, 24, (1, 1), groups=3),
    Case("3x3-p1", 1, 72, 8, 9, 40, (3, 3), padding=1),
    Case("3x3-p1-groups2", 3, 144, 7, 6, 160, (3, 3), padding=1, groups=2),
    Case("3x3-s2-p1", 2, 16, 9, 8, 136, (3, 3), stride=2, padding=1),
    Case("dilation2", 1, 40, 9, 7, 8, (3, 3), padding=2, dilation=2),
    Case("groups2", 2, 16, 6, 5, 48, (3, 2), padding=(1, 0), groups=2),
    Case("same-s2-even", 2, 8, 8, 6, 16, (3, 3), stride=2, padding="same"),
    Case("same-even-kernel", 2, 8, 6, 5, 24, (2, 4), padding="same"),
    Case("padding-beyond-kernel", 1, 8, 4, 4, 8, (2, 2), padding=3),
)


def ids(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(value)
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


@pytest.fixture(scope="module")
def simt() -> Iterator[Any]:
    """The emulated ops."""
    reason = native.missing or builds.why_not(FAST)
    if reason is not None:
        pytest.skip(reason)
    torch.ops.load_library(str(ops_library()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield torch.ops.dcconv_simt
    torch.set_num_threads(threads)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def flat(t: Tensor) -> Tensor:
    """A map [n, groups, h, w] as the ops want it."""
    return t.permute(0, 2, 3, 1).contiguous().reshape(-1).float()


def unflat(t: Tensor, like: Tensor) -> Tensor:
    n, groups, h, w = like.shape
    return t.reshape(n, h, w, groups).permute(0, 3, 1, 2)


def checked(inputs: Inputs) -> tuple[Operands, Problem]:
    signature = inspect.signature(reference.decoupled_conv2d)
    usual = {name: p.default for name, p in list(signature.parameters.items())[3:]}
    tensors = {"bias": None, **inputs.tensors}
    return convolution(**(usual | tensors | inputs.options))


def geometry(problem: Problem) -> tuple[Any, ...]:
    return (
        problem.window.stride,
        problem.window.padding,
        problem.window.dilation,
        problem.window.groups,
        problem.window.padding_mode,
    )


def norm_map(x: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    return reference.window_norm(x, (weight.shape[2], weight.shape[3]), problem)


def forward(simt: Any, inputs: Inputs, tile: int, source: str, dot: bool = True) -> Results:
    """Call the op; source: where the norms come from, ``loop``, ``sums`` or ``norms``."""
    operands, problem = checked(inputs)
    x, weight = last(operands.x), last(operands.weight)
    b = norm_map(x, weight, problem)
    mean = {NORM_BATCH: b.mean(), NORM_GIVEN: operands.norm_mean}.get(problem.norm)
    sums = x.float().square().unflatten(1, (problem.window.groups, -1)).sum(2)
    y, norms, u = simt.conv2d_one_pass(
        x,
        weight,
        simt.filter_norm(weight, problem.operator.eps),
        {"loop": None, "sums": flat(sums), "norms": flat(b)}[source],
        operands.bias,
        operands.radius,
        mean,
        operands.k,
        *geometry(problem),
        problem.operator.magnitude,
        problem.operator.angular,
        problem.operator.weighting,
        problem.operator.alpha,
        problem.operator.beta,
        problem.operator.power,
        problem.delta,
        problem.operator.eps,
        source == "norms",
        True,
        dot,
        "implicit_gemm",
        tile,
        True,
    )
    assert norms.numel() == (0 if source == "norms" else b.numel())
    results = {"y": y}
    if dot:
        results["u"] = u
    if source != "norms":
        results["b"] = unflat(norms, b)
    return results


def expected_forward(inputs: Inputs) -> tuple[Results, Results]:
    truth, peer = truth_and_peer(inputs)
    operands, problem = checked(inputs)
    for results, dtype in ((truth, torch.float64), (peer, operands.x.dtype)):
        x, weight = operands.x.to(dtype), operands.weight.to(dtype)
        padded, padding = reference.padded(x, problem)
        results["u"] = F.conv2d(
            padded,
            weight,
            None,
            problem.window.stride,
            padding,
            problem.window.dilation,
            problem.window.groups,
        )
        results["b"] = norm_map(x, weight, problem)
    return truth, peer


def compare_forward(name: str, got: Results, expected: tuple[Results, Results]) -> None:
    truth, peer = ({key: t for key, t in e.items() if key in got} for e in expected)
    check_all(name, got, truth, peer, got["y"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_geometry_agrees_with_the_reference(simt: Any, case: Case, dtype: torch.dtype) -> None:
    """Every tile, with the same bits where products are added in the same order."""
    sources = ["norms", "sums"] + ["loop"] * (case.kernel == (1, 1))
    for i, source in enumerate(sources):
        magnitude, weighting, angular = OPERATORS[
            (17 * CASES.index(case) + 37 * i) % len(OPERATORS)
        ]
        inputs = make_inputs(
            case,
            dtype,
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm="batch" if source == "norms" else "given",
            bias=i == 1,
            scalar=i == 2,
        )
        expected = expected_forward(inputs)
        results = [forward(simt, inputs, tile, source) for tile in (*TILES, -1)]
        for tile, got in zip((*TILES, -1), results, strict=True):
            compare_forward(f"{case.id} {source} {tile}", got, expected)
            for key, t in got.items():
                like = [results[i][key] for i in ORDERS[tile]]
                assert any(torch.equal(t, other) for other in like), (source, tile, key)


@pytest.mark.parametrize("operator", OPERATORS, ids=ids)
def test_operator_agrees_with_the_reference(simt: Any, operator: tuple[str, str, str]) -> None:
    magnitude, weighting, angular = operator
    place = OPERATORS.index(operator)
    case = Case("small", 2, 16, 4, 5, 24, (1, 1))
    for i, norm in enumerate(NORMS):
        inputs = make_inputs(
            case,
            DTYPES[(i + place) % 2],
            magnitude=magnitude,
            weighting=weighting,
            angular=angular,
            norm=norm,
            bias=(i + place) % 3 == 0,
            scalar=i == 2 and place % 2 == 0,
            alpha=1.25,
            beta=0.75,
            power=2.5,
        )
        source = "norms" if norm == "batch" else ("sums", "loop")[i % 2]
        got = forward(simt, inputs, 2, source, dot=i == 0)
        compare_forward(f"{norm} {source}", got, expected_forward(inputs))


def input_gradient(
    grad_u: Tensor, x: Tensor, weight: Tensor, problem: Problem, taps: Tensor
) -> Tensor:
    """Plain PyTorch, in the tensors' dtype; taps: [n, groups, p, q] in compute dtype."""
    n, _, h, w = x.shape
    top, bottom, left, right = problem.window.padding
    sizes = (h + top + bottom, w + left + right)
    groups, channels = problem.window.groups, weight.shape[1]
    rest = (problem.window.stride, 0, problem.window.dilation, groups)

    def transposed(grad: Tensor, filters: Tensor, count: int) -> Tensor:
        padded = conv2d_input((n, count, *sizes), filters, grad, *rest)
        return padded[:, :, top : top + h, left : left + w]

    ones = torch.ones(groups, 1, *weight.shape[2:], dtype=taps.dtype)
    sums = transposed(taps, ones, groups).repeat_interleave(channels, 1)
    grad = transposed(grad_u, weight, groups * channels)
    return (grad.to(taps.dtype) + x.to(taps.dtype) * sums).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", [case for case in CASES if case.stride == 1], ids=ids)
def test_input_gradient_agrees_with_the_reference(
    simt: Any, case: Case, dtype: torch.dtype
) -> None:
    operands, problem = checked(make_inputs(case, dtype))
    x, weight = last(operands.x), last(operands.weight)
    generator = torch.Generator().manual_seed(3)
    b = norm_map(x, weight, problem)
    n, _, p, q = b.shape
    grad_u = last(torch.randn(n, case.o, p, q, generator=generator).to(dtype))
    t = torch.randn(b.shape, generator=generator)
    sigma = torch.tensor(0.7)
    for mean in (None, sigma):
        taps = t if mean is None else t + sigma / b
        exact = t.double() if mean is None else t.double() + sigma.double() / b.double()
        wide = (grad_u.double(), x.double(), weight.double())
        truth = {"grad_x": input_gradient(*wide, problem, exact)}
        peer = {"grad_x": input_gradient(grad_u, x, weight, problem, taps)}
        results = [
            simt.conv2d_one_pass_grad_input(
                grad_u,
                weight,
                x,
                flat(t),
                flat(b) if mean is not None else flat(b)[:0],
                mean,
                *geometry(problem),
                "implicit_gemm",
                tile,
                True,
            )
            for tile in (*TILES, -1)
        ]
        for tile, grad_x in zip((*TILES, -1), results, strict=True):
            check_all(case.id, {"grad_x": grad_x}, truth, peer, dtype)
            assert any(torch.equal(grad_x, results[i]) for i in ORDERS[tile])
            assert grad_x.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(simt: Any) -> None:
    for case in (Case("1x1", 0, 8, 3, 3, 8, (1, 1)), Case("3x3", 0, 8, 5, 5, 8, (3, 3))):
        inputs = make_inputs(case, torch.bfloat16, norm="given")
        got = forward(simt, inputs, -1, "loop" if case.id == "1x1" else "sums")
        assert got["y"].shape[:2] == (0, 8) and got["b"].numel() == 0


@pytest.mark.parametrize("moved", ["x", "weight", "grad_u"])
def test_operands_begin_at_any_address(simt: Any, moved: str) -> None:
    """An operand that begins between two multiples of 16 bytes gives the same bits."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: last(torch.randn(*shape, generator=generator).bfloat16())
        for name, shape in (
            ("x", (2, 8, 5, 6)),
            ("weight", (16, 8, 3, 3)),
            ("grad_u", (2, 16, 5, 6)),
        )
    }
    sums = flat(tensors["x"].float().square().sum(1, keepdim=True))
    place = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "zeros")
    functions = ("sphere", "cosine", "none", 1.0, 0.5, 2.0, 1e-3, 1e-4, False, True, False)

    def results(x: Tensor, weight: Tensor, grad_u: Tensor) -> list[Tensor]:
        a = simt.filter_norm(weight, 1e-4)
        y, norm, _ = simt.conv2d_one_pass(
            x,
            weight,
            a,
            sums,
            None,
            None,
            None,
            None,
            *place,
            *functions,
            "implicit_gemm",
            -1,
            True,
        )
        grad_x = simt.conv2d_one_pass_grad_input(
            grad_u, weight, x, norm, norm, None, *place, "implicit_gemm", -1, True
        )
        return [y, norm, grad_x]

    expected = results(**tensors)
    t = tensors[moved]
    for elements in (1, 7, 8):
        memory = t.new_zeros(t.numel() + elements)
        shifted = memory.as_strided(t.shape, t.stride(), elements).copy_(t)
        assert (shifted.data_ptr() % 16 == 0) == (elements == 8)
        for one, two in zip(results(**(tensors | {moved: shifted})), expected, strict=True):
            assert torch.equal(one, two)


REFUSED = {
    "bfloat16 or float16": {"dtype": torch.float32},
    "channels_last tensors": {"channels_last": False},
    "multiples of 8 input channels and filters in each group": {"c": 12},
    "zero padding": {"mode": "reflect"},
    "a tile from -1 to 2, got 3": {"tile": 3},
    "a map of norms or sums of squares unless the window is 1x1 without padding": {"map": None},
    "stride 1 for the gradient of x": {"stride": 2},
}


@pytest.mark.parametrize("rule", REFUSED)
def test_refusals_name_the_rule(simt: Any, rule: str) -> None:
    options = REFUSED[rule]
    dtype, c = options.get("dtype", torch.bfloat16), options.get("c", 8)
    channels_last = options.get("channels_last", True)
    stride, tile = options.get("stride", 1), options.get("tile", -1)
    arrange = last if channels_last else Tensor.contiguous
    x = arrange(torch.zeros(1, c, 5, 5, dtype=dtype))
    weight = arrange(torch.zeros(8, c, 3, 3, dtype=dtype))
    place = ((stride, stride), (1, 1, 1, 1), (1, 1), 1, options.get("mode", "zeros"))
    size = (5 + 2 - 3) // stride + 1
    grad_u = arrange(torch.zeros(1, 8, size, size, dtype=dtype))
    sums = torch.zeros(25) if "map" not in options else None
    message = f"^dcconv: kernel implicit_gemm must have {rule}"
    if "map" in options:
        t = torch.zeros(25)
    if stride == 1:
        with pytest.raises(RuntimeError, match=message):
            simt.conv2d_one_pass(
                x,
                weight,
                torch.ones(8),
                sums,
                None,
                None,
                None,
                None,
                *place,
                *("sphere", "cosine", "none", 1.0, 0.5, 2.0, 1e-3, 1e-4, False, True, False),
                "implicit_gemm",
                tile,
                channels_last,
            )
    if "map" not in options:
        t = torch.zeros(size * size)
        with pytest.raises(RuntimeError, match=message):
            simt.conv2d_one_pass_grad_input(
                grad_u, weight, x, t, t, None, *place, "implicit_gemm", tile, channels_last
            )


def program(build: Build, changed: Path | None = None, tile: int = 2) -> Path:
    """Return the test program, or that of a changed copy of csrc, with one tile alone."""
    reason = builds.why_not(build)
    if reason is not None:
        pytest.skip(reason)
    flags = ["-Werror", "-Wno-unknown-pragmas", "-DDCCONV_SIMT", f"-I{changed or ROOT / 'csrc'}"]
    # Unoptimised where compiling would take longer than running.
    if changed is not None:
        flags += ["-O0", "-g0", "-Wno-unused-variable", f"-DSIMT_ONE_TILE={tile}"]
    elif build is ADDRESS:
        flags += ["-O0"]
    source = builds.SIMT / "implicit_gemm_test.cpp"
    return builds.compile_executable("implicit_gemm_test", [source], build, flags)


def run(build: Build, executable: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return builds.run([executable, *map(str, arguments)], build, timeout=120)


PROGRAM_CASES = ("one", "taps", "groups", "wide", "halo")


@pytest.mark.parametrize("case", PROGRAM_CASES)
def test_values_do_not_depend_on_the_schedule(case: str) -> None:
    executable = program(FAST)
    for tile in TILES:
        for seed in range(4):
            done = run(FAST, executable, case, tile, seed)
            assert done.returncode == 0, (tile, seed, done.stderr)


@pytest.mark.parametrize("case", PROGRAM_CASES)
def test_address_and_undefined_behaviour_sanitizers(case: str) -> None:
    for tile in TILES[1:] if case != "one" else TILES:
        done = run(ADDRESS, program(ADDRESS), case, tile, 1)
        assert done.returncode == 0, (tile, done.stderr)


# A thread of the system per CUDA thread is slow.
@pytest.mark.parametrize(("case", "tile"), [("one", 1), ("groups", 2)])
def test_thread_sanitizer(case: str, tile: int) -> None:
    done = run(THREAD, program(THREAD), case, tile, 1)
    assert done.returncode == 0, done.stderr


def test_rule_fills_the_device_and_no_half_tile_is_empty() -> None:
    executable = program(FAST)

    def rule(rows: int, columns: int, groups: int = 1) -> int:
        return int(run(FAST, executable, "rule", rows, columns, groups, 264).stdout)

    assert rule(128 * 56 * 56, 256) == 0
    assert rule(128 * 56 * 56, 64) == 1
    assert rule(128 * 56 * 56, 192) == 1
    assert rule(128 * 56 * 56, 200) == 0
    assert rule(128 * 264, 128) == 0
    assert rule(128 * 263, 128) == 1
    assert rule(64 * 264, 128) == 1
    assert rule(64 * 263, 64) == 2
    assert rule(128 * 132, 64, groups=2) == 1


def test_offsets_beyond_32_bits_are_refused() -> None:
    executable = program(FAST)

    def fits(side: int, channels: int, filters: int, kernel: int) -> bool:
        done = run(FAST, executable, "fits", side, channels, filters, kernel)
        return bool(int(done.stdout))

    assert fits(224, 2048, 2048, 7)
    # Two images of 2^30 pieces each may be under one tile.
    assert fits(32000, 8, 8, 1) and not fits(32768, 8, 8, 1)
    assert fits(1, 65536, 65536, 1) and not fits(1, 65536, 65536, 3)
    assert not fits(2**31 - 1, 2**31 - 8, 2**31 - 8, 1)


CRASHED = -11

# What is changed, the case and the tile that have to see it, and what is said: values that are
# wrong, what the model names itself, or an access beyond an array's end, which says nothing.
FAULTS = {
    "no barrier in the loop": (
        "main_loop.cuh",
        "              __syncthreads();\n",
        "",
        "taps",
        "error",
    ),
    "a weak wait": (
        "main_loop.cuh",
        "              wait_async<kAhead - 1>()",
        "              wait_async<kAhead>()",
        "taps",
        "error",
    ),
    "another stage": ("gathered.cuh", "now_ = 0;", "now_ = 1;", "one", "error"),
    "no swizzle of x": (
        "gathered.cuh",
        "swizzled<Tile::kDepth / kPiece>(row, part * 2 + lane / 16)",
        "row * (Tile::kDepth / kPiece) + part * 2 + lane / 16",
        "one",
        "error",
    ),
    "no transposition": (
        "gathered.cuh",
        "load_matrix_x4_transposed(",
        "load_matrix_x4(",
        "one",
        "grad_x: error",
    ),
    "squares by every warp": (
        "main_loop.cuh",
        "m % Tile::kWarpColumns != warp_column()",
        "false",
        "one",
        "norms: error",
    ),
    "no tail of channels": (
        "loaders.cuh",
        "step.channel + piece_ * kPiece < p.depth ?",
        "step.channel < p.depth ?",
        "one",
        "",
    ),
    "no tail of filters": (
        "loaders.cuh",
        "place.first_column + first + i * kStride < p.columns",
        "true",
        "one",
        "",
    ),
    "no tail of filters, transposed": (
        "loaders.cuh",
        "i * kStride < rows\n",
        "0 < rows\n",
        "one",
        "",
    ),
    "no tail of rows": (
        "loaders.cuh",
        "if (row < place.rows) {",
        "{",
        "wide",
        "",
    ),
    "no padding at the side": (
        "loaders.cuh",
        "inside(p.horizontal, x_[i] + step.x)",
        "true",
        "taps",
        "",
    ),
    "a tap too few in flight": (
        "row_sums.cuh",
        "      total += part[i];",
        "      total += i > 0 ? part[i] : 0;",
        "taps",
        "norms: error",
    ),
    "operands of another column": (
        "columns.cuh",
        "column / (kPiece / 2) % 2",
        "(column + 4) / (kPiece / 2) % 2",
        "groups",
        "y: error",
    ),
    "the window not turned around": (
        "problem.cuh",
        "1, w.before, -w.dilation}",
        "1, w.before - w.dilation * (w.kernel - 1), w.dilation}",
        "wide",
        "grad_x: error",
    ),
    "no barrier before the product": (
        "forward.cuh",
        "  __syncthreads();\n  if (args.last_step == LastStep::chosen) {",
        "  if (args.last_step == LastStep::chosen) {",
        "one",
        "error",
    ),
    "another swizzle of 16-bit pairs": (
        "fragments.cuh",
        "swizzled<kPieces>(row_, ",
        "swizzled<kPieces>(row_ ^ 1, ",
        "taps",
        "error",
    ),
    "alpha is left out": (
        "outputs.cuh",
        "args.last_step == LastStep::tanh_cosine ? float(args.p.op.alpha) : 1.0f",
        "args.last_step == LastStep::tanh_cosine ? 1.0f : 1.0f",
        "taps",
        "y: error",
    ),
    "no barrier after the product": (
        "forward.cuh",
        "    __syncthreads();\n    return store_chosen_outputs",
        "    return store_chosen_outputs",
        "taps",
        "y: error",
    ),
    "no barrier before y is stored": (
        "outputs.cuh",
        "\n  __syncthreads();\n  tile.copy(",
        "\n  tile.copy(",
        "taps",
        "y: error",
    ),
    "no barrier before u is stored": (
        "outputs.cuh",
        "\n    __syncthreads();\n    tile.copy(",
        "\n    tile.copy(",
        "taps",
        "u: error",
    ),
    "y overtakes u": (
        "outputs.cuh",
        "static_cast<T*>(p.dot));\n    __syncthreads();\n",
        "static_cast<T*>(p.dot));\n",
        "taps",
        "u: error",
    ),
    "rows of the other half of a fragment": (
        "fragments.cuh",
        "+ m) * 16 + half * 8 + row_",
        "+ m) * 16 + (1 - half) * 8 + row_",
        "taps",
        "error",
    ),
    "x is read before it is there": (
        "gradient.cuh",
        "  wait_async<0>();\n",
        "",
        "one",
        "copies are under way",
    ),
    "x is seen before it is there": (
        "gradient.cuh",
        "  wait_async<0>();\n  __syncthreads();\n",
        "  wait_async<0>();\n",
        "one",
        "grad_x: error",
    ),
    "no barrier before the gradient is stored": (
        "gradient.cuh",
        "  __syncthreads();\n  tile.copy(",
        "  tile.copy(",
        "one",
        "grad_x: error",
    ),
    "quarters change places": (
        "gradient.cuh",
        "upper ? quarters[0] : quarters[2],",
        "quarters[0],",
        "wide",
        "grad_x: error",
    ),
    "a tap of another row's pixel": (
        "problem.cuh",
        "axis.size);\n}\n",
        "axis.size + 1);\n}\n",
        "halo",
        "",
    ),
    "no zeros outside of the image": (
        "halo.cuh",
        "(seen_[m] >> turn & 1) != 0",
        "(seen_[m] >> turn & 1) != 2",
        "halo",
        "error",
    ),
    "pixels before the first": (
        "halo.cuh",
        "row >= begin_ && ",
        "",
        "halo",
        "",
    ),
    "pixels after the last": (
        "halo.cuh",
        "row < end_ && ",
        "",
        "halo",
        "",
    ),
    "no tail of channels in a halo": (
        "halo.cuh",
        " && channel < depth_\n",
        "\n",
        "halo",
        "",
    ),
    "a halo is overwritten": (
        "halo.cuh",
        "copy_pixels(halo_ ^ kHaloBytes,",
        "copy_pixels(halo_,",
        "halo",
        "error",
    ),
    "outputs beyond the last row": (
        "stored_tile.cuh",
        "columns ? place.rows : 0",
        "columns ? Tile::kRows : 0",
        "one",
        "",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name: str, tmp_path: Path) -> None:
    file, old, new, case, words = FAULTS[name]
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    path = copy / "cuda/fused/implicit_gemm" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has not one {old!r}"
    path.write_text(text.replace(old, new))
    tile = 1 if case == "halo" else 2  # of 64 rows: none
    executable = program(FAST, copy, tile)
    try:
        for seed in range(8):
            done = run(FAST, executable, case, tile, seed)
            if done.returncode != 0:
                break
        assert (done.returncode == CRASHED) == (not words), (done.returncode, done.stderr)
        assert words in done.stderr
    finally:
        shutil.rmtree(executable.parent)
