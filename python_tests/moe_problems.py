"""Problems of routed experts, and their definition written slot by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import moe_experts
from grpo_kernels.testing import assert_as_accurate


class _Round(torch.autograd.Function):
    """Rounds a float32 value, and its gradient, to a narrower dtype."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


class Problem(NamedTuple):
    """Inputs of moe_experts, an upstream gradient, and the activation's options."""

    tensors: dict[str, Tensor]  # x, gate_up, down, weights, and biases if there are any
    ids: Tensor
    upstream: Tensor
    options: dict[str, Any]

    @classmethod
    def make(
        cls, dtype: torch.dtype = torch.float32, *, tokens: int = 30, hidden: int = 24, width: int = 20,
        experts: int = 6, top_k: int = 3, bias: bool = False, ids: Tensor | None = None, scale: float = 1.0,
        **options: Any,
    ) -> Problem:  # fmt: skip
        """Different experts for the slots of a token; some slots, all of token 2 and the last expert are left out."""
        tensors = {
            "x": torch.randn(tokens, hidden) * scale,
            "gate_up": torch.randn(experts, 2 * width, hidden) * hidden**-0.5 * 2,
            "down": torch.randn(experts, hidden, width) * width**-0.5,
        }
        if bias:
            tensors |= {"gate_up_bias": torch.randn(experts, 2 * width), "down_bias": torch.randn(experts, hidden)}
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if ids is None:
            ids = torch.rand(tokens, max(experts - 1, top_k)).argsort(1)[:, :top_k]
            ids[torch.rand(ids.shape) < 0.1] = -1
            ids[2:3] = -1
        tensors["weights"] = torch.rand(ids.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return cls(tensors, ids, torch.randn(tokens, hidden).to(dtype), options)

    def run(self, trained: tuple[str, ...] | None = None, **more: Any) -> dict[str, Tensor]:
        """The result of moe_experts, and the gradient of each trained tensor; all by default."""
        leaves = {
            name: tensor.detach().clone().requires_grad_(trained is None or name in trained)
            for name, tensor in self.tensors.items()
        }
        result = self.call(leaves, **more)
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        grads = torch.autograd.grad(result, [leaves[name] for name in wanted], self.upstream) if wanted else ()
        return {"y": result.detach(), **dict(zip(wanted, grads, strict=True))}

    def call(self, tensors: dict[str, Tensor], **more: Any) -> Tensor:
        biases = {name: tensors[name] for name in ("gate_up_bias", "down_bias") if name in tensors}
        x, gate_up, down, weights = (tensors[name] for name in ("x", "gate_up", "down", "weights"))
        return moe_experts(x, gate_up, down, (weights, self.ids), **biases, **self.options, **more)

    def define(self, dtype: torch.dtype, rounds: torch.dtype | None = None) -> dict[str, Tensor]:
        """The same from the formula, slot by slot, in `dtype`; `rounds` is what is rounded to between the products."""
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.tensors.items()}
        result = self._defined(leaves, rounds)
        grads = torch.autograd.grad(result, list(leaves.values()), self.upstream.to(dtype))
        return {"y": result.detach(), **dict(zip(leaves, grads, strict=True))}

    def _defined(self, tensors: dict[str, Tensor], rounds: torch.dtype | None) -> Tensor:
        def rounded(value: Tensor) -> Tensor:
            return value if rounds is None else _Round.apply(value, rounds)

        live, chosen = self.ids >= 0, self.ids.long().clamp(min=0)
        x = torch.where(live[..., None], tensors["x"][:, None], 0.0)  # [T, K, H]
        preact = torch.einsum("tkh,tkih->tki", rounded(x), tensors["gate_up"][chosen])
        if "gate_up_bias" in tensors:
            preact = preact + tensors["gate_up_bias"][chosen]
        y = torch.einsum("tki,tkhi->tkh", rounded(activation(rounded(preact), **self.options)), tensors["down"][chosen])
        if "down_bias" in tensors:
            y = y + tensors["down_bias"][chosen]
        return torch.where(live[..., None], rounded(y) * tensors["weights"][..., None], 0.0).sum(1)

    def assert_accurate(self, found: dict[str, Tensor]) -> None:
        """At most twice as far from float64 as plain PyTorch with operands of the inputs' dtype."""
        assert_all_accurate([(self, found)])

    def _definitions(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dtype = self.tensors["x"].dtype
        return self.define(torch.float64), self.define(torch.float32, None if dtype == torch.float32 else dtype)


def assert_all_accurate(runs: Sequence[tuple[Problem, dict[str, Tensor]]]) -> None:
    """Small problems are judged together: in one of a few rows plain PyTorch may be exact by chance."""
    definitions = [problem._definitions() for problem, _ in runs]
    for name in runs[0][1]:
        triples = (
            (found[name], exact[name], plain[name])
            for (_, found), (exact, plain) in zip(runs, definitions, strict=True)
        )
        actual, exact, plain = (torch.cat([t.flatten() for t in column]) for column in zip(*triples, strict=True))
        assert_as_accurate(actual, exact, plain, name=name)


def activation(
    preact: Tensor, activation: str = "swiglu", swiglu_alpha: float = 1.702, swiglu_limit: float = 7.0,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """What stands between the products, from the formulas."""
    half = preact.shape[-1] // 2
    gate = preact[..., 0::2] if interleaved else preact[..., :half]
    up = preact[..., 1::2] if interleaved else preact[..., half:]
    if activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    return (up + 1) * (gate * torch.sigmoid(gate * swiglu_alpha))
