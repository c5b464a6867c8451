"""The arguments of the loss: checked, and brought into the one form that every backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.grpo_loss.config import GRPOLossConfig
from grpo_kernels.grpo_loss.rows import LossInputs

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


class Subject(NamedTuple):
    """What the arguments of a loss are measured by.

    Args:
        op: the public function, for messages.
        log_probs: the log-probs, or a stand-in with their shape, dtype and device.
        name: the argument that gives the device, for messages.
    """

    op: str
    log_probs: Tensor
    name: str = "log_probs"


def check_cu_seqlens(op: str, cu_seqlens: Any, name: str, other: Tensor) -> int:
    """Returns the number of sequences; `name` and `other` are the tensor that lies on the same device."""
    _checks.check_tensor(op, "cu_seqlens", cu_seqlens)
    _checks.check_dtype(op, "cu_seqlens", cu_seqlens, _checks.INTEGER)
    _checks.check_same_device(op, "cu_seqlens", cu_seqlens, name, other)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    batch: int = cu_seqlens.shape[0] - 1
    return batch


def loss_inputs(
    subject: Subject,
    config: GRPOLossConfig,
    batch: int,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    ref_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    token_weights: Tensor | None,
    entropy: Tensor | None,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    cu_seqlens: Tensor | None,
    num_items: Tensor | float | None,
    max_length: int | None,
) -> LossInputs:
    """Checks every argument but the log-probs and cu_seqlens. What takes the whole batch is left open."""
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"{subject.op}: config must be a GRPOLossConfig, got {type(config).__name__}")
    like = _like(subject)
    log_probs, row = subject.log_probs, torch.Size((batch,))
    sampler = _per_token(like, "sampler_log_probs", sampler_log_probs)
    ref = _per_token(like, "ref_log_probs", ref_log_probs)
    entropy = _per_token(like, "entropy", entropy)
    mask = _check_mask(like, mask)
    kl, bonus = _coefficients(like, config, kl_coef, entropy_coef, ref, entropy, sampler)
    return LossInputs(
        log_probs if like.dtype == like.computed else log_probs.to(like.computed),
        _per_token(like, "old_log_probs", old_log_probs),
        _per_sequence(like, "advantages", advantages, batch, (row, like.shape)),
        mask,
        ref,
        sampler,
        None
        if token_weights is None
        else _per_sequence(like, "token_weights", token_weights, batch, (row, torch.Size((batch, 1)), like.shape)),
        entropy,
        None,
        None,
        cu_seqlens,
        kl,
        bonus,
        _check_num_items(like, num_items, config),
        _check_max_length(like.op, max_length, config, cu_seqlens),
    )


class _Like(NamedTuple):
    """The subject, each of its attributes read once."""

    op: str
    name: str
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype  # what the loss is computed in


def _like(subject: Subject) -> _Like:
    op, log_probs, name = subject
    dtype = log_probs.dtype
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return _Like(op, name, log_probs.shape, log_probs.device, dtype, computed)


def _check(like: _Like, name: str, value: Any, shapes: tuple[torch.Size, ...]) -> None:
    """`value` is a floating tensor (a mask may have any type) of one of the shapes, the last that of the log-probs."""
    _checks.check_tensor(like.op, name, value)
    symbols = (*("[B]", "[B, 1]")[: len(shapes) - 1], "[B, T]" if len(like.shape) == 2 else "[N]")
    _checks.check_shape(like.op, name, value, *zip(symbols, shapes, strict=True))
    if value.device != like.device:
        raise ValueError(f"{like.op}: {name} must be on {like.device} like {like.name}, got {value.device}")
    if name != "mask":
        _checks.check_dtype(like.op, name, value)


def _floating(like: _Like, name: str, value: Any, shapes: tuple[torch.Size, ...]) -> Tensor:
    """The checked value, without gradient, in the dtype that the loss is computed in."""
    if not isinstance(value, Tensor) or value.shape not in shapes or value.device != like.device:
        _check(like, name, value, shapes)
    if value.dtype != like.computed:
        _check(like, name, value, shapes)
        value = value.to(like.computed)
    checked: Tensor = value.detach() if value.requires_grad and name != "entropy" else value
    return checked


def _per_token(like: _Like, name: str, value: Tensor | None) -> Tensor | None:
    return None if value is None else _floating(like, name, value, (like.shape,))


def _per_sequence(like: _Like, name: str, value: Tensor, batch: int, shapes: tuple[torch.Size, ...]) -> Tensor:
    """[B, 1], or the shape of the log-probs."""
    value = _floating(like, name, value, shapes)
    return value.unsqueeze(1) if value.ndim == 1 and value.shape[0] == batch else value


def _check_mask(like: _Like, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != like.shape or mask.device != like.device:
        _check(like, "mask", mask, (like.shape,))
    return mask if mask.dtype in _MASK_DTYPES else mask != 0


def _coefficients(
    like: _Like,
    config: GRPOLossConfig,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    ref: Tensor | None,
    entropy: Tensor | None,
    sampler: Tensor | None,
) -> tuple[Tensor | float, Tensor | float]:
    """The two coefficients, after checking that what they and the config need is there."""
    op = like.op
    kl = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    if ref is None and (isinstance(kl, Tensor) or kl != 0):
        raise ValueError(f"{op}: ref_log_probs must be given when kl_coef is set, got None")
    if entropy is None and (isinstance(bonus, Tensor) or bonus != 0):
        raise ValueError(f"{op}: entropy must be given when entropy_coef is set, got None")
    if entropy is None and config.top_entropy_quantile < 1.0:
        raise ValueError(f"{op}: entropy must be given when top_entropy_quantile is set, got None")
    if sampler is None and config.sampler_correction != "none":
        raise ValueError(f"{op}: sampler_log_probs must be given when sampler_correction is set, got None")
    if kl_coef is None and entropy_coef is None and not torch.compiler.is_compiling():
        return float(kl), float(bonus)  # the config has checked its own
    return _scalar(like, "kl_coef", kl), _scalar(like, "entropy_coef", bonus)


def _scalar(like: _Like, name: str, value: Tensor | float) -> Tensor | float:
    tensor, number = _checks.scalar_argument(like.op, name, value, like.device, like.computed)
    return number if tensor is None else tensor


def _check_num_items(like: _Like, num_items: Tensor | float | None, config: GRPOLossConfig) -> Tensor | float:
    """0.0 stands for None."""
    if num_items is None:
        return 0.0
    if config.reduction in ("none", "token_sum"):
        raise ValueError(
            f"{like.op}: num_items must be None with reduction={config.reduction!r}, which divides by nothing"
        )
    if isinstance(num_items, (int, float)) and not torch.compiler.is_compiling():
        _checks.check_number(like.op, "num_items", num_items, minimum=0.0)
    return _scalar(like, "num_items", num_items)


def _check_max_length(op: str, max_length: int | None, config: GRPOLossConfig, cu_seqlens: Tensor | None) -> int:
    """0 stands for T."""
    if config.reduction != "sequence_mean_token_sum_norm":
        if max_length is not None:
            raise ValueError(f"{op}: max_length must be None with reduction={config.reduction!r}")
        return 0
    length = config.max_length if max_length is None else max_length
    if length is None:
        if cu_seqlens is not None:
            raise ValueError(f"{op}: max_length must be given with cu_seqlens and reduction={config.reduction!r}")
        return 0
    _checks.check_integer(op, "max_length", length, minimum=1)
    return length
