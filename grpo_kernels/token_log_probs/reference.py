"""Log-probs of tokens in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def transformed(logits: Tensor, temperature: Tensor | float, logit_scale: float, softcap: float) -> Tensor:
    """[..., V]. z = softcap * tanh(logits * logit_scale / softcap) / temperature; without the softcap where it is 0.

    -inf stays -inf through the softcap, since it means probability zero. +inf and NaN stay too.
    """
    z = logits * logit_scale if logit_scale != 1.0 else logits
    if softcap > 0.0:
        z = torch.where(z.isfinite(), softcap * torch.tanh(z / softcap), z)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    logit_scale: float,
    softcap: float,
    outputs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Log-prob, entropy, sum of squared probabilities and top-1 id of every token, as `api.token_log_probs` says.

    Args:
        outputs: whether entropy, sum_squared_probs and top1_ids are wanted.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab = logits.shape[-1]
    live = token_ids >= 0 if mask is None else (token_ids >= 0) & mask
    outside = live & (token_ids >= vocab)
    poison = torch.where(outside, float("nan"), 1.0).to(dtype)

    x = torch.where(live[..., None], logits.to(dtype), 0.0)  # a masked row may hold anything; its gradient is exactly 0
    z = transformed(x, temperature, logit_scale, softcap)
    u = z - z.detach().amax(dim=-1, keepdim=True)
    e = u.exp()
    total = e.sum(dim=-1)
    log_total = total.log()

    def finish(value: Tensor, masked: float = 0.0) -> Tensor:
        return torch.where(live, value * poison, masked)

    index = token_ids.clamp(0, vocab - 1).to(torch.int64)[..., None]
    log_probs = finish(u.gather(-1, index).squeeze(-1) - log_total)
    want_entropy, want_squared, want_top1 = outputs
    entropy = squared = top1 = None
    if want_entropy:
        weighted = torch.where(u == float("-inf"), 0.0, u) * e  # -inf * 0 is NaN, in the value and in the gradient
        entropy = finish(log_total - weighted.sum(dim=-1) / total)
    if want_squared:
        detached = e.detach()
        squared = finish((detached * detached).sum(dim=-1) / total.detach() / total.detach())
    if want_top1:
        finite = live & ~outside & total.detach().isfinite()
        top1 = torch.where(finite, z.detach().argmax(dim=-1), -1)
    return log_probs, entropy, squared, top1
