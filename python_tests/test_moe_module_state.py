"""The MoE module's parameters: names, dtypes that stay, state dicts, fresh values, biases that move."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from grpo_kernels import MoE, update_expert_bias
from python_tests.moe_layers import DEEPSEEK, GPT_OSS, SHARED, E, H, I, K, layer_of, normal

X = normal(3, 5, H)


def test_names_are_those_of_hugging_face() -> None:
    assert {name: list(value.shape) for name, value in layer_of(**DEEPSEEK).state_dict().items()} == {
        "gate.weight": [E, H],
        "gate.e_score_correction_bias": [E],
        "experts.gate_up_proj": [E, 2 * I, H],
        "experts.down_proj": [E, H, I],
        "shared_experts.gate_proj.weight": [SHARED, H],
        "shared_experts.up_proj.weight": [SHARED, H],
        "shared_experts.down_proj.weight": [H, SHARED],
    }
    assert {name: list(value.shape) for name, value in layer_of(**GPT_OSS).state_dict().items()} == {
        "gate.weight": [E, H],
        "gate.bias": [E],
        "experts.gate_up_proj": [E, 2 * I, H],
        "experts.down_proj": [E, H, I],
        "experts.gate_up_proj_bias": [E, 2 * I],
        "experts.down_proj_bias": [E, H],
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda moe: moe.to(torch.bfloat16),
        lambda moe: moe.half(),
        lambda moe: moe.bfloat16().float().half(),
        lambda moe: moe.double().bfloat16(),
        lambda moe: nn.Sequential(moe).to(torch.bfloat16)[0],
        lambda moe: copy.deepcopy(moe).to("cpu", torch.float16),
    ],
)
def test_the_correction_bias_stays_float32(change: Callable[[MoE], MoE]) -> None:
    moe = layer_of(**DEEPSEEK)
    bias = moe.e_score_correction_bias.clone()  # type: ignore[union-attr]
    changed = change(moe)
    assert changed.gate.weight.dtype in (torch.bfloat16, torch.float16)
    assert changed.e_score_correction_bias.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(changed.e_score_correction_bias, bias)  # type: ignore[arg-type]
    assert changed(X.to(changed.gate.weight.dtype)).hidden.isfinite().all()


def test_other_devices_and_double() -> None:
    assert layer_of(**DEEPSEEK).to("meta").e_score_correction_bias.device.type == "meta"  # type: ignore[union-attr]
    with torch.device("meta"):
        moe = MoE(H, I, E, K, **DEEPSEEK, dtype=torch.bfloat16)
    moe = moe.to_empty(device="cpu")
    assert moe.e_score_correction_bias.dtype == torch.float32  # type: ignore[union-attr]
    moe.reset_parameters()
    assert not moe.e_score_correction_bias.any()  # type: ignore[union-attr]
    assert float(moe.experts.down_proj.detach().abs().max()) <= I**-0.5
    assert layer_of(**DEEPSEEK).double().e_score_correction_bias.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize("assign", [False, True])
def test_state_survives_a_round_trip_and_a_narrow_checkpoint(assign: bool) -> None:
    moe, other = layer_of(**DEEPSEEK), MoE(H, I, E, K, **DEEPSEEK)
    assert not torch.equal(other(X).hidden, moe(X).hidden)
    other.load_state_dict(moe.state_dict(), assign=assign)
    assert torch.equal(other(X).hidden, moe(X).hidden)
    narrow = {name: value.bfloat16() for name, value in moe.state_dict().items()}
    other.load_state_dict(narrow, assign=assign)
    assert other.e_score_correction_bias.dtype == torch.float32  # type: ignore[union-attr]
    assert narrow["gate.e_score_correction_bias"].dtype == torch.bfloat16


def test_fresh_parameters_are_those_of_linear_layers() -> None:
    torch.manual_seed(0)
    moe = MoE(64, 32, 16, 2, shared_intermediate_size=48, router_bias=True, expert_bias=True)
    for weight in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
        bound = weight.shape[-1] ** -0.5
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    biases = (moe.gate.bias, moe.experts.gate_up_proj_bias, moe.experts.down_proj_bias)
    assert not any(bias.any() for bias in biases if bias is not None)
    assert not any(bias is None for bias in biases)


def test_balancing_the_layer() -> None:
    moe = layer_of(**DEEPSEEK)
    before = moe.e_score_correction_bias.clone()  # type: ignore[union-attr]
    counts = moe(X).router.tokens_per_expert
    update_expert_bias(moe.e_score_correction_bias, counts, 0.25)  # type: ignore[arg-type]
    expected = before + 0.25 * torch.sign(counts.double().mean() - counts).float()
    assert torch.equal(moe.e_score_correction_bias, expected)  # type: ignore[arg-type]


def test_it_says_what_it_is() -> None:
    text = repr(layer_of(**DEEPSEEK))
    assert "hidden_size=8, num_experts=8, top_k=2, bias=False, e_score_correction_bias=True, layer_id=3" in text
    assert "hidden_size=8, intermediate_size=6, num_experts=8, bias=False" in text
    assert "scoring_func='sigmoid'" in text
