"""moe_experts and the FP8 copies of its weights: taken from one call to the next, and never seen in what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_kernels import MoE, moe_experts
from grpo_kernels.moe_experts import fp8_weights
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from python_tests.fp8_weight_products import count_quantisations, nothing_is_kept

__all__ = ["nothing_is_kept"]


T, H, I, E, K = 12, 144, 80, 3, 2
BOTH = (True, True)


def _layer(**options: Any) -> MoE:
    moe = MoE(H, I, E, K, recipe="fp8_block128", **options)
    moe.reset_parameters()
    return moe


def _pass(moe: MoE, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    hidden = (moe if forward is None else forward)(x).hidden
    return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), (x, *moe.parameters()))]


def _without_copies(moe: MoE, x: Tensor) -> list[Tensor]:
    clear_fp8_weight_cache()
    return _pass(moe, x)


@pytest.mark.parametrize("save", ["preact", "input"])
@pytest.mark.parametrize("fp8_wgrad", [False, True])
def test_steps_of_several_batches(save: str, fp8_wgrad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights, quantised once for each step; and each batch computes what it would without copies."""
    moe = _layer(save=save, fp8_wgrad=fp8_wgrad)
    optimizer = torch.optim.SGD(moe.parameters(), 0.01)
    for _ in range(2):
        batches = [torch.randn(T, H) for _ in range(3)]
        expected = [_without_copies(moe, x) for x in batches]
        clear_fp8_weight_cache()
        with monkeypatch.context() as patch:
            made = count_quantisations(patch)
            for x, wanted in zip(batches, expected, strict=True):
                assert all(map(torch.equal, _pass(moe, x), wanted))
            assert made == [BOTH, BOTH]
        moe(batches[0]).hidden.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = _layer(), torch.randn(T, H)
    wanted = _without_copies(moe, x)
    clear_fp8_weight_cache()
    made = count_quantisations(monkeypatch)
    for _ in range(2):
        given = x.clone().requires_grad_()
        moe.zero_grad()
        hidden = checkpoint(lambda x: moe(x).hidden, given, use_reentrant=reentrant)
        hidden.square().sum().backward()
        grads = [given.grad, *(parameter.grad for parameter in moe.parameters())]
        assert all(map(torch.equal, [hidden.detach(), *grads], wanted))
    assert made == ([(True, False)] * 2 + [(False, True)] * 2 if reentrant else [BOTH, BOTH])


def test_a_compiled_layer_keeps_nothing() -> None:
    moe, x = _layer(), torch.randn(T, H)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual = _pass(moe, x, compiled)
        assert not fp8_weights._kept
        assert all(map(torch.equal, actual, _without_copies(moe, x)))
        clear_fp8_weight_cache()
        moe.experts.down_proj.data.mul_(2)  # no version counts it


def test_views_as_transformers_holds_them() -> None:
    """gpt-oss' parameters are [E, H, 2I] and [E, I, H]: every call passes new views of them."""
    gate_up, down = torch.nn.Parameter(torch.randn(E, H, 2 * I) / 12), torch.nn.Parameter(torch.randn(E, I, H) / 9)
    x, routes = torch.randn(T, H), (torch.rand(T, K), torch.randint(E, (T, K)))

    def call() -> Tensor:
        return moe_experts(x, gate_up.transpose(1, 2), down.transpose(1, 2), routes, recipe="fp8_block128")

    before = call()
    before.sum().backward()
    copies = [list(owned.copies.values()) for owned in fp8_weights._kept.values()]
    call().sum().backward()
    assert [list(owned.copies.values()) for owned in fp8_weights._kept.values()] == copies
    assert [len(of_weight) for of_weight in copies] == [1, 1]
    torch.optim.SGD([gate_up, down], 0.1).step()
    after = call()
    assert not torch.equal(after, before)
    clear_fp8_weight_cache()
    assert torch.equal(after, call())


def test_a_loaded_state_is_seen() -> None:
    moe, other, x = _layer(), _layer(), torch.randn(T, H)
    moe(x)
    moe.load_state_dict(other.state_dict())
    assert torch.equal(moe(x).hidden, other(x).hidden)
