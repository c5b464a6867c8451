"""Peak memory of the linear ops and of eager PyTorch in this process, in bytes above inputs and results, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from bench.memory import bytes_of, growth_cpu

ROWS, WIDTH, VOCAB = 2048, 128, 32000
SEQUENCES = 8
_CONFIG = grpo_kernels.GRPOLossConfig.preset("bnpo")
Inputs = dict[str, Tensor]


def make(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states and weight that need gradients, ids, and what a loss takes."""
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(rows, WIDTH).to(dtype).requires_grad_(),
        "weight": (torch.randn(VOCAB, WIDTH) * WIDTH**-0.5).to(dtype).requires_grad_(),
        "ids": torch.randint(VOCAB, (rows,)),
        "upstream": torch.randn(rows),
        "old": torch.full((rows,), -10.5),
        "advantages": torch.linspace(-1.0, 1.0, SEQUENCES),
        "accumulator": torch.zeros(VOCAB, WIDTH),
    }


def _gradients(output: Tensor, inputs: Inputs) -> list[Tensor]:
    upstream = inputs["upstream"] if output.ndim else torch.tensor(1.5)
    leaves = [value for value in inputs.values() if value.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def _eager_log_probs(inputs: Inputs) -> Tensor:
    logits = F.linear(inputs["hidden"], inputs["weight"])
    return torch.log_softmax(logits.float(), -1).gather(-1, inputs["ids"][:, None])[:, 0]


def _eager_loss(inputs: Inputs) -> Tensor:
    ratio = torch.exp(_eager_log_probs(inputs) - inputs["old"]).view(SEQUENCES, -1)
    advantages = inputs["advantages"][:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def _log_probs(inputs: Inputs, **options: Any) -> Tensor:
    return grpo_kernels.linear_token_log_probs(inputs["hidden"], inputs["weight"], inputs["ids"], **options).log_probs


def _loss(inputs: Inputs) -> Tensor:
    shape = (SEQUENCES, -1)
    return grpo_kernels.linear_grpo_loss(
        inputs["hidden"].view(*shape, WIDTH), inputs["weight"], inputs["ids"].view(shape), inputs["old"].view(shape),
        inputs["advantages"], None, _CONFIG,
    ).loss  # fmt: skip


def _cross_entropy(inputs: Inputs) -> Tensor:
    return grpo_kernels.linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["ids"])


def _accumulated(inputs: Inputs) -> list[Tensor]:
    output = _log_probs(inputs, weight_grad_accumulator=inputs["accumulator"])
    output.backward(inputs["upstream"])
    gradient, inputs["hidden"].grad = inputs["hidden"].grad, None
    return [output.detach(), *([] if gradient is None else [gradient])]


def _frozen(inputs: Inputs) -> list[Tensor]:
    inputs = {**inputs, "weight": inputs["weight"].detach()}
    return _gradients(_log_probs(inputs), inputs)


def measure(work: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> int:
    """Peak bytes above the inputs and what `work` returns."""
    growth, results = growth_cpu(lambda: work(inputs))
    return max(growth - bytes_of(results, inputs.values()), 0)


def main() -> None:
    inputs, half, long = make(), make(dtype=torch.bfloat16), make(2 * ROWS)
    works: dict[str, tuple[Callable[[Inputs], list[Tensor]], Inputs]] = {
        "eager log-probs": (lambda given: _gradients(_eager_log_probs(given), given), inputs),
        "log-probs": (lambda given: _gradients(_log_probs(given), given), inputs),
        "log-probs, frozen weight": (_frozen, inputs),
        "log-probs, accumulator": (_accumulated, inputs),
        "log-probs, forward": (lambda given: [_log_probs(given).detach()], inputs),
        "log-probs, forward, twice the rows": (lambda given: [_log_probs(given).detach()], long),
        "log-probs, bf16": (lambda given: _gradients(_log_probs(given), given), half),
        "eager loss": (lambda given: _gradients(_eager_loss(given), given), inputs),
        "loss": (lambda given: _gradients(_loss(given), given), inputs),
        "cross-entropy": (lambda given: _gradients(_cross_entropy(given), given), inputs),
    }
    print(json.dumps({name: measure(work, given) for name, (work, given) in works.items()}))


if __name__ == "__main__":
    main()
