"""A pytest plugin: float32 products of the library in float32, not in TF32 as cuDNN defaults to."""

from __future__ import annotations

import torch

torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
