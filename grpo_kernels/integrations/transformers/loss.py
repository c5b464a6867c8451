"""causal_lm_loss: the loss of causal language models in transformers, from logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import _checks
from grpo_kernels._token_ids import live_rows
from grpo_kernels.token_log_probs import token_log_probs

_OP = "causal_lm_loss"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss` of transformers without float32 logits: `model.loss_function = causal_lm_loss`.

    Args:
        logits: [B, T, V] or [N, V] float.
        labels: [B, T] or [N] int. Position t is scored against label t + 1; the last against nothing.
        vocab_size: V.
        num_items_in_batch: the sum of the token losses is divided by it. None: by the number of labels that count.
        ignore_index: labels with this value do not count; nor do other negative ones.
        shift_labels: labels that are in their places already; `labels` is then not looked at.
        kwargs: ignored, as transformers does.

    Returns:
        0-d float32, nats.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on the CPU also a label >= V.

    Numerics:
        Computed in float32 whatever the dtype of the logits, whose gradient is rounded once. A mean over no label is 0
        with gradient 0, where transformers gives NaN.
    """
    _checks.check_tensor(_OP, "logits", logits)
    if logits.shape[-1:] != (vocab_size,):
        raise ValueError(f"{_OP}: logits must have shape [..., vocab_size = {vocab_size}], got {list(logits.shape)}")
    ids = shifted(_OP, labels, ignore_index, shift_labels)
    if ids.numel() != logits.numel() // vocab_size:
        raise ValueError(f"{_OP}: labels must have shape {list(logits.shape[:-1])}, got {list(ids.shape)}")
    ids = ids.reshape(logits.shape[:-1]).to(logits.device)
    log_probs = token_log_probs(logits, ids, mask=ids != ignore_index).log_probs
    return divided(-log_probs.sum(), ids, ignore_index, num_items_in_batch).float()


def shifted(op: str, labels: Tensor | None, ignore_index: int, shift_labels: Tensor | None) -> Tensor:
    """The label of each position."""
    name, value = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    _checks.check_tensor(op, name, value)
    value = cast("Tensor", value)
    _checks.check_dtype(op, name, value, _checks.INTEGER)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    return value if shift_labels is not None else F.pad(value, (0, 1), value=ignore_index)[..., 1:]


def divided(total: Tensor, ids: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The sum of the token losses over the number of items, or of the labels that count."""
    if num_items_in_batch is None:
        count = live_rows(ids, ids != ignore_index).sum()
        return total / count.clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
