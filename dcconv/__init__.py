"""Decoupled convolution (Liu et al., CVPR 2018) as fused kernels for PyTorch."""

from dcconv import backends, functional, reference
from dcconv.backends import use_backend
from dcconv.calibration import calibrate
from dcconv.convert import convert
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.modules import DecoupledConv2d, norm_updates
from dcconv.optim import (
    orthogonality_penalty,
    project_weights,
    register_projection,
    register_weighted_gradients,
)

__version__ = "0.1.0"

__all__ = [
    "DecoupledConv2d",
    "backends",
    "calibrate",
    "convert",
    "decoupled_conv2d",
    "functional",
    "norm_updates",
    "orthogonality_penalty",
    "patch_norm",
    "project_weights",
    "reference",
    "register_projection",
    "register_weighted_gradients",
    "use_backend",
]
