"""Decoupled convolution (Liu et al., CVPR 2018) as fused kernels for PyTorch."""

import sys

from dcconv import backends, functional, fusion
from dcconv.backends import use_backend
from dcconv.batch_norm import BatchNormAct2d
from dcconv.calibration import calibrate
from dcconv.convert import convert
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.modules import DecoupledConv2d, norm_updates
from dcconv.operator import functions, reference
from dcconv.operator.records import Operator
from dcconv.optim import (
    orthogonality_penalty,
    project_weights,
    register_projection,
    register_weighted_gradients,
)
from dcconv.version import __version__ as __version__

# Their names as modules, beside those as attributes.
for _module in (functions, reference):
    sys.modules[f"dcconv.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = [
    "BatchNormAct2d",
    "DecoupledConv2d",
    "Operator",
    "backends",
    "calibrate",
    "convert",
    "decoupled_conv2d",
    "functional",
    "functions",
    "fusion",
    "norm_updates",
    "orthogonality_penalty",
    "patch_norm",
    "project_weights",
    "reference",
    "register_projection",
    "register_weighted_gradients",
    "use_backend",
]
