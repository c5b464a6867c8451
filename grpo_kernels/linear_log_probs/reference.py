"""The linear log-probs in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._token_ids import live_rows
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.token_log_probs import reference as rows


def linear_logits(hidden: Tensor, head: Head, live: Tensor) -> Tensor:
    """[N, V] logits in float32 (float64 for float64), of the rows that count; the others are 0, whatever they hold."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = torch.where(live[:, None], hidden, 0).to(dtype)
    logits = x @ head.weight.to(dtype).t()
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + head.lora_scale * (x @ head.lora_a.to(dtype).t()) @ head.lora_b.to(dtype).t()
    return logits


def linear_token_log_probs(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    logit_scale: float,
    softcap: float,
    outputs: tuple[bool, bool, bool],
    log_sum_exp: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Log-prob, entropy, sum of squared probabilities, top-1 id and log-sum-exp (differentiable) of every row.

    Args:
        hidden: [N, H], of one dtype with the head.
        outputs: whether entropy, sum_squared_probs and top1_ids are wanted.
        log_sum_exp: whether the log of the sum of e^z is wanted; it is 0 for masked rows.
    """
    live = live_rows(token_ids, mask)
    logits = linear_logits(hidden, head, live)
    results = rows.token_log_probs(logits, token_ids, mask, temperature, logit_scale, softcap, outputs)
    if not log_sum_exp:
        return (*results, None)
    logits = torch.where(live[:, None], logits, 0.0)  # a temperature of 0 in a row that does not count gives no NaN
    z = rows.transformed(logits, temperature, logit_scale, softcap)
    top = z.detach().amax(dim=-1, keepdim=True)
    return (*results, torch.where(live, top.squeeze(-1) + (z - top).exp().sum(-1).log(), 0.0))
