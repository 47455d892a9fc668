// dcconv_simt::launches(): how many kernels the emulated ops have launched so far.

#include <torch/csrc/stable/library.h>

#include "simt.h"

namespace {

int64_t launches() {
  return static_cast<int64_t>(simt::settings.launches);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dcconv_simt, m) {
  m.def("launches() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dcconv_simt, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&launches));
}
