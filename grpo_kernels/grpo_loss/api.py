"""The public loss: argument checks, the choice of a backend, and the autograd function around the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels.grpo_loss import ops, reference
from grpo_kernels.grpo_loss.config import GRPOLossConfig
from grpo_kernels.grpo_loss.metrics import GRPOMetrics
from grpo_kernels.grpo_loss.reference import LossInputs

_OP = "grpo_loss"
_DEFAULT_CONFIG = GRPOLossConfig()
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


class GRPOLossOutput(NamedTuple):
    """What the loss returns.

    Args:
        loss: 0-d, or the shape of log_probs with reduction "none". Differentiable.
        metrics: statistics on the device; ``metrics.to_dict()`` reads them.
        log_probs: None here; `linear_grpo_loss` returns its log-probs, detached.
        entropy: None here; likewise.
    """

    loss: Tensor
    metrics: GRPOMetrics
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    *,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: Tensor | float | None = None,
    entropy_coef: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
) -> GRPOLossOutput:
    """The GRPO policy loss and its published variants, from the log-probs of the sampled tokens.

    Every variant is a map from a token's log-probs and advantage to a loss and its derivative; ``config`` picks it.
    With the default, loss = mean over live tokens of -min(r A, clip(r, 0.8, 1.2) A), r = exp(log_prob -
    old_log_prob). In general::

        token loss = token_weight * sampler_weight * keep * policy(r, A) + kl_coef * KL(log_prob, ref_log_prob)
        loss       = reduction(token loss) - entropy_coef * mean(entropy)

    Sequences are rows of [B, T], or packed: all tensors [N] and ``cu_seqlens`` says where each sequence starts.
    Tokens outside [cu_seqlens[0], cu_seqlens[-1]) count as masked.

    Args:
        log_probs: [B, T] or [N] floating. Log-probs of the sampled tokens under the policy, nats. Differentiable.
        old_log_probs: same shape, or None. Under the policy that the ratio refers to. None means on-policy: log_probs
            without gradient.
        advantages: [B] or [B, T] ([B] or [N] packed; where B = N it is [B]). Floating.
        mask: same shape as log_probs, or None for all. True or non-zero = the token counts. Masked tokens may hold
            anything.
        config: the variant.
        ref_log_probs: same shape. Under the reference policy. Needed with a KL coefficient; otherwise only the KL
            metric uses it.
        sampler_log_probs: same shape. As the inference engine reported them; NaN = not reported, no correction there.
        token_weights: [B, T], [B, 1] or [B] ([N], [B, 1] or [B] packed). Factor of the policy term, not of the KL.
        entropy: same shape as log_probs, nats. For the bonus (differentiable), the entropy mask and the metric.
        kl_coef: number or 0-d tensor. Overrides the config's.
        entropy_coef: number or 0-d tensor. Overrides the config's.
        cu_seqlens: [B + 1] int32 or int64, non-decreasing. Start of each packed sequence, and the end of the last.
        num_items: number or 0-d tensor. What the sum is divided by instead of the count in this call: the number of
            live tokens for "token_mean", of sequences for "sequence_*". For gradient accumulation and data
            parallelism. 0 means not given.
        max_length: length in the denominator of "sequence_mean_token_sum_norm". Overrides the config's; the default
            is T.

    Returns:
        GRPOLossOutput. float32; float64 if log_probs are. Metrics are always float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, is missing, or contradicts the
            config. On the CPU also when cu_seqlens decreases or leaves [0, N]; on CUDA such bounds give undefined
            values, but nothing out of bounds is read or written.

    Numerics:
        Token terms in float32 (float64 for float64 inputs), all sums in float64 and in a fixed order in the kernels.
        A masked token contributes exactly zero to value, gradient and metrics. A token whose advantage or weight is
        zero has a policy term of exactly zero, also when its ratio overflows. NaN in a live token makes the scalar
        loss NaN; with reduction "none" it stays in its token, or in its sequence where the ratio or weight is the
        sequence's. Equal infinite log-probs have ratio 1. An empty batch gives 0.

    Source:
        DeepSeekMath (arXiv 2402.03300) and the papers listed at the presets; conventions of TRL 1.16.
    """
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"{_OP}: config must be a GRPOLossConfig, got {type(config).__name__}")
    batch = _check_log_probs(log_probs, cu_seqlens)
    per_row: _Shapes = (("[B]", (batch,)),)
    sampler = _per_token("sampler_log_probs", sampler_log_probs, log_probs)
    ref = _per_token("ref_log_probs", ref_log_probs, log_probs)
    entropy = _per_token("entropy", entropy, log_probs)
    mask = _check_mask(mask, log_probs)
    kl, bonus = _coefficients(config, kl_coef, entropy_coef, ref, entropy, sampler, log_probs)
    inputs = LossInputs(
        log_probs=_computed(log_probs, log_probs),
        old_log_probs=_per_token("old_log_probs", old_log_probs, log_probs),
        advantages=_per_sequence("advantages", advantages, log_probs, batch, per_row),
        mask=mask,
        ref_log_probs=ref,
        sampler_log_probs=sampler,
        token_weights=None
        if token_weights is None
        else _per_sequence("token_weights", token_weights, log_probs, batch, (*per_row, ("[B, 1]", (batch, 1)))),
        entropy=entropy,
        entropy_threshold=None
        if entropy is None or config.top_entropy_quantile >= 1.0
        else reference.entropy_threshold(entropy, mask, cu_seqlens, config.top_entropy_quantile),
        cu_seqlens=cu_seqlens,
        kl_coef=kl,
        entropy_coef=bonus,
        num_items=_check_num_items(num_items, config, log_probs),
        max_length=_check_max_length(max_length, config, cu_seqlens),
    )
    backend = _dispatch.resolve(_OP, log_probs)
    if backend == "reference":
        loss, values = reference.grpo_loss(inputs, config)
    else:
        loss, values = _kernel(inputs, config, backend)
    return GRPOLossOutput(loss, GRPOMetrics(values))


def _check_log_probs(log_probs: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of sequences."""
    _checks.check_tensor(_OP, "log_probs", log_probs)
    _checks.check_dtype(_OP, "log_probs", log_probs)
    if cu_seqlens is None:
        _checks.check_ndim(_OP, "log_probs", log_probs, "[B, T]")
        return log_probs.shape[0]
    _checks.check_ndim(_OP, "log_probs", log_probs, "[N]")
    _checks.check_tensor(_OP, "cu_seqlens", cu_seqlens)
    _checks.check_dtype(_OP, "cu_seqlens", cu_seqlens, _checks.INTEGER)
    _checks.check_same_device(_OP, "cu_seqlens", cu_seqlens, "log_probs", log_probs)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{_OP}: cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1


def _computed(value: Tensor, log_probs: Tensor) -> Tensor:
    """The value in the dtype that the loss is computed in."""
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    return value if value.dtype == dtype else value.to(dtype)


def _check(name: str, value: Any, log_probs: Tensor, shapes: _Shapes = ()) -> None:
    """`value` is a floating tensor (a mask may have any type) like log_probs, or of another of `shapes`."""
    if not (isinstance(value, Tensor) and value.shape == log_probs.shape and value.device == log_probs.device):
        _checks.check_tensor(_OP, name, value)
        symbol = "[B, T]" if log_probs.ndim == 2 else "[N]"
        _checks.check_shape(_OP, name, value, *shapes, (symbol, tuple(log_probs.shape)))
        _checks.check_same_device(_OP, name, value, "log_probs", log_probs)
    if value.dtype != log_probs.dtype and name != "mask":
        _checks.check_dtype(_OP, name, value)


def _per_token(name: str, value: Tensor | None, log_probs: Tensor) -> Tensor | None:
    if value is None:
        return None
    _check(name, value, log_probs)
    return _computed(value.detach() if value.requires_grad and name != "entropy" else value, log_probs)


def _per_sequence(name: str, value: Tensor, log_probs: Tensor, batch: int, shapes: _Shapes) -> Tensor:
    """[B, 1], or the shape of log_probs."""
    _check(name, value, log_probs, shapes)
    value = _computed(value.detach() if value.requires_grad else value, log_probs)
    return value[:, None] if value.ndim == 1 and value.shape[0] == batch else value


def _check_mask(mask: Tensor | None, log_probs: Tensor) -> Tensor | None:
    if mask is None:
        return None
    _check("mask", mask, log_probs)
    return mask if mask.dtype in _MASK_DTYPES else mask != 0


def _coefficients(
    config: GRPOLossConfig,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    ref: Tensor | None,
    entropy: Tensor | None,
    sampler: Tensor | None,
    log_probs: Tensor,
) -> tuple[Tensor | float, Tensor | float]:
    """The two coefficients, after checking that what they and the config need is there."""
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    if ref is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError(f"{_OP}: ref_log_probs must be given when kl_coef is set, got None")
    if entropy is None and (isinstance(entropy_coef, Tensor) or entropy_coef != 0):
        raise ValueError(f"{_OP}: entropy must be given when entropy_coef is set, got None")
    if entropy is None and config.top_entropy_quantile < 1.0:
        raise ValueError(f"{_OP}: entropy must be given when top_entropy_quantile is set, got None")
    if sampler is None and config.sampler_correction != "none":
        raise ValueError(f"{_OP}: sampler_log_probs must be given when sampler_correction is set, got None")
    return _scalar("kl_coef", kl_coef, log_probs), _scalar("entropy_coef", entropy_coef, log_probs)


def _scalar(name: str, value: Tensor | float, log_probs: Tensor) -> Tensor | float:
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    tensor, number = _checks.scalar_argument(_OP, name, value, log_probs.device, dtype)
    return number if tensor is None else tensor


def _check_num_items(num_items: Tensor | float | None, config: GRPOLossConfig, log_probs: Tensor) -> Tensor | float:
    """0.0 stands for None."""
    if num_items is None:
        return 0.0
    if config.reduction == "none":
        raise ValueError(f"{_OP}: num_items must be None with reduction='none', which divides by nothing")
    if isinstance(num_items, (int, float)) and not torch.compiler.is_compiling():
        _checks.check_number(_OP, "num_items", num_items, minimum=0.0)
    return _scalar("num_items", num_items, log_probs)


def _check_max_length(max_length: int | None, config: GRPOLossConfig, cu_seqlens: Tensor | None) -> int:
    """0 stands for T."""
    if config.reduction != "sequence_mean_token_sum_norm":
        if max_length is not None:
            raise ValueError(f"{_OP}: max_length must be None with reduction={config.reduction!r}")
        return 0
    length = config.max_length if max_length is None else max_length
    if length is None:
        if cu_seqlens is not None:
            raise ValueError(f"{_OP}: max_length must be given with cu_seqlens and reduction={config.reduction!r}")
        return 0
    _checks.check_integer(_OP, "max_length", length, minimum=1)
    return length


def _kernel(inputs: LossInputs, config: GRPOLossConfig, backend: str) -> tuple[Tensor, Tensor]:
    tensors: list[Tensor | None] = list(inputs[:10])
    numbers: list[Any] = []
    for value in inputs[10:13]:
        tensor, number = (value, 0.0) if isinstance(value, Tensor) else (None, value)
        tensors.append(tensor)
        numbers.append(number)
    constants = (*numbers, inputs.max_length, *config.pack(), backend)
    entropy = inputs.entropy
    if torch.is_grad_enabled() and (inputs.log_probs.requires_grad or (entropy is not None and entropy.requires_grad)):
        loss, values = _GRPOLoss.apply(config.reduction == "none", constants, *tensors)  # type: ignore[no-untyped-call]
    else:
        loss, _, _, _, values = _call(tensors, constants, None, False, False)
    return loss, values


def _call(tensors: Any, constants: Any, upstream: Tensor | None, need_log_probs: bool, need_entropy: bool) -> Any:
    kl_coef, entropy_coef, num_items, max_length, options, parameters, backend = constants
    kl_tensor, entropy_tensor, items_tensor = tensors[10:]
    return ops.grpo_loss(
        *tensors[:10],
        upstream,
        kl_tensor,
        kl_coef,
        entropy_tensor,
        entropy_coef,
        items_tensor,
        num_items,
        max_length,
        options,
        parameters,
        need_log_probs,
        need_entropy,
        backend,
    )


class _GRPOLoss(torch.autograd.Function):
    """The forward computes the derivative as well, so the backward is one multiplication by the upstream scalar.

    Per-token losses may have any upstream gradient, and a sequence's ratio couples its tokens: there the backward
    runs the kernel again with the upstream gradient as weights, and nothing but the inputs is kept.
    """

    @staticmethod
    def forward(ctx: Any, per_token: bool, constants: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        ctx.per_token, ctx.constants = per_token, constants
        ctx.needs = ctx.needs_input_grad[2], ctx.needs_input_grad[9]
        now = (False, False) if per_token else ctx.needs
        loss, grad_log_probs, grad_entropy, scale, values = _call(tensors, constants, None, *now)
        ctx.save_for_backward(*(tensors if per_token else (grad_log_probs, grad_entropy, scale)))
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        upstream = upstreams[0]
        need_log_probs, need_entropy = ctx.needs
        if ctx.per_token:
            _, grad_log_probs, grad_entropy, _, _ = _call(ctx.saved_tensors, ctx.constants, upstream, *ctx.needs)
        else:
            grad_log_probs, grad_entropy, scale = ctx.saved_tensors
            factors = upstream * scale
            grad_log_probs = grad_log_probs * factors[0] if need_log_probs else None
            grad_entropy = grad_entropy * factors[1] if need_entropy else None
        return (
            None,
            None,
            grad_log_probs if need_log_probs else None,
            *(None,) * 6,
            grad_entropy if need_entropy else None,
            *(None,) * 5,
        )
