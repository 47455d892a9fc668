"""BatchNormAct2d: batch normalisation and its ReLU, and the sums that a next layer asks for."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconv import backends, pixel_sums, tracing
from dcconv.operator import checks, reference
from dcconv.operator.layout import PLAIN, memory_format
from dcconv.operator.numerics import FLOATING_DTYPES, compute_dtype
from dcconv.passes import ops
from dcconv.passes.records import COMPILED, AffineRelu
from dcconv.pixel_sums import PixelSums


class _Normalised(NamedTuple):
    """How a call normalises.

    Attributes:
        running_mean, running_var: [c], or None without them.
        of_batch: whether by the batch's own statistics; running ones are updated then.
        momentum: of the update.
        eps: added to the variance.
        groups, channels_last, namespace: of ``affine_relu``.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    of_batch: bool
    momentum: float
    eps: float
    groups: int
    channels_last: bool
    namespace: str


def _statistics(x: Tensor, how: _Normalised) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, [c] in compute dtype; running ones are updated."""
    mean, var, compute = how.running_mean, how.running_var, compute_dtype(x.dtype)
    if how.of_batch:
        if mean is None and x.dtype != compute:
            # Statistics have the dtype of the running ones, without them that of x.
            mean, var = (x.new_zeros(x.shape[1], dtype=compute) for _ in range(2))
        mean, var = torch.batch_norm_update_stats(x, mean, var, how.momentum)
    assert mean is not None and var is not None
    return mean.to(compute), var.to(compute)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, how: _Normalised
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, its sums, and mean, variance and reciprocal deviation, [c] in compute dtype."""
    mean, var = _statistics(x, how)
    invstd = torch.rsqrt(var + how.eps)
    scale = invstd if weight is None else invstd * weight
    if bias is None:
        shift = (mean * scale).neg_()
    else:
        shift = torch.addcmul(bias.to(mean.dtype), mean, scale, value=-1)
    call = AffineRelu(x, scale, shift, how.groups, how.channels_last)
    y, sums = ops.affine_relu(call, how.namespace)
    return y, sums, mean, var, invstd


class _BatchNormAct(torch.autograd.Function):
    """y = relu(batch_norm(x)) and the sums of its squares, of which no gradient is taken.

    Their gradient reaches y through whoever uses them: the decoupled convolution's own is whole.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, how: _Normalised
    ) -> tuple[Tensor, Tensor]:
        y, sums, *statistics = _forward(x, weight, bias, how)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, y, *statistics)
        ctx.how = how.of_batch, how.eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, sums

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None:
            return None, None, None, None
        x, weight, y, mean, var, invstd = ctx.saved_tensors
        of_batch, eps = ctx.how
        wanted = ctx.needs_input_grad[:3]
        # PyTorch's own operations, which have derivatives: so has this.
        grad = torch.ops.aten.threshold_backward(
            grad_y.contiguous(memory_format=memory_format(x)), y, 0
        )
        wide = None if weight is None else weight.to(mean.dtype)
        running = (None, None) if of_batch else (mean, var)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *(grad, x, wide, *running, mean, invstd, of_batch, eps),
            [wanted[0], wanted[1], wanted[2]],
        )
        return (
            grad_x if wanted[0] else None,
            grad_weight.to(weight.dtype) if wanted[1] else None,
            grad_bias.to(ctx.bias_dtype) if wanted[2] else None,
            None,
        )


class BatchNormAct2d(tracing.Leaf, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a ReLU behind it, which finds the next layer's patch norms half-way.

    y = max(0, (x - mean) / sqrt(var + eps) weight + bias), with mean and var as in
    ``nn.BatchNorm2d``, whose state dict this is. In one pass over x it writes y and the sum of the
    squares of y per pixel and group. The output carries the sums until it is changed in place, and
    a :class:`dcconv.DecoupledConv2d` of as many groups that it reaches itself, not a copy or a
    result of it, starts from them: it reads its input once less.

    Where something traces, transforms or watches what runs (``torch.compile``, ``torch.export``,
    ``torch.func``, ``torch.jit.trace``, forward-mode derivatives, dispatch modes), and for an empty
    batch, it is ``nn.BatchNorm2d`` and ``F.relu``; so it is for the backend ``reference``. In
    inference mode, in which PyTorch does not count changes, y comes without the sums.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``.
        device, dtype, bias: as ``nn.BatchNorm2d``.
        groups: those of the convolution that follows; they divide num_features.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu``, ``reference``, or None for the process's
            setting, as of :func:`dcconv.functional.decoupled_conv2d`.

    Shape:
        x [n, num_features, h, w] to y of the same shape; float16, bfloat16, float32 or float64.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NotImplementedError: the named backend cannot run a call; the message says why.
            ``nn.SyncBatchNorm.convert_sync_batchnorm`` meets the layer, and would drop its ReLU.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015.

    Example:
        >>> import dcconv, torch
        >>> from torch import nn
        >>> norm, conv = dcconv.BatchNormAct2d(16), dcconv.DecoupledConv2d(16, 32, 3)
        >>> conv(norm(torch.randn(2, 16, 8, 8))).shape
        torch.Size([2, 32, 6, 6])
    """

    @property
    def num_features(self) -> int:
        """The number of channels."""
        number: int = self.__dict__["num_features"]
        if torch.compiler.is_compiling():
            return number
        caller = sys._getframe(1).f_code.co_name
        if caller == "convert_sync_batchnorm" and not self.before_relu:
            rule = "stay what it is: nn.SyncBatchNorm has no ReLU"
            raise NotImplementedError(f"dcconv: BatchNormAct2d must {rule}, got {caller}")
        return number

    @num_features.setter
    def num_features(self, number: int) -> None:
        self.__dict__["num_features"] = number

    # Whether the network has its ReLU still behind the layer (dcconv.fusion): where the output
    # cannot say that it is rectified, this is nn.BatchNorm2d alone.
    before_relu = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        groups: int = 1,
        backend: str | None = None,
    ) -> None:
        num_features = checks.size("num_features", num_features, 1)
        groups = checks.size("groups", groups, 1)
        if num_features % groups:
            raise checks.value_error("groups", f"divide num_features {num_features}", groups)
        checks.number("eps", eps, "be a finite number of at least 0", 0.0, closed=True)
        if momentum is not None:
            rule = "be None or a number from 0 to 1"
            checks.number("momentum", momentum, rule, 0.0, closed=True)
            if momentum > 1:
                raise checks.value_error("momentum", rule, momentum)
        affine = checks.boolean("affine", affine)
        track_running_stats = checks.boolean("track_running_stats", track_running_stats)
        bias = checks.boolean("bias", bias)
        if dtype is not None and dtype not in FLOATING_DTYPES:
            raise checks.type_error("dtype", checks.DTYPE_RULE, dtype)
        if backend is not None:
            backends.check_name("backend", backend)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.groups = groups
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, rectify and, where the output can carry them, find its sums of squares."""
        x = input
        proxy = None if type(x) is Tensor else tracing.proxy_in((x,), {})
        if proxy is not None:
            recorded: Tensor = tracing.leaf(self, proxy, (x,), {})
            return recorded
        self._check_input_dim(x)
        runner = None if tracing.recording() else backends.choose(x, self.backend)
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        if pixel_sums.is_watched() or not self._is_fusible(x, own):
            y: Tensor = super().forward(x)
            return y if self.before_relu else F.relu(y)
        assert runner is not None
        layout = memory_format(x)
        last = layout == torch.channels_last
        if runner.name == "reference":
            y = F.relu(super().forward(x))
            sums = reference.pixel_sums(y.detach(), self.groups, last)
        else:
            how = self._update(own[2], own[3], last, runner.backend.namespace or COMPILED)
            x, (weight, bias) = x.contiguous(memory_format=layout), own[:2]
            learned = (weight is not None and weight.requires_grad) or (
                bias is not None and bias.requires_grad
            )
            if torch.is_grad_enabled() and (learned or x.requires_grad):
                y, sums = _BatchNormAct.apply(x, weight, bias, how)
            else:
                y, sums, *_ = _forward(x, weight, bias, how)
        pixel_sums.hand_on(y, PixelSums(sums, self.groups, last), self.before_relu)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise checks.type_error("x", "be a tensor", type(input).__name__)
        sizes = tracing.sizes(input)
        if len(sizes) != 4 or sizes[1] != self.num_features:
            rule = f"have shape [n, {self.num_features}, h, w]"
            raise checks.value_error("x", rule, list(sizes))
        if input.dtype not in FLOATING_DTYPES:
            raise checks.type_error("x", f"have dtype {checks.DTYPE_RULE[3:]}", input.dtype)

    def _is_fusible(self, x: Tensor, own: tuple[Tensor | None, ...]) -> bool:
        """Whether kernels read x and the layer's tensors, for a gain; PyTorch has the errors."""
        if type(x) is not Tensor or x.numel() <= x.size(1):
            return False
        if self.before_relu and torch.is_inference_mode_enabled():
            return False  # Its ReLU could not be told, and would run.
        dtype: torch.dtype | None = None
        for t in own:
            if t is None:
                continue
            if type(t) not in PLAIN or t.device != x.device or dtype not in (None, t.dtype):
                return False
            dtype = t.dtype
        return dtype in (None, x.dtype, compute_dtype(x.dtype))

    def _update(
        self, mean: Tensor | None, var: Tensor | None, last: bool, namespace: str
    ) -> _Normalised:
        """Return how a call normalises, the batch counted, as ``nn.BatchNorm2d.forward`` does."""
        momentum, training = self.momentum or 0.0, self.training
        of_batch = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = None
        elif training:
            steps = self.num_batches_tracked
            if steps is not None:
                steps.add_(1)
                if self.momentum is None:
                    momentum = 1.0 / float(steps)
        return _Normalised(mean, var, of_batch, momentum, self.eps, self.groups, last, namespace)

    def extra_repr(self) -> str:
        """Show the arguments of ``nn.BatchNorm2d``, and those that differ from their defaults."""
        usual = {"groups": 1, "backend": None}
        more = [f", {n}={getattr(self, n)!r}" for n, v in usual.items() if getattr(self, n) != v]
        shown: str = super().extra_repr()
        return shown + "".join(more)
