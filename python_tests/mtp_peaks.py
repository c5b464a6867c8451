"""Peak memory of the loss of multi-token prediction and of eager PyTorch in this process, above inputs and results."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import PolicyTerms, mtp_linear_cross_entropy
from python_tests.linear_peaks import SEQUENCES, WIDTH, Inputs, make, measure

DEPTHS = 2


def _results(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])]


def _ours(inputs: Inputs, **options: Any) -> list[Tensor]:
    """The rows are those of two depths."""
    hiddens = inputs["hidden"].view(DEPTHS, SEQUENCES, -1, WIDTH)
    ids = inputs["ids"].view(DEPTHS, SEQUENCES, -1)[0]
    return _results(mtp_linear_cross_entropy(hiddens, inputs["weight"], ids, shift=0, **options).loss, inputs)


def _eager(inputs: Inputs) -> list[Tensor]:
    return _results(F.cross_entropy(F.linear(inputs["hidden"], inputs["weight"]), inputs["ids"]), inputs)


def main() -> None:
    inputs = make()
    shape = (SEQUENCES, len(inputs["ids"]) // DEPTHS // SEQUENCES)
    policy = PolicyTerms(torch.full(shape, -10.5), inputs["advantages"])
    found = {
        "eager": measure(_eager, inputs),
        "all depths": measure(_ours, inputs),
        "policy": measure(lambda given: _ours(given, policy=policy), inputs),
        "detached": measure(lambda given: _ours(given, detach_head=True), inputs),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
