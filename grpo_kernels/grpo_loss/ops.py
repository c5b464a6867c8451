"""Schema of the loss. Imports no backend, so that it exists before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from grpo_kernels.grpo_loss.metrics import NAMES

NO_REDUCTION = REDUCTIONS.index("none")
METRICS = len(NAMES)

_dispatch.register_backends("grpo_loss", cpu=("native",), cuda=("native",))


def _grpo_loss_fake(log_probs: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    entropy, upstream = arguments[6], arguments[10]
    options, need_log_probs_grad, need_entropy_grad = arguments[18], arguments[20], arguments[21]
    per_token = isinstance(options, (list, tuple)) and options[2] == NO_REDUCTION
    again = upstream is not None
    with_grad = again or not per_token

    def like_log_probs(wanted: bool) -> Tensor:
        return log_probs.new_empty(log_probs.shape if wanted else (0,))

    return (
        like_log_probs(per_token and not again) if per_token else log_probs.new_empty(()),
        like_log_probs(with_grad and bool(need_log_probs_grad)),
        like_log_probs(with_grad and bool(need_entropy_grad) and entropy is not None),
        log_probs.new_empty((0,) if per_token else (2,)),
        log_probs.new_empty((0,) if again else (METRICS,), dtype=torch.float32),
    )


_grpo_loss = _dispatch.define(
    "grpo_loss(Tensor log_probs, Tensor? old_log_probs, Tensor advantages, Tensor? mask, Tensor? ref_log_probs, "
    "Tensor? sampler_log_probs, Tensor? token_weights, Tensor? entropy, Tensor? entropy_threshold, Tensor? selection, "
    "Tensor? cu_seqlens, Tensor? upstream, Tensor? kl_coef_tensor, float kl_coef, Tensor? entropy_coef_tensor, "
    "float entropy_coef, Tensor? num_items_tensor, float num_items, SymInt max_length, int[] options, "
    "float[] parameters, bool need_log_probs_grad, bool need_entropy_grad, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    package="grpo_kernels.grpo_loss",
    fake=_grpo_loss_fake,
)
grpo_loss_unwatched = _dispatch.unwatched(_grpo_loss)
grpo_loss = _dispatch.direct(_grpo_loss)
"""Returns loss, grad_log_probs, grad_entropy, scale, metrics; absent ones are empty. The first gradient is still to
be multiplied by scale[0], the second by scale[1]. A kernel that knows the divisor beforehand, as the CPU's does, leaves
less to do: its scale[0] is 1. With ``upstream`` (reduction "none", in the backward) the gradients are final and the
rest is empty."""
