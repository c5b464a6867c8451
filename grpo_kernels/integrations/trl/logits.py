"""TRL's functions of logits on `token_log_probs`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from grpo_kernels import TokenLogProbsOutput, token_log_probs
from grpo_kernels.integrations.trl.head import has_kernels, is_positive, token_ids

_MASKS = (torch.bool, torch.int32, torch.int64)
_IDS = (torch.int32, torch.int64)


def selective_log_softmax(utils: Any) -> Callable[..., Tensor]:
    """The function of that name in `utils`, TRL's module."""
    stock = utils.selective_log_softmax

    @functools.wraps(stock)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if not _is_served(logits, index, temperature, row_mask):
            return cast("Tensor", stock(logits, index, temperature=temperature, row_mask=row_mask))
        return _rows(logits, index, temperature, row_mask).log_probs.to(_dtype(utils, logits, index, row_mask))

    return selective_log_softmax


def entropy_from_logits(utils: Any) -> Callable[..., Tensor]:
    """The function of that name in `utils`, TRL's module."""
    stock = utils.entropy_from_logits

    @functools.wraps(stock)
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if logits.ndim == 0 or not has_kernels("token_log_probs", logits):
            return cast("Tensor", stock(logits, chunk_size=chunk_size))
        anything = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
        entropy = _rows(logits, anything, 1.0, None, outputs=("entropy",)).entropy
        return cast("Tensor", entropy).to(_dtype(utils, logits, None, None))

    return entropy_from_logits


def selective_log_softmax_and_entropy(utils: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of that name in `utils`, TRL's module."""
    stock = utils.selective_log_softmax_and_entropy

    @functools.wraps(stock)
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _is_served(logits, index, temperature, row_mask):
            both = stock(logits, index, entropy_requires_grad, temperature=temperature, row_mask=row_mask)
            return cast("tuple[Tensor, Tensor]", both)
        dtype = _dtype(utils, logits, index, row_mask)
        rows = _rows(logits, index, temperature, row_mask, outputs=("entropy",))
        entropy = cast("Tensor", rows.entropy).to(dtype)
        return rows.log_probs.to(dtype), entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _rows(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, outputs: Iterable[str] = ()
) -> TokenLogProbsOutput:
    ids = token_ids(index, logits.shape[-1])
    return token_log_probs(logits, ids, temperature=temperature, mask=row_mask, outputs=outputs)


def _is_served(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> bool:
    """TRL's own functions keep several ids a row, what they raise for, and devices without kernels."""
    return (
        is_positive(temperature)
        and logits.ndim > 0
        and index.shape == logits.shape[:-1]
        and index.dtype in _IDS
        and (row_mask is None or (row_mask.shape == index.shape and row_mask.dtype in _MASKS))
        and has_kernels("token_log_probs", logits)
    )


def _dtype(utils: Any, logits: Tensor, index: Tensor | None, row_mask: Tensor | None) -> torch.dtype:
    """TRL's kernels return float32, its PyTorch functions the dtype of the logits."""
    kernels = utils.is_triton_available() and utils._supports_trl_loss_kernel(logits, index, row_mask)
    return torch.float32 if kernels else logits.dtype
