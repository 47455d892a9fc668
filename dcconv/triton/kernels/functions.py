"""Every magnitude and angular function in Triton: value and hand-written derivatives.

The twins of ``dcconv/operator/functions.py``, float32, without libdevice: polynomials with the
coefficients of ``csrc/elementary.h``, so that the interpreter runs what a GPU runs. ``MAGNITUDES``
and ``ANGULARS`` name what there is; the branches of the functions below are chosen while compiling.
"""

import triton
import triton.language as tl

#: Magnitudes, those with a weighting inside as magnitude_weighting.
MAGNITUDES = (
    "sphere",
    "ball",
    "tanh",
    "linear",
    "segmented",
    "log",
    "mix",
    "tanh_product",
    "tanh_separate",
)
ANGULARS = ("linear", "cosine", "sigmoid", "square_cosine", "power")


# min and max that return a NaN first argument.
@triton.jit
def at_most(x, high):
    return tl.where(x > high, high, x)


@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def clamp_unit(c):
    return at_least(at_most(c, 1.0), -1.0)


@triton.jit
def with_sign(size, sign):
    return tl.where(sign < 0.0, -size, size)


@triton.jit
def polynomial(x, coefficients):
    """By Horner's rule, the coefficient of the highest power first."""
    p = coefficients[0] * x + coefficients[1]
    for i in tl.static_range(2, len(coefficients)):
        p = p * x + coefficients[i]
    return p


@triton.jit
def power_of_two(shifted):
    """2^n for shifted = n + 1.5 * 2^23: the low bits of such a sum are n itself."""
    bits = shifted.to(tl.int32, bitcast=True)
    return ((bits + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tanh_slope(x):
    """tanh x for x >= 0 and its derivative 4 e / (1 + e)^2, e = exp(-2 x)."""
    y = -2.0 * at_most(x, 44.0)
    # Adding and subtracting 1.5 * 2^23 rounds to an integer.
    shifted = y * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    # ln 2 in two parts, the first exact in products with an exponent.
    r = (y - n * 0.693145752) - n * 1.42860677e-06
    p = polynomial(r, (0.00138888566, 0.0083690742, 0.0416671373, 0.166665062, 0.5, 1.0))
    scale = power_of_two(shifted)
    minus = scale * (r * p) + (scale - 1.0)  # exp(y) - 1
    inverse = 1.0 / (2.0 + minus)
    e = scale * (r * p) + scale
    return -minus * inverse, 4.0 * e * inverse * inverse


@triton.jit
def tanh_of(x):
    """2 n q / (q^2 + n^2), n / q = tanh(x / 2) minimax up to 9.01; tanh 9.01 rounds to 1."""
    z = at_least(at_most(x, 9.01), -9.01)
    t = z * z
    p = 0.000105595297 * t + 0.0275366791
    n = z * (p * t + 0.925)
    q = polynomial(t, (2.26981943e-06, 0.00223125657, 0.209239960, 1.85))
    return clamp_unit((n + n) * q / (q * q + n * n))


@triton.jit
def tanh_defect(z, t, slope):
    """z / cosh(z)^2 - tanh(z) for z >= 0, given both: the difference cancels for small z."""
    s = z * z
    p = polynomial(s, (-0.0660842583, 0.170292109, -0.323401719, 0.533320606, -0.666666627))
    return tl.where(z < 0.5, z * s * p, z * slope - t)


@triton.jit
def split(x):
    """x = 2^e (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; x positive and normal."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return e.to(tl.float32), f


@triton.jit
def log1p_of(x):
    """log(1 + x) for x >= 0: log of the rounded sum u, plus (x - (u - 1)) / u for what it lost."""
    u = 1.0 + x
    lost = (x - (u - 1.0)) / u
    e, f = split(u)
    high = (-0.0797415748, 0.126556724, -0.129892841, 0.142099485)
    low = (-0.166415811, 0.200012013, -0.25000304, 0.333333313)
    p = polynomial(f, high + low)
    r = f * f * (f * p - 0.5)
    value = e * 0.693145752 + (f + (r + (e * 1.42860677e-06 + lost)))
    return tl.where(x < 3.0e38, value, x)


@triton.jit
def log_defect(b, log):
    """b / (1 + b) - log(1 + b) for b >= 0, given the logarithm."""
    high = (-0.386207134, 0.715531468, -0.811072409, 0.79813236)
    low = (-0.749923766, 0.666665494, -0.5)
    p = polynomial(b, high + low)
    return tl.where(b < 0.25, b * b * p, b / (1.0 + b) - log)


@triton.jit
def asin_of(x):
    """x + x^3 P(x^2) below 1/2, pi/2 - 2 asin(sqrt((1 - x) / 2)) above, for |x| <= 1."""
    size = tl.abs(x)
    large = size > 0.5
    t = tl.where(large, 0.5 - 0.5 * size, size * size)
    s = tl.where(large, tl.sqrt_rn(t), size)
    p = polynomial(t, (0.0381963216, 0.0264993571, 0.0450099036, 0.0749881342, 0.166666731))
    small = s + s * t * p
    # pi/2 in two parts keeps the difference within an ulp.
    value = tl.where(large, 1.57079637 - (2.0 * small + 4.37113883e-08), small)
    return with_sign(value, x)


@triton.jit
def sin_half_pi(x):
    """sin(pi/2 x) for |x| <= 1."""
    t = x * x
    p = polynomial(t, (0.000151485117, -0.00467376644, 0.0796896815, -0.645963728, 1.57079637))
    return x * p


@triton.jit
def pow_of(x, y):
    """x^y for x >= 0, y >= 0: exp2(y log2 x), the leading product in two parts."""
    e, f = split(x)
    high = (-0.112212539, 0.184337556, -0.189195678, 0.204807162, -0.239878252)
    low = (0.288562626, -0.360684991, 0.480898231, -0.721347511)
    p = polynomial(f, high + low)
    fraction = y * (1.44269502 * f + (1.92596303e-08 * f + f * f * p))
    whole = y * e
    total = at_least(at_most(whole + fraction, 127.0), -126.0)
    shifted = total + 12582912.0
    n = shifted - 12582912.0
    r = at_least(at_most((whole - n) + fraction, 1.0), -1.0)
    upper = (0.000153533605, 0.0013398875, 0.00961843692, 0.0555033237)
    lower = (0.240226477, 0.693147182, 1.0)
    q = polynomial(r, upper + lower)
    nonzero = tl.where(x > 0.0, q * power_of_two(shifted), x)  # 0 and NaN come out as they are
    return tl.where(y == 0.0, 1.0, nonzero)


@triton.jit
def asin_slope(c, delta):
    return 1.0 / tl.sqrt_rn(at_least((1.0 - c) * (1.0 + c), delta))


@triton.jit
def magnitude_value(a, b, rho, alpha, beta, NAME: tl.constexpr):
    """h; a and rho are filter operands that broadcast with b."""
    inverse = 1.0 / rho
    if NAME == "sphere":
        h = tl.zeros_like(b) + alpha
    elif NAME == "ball":
        h = alpha * tl.where(b > rho, 1.0, b * inverse)
    elif NAME == "tanh":
        h = alpha * tanh_of(b * inverse)
    elif NAME == "linear":
        h = alpha * b
    elif NAME == "segmented":
        h = tl.where(b < rho, alpha * b, beta * b + (alpha - beta) * rho)
    elif NAME == "log":
        h = alpha * log1p_of(b)
    elif NAME == "mix":
        h = alpha * b + beta * log1p_of(b)
    elif NAME == "tanh_product":
        h = alpha * tanh_of(a * b * inverse)
    else:
        tl.static_assert(NAME == "tanh_separate", "unknown magnitude")
        h = alpha * tanh_of(b * inverse) * tanh_of(a * inverse)
    return h


@triton.jit
def magnitude_grad(a, b, rho, alpha, beta, NAME: tl.constexpr):
    """h, d = b dh/db - h (exact where dh/db would cancel), dh/drho, dh/da."""
    inverse = 1.0 / rho
    zero = tl.zeros_like(b)
    h_rho = zero
    h_a = zero
    if NAME == "sphere":
        h = zero + alpha
        d = zero - alpha
    elif NAME == "ball":
        outside = b > rho
        h = alpha * tl.where(outside, 1.0, b * inverse)
        d = tl.where(outside, -alpha, 0.0)
        h_rho = tl.where(outside, 0.0, -alpha * b * inverse * inverse)
    elif NAME == "tanh":
        z = b * inverse
        t, slope = tanh_slope(z)
        h = alpha * t
        d = alpha * tanh_defect(z, t, slope)
        h_rho = -alpha * z * slope * inverse
    elif NAME == "linear":
        h = alpha * b
        d = zero
    elif NAME == "segmented":
        step = tl.where(b < rho, 0.0, alpha - beta)
        h = tl.where(b < rho, alpha * b, beta * b + (alpha - beta) * rho)
        d = -step * rho
        h_rho = step
    elif NAME == "log":
        log = log1p_of(b)
        h = alpha * log
        d = alpha * log_defect(b, log)
    elif NAME == "mix":
        log = log1p_of(b)
        h = alpha * b + beta * log
        d = beta * log_defect(b, log)
    elif NAME == "tanh_product":
        z = a * b * inverse
        t, slope = tanh_slope(z)
        h = alpha * t
        d = alpha * tanh_defect(z, t, slope)
        h_rho = -alpha * slope * inverse * z
        h_a = alpha * slope * inverse * b
    else:
        tl.static_assert(NAME == "tanh_separate", "unknown magnitude")
        zb = b * inverse
        za = a * inverse
        tb, slope_b = tanh_slope(zb)
        ta, slope_a = tanh_slope(za)
        h = alpha * tb * ta
        d = alpha * ta * tanh_defect(zb, tb, slope_b)
        h_rho = -alpha * inverse * (zb * slope_b * ta + za * slope_a * tb)
        h_a = alpha * tb * slope_a * inverse
    return h, d, h_rho, h_a


@triton.jit
def angular_value(c, k, power, NAME: tl.constexpr):
    """g; k is a filter operand that broadcasts with c."""
    if NAME == "linear":
        g = 0.636619772367581343 * asin_of(clamp_unit(c))
    elif NAME == "cosine":
        g = c
    elif NAME == "sigmoid":
        half = 0.5 / k
        g = tanh_of(asin_of(clamp_unit(c)) * half) / tanh_of(1.57079632679489662 * half)
    elif NAME == "square_cosine":
        g = c * tl.abs(c)
    else:
        tl.static_assert(NAME == "power", "unknown angular function")
        g = c * pow_of(tl.abs(c), power - 1.0)
    return g


@triton.jit
def angular_grad(c, k, power, delta, NAME: tl.constexpr):
    """g, dg/dc, e = g - c dg/dc (0 for the cosine), dg/dk."""
    g_k = tl.zeros_like(c)
    if NAME == "linear":
        g = 0.636619772367581343 * asin_of(clamp_unit(c))
        g_c = 0.636619772367581343 * asin_slope(c, delta)
        e = g - c * g_c
    elif NAME == "cosine":
        g = c
        g_c = g_k + 1.0
        e = g_k
    elif NAME == "sigmoid":
        # g is even in k; the sign of k comes in with the derivative by k alone.
        half = 0.5 / tl.abs(k)
        phi = asin_of(clamp_unit(c))
        q, q_slope = tanh_slope(tl.abs(phi) * half)
        t, t_slope = tanh_slope(1.57079632679489662 * half)
        g = with_sign(q, phi) / t
        slope = q_slope * half / t  # dg/dphi
        g_c = slope * asin_slope(c, delta)
        e = g - c * g_c
        g_k = (g * 1.57079632679489662 * t_slope * half / t - phi * slope) / k
    elif NAME == "square_cosine":
        size = tl.abs(c)
        g = c * size
        g_c = 2.0 * size
        e = -g
    else:
        tl.static_assert(NAME == "power", "unknown angular function")
        slope = pow_of(tl.abs(c), power - 1.0)
        g = c * slope
        g_c = power * slope
        e = g * (1.0 - power)
    return g, g_c, e, g_k


@triton.jit
def cosine_from(g, NAME: tl.constexpr):
    """c from g, for the angular functions that dcconv.operator.functions calls invertible."""
    if NAME == "linear":
        c = sin_half_pi(clamp_unit(g))
    elif NAME == "square_cosine":
        c = with_sign(tl.sqrt_rn(tl.abs(g)), g)
    else:
        tl.static_assert(NAME == "cosine", "this angular function has no inverse")
        c = g
    return c
