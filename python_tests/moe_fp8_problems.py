"""The definition of routed experts in FP8, slot by slot, and problems whose answer it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import fp8_dequantize, fp8_quantize
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_problems import Problem, activation

ROWS, SQUARE = (1, 128), (128, 128)
GRAD_EPS = 1e-30


def rounded(x: Tensor, block: tuple[int, int] = ROWS, eps: float = 1e-12) -> Tensor:
    """What x is in e4m3, in its own dtype."""
    flat = x.float() if block == SQUARE else x.float().flatten(0, -2)
    return fp8_dequantize(fp8_quantize(flat, block, eps=eps), torch.float64).reshape(x.shape).to(x.dtype)


class Fp8Problem(Problem):
    """Runs the FP8 recipe; `define` is that of the recipe."""

    def run(self, trained: tuple[str, ...] | None = None, **more: object) -> dict[str, Tensor]:
        return super().run(trained, **{"recipe": "fp8_block128", **more})

    def define(self, dtype: torch.dtype, rounds: torch.dtype | None = None, wgrad: bool = False) -> dict[str, Tensor]:
        """From the formulas in `dtype`; `rounds` is the dtype of the products' results. `wgrad`: as with fp8_wgrad."""

        def narrow(value: Tensor) -> Tensor:
            return value if rounds is None else value.to(rounds).to(dtype)

        of = {name: tensor.detach().to(dtype) for name, tensor in self.tensors.items()}
        live, chosen = (self.ids >= 0)[..., None], self.ids.long().clamp(min=0)
        upstream, weights = self.upstream.to(dtype), torch.where(live, of["weights"][..., None], 0.0)
        x = torch.where(live, rounded(of["x"])[:, None], 0.0)  # [T, K, H]
        gate_up, down = (rounded(of[name], SQUARE)[chosen] for name in ("gate_up", "down"))
        zero = x.new_zeros(())
        bias, down_bias = (of[name][chosen] if name in of else zero for name in ("gate_up_bias", "down_bias"))
        preact = narrow(torch.einsum("tkh,tkih->tki", x, gate_up) + bias)
        y = torch.einsum("tki,tkhi->tkh", rounded(activation(preact, **self.options)), down) + down_bias
        found = {"y": torch.where(live, narrow(y) * weights, 0.0).sum(1)}

        kept = torch.where(live, rounded(preact), 0.0).requires_grad_()
        activated = activation(kept, **self.options)
        g = torch.where(live, upstream[:, None], 0.0)
        of_activated = narrow(torch.einsum("tkh,tkhi->tki", rounded(g, eps=GRAD_EPS), down))
        (of_preact,) = torch.autograd.grad(activated, kept, weights * of_activated)
        scaled = torch.where(live, weights * activated.detach(), 0.0)
        of_x = narrow(torch.einsum("tki,tkih->tkh", rounded(of_preact, eps=GRAD_EPS), gate_up))
        found["x"] = torch.where(live, of_x, 0.0).sum(1)
        if wgrad:
            found |= {"gate_up": self._of_tiles(x, of_preact), "down": self._of_tiles(scaled, g)}
        else:
            found |= {
                "gate_up": self._of_experts(x, narrow(of_preact)),
                "down": self._of_experts(narrow(scaled), g),
            }
        terms = (of_activated * activated.detach()).sum(-1)
        found["weights"] = torch.where(live[..., 0], terms + (g * down_bias).sum(-1), 0.0)
        if "down_bias" in of:
            found["gate_up_bias"] = self._sums(narrow(of_preact))
            found["down_bias"] = self._sums(narrow(weights * g))
        return found

    def _slots(self) -> list[Tensor]:
        """Those of each expert, in their order."""
        experts = range(len(self.tensors["gate_up"]))
        return [(self.ids.reshape(-1) == expert).nonzero()[:, 0] for expert in experts]

    def _sums(self, values: Tensor) -> Tensor:
        return torch.stack([values.flatten(0, 1)[slots].sum(0) for slots in self._slots()])

    def _of_experts(self, rows: Tensor, grads: Tensor) -> Tensor:
        rows, grads = rows.flatten(0, 1), grads.flatten(0, 1)
        return torch.stack([grads[slots].t() @ rows[slots] for slots in self._slots()])

    def _of_tiles(self, rows: Tensor, grads: Tensor) -> Tensor:
        """Both operands in e4m3, tiles of 128 of an expert's rows."""
        rows, grads = rows.flatten(0, 1), grads.flatten(0, 1)
        pairs = [(rounded(grads[s].t(), eps=GRAD_EPS), rounded(rows[s].t(), eps=GRAD_EPS)) for s in self._slots()]
        return torch.stack([grad @ x.t() for grad, x in pairs])

    def assert_close_to_definition(self, found: dict[str, Tensor], wgrad: bool = False) -> None:
        """At most twice as far from float64 as plain PyTorch in float32, and one rounding."""
        rounds = None if self.tensors["x"].dtype == torch.float32 else self.tensors["x"].dtype
        expected, plain = self.define(torch.float64, rounds, wgrad), self.define(torch.float32, rounds, wgrad)
        for name, value in found.items():
            assert_as_accurate(value, expected[name], plain[name], name=name)
