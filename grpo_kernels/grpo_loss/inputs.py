"""The arguments of the loss: checked, and brought into the one form that every backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.grpo_loss.config import GRPOLossConfig
from grpo_kernels.grpo_loss.rows import LossInputs

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
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
    per_row: _Shapes = (("[B]", (batch,)),)
    sampler = _per_token(subject, "sampler_log_probs", sampler_log_probs)
    ref = _per_token(subject, "ref_log_probs", ref_log_probs)
    entropy = _per_token(subject, "entropy", entropy)
    mask = _check_mask(subject, mask)
    kl, bonus = _coefficients(subject, config, kl_coef, entropy_coef, ref, entropy, sampler)
    return LossInputs(
        log_probs=_computed(subject.log_probs, subject.log_probs),
        old_log_probs=_per_token(subject, "old_log_probs", old_log_probs),
        advantages=_per_sequence(subject, "advantages", advantages, batch, per_row),
        mask=mask,
        ref_log_probs=ref,
        sampler_log_probs=sampler,
        token_weights=None
        if token_weights is None
        else _per_sequence(subject, "token_weights", token_weights, batch, (*per_row, ("[B, 1]", (batch, 1)))),
        entropy=entropy,
        entropy_threshold=None,
        selection=None,
        cu_seqlens=cu_seqlens,
        kl_coef=kl,
        entropy_coef=bonus,
        num_items=_check_num_items(subject, num_items, config),
        max_length=_check_max_length(subject.op, max_length, config, cu_seqlens),
    )


def _computed(value: Tensor, log_probs: Tensor) -> Tensor:
    """The value in the dtype that the loss is computed in."""
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    return value if value.dtype == dtype else value.to(dtype)


def _check(subject: Subject, name: str, value: Any, shapes: _Shapes = ()) -> None:
    """`value` is a floating tensor (a mask may have any type) like the log-probs, or of another of `shapes`."""
    op, log_probs, like = subject
    if not (isinstance(value, Tensor) and value.shape == log_probs.shape and value.device == log_probs.device):
        _checks.check_tensor(op, name, value)
        symbol = "[B, T]" if log_probs.ndim == 2 else "[N]"
        _checks.check_shape(op, name, value, *shapes, (symbol, tuple(log_probs.shape)))
        _checks.check_same_device(op, name, value, like, log_probs)
    if value.dtype != log_probs.dtype and name != "mask":
        _checks.check_dtype(op, name, value)


def _per_token(subject: Subject, name: str, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    _check(subject, name, value)
    return _computed(value.detach() if value.requires_grad and name != "entropy" else value, subject.log_probs)


def _per_sequence(subject: Subject, name: str, value: Tensor, batch: int, shapes: _Shapes) -> Tensor:
    """[B, 1], or the shape of the log-probs."""
    _check(subject, name, value, shapes)
    value = _computed(value.detach() if value.requires_grad else value, subject.log_probs)
    return value[:, None] if value.ndim == 1 and value.shape[0] == batch else value


def _check_mask(subject: Subject, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    _check(subject, "mask", mask)
    return mask if mask.dtype in _MASK_DTYPES else mask != 0


def _coefficients(
    subject: Subject,
    config: GRPOLossConfig,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    ref: Tensor | None,
    entropy: Tensor | None,
    sampler: Tensor | None,
) -> tuple[Tensor | float, Tensor | float]:
    """The two coefficients, after checking that what they and the config need is there."""
    op = subject.op
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
    if ref is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError(f"{op}: ref_log_probs must be given when kl_coef is set, got None")
    if entropy is None and (isinstance(entropy_coef, Tensor) or entropy_coef != 0):
        raise ValueError(f"{op}: entropy must be given when entropy_coef is set, got None")
    if entropy is None and config.top_entropy_quantile < 1.0:
        raise ValueError(f"{op}: entropy must be given when top_entropy_quantile is set, got None")
    if sampler is None and config.sampler_correction != "none":
        raise ValueError(f"{op}: sampler_log_probs must be given when sampler_correction is set, got None")
    return _scalar(subject, "kl_coef", kl_coef), _scalar(subject, "entropy_coef", entropy_coef)


def _scalar(subject: Subject, name: str, value: Tensor | float) -> Tensor | float:
    dtype = torch.float64 if subject.log_probs.dtype == torch.float64 else torch.float32
    tensor, number = _checks.scalar_argument(subject.op, name, value, subject.log_probs.device, dtype)
    return number if tensor is None else tensor


def _check_num_items(subject: Subject, num_items: Tensor | float | None, config: GRPOLossConfig) -> Tensor | float:
    """0.0 stands for None."""
    if num_items is None:
        return 0.0
    if config.reduction in ("none", "token_sum"):
        raise ValueError(
            f"{subject.op}: num_items must be None with reduction={config.reduction!r}, which divides by nothing"
        )
    if isinstance(num_items, (int, float)) and not torch.compiler.is_compiling():
        _checks.check_number(subject.op, "num_items", num_items, minimum=0.0)
    return _scalar(subject, "num_items", num_items)


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
