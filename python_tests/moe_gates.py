"""Routing written another way than the package writes it: values at given ids, whether a choice is the best, loops."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.testing import accuracy_error
from grpo_kernels.testing.accuracy import accuracy_budget

INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Gate:
    """A router's options, and the sizes that its model has."""

    experts: int
    top_k: int
    scoring_func: str = "softmax"
    bias: float | None = None  # its deviation
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)

    def options(self, bias: Tensor | None = None) -> dict[str, Any]:
        names = ("scoring_func", "n_group", "topk_group", "group_score", "norm_topk_prob", "routed_scaling_factor")
        return {name: getattr(self, name) for name in names} | {"e_score_correction_bias": bias} | self.more

    def with_(self, **changes: Any) -> Gate:
        return replace(self, **changes)

    def make_bias(self) -> Tensor | None:
        return None if self.bias is None else torch.randn(self.experts) * self.bias


GATES = {
    "mixtral": Gate(8, 2),
    "qwen3": Gate(128, 8),
    "qwen2": Gate(60, 4, norm_topk_prob=False),
    "gpt_oss": Gate(32, 4, "topk_softmax"),
    "deepseek_v2": Gate(
        160, 6, n_group=8, topk_group=3, group_score="max", norm_topk_prob=False, routed_scaling_factor=16.0
    ),
    "deepseek_v3": Gate(256, 8, "sigmoid", 0.1, 8, 4, routed_scaling_factor=2.5),
    "deepseek_v4": Gate(256, 6, "sqrtsoftplus", 0.1, routed_scaling_factor=1.5),
    "kimi_k2": Gate(384, 8, "sigmoid", 0.1, routed_scaling_factor=2.827),
    "llama4": Gate(16, 1, "sigmoid", norm_topk_prob=False),
    "qwen3_next": Gate(512, 10),
    "nemotron": Gate(512, 22, "sigmoid", 0.1, routed_scaling_factor=5.0),
    "largest": Gate(1024, 32, "sqrtsoftplus", norm_topk_prob=False),
    "every_expert": Gate(32, 32, bias=0.1),
    "biased_logits": Gate(33, 5, "topk_softmax", 1.0),
    "groups_of_one": Gate(8, 4, "sigmoid", n_group=8, topk_group=5),
    "one_expert": Gate(1, 1),
}


def scores(z: Tensor, scoring_func: str) -> Tensor:
    """Scores of all experts; of "topk_softmax" the logits."""
    if scoring_func == "softmax":
        return torch.exp(z - torch.logsumexp(z, dim=-1, keepdim=True))
    if scoring_func == "sigmoid":
        return torch.sigmoid(z)
    if scoring_func == "sqrtsoftplus":
        return torch.sqrt(torch.clamp(z, min=0.0) + torch.log1p(torch.exp(-z.abs())))
    return z


def weights_at(z: Tensor, ids: Tensor, gate: Gate) -> Tensor:
    """[T, K]. The weights of the experts `ids`, in the dtype of z."""
    ids = ids.long()
    if gate.scoring_func == "topk_softmax":
        chosen = torch.softmax(z.gather(1, ids), dim=-1)
    else:
        chosen = scores(z, gate.scoring_func).gather(1, ids)
        if gate.norm_topk_prob:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + (0.0 if gate.scoring_func == "softmax" else 1e-20))
    return chosen * gate.routed_scaling_factor


def probabilities(z: Tensor, gate: Gate) -> Tensor:
    """[T, E]. What the balance losses sum: scores that add up to 1."""
    if "softmax" in gate.scoring_func:
        return torch.softmax(z, dim=-1)
    score = scores(z, gate.scoring_func)
    return score / (score.sum(dim=-1, keepdim=True) + 1e-20)


def losses_of(
    z: Tensor, ids: Tensor, gate: Gate, live: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z-loss, auxiliary loss and sequence-wise loss, token by token and sequence by sequence, in the dtype of z."""
    tokens, experts = z.shape
    order = torch.argsort(z.detach(), dim=-1, descending=True, stable=True)[:, : gate.top_k]
    p = probabilities(z, gate)
    alive = [t for t in range(tokens) if live[t]]
    zero = z.sum() * 0.0
    if not alive:
        return zero, zero, zero
    z_loss = sum((torch.logsumexp(z[t], dim=0) ** 2 for t in alive), zero) / len(alive)
    aux = experts / (gate.top_k * len(alive) ** 2) * _dot(ids, p, alive)
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = [[t for t in range(a, b) if live[t]] for a, b in pairwise(ends)]
    sequences = [members for members in sequences if members]
    terms = [experts / (gate.top_k * len(members) ** 2) * _dot(order, p, members) for members in sequences]
    return z_loss, aux, sum(terms, zero) / len(sequences)


def _dot(ids: Tensor, p: Tensor, members: list[int]) -> Tensor:
    """sum_e count_e sum_t p_te over some tokens."""
    counts = torch.bincount(ids[members].reshape(-1).long(), minlength=p.shape[1])
    return (counts.to(p.dtype) * p[members].sum(dim=0)).sum()


def assert_best(z: Tensor, ids: Tensor, gate: Gate, bias: Tensor | None) -> None:
    """The ids are distinct experts, the best of the best groups, in descending order of their keys.

    Without bias and groups the key is the logit and the order is exact, the lower id first among equals. Otherwise keys
    are rounded: none that was left out may be ahead of one that was taken by more than their budgets of error.
    """
    rows = [ids[t].tolist() for t in range(ids.shape[0])]
    assert all(len(set(row)) == gate.top_k and min(row) >= 0 and max(row) < gate.experts for row in rows)
    if bias is None and gate.n_group == 1:
        best = torch.argsort(z, dim=-1, descending=True, stable=True)[:, : gate.top_k]
        assert torch.equal(ids.long(), best)
        return
    key = scores(z.double(), gate.scoring_func) + (0.0 if bias is None else bias.double())
    eager = scores(z.float(), gate.scoring_func) + (0.0 if bias is None else bias.float())
    room = 2.0 * accuracy_budget(torch.float32, accuracy_error(eager, key)) * key.abs().max().item()
    taken = torch.zeros_like(key, dtype=torch.bool).scatter(1, ids.long(), True)
    sure = torch.ones_like(taken)  # experts of groups that surely win
    if gate.n_group > 1:
        grouped = key.unflatten(1, (gate.n_group, -1))
        best = grouped.sort(dim=-1, descending=True).values
        pair = gate.group_score == "top2_sum" and grouped.shape[-1] > 1
        value = best[..., :2].sum(-1) if pair else best[..., 0]
        ranked = value.sort(dim=-1, descending=True).values
        last_in = ranked[:, gate.topk_group - 1 : gate.topk_group]
        first_out = ranked[:, gate.topk_group : gate.topk_group + 1]
        used = taken.unflatten(1, (gate.n_group, -1)).any(-1)
        assert (used.sum(dim=1) <= gate.topk_group).all()
        assert (value >= last_in - 2 * room)[used].all(), "an expert of a group that lost"
        sure = (value > first_out + 2 * room)[..., None].expand(grouped.shape).flatten(1)
    worst_taken = key.masked_fill(~taken, INF).amin(dim=1)
    best_left = key.masked_fill(taken | ~sure, -INF).amax(dim=1)
    assert (best_left <= worst_taken + room).all(), "a better expert was left out"
    slots = key.gather(1, ids.long())
    assert (slots[:, 1:] <= slots[:, :-1] + room).all(), "slots out of order"
