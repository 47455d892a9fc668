// Every magnitude and angular function: value and hand-written derivatives, for host and device.
// dcconv/operator/functions.py holds the same lists in PyTorch; a test compares names and numbers.
#pragma once

#include <cstddef>

#include "elementary.h"

namespace dcconv::DCCONV_ISA {

// Operator constants of a call.
template <class T>
struct Constants {
  T alpha;
  T beta;
  T power;
  T delta;  // floor of (1 - c)(1 + c) in the derivative of asin
};

// The radius and its reciprocal, formed once per filter.
template <class T>
struct Radius {
  T rho;
  T inverse;
};

// h and what backward needs of it. The patch-norm derivative comes as d = b dh/db - h, which is
// exact where dh/db itself would cancel: dL/db collects dy (d g + h e) / b, e below.
template <class T>
struct MagnitudeGrad {
  T h;
  T d;
  T h_rho;
  T h_a;
};

// g and what backward needs of it: e = g - c dg/dc vanishes for the cosine.
template <class T>
struct AngularGrad {
  T g;
  T g_c;
  T e;
  T g_k;
};

// z / cosh(z)^2 - tanh(z) for z >= 0, given both: the difference cancels for small z.
DC_HD float tanh_defect(float z, TanhSlope<float> v) {
  const float s = z * z;
  float p = -0.0660842583f;
  p = p * s + 0.170292109f;
  p = p * s - 0.323401719f;
  p = p * s + 0.533320606f;
  p = p * s - 0.666666627f;
  return z < 0.5f ? z * s * p : z * v.slope - v.t;
}

DC_HD double tanh_defect(double z, TanhSlope<double> v) {
  const double s = z * z;
  const double series =
      z * s *
      (-2.0 / 3 + s * (8.0 / 15 + s * (-34.0 / 105 + s * (496.0 / 2835 - s * 2764.0 / 31185))));
  return z < 0.02 ? series : z * v.slope - v.t;
}

// b / (1 + b) - log(1 + b) for b >= 0, given l = log(1 + b). b is a root in float, below 2^65.
DC_HD float log_defect(float b, float l) {
  float p = -0.386207134f;
  p = p * b + 0.715531468f;
  p = p * b - 0.811072409f;
  p = p * b + 0.79813236f;
  p = p * b - 0.749923766f;
  p = p * b + 0.666665494f;
  p = p * b - 0.5f;
  return b < 0.25f ? b * b * p : quotient_of(b, 1.0f + b) - l;
}

DC_HD double log_defect(double b, double l) {
  const double series =
      b * b * (-0.5 + b * (2.0 / 3 + b * (-0.75 + b * (0.8 + b * (-5.0 / 6 + b * 6.0 / 7)))));
  return b < 1e-3 ? series : b / (1.0 + b) - l;
}

// h = alpha
struct Sphere {
  static constexpr const char* name = "sphere";
  static constexpr bool uses_rho = false;
  template <class T>
  DC_HD static T value(T, T, Radius<T>, const Constants<T>& k) {
    return k.alpha;
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T, T, Radius<T>, const Constants<T>& k) {
    return {k.alpha, -k.alpha, T(0), T(0)};
  }
};

// h = alpha min(b, rho) / rho; b == rho counts as inside
struct Ball {
  static constexpr const char* name = "ball";
  static constexpr bool uses_rho = true;
  template <class T>
  DC_HD static T value(T, T b, Radius<T> r, const Constants<T>& k) {
    return k.alpha * (b > r.rho ? T(1) : b * r.inverse);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T a, T b, Radius<T> r, const Constants<T>& k) {
    const bool outside = b > r.rho;
    return {
        value(a, b, r, k),
        outside ? -k.alpha : T(0),
        outside ? T(0) : -k.alpha * b * r.inverse * r.inverse,
        T(0)
    };
  }
};

// h = alpha tanh(b / rho)
struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr bool uses_rho = true;
  template <class T>
  DC_HD static T value(T, T b, Radius<T> r, const Constants<T>& k) {
    return k.alpha * tanh_of(b * r.inverse);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T, T b, Radius<T> r, const Constants<T>& k) {
    const T z = b * r.inverse;
    const TanhSlope<T> v = tanh_slope(z);
    return {k.alpha * v.t, k.alpha * tanh_defect(z, v), -k.alpha * z * r.inverse * v.slope, T(0)};
  }
};

// h = alpha b
struct Linear {
  static constexpr const char* name = "linear";
  static constexpr bool uses_rho = false;
  template <class T>
  DC_HD static T value(T, T b, Radius<T>, const Constants<T>& k) {
    return k.alpha * b;
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T, T b, Radius<T>, const Constants<T>& k) {
    return {k.alpha * b, T(0), T(0), T(0)};
  }
};

// h = alpha b if b < rho, else beta b + (alpha - beta) rho; b == rho counts as outside
struct Segmented {
  static constexpr const char* name = "segmented";
  static constexpr bool uses_rho = true;
  template <class T>
  DC_HD static T value(T, T b, Radius<T> r, const Constants<T>& k) {
    return b < r.rho ? k.alpha * b : k.beta * b + (k.alpha - k.beta) * r.rho;
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T a, T b, Radius<T> r, const Constants<T>& k) {
    const T step = b < r.rho ? T(0) : k.alpha - k.beta;
    return {value(a, b, r, k), -step * r.rho, step, T(0)};
  }
};

// h = alpha log(1 + b)
struct Log {
  static constexpr const char* name = "log";
  static constexpr bool uses_rho = false;
  template <class T>
  DC_HD static T value(T, T b, Radius<T>, const Constants<T>& k) {
    return k.alpha * log1p_of(b);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T, T b, Radius<T>, const Constants<T>& k) {
    const T l = log1p_of(b);
    return {k.alpha * l, k.alpha * log_defect(b, l), T(0), T(0)};
  }
};

// h = alpha b + beta log(1 + b)
struct Mix {
  static constexpr const char* name = "mix";
  static constexpr bool uses_rho = false;
  template <class T>
  DC_HD static T value(T, T b, Radius<T>, const Constants<T>& k) {
    return k.alpha * b + k.beta * log1p_of(b);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T, T b, Radius<T>, const Constants<T>& k) {
    const T l = log1p_of(b);
    return {k.alpha * b + k.beta * l, k.beta * log_defect(b, l), T(0), T(0)};
  }
};

// h = alpha tanh(a b / rho): magnitude tanh with weighting "product" (Eq. 15)
struct TanhProduct {
  static constexpr const char* name = "tanh";
  static constexpr bool uses_rho = true;
  template <class T>
  DC_HD static T value(T a, T b, Radius<T> r, const Constants<T>& k) {
    return k.alpha * tanh_of(a * b * r.inverse);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T a, T b, Radius<T> r, const Constants<T>& k) {
    const T z = a * b * r.inverse;
    const TanhSlope<T> v = tanh_slope(z);
    const T slope = k.alpha * v.slope * r.inverse;
    return {k.alpha * v.t, k.alpha * tanh_defect(z, v), -slope * z, slope * b};
  }
};

// h = alpha tanh(b / rho) tanh(a / rho): magnitude tanh with weighting "separate" (Eq. 16)
struct TanhSeparate {
  static constexpr const char* name = "tanh";
  static constexpr bool uses_rho = true;
  template <class T>
  DC_HD static T value(T a, T b, Radius<T> r, const Constants<T>& k) {
    return k.alpha * tanh_of(b * r.inverse) * tanh_of(a * r.inverse);
  }
  template <class T>
  DC_HD static MagnitudeGrad<T> grad(T a, T b, Radius<T> r, const Constants<T>& k) {
    const T zb = b * r.inverse, za = a * r.inverse;
    const TanhSlope<T> vb = tanh_slope(zb), va = tanh_slope(za);
    return {
        k.alpha * vb.t * va.t,
        k.alpha * va.t * tanh_defect(zb, vb),
        -k.alpha * r.inverse * (zb * vb.slope * va.t + za * va.slope * vb.t),
        k.alpha * vb.t * va.slope * r.inverse
    };
  }
};

template <class T>
DC_HD T asin_slope(T c, T delta) {
  return inverse_sqrt_of(at_least((T(1) - c) * (T(1) + c), delta));
}

// g = (2 / pi) asin(c)
struct LinearAngle {
  static constexpr const char* name = "linear";
  static constexpr bool uses_k = false;
  static constexpr bool invertible = true;
  static constexpr bool has_e = true;  // whether e can differ from zero
  template <class T>
  DC_HD static T value(T c, T, const Constants<T>&) {
    return T(0.636619772367581343) * asin_of(clamp_unit(c));
  }
  template <class T>
  DC_HD static AngularGrad<T> grad(T c, T k, const Constants<T>& s) {
    const T g = value(c, k, s);
    const T g_c = T(0.636619772367581343) * asin_slope(c, s.delta);
    return {g, g_c, g - c * g_c, T(0)};
  }
  template <class T>
  DC_HD static T inverse(T g) {
    return sin_half_pi(clamp_unit(g));
  }
};

// g = c
struct Cosine {
  static constexpr const char* name = "cosine";
  static constexpr bool uses_k = false;
  static constexpr bool invertible = true;
  static constexpr bool has_e = false;
  template <class T>
  DC_HD static T value(T c, T, const Constants<T>&) {
    return c;
  }
  template <class T>
  DC_HD static AngularGrad<T> grad(T c, T, const Constants<T>&) {
    return {c, T(1), T(0), T(0)};
  }
  template <class T>
  DC_HD static T inverse(T g) {
    return g;
  }
};

// g = tanh(asin(c) / (2 k)) / tanh(pi / (4 k)). 1 / (2 k) for every k; the tanh below the line, of
// more than 2^-100 for k below 2^100, divides by the rules of quotient_of.
struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr bool uses_k = true;
  static constexpr bool invertible = false;
  static constexpr bool has_e = true;
  template <class T>
  DC_HD static T value(T c, T k, const Constants<T>&) {
    const T half = half_reciprocal_of(k);
    return quotient_of(
        tanh_of(asin_of(clamp_unit(c)) * half), tanh_of(T(1.57079632679489662) * half)
    );
  }
  template <class T>
  DC_HD static AngularGrad<T> grad(T c, T k, const Constants<T>& s) {
    // g is even in k; the sign of k comes in with the derivative by k alone.
    const T half = half_reciprocal_of(abs_of(k));
    const T phi = asin_of(clamp_unit(c));
    const TanhSlope<T> q = tanh_slope(abs_of(phi) * half);
    const TanhSlope<T> t = tanh_slope(T(1.57079632679489662) * half);
    const T scale = quotient_of(T(1), t.t);
    const T g = with_sign(q.t, phi) * scale;
    const T slope = q.slope * half * scale;  // dg/dphi
    const T g_c = slope * asin_slope(c, s.delta);
    const T g_k = quotient_of(g * T(1.57079632679489662) * t.slope * half * scale - phi * slope, k);
    return {g, g_c, g - c * g_c, g_k};
  }
  template <class T>
  DC_HD static T inverse(T) {
    return T(0);
  }
};

// g = sign(c) c^2
struct SquareCosine {
  static constexpr const char* name = "square_cosine";
  static constexpr bool uses_k = false;
  static constexpr bool invertible = true;
  static constexpr bool has_e = true;
  template <class T>
  DC_HD static T value(T c, T, const Constants<T>&) {
    return c * abs_of(c);
  }
  template <class T>
  DC_HD static AngularGrad<T> grad(T c, T, const Constants<T>&) {
    const T size = abs_of(c);
    return {c * size, T(2) * size, -c * size, T(0)};
  }
  template <class T>
  DC_HD static T inverse(T g) {
    return with_sign(sqrt_of(abs_of(g)), g);
  }
};

// g = sign(c) |c|^power
struct Power {
  static constexpr const char* name = "power";
  static constexpr bool uses_k = false;
  static constexpr bool invertible = false;
  static constexpr bool has_e = true;
  template <class T>
  DC_HD static T value(T c, T, const Constants<T>& s) {
    return c * pow_of(abs_of(c), s.power - T(1));
  }
  template <class T>
  DC_HD static AngularGrad<T> grad(T c, T, const Constants<T>& s) {
    const T slope = pow_of(abs_of(c), s.power - T(1));
    const T g = c * slope;
    return {g, s.power * slope, g * (T(1) - s.power), T(0)};
  }
  template <class T>
  DC_HD static T inverse(T) {
    return T(0);
  }
};

template <class... Types>
struct TypeList {
  static constexpr std::size_t size = sizeof...(Types);
};

using Magnitudes = TypeList<Sphere, Ball, Tanh, Linear, Segmented, Log, Mix>;
using WeightedMagnitudes = TypeList<TanhProduct, TanhSeparate>;
using Angulars = TypeList<LinearAngle, Cosine, Sigmoid, SquareCosine, Power>;

}  // namespace dcconv::DCCONV_ISA
