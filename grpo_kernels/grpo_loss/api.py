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
            config. On the CPU also when cu_seqlens decreases or leaves [0, N].

    Numerics:
        Token terms in float32 (float64 for float64 inputs), all sums in float64 and in a fixed order in the kernels.
        A masked token contributes exactly zero to value, gradient and metrics. A token whose advantage or weight is
        zero has a policy term of exactly zero, also when its ratio overflows. NaN in a live token makes the scalar
        loss NaN; with reduction "none" it stays in its token, or in its sequence where the ratio or weight is the
        sequence's. Equal infinite log-probs have ratio 1. An empty batch gives 0.

    Source:
        DeepSeekMath (arXiv 2402.03300) and the papers listed at the presets; conventions of TRL 1.16.
    """
    _check_config(config)
    inputs = _prepare(
        log_probs, old_log_probs, advantages, mask, ref_log_probs, sampler_log_probs, token_weights, entropy, cu_seqlens
    )
    inputs = _with_coefficients(inputs, config, kl_coef, entropy_coef, num_items, max_length)
    backend = _dispatch.resolve(_OP, log_probs)
    if backend == "reference":
        loss, values = reference.grpo_loss(inputs, config)
    else:
        loss, values = _kernel(inputs, config, backend)
    return GRPOLossOutput(loss, GRPOMetrics(values))


def _check_config(config: Any) -> None:
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"{_OP}: config must be a GRPOLossConfig, got {type(config).__name__}")


def _prepare(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    ref_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    token_weights: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
) -> LossInputs:
    """Checks the tensors and brings them to one dtype and form."""
    batch = _check_log_probs(log_probs, cu_seqlens)
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    symbol = "[B, T]" if cu_seqlens is None else "[N]"
    shape = tuple(log_probs.shape)

    def check(name: str, value: Tensor, *extra: tuple[str, tuple[int, ...]]) -> None:
        _checks.check_tensor(_OP, name, value)
        _checks.check_shape(_OP, name, value, *extra, (symbol, shape))
        _checks.check_same_device(_OP, name, value, "log_probs", log_probs)

    def floating(name: str, value: Tensor | None, *extra: tuple[str, tuple[int, ...]]) -> Tensor | None:
        if value is None:
            return None
        check(name, value, *extra)
        _checks.check_dtype(_OP, name, value)
        return (value if name == "entropy" else value.detach()).to(dtype)

    def per_sequence(value: Tensor) -> Tensor:
        return value[:, None] if value.ndim == 1 and value.shape[0] == batch else value

    if mask is not None:
        check("mask", mask)
        mask = mask if mask.dtype in _MASK_DTYPES else mask != 0
    per_row = floating("advantages", advantages, ("[B]", (batch,)))
    if per_row is None:
        raise TypeError(f"{_OP}: advantages must be a torch.Tensor, got NoneType")
    weights = floating("token_weights", token_weights, ("[B]", (batch,)), ("[B, 1]", (batch, 1)))
    return LossInputs(
        log_probs=log_probs.to(dtype),
        old_log_probs=floating("old_log_probs", old_log_probs),
        advantages=per_sequence(per_row),
        mask=mask,
        ref_log_probs=floating("ref_log_probs", ref_log_probs),
        sampler_log_probs=floating("sampler_log_probs", sampler_log_probs),
        token_weights=None if weights is None else per_sequence(weights),
        entropy=floating("entropy", entropy),
        entropy_threshold=None,
        cu_seqlens=cu_seqlens,
        kl_coef=0.0,
        entropy_coef=0.0,
        num_items=0.0,
        max_length=0,
    )


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


def _with_coefficients(
    inputs: LossInputs,
    config: GRPOLossConfig,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    num_items: Tensor | float | None,
    max_length: int | None,
) -> LossInputs:
    """Adds the coefficients, after checking that what they and the config need is there."""
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    kl = isinstance(kl_coef, Tensor) or kl_coef != 0
    bonus = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    for needed, name, value, reason in (
        (kl, "ref_log_probs", inputs.ref_log_probs, "kl_coef"),
        (bonus, "entropy", inputs.entropy, "entropy_coef"),
        (config.top_entropy_quantile < 1.0, "entropy", inputs.entropy, "top_entropy_quantile"),
        (config.sampler_correction != "none", "sampler_log_probs", inputs.sampler_log_probs, "sampler_correction"),
    ):
        if needed and value is None:
            raise ValueError(f"{_OP}: {name} must be given when {reason} is set, got None")
    if num_items is not None and config.reduction == "none":
        raise ValueError(f"{_OP}: num_items must be None with reduction='none', which divides by nothing")
    if isinstance(num_items, (int, float)) and not torch.compiler.is_compiling():
        _checks.check_number(_OP, "num_items", num_items, minimum=0.0)
    threshold = None
    if config.top_entropy_quantile < 1.0 and inputs.entropy is not None:
        threshold = reference.entropy_threshold(
            inputs.entropy, inputs.mask, inputs.cu_seqlens, config.top_entropy_quantile
        )
    return inputs._replace(
        entropy_threshold=threshold,
        kl_coef=_coefficient("kl_coef", kl_coef, inputs.log_probs),
        entropy_coef=_coefficient("entropy_coef", entropy_coef, inputs.log_probs),
        num_items=0.0 if num_items is None else _coefficient("num_items", num_items, inputs.log_probs),
        max_length=_length(inputs, config, max_length),
    )


def _coefficient(name: str, value: Tensor | float, like: Tensor) -> Tensor | float:
    tensor, number = _checks.scalar_argument(_OP, name, value, like.device, like.dtype)
    return number if tensor is None else tensor


def _length(inputs: LossInputs, config: GRPOLossConfig, max_length: int | None) -> int:
    if config.reduction != "sequence_mean_token_sum_norm":
        if max_length is not None:
            raise ValueError(f"{_OP}: max_length must be None with reduction={config.reduction!r}")
        return 0
    if max_length is None:
        max_length = config.max_length
    if max_length is None:
        if inputs.cu_seqlens is not None:
            raise ValueError(f"{_OP}: max_length must be given with cu_seqlens and reduction={config.reduction!r}")
        return 0
    _checks.check_integer(_OP, "max_length", max_length, minimum=1)
    return max_length


def _arguments(inputs: LossInputs, config: GRPOLossConfig, backend: str) -> tuple[Any, ...]:
    """The op's arguments but for upstream and the two flags."""
    scalars: list[Any] = []
    for value in (inputs.kl_coef, inputs.entropy_coef, inputs.num_items):
        scalars += (value, 0.0) if isinstance(value, Tensor) else (None, value)
    options, parameters = config.pack()
    return (*inputs[:10], *scalars, inputs.max_length, options, parameters, backend)


def _call(arguments: tuple[Any, ...], upstream: Tensor | None, need_log_probs: bool, need_entropy: bool) -> Any:
    return ops.grpo_loss(*arguments[:10], upstream, *arguments[10:19], need_log_probs, need_entropy, arguments[19])


def _kernel(inputs: LossInputs, config: GRPOLossConfig, backend: str) -> tuple[Tensor, Tensor]:
    arguments = _arguments(inputs, config, backend)
    entropy = inputs.entropy
    if torch.is_grad_enabled() and (inputs.log_probs.requires_grad or (entropy is not None and entropy.requires_grad)):
        loss, values = _GRPOLoss.apply(config.reduction == "none", *arguments)  # type: ignore[no-untyped-call]
    else:
        loss, _, _, _, values = _call(arguments, None, False, False)
    return loss, values


class _GRPOLoss(torch.autograd.Function):
    """The forward computes the derivative as well, so the backward is one multiplication by the upstream scalar.

    Per-token losses may have any upstream gradient, and a sequence's ratio couples its tokens: there the backward
    runs the kernel again with the upstream gradient as weights, and nothing but the inputs is kept.
    """

    @staticmethod
    def forward(ctx: Any, per_token: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        need_log_probs, need_entropy = ctx.needs_input_grad[1], ctx.needs_input_grad[8]
        loss, grad_log_probs, grad_entropy, scale, values = _call(
            arguments, None, need_log_probs and not per_token, need_entropy and not per_token
        )
        ctx.per_token, ctx.needs = per_token, (need_log_probs, need_entropy)
        if per_token:
            ctx.tensors = [isinstance(argument, Tensor) for argument in arguments]
            ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
            ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))
        else:
            ctx.save_for_backward(grad_log_probs, grad_entropy, scale)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        upstream = upstreams[0]
        need_log_probs, need_entropy = ctx.needs
        grad_log_probs: Tensor | None = None
        grad_entropy: Tensor | None = None
        if ctx.per_token:
            saved = iter(ctx.saved_tensors)
            arguments = tuple(
                next(saved) if is_tensor else other for is_tensor, other in zip(ctx.tensors, ctx.others, strict=True)
            )
            _, grad_log_probs, grad_entropy, _, _ = _call(arguments, upstream, need_log_probs, need_entropy)
        else:
            grad_log_probs, grad_entropy, scale = ctx.saved_tensors
            factors = upstream * scale
            grad_log_probs = grad_log_probs * factors[0] if need_log_probs else None
            grad_entropy = grad_entropy * factors[1] if need_entropy else None
        return (
            None,
            grad_log_probs if need_log_probs else None,
            *(None,) * 6,
            grad_entropy if need_entropy else None,
            *(None,) * 12,
        )
