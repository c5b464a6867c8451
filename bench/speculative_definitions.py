"""Pieces of speculative verification in plain PyTorch, as inference code has them, and other people's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .case import Inputs

Values = tuple[Tensor, ...]


def log_softmaxes(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs before and after the filters, in float32 where the logits are narrower."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(wide, dim=-1)
    if not top_k and top_p == 1.0:
        return log_probs, log_probs
    ordered, order = log_probs.topk(top_k) if top_k else log_probs.sort(dim=-1, descending=True)
    probs = torch.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
    kept = torch.full_like(log_probs, -torch.inf).scatter_(-1, order, ordered)
    return log_probs, torch.log_softmax(kept, dim=-1)


def drawn(weights: Tensor) -> Tensor:
    """[B] of [B, V]: a token of each row."""
    return torch.multinomial(weights, 1).squeeze(1)


def emitted(draft_ids: Tensor, num_accepted: Tensor, last: Tensor, log_probs: Tensor) -> Values:
    """Tokens, their number and their log-probs: the accepted drafts, `last` behind them, and then nothing."""
    places = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device)
    accepted = num_accepted[:, None]
    padded = torch.cat([draft_ids, draft_ids[:, :1]], 1)
    tokens = torch.where(places < accepted, padded, torch.where(places == accepted, last[:, None], -1))
    chosen = log_probs.gather(2, tokens.clamp(min=0)[..., None]).squeeze(2)
    return tokens, num_accepted, torch.where(tokens >= 0, chosen, 0.0)


def flashinfer_chain(device: str) -> Callable[[Inputs], Values] | None:
    """FlashInfer's kernel for the token rule behind the softmaxes that it wants, and log-probs of what it emits."""
    try:
        function = importlib.import_module("flashinfer.sampling").chain_speculative_sampling
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None
    if device != "cuda":
        return None

    def run(inputs: Inputs) -> Values:
        log_probs, _ = log_softmaxes(inputs["target_logits"])
        draft = torch.softmax(inputs["draft_logits"].float(), dim=-1)
        tokens, _, count = function(draft, inputs["draft_ids"].int(), log_probs.exp())
        chosen = log_probs.gather(2, tokens.long().clamp(min=0)[..., None]).squeeze(2)
        return tokens, count, torch.where(tokens >= 0, chosen, 0.0)

    return run
