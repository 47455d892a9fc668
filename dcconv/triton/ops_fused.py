"""The ops that take a whole direction in one pass, on Triton kernels; importing registers them.

Their schemas are those of ``csrc/schemas.h``.
"""

from typing import Any

import torch
from torch import Tensor

from dcconv.operator import checks
from dcconv.operator.layout import on_device
from dcconv.operator.numerics import RHO_FLOOR
from dcconv.passes import fused, guards, ops, records
from dcconv.triton import operands
from dcconv.triton.environment import INTERPRETED
from dcconv.triton.fused import AUTOTUNED
from dcconv.triton.kernels.depthwise import depthwise_kernel
from dcconv.triton.kernels.depthwise_grad_input import depthwise_grad_input_kernel
from dcconv.triton.kernels.depthwise_grad_weight import depthwise_grad_weight_kernel
from dcconv.triton.kernels.implicit_gemm import implicit_gemm_kernel
from dcconv.triton.kernels.implicit_gemm_grad_input import implicit_gemm_grad_input_kernel
from dcconv.triton.launch import blocks, gradient_elements, launch, op, tiling
from dcconv.triton.ops_library import check_parameters, column_sums, filter_norms
from dcconv.triton.tiles import TILES, Product, gpu_of, product_of, programs, tile_of
from dcconv.triton.tuning import tuned

# depthwise_grad_weight: a program has a sum per element of its tile for so many taps at most.
TAPS = 9


@op(ops.filter_norm)
def filter_norm(call: records.FilterNorm) -> Tensor:
    a = ops.filter_norm.fake(call)
    filter_norms(records.FilterScale(call.weight, 1.0, call.eps, False), a)
    return a


def _launch(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    product: Product,
    number: int,
    x: Tensor,
) -> None:
    """Launch a kernel of the implicit GEMM; ``number`` names its tile, or who chooses it."""
    if not AUTOTUNED <= number < len(TILES):
        raise checks.value_error("tile", f"be from {AUTOTUNED} to {len(TILES) - 1}", number)
    constants = {
        **constants,
        "FLAT": product.shares_steps,
        "LAST": not product.in_planes,
        "PRECISION": operands.precision(x),
        "UPCASTS": INTERPRETED and x.dtype == torch.bfloat16,
    }
    gpu = gpu_of(x)
    if number == AUTOTUNED:
        with on_device(x):
            number = tuned(kernel, arguments, constants, product, gpu, x)
    tile = tile_of(number, product, gpu)
    constants |= {"P": tile.positions, "LANES": tile.lanes, "DEPTH": tile.depth}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    launch(kernel, programs(tile, product))(*arguments, 0, **constants)


@op(ops.conv2d_one_pass)
def conv2d_one_pass(call: records.OnePass) -> ops.Three:
    checks.choice("kernel", call.kernel, (records.DEPTHWISE, records.IMPLICIT_GEMM))
    y, norm_map, dot = ops.conv2d_one_pass.fake(call)
    x, weight, a, map, window = call.x, call.weight, call.a, call.map, call.window
    check_parameters(weight.shape[0], a, call.bias, call.parameters, x.dtype)
    if y.numel() == 0:
        return y, norm_map, dot
    (n, _, h, w), (p, q), groups = x.shape, y.shape[2:], window.groups
    filters, channels, rows, columns = weight.shape
    parameters = (operands.dense(call.bias, a), *operands.dense_parameters(call.parameters, a))
    tensors = (x, weight, y, dot, a, operands.dense(map, a), norm_map, *parameters)
    numbers = (h, w, q, *operands.steps(window), *call.functions[3:], call.eps, RHO_FLOOR)
    constants: dict[str, Any] = {
        **operands.window_constants((rows, columns), window),
        **operands.function_constants(call.functions, call.parameters),
        "HAS_BIAS": call.bias is not None,
        "KEEPS_NORM": call.keep_norm,
        "KEEPS_DOT": call.keep_dot,
    }
    if call.kernel == records.IMPLICIT_GEMM:
        lanes, point = filters // groups, fused.single_pixels(weight, window)
        constants["DENSE"] = point and max(window.stride) == 1
        constants["NORM"] = "norms" if call.map_is_norm else "loop" if map is None else "sums"
        sizes = (n, p * q, groups, channels, lanes)
        product = product_of(n, p * q, groups, lanes, channels, weight, call.channels_last)
        arguments = (*tensors, *sizes, *numbers)
        _launch(implicit_gemm_kernel, arguments, constants, product, call.tile, x)
        return y, norm_map, dot
    tiles = tiling(n, p * q, filters, groups, call.channels_last)
    constants |= {"MAP_IS_NORM": call.map_is_norm, **tiles.constants}
    launch(depthwise_kernel, tiles.programs)(*tensors, *tiles.sizes, *numbers, **constants)
    return y, norm_map, dot


def _depthwise_grad_input(call: records.OnePassGradInput, grad_x: Tensor) -> None:
    x, weight, window = call.x, call.weight, call.window
    (n, _, h, w), (p, q), groups = x.shape, call.grad_u.shape[2:], window.groups
    t, norm_map, sigma = call.taps
    row_slots, column_slots = operands.slots(window)
    elements = gradient_elements(call.channels_last, x.element_size())
    tiles = tiling(n, h * w, groups, groups, call.channels_last, elements)
    launch(depthwise_grad_input_kernel, tiles.programs)(
        *(call.grad_u, weight, x, t, norm_map, operands.dense(sigma, t), grad_x),
        *(n, h * w, groups, weight.shape[0] // groups, tiles.chunks, tiles.all_chunks),
        *(h, w, p, q, *operands.edges(window), row_slots * column_slots, column_slots),
        WITH_MEAN=sigma is not None,
        **operands.window_constants(weight.shape[2:], window),
        **tiles.map_constants,
    )


@op(ops.conv2d_one_pass_grad_input)
def conv2d_one_pass_grad_input(call: records.OnePassGradInput) -> Tensor:
    checks.choice("kernel", call.kernel, (records.DEPTHWISE, records.IMPLICIT_GEMM))
    grad_x = ops.conv2d_one_pass_grad_input.fake(call)
    x, weight, (t, norm_map, sigma) = call.x, call.weight, call.taps
    guards.one_value("sigma", sigma)
    if sigma is not None:
        guards.values("norm_map", norm_map, t.shape[0])
    if x.numel() == 0:
        return grad_x
    if call.kernel == records.DEPTHWISE:
        _depthwise_grad_input(call, grad_x)
        return grad_x
    (n, _, h, w), (p, q), groups = x.shape, call.grad_u.shape[2:], call.window.groups
    channels, rows, columns = weight.shape[1:]
    filters = weight.shape[0] // groups
    tensors = (call.grad_u, weight, x, t, norm_map, t if sigma is None else sigma, grad_x)
    sizes = (n, h * w, groups, filters, channels, p, q, w)
    constants = {
        **{"ROWS": rows, "COLUMNS": columns, "WITH_MEAN": sigma is not None},
        "DENSE": fused.single_pixels(weight, call.window),
    }
    product = product_of(n, h * w, groups, channels, filters, weight, call.channels_last)
    arguments = (*tensors, *sizes, *operands.steps(call.window)[2:])
    _launch(implicit_gemm_grad_input_kernel, arguments, constants, product, call.tile, x)
    return grad_x


@op(ops.depthwise_grad_weight)
def depthwise_grad_weight(call: records.DepthwiseGradWeight) -> Tensor:
    grad_weight = ops.depthwise_grad_weight.fake(call)
    x, window = call.x, call.window
    n, filters, p, q = call.grad_u.shape
    taps = call.kernel_size[0] * call.kernel_size[1]
    tap_blocks = blocks(taps, TAPS)
    elements = gradient_elements(call.channels_last, x.element_size())
    tiles = tiling(n, p * q, filters, window.groups, call.channels_last, elements)
    parts = call.grad_u.new_empty((1, call.rows, filters * taps), dtype=torch.float32)
    launch(depthwise_grad_weight_kernel, call.rows * tiles.all_chunks * tap_blocks)(
        *(call.grad_u, x, parts, *tiles.sizes, tiles.tiles, blocks(tiles.tiles, call.rows)),
        *(x.shape[2], x.shape[3], q, *operands.steps(window), tap_blocks),
        TAPS=blocks(taps, tap_blocks),
        **operands.window_constants(call.kernel_size, window),
        **tiles.constants,
    )
    # Filters of one channel lie the same way in both layouts.
    column_sums(parts, grad_weight, True)
    return grad_weight
