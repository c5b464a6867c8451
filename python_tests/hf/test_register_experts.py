"""register_experts: moe_experts as an experts implementation of transformers, also for models replace_moe lacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from grpo_kernels.integrations.transformers import register_experts
from grpo_kernels.integrations.transformers.experts import experts_forward
from grpo_kernels.testing import assert_as_accurate
from python_tests.hf.tiny import VOCAB, assert_gradients, batch, gradients, tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def registered() -> Any:
    register_experts()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("grpo_kernels")


def olmoe() -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**SIZES, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "mixtral"])
def test_values_and_gradients(name: str) -> None:
    results = {}
    for implementation, dtype in (("eager", torch.float64), ("eager", torch.float32), ("grpo_kernels", torch.float32)):
        model = (olmoe() if name == "olmoe" else tiny(name)).to(dtype)
        model.set_experts_implementation(implementation)
        output = model(**batch())
        output.loss.backward()
        results[implementation, dtype] = output.logits.detach(), gradients(model)
    exact, eager, ours = results.values()
    assert_as_accurate(ours[0], exact[0], eager[0], name="logits")
    assert_gradients(ours[1], exact[1], eager[1])
    assert not torch.equal(ours[0], eager[0])


def test_chosen_at_construction() -> None:
    config = copy.deepcopy(tiny("qwen3_moe").config)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grpo_kernels")
    assert model.config._experts_implementation == "grpo_kernels"
    assert model(**batch()).loss.isfinite()


def test_under_the_expert_parallelism_of_transformers() -> None:
    """Its routers mark experts of other ranks with the number of experts that are here."""
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    x, weights = torch.randn(20, 32), torch.rand(20, 3)
    ids = torch.rand(20, 9).argsort(1)[:, :3]  # 8 is elsewhere
    ids[0] = 8
    expected = grouped_mm_experts_forward(experts, x, ids.clone(), weights)
    torch.testing.assert_close(experts_forward(experts, x, ids, weights), expected)


def test_options() -> None:
    register_experts("grpo_kernels", recipe="fp8_block128")
    model = tiny("mixtral").eval()
    with torch.no_grad():
        exact = model(**batch()).logits
        model.set_experts_implementation("grpo_kernels")
        eight = model(**batch()).logits
    difference = (eight - exact).norm() / exact.norm()
    assert 1e-3 < difference < 0.2
    with pytest.raises(ValueError, match="recipe"):
        register_experts("mine", recipe="fp4")
    with pytest.raises(ValueError, match="'eager'"):
        register_experts("eager")


def test_what_is_not_served_raises_by_name() -> None:
    model = olmoe()
    model.model.layers[0].mlp.experts.act_fn = torch.nn.ReLU()
    model.set_experts_implementation("grpo_kernels")
    with pytest.raises(ValueError, match="OlmoeExperts is not served: its activation is ReLU"):
        model(**batch())
    for attribute, value, message in (("has_gate", False, "no gate"), ("has_post_expert_norm", True, "norm")):
        model = olmoe()
        setattr(model.model.layers[0].mlp.experts, attribute, value)
        model.set_experts_implementation("grpo_kernels")
        with pytest.raises(ValueError, match=message):
            model(**batch())


def test_an_activation_of_its_own_is_not_taken_for_silu() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    experts.__class__ = DeepseekV4Experts
    experts.config._experts_implementation = "grpo_kernels"
    with pytest.raises(ValueError, match="DeepseekV4Experts is not served: it has an activation of its own"):
        experts(torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
