"""The filter side: the gradient of the filters, and the gradients of the parameters per filter."""

import triton
import triton.language as tl


@triton.jit
def filter_grad_kernel(
    library_grad, weight, a, by_a, grad_weight,
    filters, size, alpha,
    DIVIDES: tl.constexpr, PROJECTS: tl.constexpr, HAS_A: tl.constexpr,
    FILTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale library_grad + along weight: the part along the filter leaves, that of h comes."""
    o = tl.program_id(0).to(tl.int64) * FILTERS + tl.arange(0, FILTERS)
    exists = (o < filters)[:, None]
    row = (o * size)[:, None]
    norm = tl.load(a + o, mask=o < filters, other=1.0)
    scale = alpha / norm if DIVIDES else tl.zeros_like(norm) + alpha
    along = tl.zeros_like(norm)
    if PROJECTS:
        products = tl.zeros([FILTERS, BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            i = (start + tl.arange(0, BLOCK))[None, :]
            mask = exists & (i < size)
            w = tl.load(weight + row + i, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(library_grad + row + i, mask=mask, other=0.0).to(tl.float32)
            products += w * g
        along = -scale * tl.sum(products, axis=1) / (norm * norm)
    if HAS_A:
        along += tl.load(by_a + o, mask=o < filters, other=0.0).to(tl.float32) / norm
    for start in range(0, size, BLOCK):
        i = (start + tl.arange(0, BLOCK))[None, :]
        mask = exists & (i < size)
        w = tl.load(weight + row + i, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(library_grad + row + i, mask=mask, other=0.0).to(tl.float32)
        value = g * scale[:, None] + w * along[:, None]
        tl.store(grad_weight + row + i, value, mask=mask)


@triton.jit
def parameter_grads_kernel(
    by_rho, by_k, by_bias, radius, mean,
    grad_radius, grad_mean, grad_k, grad_bias, sigma,
    filters, count, floor,
    RADIUS: tl.constexpr, HAS_MEAN: tl.constexpr, CURVATURE: tl.constexpr,
    SUM_RHO: tl.constexpr, WANTS_RADIUS: tl.constexpr, WANTS_MEAN: tl.constexpr,
    WANTS_BIAS: tl.constexpr, WANTS_SIGMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of bias, radius, mean norm and k from the column sums. One program.

    CURVATURE is "none" where the gradient of k is not wanted.
    """
    factor = tl.load(mean) if HAS_MEAN else 1.0
    of_radius = tl.zeros([BLOCK], tl.float64)
    of_mean = tl.zeros([BLOCK], tl.float64)
    of_k = tl.zeros([BLOCK], tl.float64)
    for start in range(0, filters, BLOCK):
        o = start + tl.arange(0, BLOCK)
        exists = o < filters
        if SUM_RHO:
            if RADIUS == "filter":
                r = tl.load(radius + o, mask=exists, other=1.0)
            else:
                r = tl.zeros([BLOCK], tl.float32) + tl.load(radius)
            # On its floor rho is constant.
            total = tl.load(by_rho + o, mask=exists, other=0.0)
            total = tl.where(r * factor < floor, 0.0, total)
            of_mean += r.to(tl.float64) * total
            of_radius += total
            if WANTS_RADIUS and RADIUS == "filter":
                tl.store(grad_radius + o, (total * factor).to(tl.float32), mask=exists)
        if CURVATURE != "none":
            total = tl.load(by_k + o, mask=exists, other=0.0)
            of_k += total
            if CURVATURE == "filter":
                tl.store(grad_k + o, total.to(tl.float32), mask=exists)
        if WANTS_BIAS:
            total = tl.load(by_bias + o, mask=exists, other=0.0)
            tl.store(grad_bias + o, total.to(tl.float32), mask=exists)
    if WANTS_RADIUS and RADIUS == "one":
        tl.store(grad_radius, (tl.sum(of_radius, axis=0) * factor).to(tl.float32))
    if CURVATURE == "one":
        tl.store(grad_k, tl.sum(of_k, axis=0).to(tl.float32))
    if WANTS_MEAN:
        tl.store(grad_mean, tl.sum(of_mean, axis=0).to(tl.float32))
    if WANTS_SIGMA:
        tl.store(sigma, (tl.sum(of_mean, axis=0) / count).to(tl.float32))
