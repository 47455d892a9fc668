"""DecoupledConv2d: the layer that takes the place of ``nn.Conv2d``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcconv import backends, folding, pixel_sums, settings, tracing
from dcconv.averages import KeptAverage, needs_digits
from dcconv.call import run
from dcconv.casts import Cast
from dcconv.operator import checks
from dcconv.operator.numerics import FLOATING_DTYPES, K_OFFSET, compute_dtype, constant
from dcconv.operator.records import (
    CURVATURE,
    NORM_BATCH,
    RADIUS,
    Geometry,
    Learned,
    Operator,
    changed,
)
from dcconv.weights import weighed

_STATE = ("radius_raw", "k_raw", "norm_mean", "norm_mean_steps")

# The attributes that stand in a layer's records.
_FIELDS = {"operator": tuple(Operator.__dataclass_fields__), "geometry": Geometry._fields}


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of the default process group, differentiable."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Tensor:
        # Every rank's result depends on this rank's tensor.
        grad_local = grad_total.clone()
        dist.all_reduce(grad_local)
        return grad_local


def norm_updates(enabled: bool) -> AbstractContextManager[None]:
    """Let layers in training mode update their moving average ``norm_mean``, or leave it alone.

    m_avg <- (1 - t) m_avg + t m is left out inside ``norm_updates(False)``; everything else of
    training mode stays, m of this batch above all. ``torch.func`` needs it (``vmap(grad(f))``,
    ``jacrev``, ``hessian``: its transforms cannot write to a buffer), and so do second passes over
    a batch that has been counted: recomputation by activation checkpointing, line searches. The
    setting belongs to the thread or asyncio task, as that of ``dcconv.use_backend``.

    Args:
        enabled: whether the averages move inside the context.

    Raises:
        TypeError: enabled is no boolean.

    Example:
        >>> import dcconv, torch
        >>> from torch.func import functional_call, grad, vmap
        >>> layer = dcconv.DecoupledConv2d(3, 8, 3).train()
        >>> def loss(parameters, image):
        ...     return functional_call(layer, parameters, image).square().mean()
        >>> with dcconv.norm_updates(False):
        ...     each = vmap(grad(loss), (None, 0))(
        ...         {name: p.detach() for name, p in layer.named_parameters()},
        ...         torch.randn(4, 3, 8, 8),
        ...     )
        >>> each["weight"].shape
        torch.Size([4, 8, 3, 3, 3])
    """
    checks.boolean("enabled", enabled)
    return settings.norm_updates.within(enabled)


def _write_transformed(buffer: Tensor, value: Tensor) -> None:
    """Write to a buffer inside a transform of torch.func, if it is one of the transformed."""
    try:
        buffer[...] = value
    except RuntimeError as error:
        rule = (
            "be updated outside of torch.func's transforms: put the call into "
            "dcconv.norm_updates(False), or the layer into evaluation mode"
        )
        got = "a layer in training mode inside one"
        raise NotImplementedError(f"dcconv: norm_mean must {rule}, got {got}") from error


def _field(record: str, name: str) -> Any:
    """Return an attribute that stands in a layer's record; to set it is to make another record."""

    def get(layer: DecoupledConv2d) -> Any:
        return getattr(getattr(layer, record), name)

    def put(layer: DecoupledConv2d, value: Any) -> None:
        setattr(layer, record, changed(getattr(layer, record), name, value))

    return property(get, put)


def _is_plain_on_cpu(mean: Tensor, average: Tensor, steps: Tensor) -> bool:
    """Whether numbers of an update can be looked at: nothing traces, transforms or watches it."""
    return (
        not torch.compiler.is_compiling()
        and type(mean) is type(average) is type(steps) is Tensor
        and mean.is_cpu
        and average.is_cpu
        and steps.is_cpu
        and mean.dtype == average.dtype
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not backends.is_transformed()
    )


class DecoupledConv2d(tracing.Leaf):
    """Decoupled convolution with the arguments of ``nn.Conv2d``.

    y = h(||w||, ||x||) g(angle between w and x) for every filter w and patch x; the formula and
    the meaning of every operator argument stand at :func:`dcconv.functional.decoupled_conv2d`.
    The one different default is ``bias=False``: an offset breaks the bound and the angle.

    State: parameters ``weight``, ``bias``, ``radius_raw`` [o] (r = radius_raw^2 + 1e-4) and
    ``k_raw`` [o] (k = abs(k_raw) + 0.05); buffers ``norm_mean`` (float32, float64 for float64
    layers, never half, however it is cast) and ``norm_mean_steps``. A plain ``nn.Conv2d`` state
    dict loads strictly; one of another operator is refused, where its metadata says which.
    Operators without a radius have neither radius nor norm state. Before it has been trained on,
    a layer evaluates with a guess of the mean norm: :func:`dcconv.calibrate` estimates it. A layer
    recomputed by activation checkpointing may update its moving average twice, as BatchNorm does;
    :func:`dcconv.norm_updates` stops updates.

    Args:
        in_channels, out_channels, kernel_size, dilation, groups, bias: as ``nn.Conv2d``.
        padding_mode, device, dtype: as ``nn.Conv2d``.
        stride, padding: as ``nn.Conv2d``; ``padding="same"`` works at any stride.
        magnitude, angular, weighting, alpha, beta, power, eps, keep, backend: as the functional.
        radius: initial r, a number above 0.
        learn_radius: make r a parameter, one per filter (the official code does).
        radius_unit: ``mean_norm``: rho = r m, with m this batch's mean patch norm in training and
            its moving average in evaluation; ``absolute``: rho = r.
        norm_momentum: t of m_avg <- (1 - t) m_avg + t m, in (0, 1].
        norm_init: ``first`` starts the average at the first batch's mean, ``zero`` at 0 without
            correction, the official behaviour.
        norm_mean_grad: let the gradient flow through m, the official behaviour.
        sync_norm: average m over the ranks of the default process group.
        k: initial curvature of ``sigmoid``, a number above 0 (at least 0.05 if learned).
        learn_k: make k a parameter, one per filter.

    Shape:
        x [n, in_channels, h, w] or [in_channels, h, w] to y [n, out_channels, p, q] or
        [out_channels, p, q].

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Source: Liu et al., Decoupled Networks, CVPR 2018, and the official code's constants.

    Example:
        >>> import torch
        >>> from dcconv import DecoupledConv2d
        >>> layer = DecoupledConv2d(16, 32, 3, padding=1, magnitude="ball")
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    radius_raw: nn.Parameter | None
    k_raw: nn.Parameter | None
    norm_mean: Tensor | None
    norm_mean_steps: Tensor | None
    # What weighs the weight's gradients: one scale per register_weighted_gradients.
    gradient_scales: tuple[float, ...] = ()

    # In the records, which a call takes whole.
    operator: Operator
    geometry: Geometry
    magnitude: str = _field("operator", "magnitude")
    angular: str = _field("operator", "angular")
    weighting: str = _field("operator", "weighting")
    alpha: float = _field("operator", "alpha")
    beta: float = _field("operator", "beta")
    power: float = _field("operator", "power")
    eps: float = _field("operator", "eps")
    stride: tuple[int, int] = _field("geometry", "stride")
    padding: tuple[int, int] | str = _field("geometry", "padding")
    dilation: tuple[int, int] = _field("geometry", "dilation")
    groups: int = _field("geometry", "groups")
    padding_mode: str = _field("geometry", "padding_mode")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        magnitude: str = Operator.magnitude,
        angular: str = Operator.angular,
        weighting: str = Operator.weighting,
        alpha: float = Operator.alpha,
        beta: float = Operator.beta,
        radius: float = RADIUS,
        learn_radius: bool = True,
        radius_unit: str = "mean_norm",
        norm_momentum: float = 1e-3,
        norm_init: str = "first",
        norm_mean_grad: bool = True,
        sync_norm: bool = False,
        k: float = CURVATURE,
        learn_k: bool = False,
        power: float = Operator.power,
        eps: float = Operator.eps,
        keep: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.operator = Operator(magnitude, angular, weighting, alpha, beta, power, eps)
        checks.choice("padding_mode", padding_mode, checks.PADDING_MODES)
        in_channels = checks.size("in_channels", in_channels, 1)
        out_channels = checks.size("out_channels", out_channels, 1)
        groups = checks.size("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise checks.value_error("groups", f"divide {name} {channels}", groups)
        bias = checks.boolean("bias", bias)
        learn_radius = checks.boolean("learn_radius", learn_radius)
        norm_mean_grad = checks.boolean("norm_mean_grad", norm_mean_grad)
        sync_norm = checks.boolean("sync_norm", sync_norm)
        learn_k = checks.boolean("learn_k", learn_k)
        checks.choice("radius_unit", radius_unit, ("mean_norm", "absolute"))
        checks.choice("norm_init", norm_init, ("first", "zero"))
        checks.choice("keep", keep, checks.KEEPS)
        if backend is not None:
            backends.check_name("backend", backend)
        checks.number("radius", radius, "be a finite number above 0", 0.0)
        checks.number("k", k, "be a finite number above 0", 0.0)
        if learn_k:
            checks.number("k", k, "be at least 0.05 with learn_k=True", K_OFFSET, closed=True)
        checks.number("norm_momentum", norm_momentum, "be in (0, 1]", 0.0)
        if norm_momentum > 1:
            raise checks.value_error("norm_momentum", "be in (0, 1]", norm_momentum)
        if dtype is not None and dtype not in FLOATING_DTYPES:
            raise checks.type_error("dtype", checks.DTYPE_RULE, dtype)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = checks.pair("kernel_size", kernel_size, 1)
        self.geometry = Geometry(stride, padding, dilation, groups, padding_mode)
        self.initial_radius = float(radius)
        self.learn_radius = learn_radius
        self.radius_unit = radius_unit
        self.norm_momentum = float(norm_momentum)
        self.norm_init = norm_init
        self.norm_mean_grad = norm_mean_grad
        self.sync_norm = sync_norm
        self.initial_k = float(k)
        self.learn_k = learn_k
        self.keep = keep
        self.backend = backend

        uses_rho, uses_k = self.operator.uses_rho, self.operator.uses_k
        self.uses_norm_mean = uses_rho and radius_unit == "mean_norm"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        filters = (out_channels,)
        for name, wanted in (
            ("bias", bias),
            ("radius_raw", uses_rho and learn_radius),
            ("k_raw", uses_k and learn_k),
        ):
            parameter = nn.Parameter(torch.empty(filters, **factory)) if wanted else None
            super().register_parameter(name, parameter)
        if self.uses_norm_mean:
            state = {"device": device, "dtype": self._norm_dtype()}
            self.register_buffer("norm_mean", torch.empty((), **state))
            steps = torch.zeros((), device=device, dtype=torch.int64)
            self.register_buffer("norm_mean_steps", steps)
        else:
            self.register_buffer("norm_mean", None)
            self.register_buffer("norm_mean_steps", None)
        # The weight that was replaced by multiples of its filters, while that is the last change.
        self._unscaled: nn.Parameter | None = None
        self._keep_average()
        self.reset_parameters()

    def _compute_dtype(self) -> torch.dtype:
        """Return the dtype of norms and of the average in a call."""
        return compute_dtype(self.weight.dtype)

    def _norm_dtype(self) -> torch.dtype:
        """Return the dtype of the average outside a call."""
        # A weight that is computed (pruning, weight norm) is so in the next call; what it is
        # computed from has the layer's dtype already. A sharded layer may have no tensor at all.
        source: Tensor | None = self._parameters.get("weight")
        if source is None:
            source = next(self.parameters(), None)
        if source is None:
            source = getattr(self, "weight", None)
        return torch.float32 if source is None else compute_dtype(source.dtype)

    def _keep_average(self) -> None:
        """Look at the buffer's memory from a second side, before anybody casts the buffer."""
        mean = self._buffers.get("norm_mean")
        self._kept = None if mean is None else KeptAverage(mean)

    def _average(self, dtype: torch.dtype) -> Tensor:
        """Return the buffer of the average; one with fewer digits than ``dtype`` gets them back."""
        mean: Tensor | None = self._own("norm_mean")
        assert mean is not None
        if mean.dtype == dtype:
            return mean
        if needs_digits(mean, dtype):
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                # The buffer stands in for the layer's own for one call, and must not outlive it.
                return mean.to(dtype)
            mean = mean.to(dtype) if self._kept is None else self._kept.of(mean, dtype)
            self.norm_mean = mean
            self._keep_average()
        return mean

    def restore_average(self) -> None:
        """Give the buffer of the average its digits back if it was cast from outside."""
        if self.norm_mean is not None:
            self._average(self._norm_dtype())

    def _operator(self) -> dict[str, Any]:
        """Return what a state dict says of the operator: every name and number of the formula."""
        operator = self.operator.named()
        if self.operator.uses_rho:
            operator["radius_unit"] = self.radius_unit
            operator["radius"] = "learned" if self.learn_radius else self.initial_radius
        if self.operator.uses_k:
            operator["k"] = "learned" if self.learn_k else self.initial_k
        return operator

    def reset_parameters(self) -> None:
        """Initialise weight and bias as ``nn.Conv2d``, radius and k, and forget the average."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        with torch.no_grad():
            if self.bias is not None:
                bound = 1 / math.sqrt(self.weight[0].numel())
                self.bias.uniform_(-bound, bound)
        self._reset_operator()

    @torch.no_grad()
    def _reset_operator(self) -> None:
        """Initialise radius, k and the average."""
        if self.radius_raw is not None:
            self.radius_raw.fill_(math.sqrt(self.initial_radius))
        if self.k_raw is not None:
            self.k_raw.fill_(self.initial_k - K_OFFSET)
        if self.norm_mean is not None and self.norm_mean_steps is not None:
            # The norm of a patch of unit-variance pixels: evaluation before training is finite.
            products = math.prod(self.weight.shape[1:])
            self.norm_mean.fill_(math.sqrt(products) if self.norm_init == "first" else 0.0)
            self.norm_mean_steps.zero_()

    @property
    def radius(self) -> Tensor | float:
        """The radius r: [o] in compute dtype if learned, else a number."""
        if self.radius_raw is None:
            return self.initial_radius
        return Learned(self.radius_raw).value(self._compute_dtype())

    @property
    def k(self) -> Tensor | float:
        """The curvature k: [o] in compute dtype if learned, else a number."""
        if self.k_raw is None:
            return self.initial_k
        raw = self.k_raw.to(self._compute_dtype())
        offset: float = constant("K_OFFSET")
        # Not abs, which has no slope at 0: a layer that starts at the smallest k would stay there.
        return torch.where(raw < 0.0, -raw, raw) + offset

    def _own(self, name: str) -> Any:
        """Return a parameter or buffer; PyTorch's look-up takes three times as long."""
        if name in self._parameters:
            return self._parameters[name]
        # A computed one is an attribute of another kind.
        return self._buffers[name] if name in self._buffers else getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator; in training also update the moving average of the mean norm."""
        if type(x) is not Tensor:
            proxy = tracing.proxy_in((x,), {})
            if proxy is not None:
                recorded: Tensor = tracing.leaf(self, proxy, (x,), {})
                return recorded
        weight: Tensor = self._own("weight")
        radius: Tensor | float | Learned = self.initial_radius
        raw = self._own("radius_raw")
        if raw is not None:
            # A layer of a class of one's own may have another radius.
            plain = type(self).radius is DecoupledConv2d.radius
            radius = Learned(raw) if plain else self.radius
        norm_mean: Tensor | str | None = None
        seen: Tensor | None = None  # whether any rank had a patch
        training = self.training
        if self.uses_norm_mean:
            norm_mean = self._average(compute_dtype(weight.dtype))
            if training and self._must_synchronise():
                norm_mean, seen = self._synchronised_mean(x)
            elif training:
                norm_mean = NORM_BATCH
        if self.gradient_scales:
            weight = weighed(weight, self.gradient_scales, self.operator.eps)
        k = self.initial_k if self._own("k_raw") is None else self.k
        tensors = (x, weight, self._own("bias"), radius, norm_mean, k)
        options = (self.operator, self.geometry, self.keep, self.backend, self.norm_mean_grad)
        y, mean = run.conv2d(run.Arguments(*tensors, *options, pixel_sums.of(x)))
        if training and self.uses_norm_mean and settings.norm_updates.own() is not False:
            if isinstance(norm_mean, Tensor):
                # Also with an empty batch here: the ranks' averages stay equal.
                self._update_norm_mean(norm_mean.detach(), seen)
            elif mean is not None and (tracing.recording() or y.numel()):
                self._update_norm_mean(mean)
        return y

    def _must_synchronise(self) -> bool:
        return self.sync_norm and dist.is_available() and dist.is_initialized()

    def _synchronised_mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean norm over all ranks, differentiable, and whether there was any patch."""
        b = run.patch_norm(x, self.kernel_size, self.geometry, self.operator.eps, self.backend)
        if not self.norm_mean_grad:
            b = b.detach()
        local = torch.stack((b.sum(), b.new_tensor(float(b.numel()))))
        total: Tensor = _SumOverRanks.apply(local)
        return total[0] / total[1].clamp(min=1.0), total[1].detach() > 0

    def _update_norm_mean(self, mean: Tensor, seen: Tensor | None = None) -> None:
        kept, steps = self._own("norm_mean"), self._own("norm_mean_steps")
        assert kept is not None and steps is not None
        if seen is None and _is_plain_on_cpu(mean, kept, steps):
            # Values at hand are cheaper to ask than to select by.
            if self.norm_init == "first" and not steps.item():
                kept.copy_(mean)
            else:
                kept.lerp_(mean, self.norm_momentum)
            steps.add_(1)
            return
        with torch.no_grad():
            mean = mean.to(kept.dtype)
            average = torch.lerp(kept, mean, self.norm_momentum)
            if self.norm_init == "first":
                average = torch.where(steps == 0, mean, average)
            if seen is not None:
                average = torch.where(seen, average, kept)
            if backends.is_transformed():
                _write_transformed(kept, average)
            else:
                # Through an index: torch.compile (2.13) drops in-place writes to 0-d float64.
                kept[...] = average
            steps.add_(1 if seen is None else seen.to(torch.int64))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as ``nn.Module``; a folded weight and bias are refused.

        Raises:
            ValueError: a bias is set on a layer without one, or after a weight whose filters are
                multiples of the former ones, and the operator does not scale with its weight.
        """
        former = self._parameters.get(name)
        if name == "bias" and param is not None and not self.operator.scales_with_weight:
            try:
                self._check_bias(former, param)
            except ValueError:
                # Folding has set the weight before the bias: nothing changes where it is refused.
                if self._unscaled is not None:
                    self._parameters["weight"], self._unscaled = self._unscaled, None
                raise
        if name == "weight":
            self._unscaled = former if folding.is_rescaled(former, param) else None
        super().register_parameter(name, param)

    def _check_bias(self, former: nn.Parameter | None, bias: nn.Parameter) -> None:
        if former is None and "bias" in self._parameters:
            rule = f"be asked for by bias=True when the layer is built ({folding.WHY})"
            raise checks.value_error("bias", rule, type(bias).__name__)
        if self._unscaled is not None and bias is not former:
            rule = f"stay after filters were rescaled ({folding.WHY})"
            raise checks.value_error("bias", rule, "another one")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DecoupledConv2d:
        # The average has the accuracy of float32 whatever the layer's dtype: a cast to half
        # would freeze it, since t = 1e-3 is below half an ulp.
        before = self.norm_mean
        if before is not None:
            before = self._average(compute_dtype(before.dtype))
        cast = Cast(self)
        super()._apply(fn, recurse)
        cast.check()
        after = self.norm_mean
        if before is not None and after is not None:
            if after.dtype != self._norm_dtype():
                source = after if before.is_meta else before.to(after.device)
                self.norm_mean = source.to(self._norm_dtype())
            if before.is_meta and not after.is_meta:
                # Memory of to_empty. A plain state, which has no radius, may be loaded next.
                self._reset_operator()
        self._keep_average()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy or a pickle."""
        return {**vars(self), "_unscaled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's or a pickle's attributes; a pickle may have single ones for the records."""
        state = dict(state)
        for record, made in (("operator", Operator), ("geometry", Geometry)):
            if record not in state:
                own = [name for name in state if name in _FIELDS[record]]
                state[record] = made(**{name: state.pop(name) for name in own})
        super().__setstate__(state)
        self.__dict__.setdefault("_unscaled", None)
        mean, kept = self._buffers.get("norm_mean"), self.__dict__.get("_kept")
        # A pickle has two memories where there was one, unless the buffer has lost its digits.
        if mean is None or kept is None or not needs_digits(mean, kept.tensor.dtype):
            self._keep_average()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.restore_average()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside PyTorch's own entry, the version: no key of the state dict.
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["operator"] = self._operator()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error = self._why_not_load(prefix[:-1], local_metadata.get("operator"))
        if error is not None:
            error_msgs.append(error)
            return
        self.restore_average()  # The state's digits go into the buffer in place.
        plain = not any(prefix + name in state_dict for name in _STATE)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if plain:
            own = {prefix + name for name in _STATE}
            missing_keys[:] = [key for key in missing_keys if key not in own]
            self._follow_weight()
        if self.norm_mean is not None and self.norm_mean.dtype != self._norm_dtype():
            self.norm_mean = self.norm_mean.to(self._norm_dtype())  # assign=True with a half state
        self._keep_average()

    def _why_not_load(self, name: str, saved: dict[str, Any] | None) -> str | None:
        """Return a sentence if a state dict says that it is another operator's, else None."""
        own = self._operator()
        if saved is None or saved == own:
            return None
        names = [key for key in {**own, **saved} if own.get(key) != saved.get(key)]
        rule, got = (
            ", ".join(f"{key} {operator.get(key)!r}" for key in names) for operator in (own, saved)
        )
        argument = f"state_dict of layer '{name}'" if name else "state_dict"
        return str(checks.value_error(argument, f"be of an operator with {rule}", got))

    @torch.no_grad()
    def _follow_weight(self) -> None:
        """Bring radius, k and average to the device of a weight that was assigned.

        From the meta device they come with their initial values: a plain state has none.
        """
        weight = self._parameters.get("weight")
        if weight is None or weight.is_meta:
            return
        fresh = False
        for name in _STATE:
            place: dict[str, Any] = self._parameters if name in self._parameters else self._buffers
            value = place.get(name)
            if value is None or value.device == weight.device:
                continue
            if value.is_meta:
                fresh, moved = True, torch.empty_like(value, device=weight.device)
            else:
                moved = value.detach().to(weight.device)
            if isinstance(value, nn.Parameter):
                moved = nn.Parameter(moved, value.requires_grad)
            place[name] = moved
        if fresh:
            self._reset_operator()

    def extra_repr(self) -> str:
        """Show the arguments that differ from their defaults, in signature order."""
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kernel_size={self.kernel_size}",
        ]
        usual = inspect.signature(DecoupledConv2d).parameters
        own = {"radius": self.initial_radius, "k": self.initial_k, "bias": self.bias is not None}
        pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        for name in list(usual)[3:]:
            value = own[name] if name in own else getattr(self, name, None)
            default = pairs.get(name, usual[name].default)
            if name not in ("device", "dtype") and value != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)
