"""Problems for Liger's GRPO losses, and their formulas in plain PyTorch, written from the definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LENGTHS, LENGTH, WIDTH, VOCAB = (6, 3, 0, 1), 6, 8, 19
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
MAX_LENGTH, TEMPERATURE, NAN = 9, 0.8, math.nan
Problem = dict[str, Tensor]


def cases(loss_type: str, *, step: int = 1) -> Iterator[dict[str, Any]]:
    """Options of a call by Liger's names, and "ratio", the shape of vllm_is_ratio; every step-th of all of them."""
    grid = itertools.product(
        ("token", "sequence"),
        ((0.0, False), (0.3, False), (0.3, True)),
        (None, 1.1, 1.6),
        (None, "token", "column", "row"),
        (None, 25, torch.tensor(31)),
        (True, False),
    )
    for level, (beta, corrected), delta, ratio, items, off_policy in itertools.islice(grid, 0, None, step):
        if loss_type in TOKEN_LEVEL_ONLY and (level == "sequence" or delta is not None):
            continue
        yield {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "beta": beta,
            "use_bias_correction_kl": corrected,
            "delta": delta,
            "ratio": ratio,
            "num_items_in_batch": items,
            "off_policy": off_policy,
            "epsilon_low": 0.15,
            "epsilon_high": 1.1 if loss_type == "cispo" else 0.25,
            "sapo_temperature_pos": 0.9,
            "vespo_k_neg": 2.5,
            "max_completion_length": MAX_LENGTH,
        }


def problem(seed: int, lengths: tuple[int, ...] = LENGTHS) -> Problem:
    """Float64. What masked tokens hold is finite here; `poisoned` makes it worse."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).double()

    p = {
        "hidden": normal(batch, LENGTH, WIDTH),
        "weight": normal(VOCAB, WIDTH, scale=0.4),
        "bias": normal(VOCAB),
        "ids": torch.randint(VOCAB, (batch, LENGTH), generator=generator),
        "mask": torch.arange(LENGTH) < torch.tensor(lengths).reshape(-1, 1),
        "advantages": normal(batch),
        "token": normal(batch, LENGTH, scale=0.3).exp(),
        "column": normal(batch, 1, scale=0.3).exp(),
    }
    log_probs = log_probs_of(p)
    return {
        **p,
        "row": p["column"][:, 0],
        "old": log_probs + normal(batch, LENGTH, scale=0.3),
        "ref": log_probs + normal(batch, LENGTH, scale=0.3),
    }


def poisoned(p: Problem) -> Problem:
    """Garbage behind the mask: NaN, infinities, and ids that do not exist."""
    masked = ~p["mask"]
    garbage = {"old": NAN, "ref": math.inf, "token": NAN, "ids": VOCAB + 5}
    worse = {name: p[name].masked_fill(masked, value) for name, value in garbage.items()}
    return {**p, **worse, "hidden": p["hidden"].masked_fill(masked[..., None], NAN)}


def logits_of(p: Problem) -> Tensor:
    """[B, L + 1, V]; the last position holds what must not matter."""
    logits = p["hidden"] @ p["weight"].T + p["bias"]
    return torch.cat([logits, torch.full_like(logits[:, :1], math.inf)], 1)


def log_probs_of(p: Problem) -> Tensor:
    return _chosen(p["hidden"] @ p["weight"].T + p["bias"], p["ids"], TEMPERATURE)


def _chosen(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[..., None])[..., 0]


def token_terms(p: Problem, o: dict[str, Any], row: int, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL and whether it is clipped of each live token of a sequence, from these log-probs."""
    live = p["mask"][row]
    lp, ref, a = log_probs[row][live], p["ref"][row][live].to(log_probs), p["advantages"][row].to(log_probs)
    old = p["old"][row][live].to(log_probs) if o["off_policy"] else lp.detach()
    weight = None if o["ratio"] is None else p[o["ratio"]][row].to(log_probs)
    if o["ratio"] == "token":
        weight = weight[live]
    lr = lp - old
    mean = (lr.sum() / max(len(lr), 1)).expand_as(lr)
    r = torch.exp(lr if o["importance_sampling_level"] == "token" else mean)
    low, high = (1 - o["epsilon_low"], 1 + o["epsilon_high"])
    if o["loss_type"] == "cispo":
        low, high = -math.inf, o["epsilon_high"]
        loss = -r.clamp(max=high).detach() * a * lp
    elif o["loss_type"] == "sapo":
        low, high = -math.inf, math.inf
        tau = o["sapo_temperature_pos"] if a > 0 else 1.05
        loss = -4 / tau * torch.sigmoid(tau * (r - 1)) * a
    elif o["loss_type"] == "vespo":
        low, high = -math.inf, math.inf
        k, decay = (2.0, 3.0) if a >= 0 else (o["vespo_k_neg"], 2.0)
        log_w = lr.detach().clamp(-20, 20).sum()
        if weight is not None and len(lp):
            log_w = log_w + torch.log(weight).clamp(math.log(1e-8), 20).sum()
        log_w = log_w.clamp(math.log(1e-8), 20)
        loss, weight = -torch.exp(decay + k * log_w - decay * torch.exp(log_w)) * a * lp, None
    else:
        bound = r if o["delta"] is None else r.clamp(max=o["delta"])
        loss = -torch.min(bound * a, r.clamp(low, high) * a)
    if weight is not None:
        loss = loss * weight
    kl = torch.exp(ref - lp) - (ref - lp) - 1
    kl = kl * r if o["use_bias_correction_kl"] else kl
    clipped = ((r < low) & (a < 0)) | ((r > high) & (a > 0))
    return loss + o["beta"] * kl, kl, clipped


def expected(p: Problem, o: dict[str, Any], log_probs: Tensor) -> tuple[Tensor, ...]:
    """(loss, kl, clip_ratio), the KL only where beta is not 0."""
    rows = [token_terms(p, o, row, log_probs) for row in range(len(p["mask"]))]
    counts = p["mask"].sum(-1).tolist()
    tokens = max(sum(counts), 1)
    sums = torch.stack([loss.sum() for loss, _, _ in rows])
    if o["loss_type"] in ("grpo", "sapo"):
        loss = (sums / torch.tensor(counts).clamp(min=1)).sum() / len(rows)
    elif o["loss_type"] == "luspo":
        loss = sums.sum() / len(rows)
    elif o["loss_type"] == "dr_grpo":
        loss = sums.sum() / (len(rows) * MAX_LENGTH)
    elif o["loss_type"] == "bnpo" or o["num_items_in_batch"] is None:
        loss = sums.sum() / tokens
    else:
        loss = sums.sum() / max(float(o["num_items_in_batch"]), 1.0)
    kl, clipped = (
        sum(part.detach().double().sum() for part in column) / tokens for column in list(zip(*rows, strict=True))[1:]
    )
    return (loss, kl, clipped) if o["beta"] != 0 else (loss, clipped)


def expected_tokens(p: Problem, o: dict[str, Any], log_probs: Tensor) -> list[Tensor]:
    """Losses, KLs and clipped or not of all tokens, 0 where masked."""
    rows = [token_terms(p, o, row, log_probs) for row in range(len(p["mask"]))]
    zeros = torch.zeros(p["mask"].shape, dtype=log_probs.dtype)
    return [zeros.masked_scatter(p["mask"], torch.cat(column).to(zeros)) for column in zip(*rows, strict=True)]


def chosen(logits: Tensor, ids: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Log-probs of the tokens from logits [B, L + 1, V]."""
    return _chosen(logits[:, :-1], ids, temperature)
