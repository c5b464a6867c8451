"""Heads to try TRL's fused head on, its formulas in any dtype, and TRL's own function with its calls counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

ROWS, WIDTH, VOCAB = 13, 24, 67


class Transform(NamedTuple):
    """What happens to logits before the softmax."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


PLAIN = Transform()


class Leaves(NamedTuple):
    """A head and its input."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def cast(self, *dtypes: torch.dtype) -> Leaves:
        """New leaves that were rounded to one dtype after the other."""
        return Leaves(*(None if leaf is None else _cast(leaf.detach(), dtypes) for leaf in self))

    def trained(self) -> list[Tensor]:
        return [leaf for leaf in self if leaf is not None and leaf.requires_grad]


class Stock:
    """TRL's function."""

    calls = 0

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        cls.calls += 1
        return ChunkedLogProbFunction.apply(*arguments)


def make(
    hidden: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    bias: bool = False,
    transform: Transform = PLAIN,
) -> tuple[Leaves, Tensor]:
    """Leaves and targets, of which every other is the likeliest token."""
    leaves = Leaves(
        torch.randn(ROWS, WIDTH).to(hidden).requires_grad_(),
        (torch.randn(VOCAB, WIDTH) * 0.4).to(weight).requires_grad_(),
        torch.randn(VOCAB).to(weight).requires_grad_() if bias else None,
    )
    targets = torch.randint(VOCAB, (ROWS,))
    targets[::2] = transformed(leaves.cast(torch.float64), transform).argmax(-1)[::2]
    return leaves, targets


def transformed(leaves: Leaves, transform: Transform) -> Tensor:
    """[N, V] logits, of which the softmax is taken."""
    z = leaves.hidden @ leaves.weight.T
    z = (z if leaves.bias is None else z + leaves.bias) * transform.logit_scale
    cap = transform.softcap
    return (z if cap is None else cap * torch.tanh(z / cap)) / transform.temperature


def definition(leaves: Leaves, targets: Tensor, transform: Transform) -> dict[str, Tensor]:
    """All outputs, in the dtype of the leaves."""
    z = transformed(leaves, transform)
    log_p = z.log_softmax(-1)
    return {
        "log_probs": log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).exp().sum(-1).log(),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }


def gradients(log_probs: Tensor, entropy: Tensor | None, leaves: Leaves) -> tuple[Tensor, ...]:
    """Those of a loss with another derivative for every row's log-prob and entropy."""
    slopes = torch.linspace(-1, 1, 2 * ROWS, dtype=log_probs.dtype)
    loss = (log_probs * slopes[:ROWS]).sum()
    if entropy is not None:
        loss = loss + (entropy * slopes[ROWS:]).sum()
    return torch.autograd.grad(loss, leaves.trained())


def _cast(leaf: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in dtypes:
        leaf = leaf.to(dtype)
    return leaf.clone().requires_grad_()
