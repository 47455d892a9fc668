// A kernel on numpy arrays, for the test that every build loads into Python.
#include <cstddef>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "simt.h"

namespace {

// Blocks of 64 values are turned round; the faulty variant lacks the barrier.
template <bool kBarrier>
__global__ void turn_kernel(const float* x, float* y) {
  float* values = static_cast<float*>(simt::shared_piece(64 * sizeof(float)));
  values[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (kBarrier)
    __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}

using Array = pybind11::array_t<float, pybind11::array::c_style>;

Array turn(const Array& x, unsigned blocks, bool barrier) {
  Array y(x.size());
  const float* from = x.data();
  float* to = y.mutable_data();
  simt::poison(to, static_cast<std::size_t>(y.nbytes()));
  simt::launch("turn", dim3(blocks), 64, 64 * sizeof(float), [&] {
    barrier ? turn_kernel<true>(from, to) : turn_kernel<false>(from, to);
  });
  return y;
}

}  // namespace

PYBIND11_MODULE(self_test_extension, m) {
  m.def("turn", turn);
  m.def("set_seed", simt::set_seed);
}
