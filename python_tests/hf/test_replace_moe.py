"""replace_moe: outputs and gradients of the models as transformers computes them, and everything else untouched."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from grpo_kernels import moe_experts
from grpo_kernels.integrations.transformers import replace_moe, replaced_moe, restore_moe
from grpo_kernels.testing import assert_as_accurate
from python_tests.hf.tiny import EXPERTS, MOE_MODELS, VOCAB, assert_gradients, batch, gradients, tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]
FIRST = {"deepseek_v3": 1}  # its first layers are dense
each_model = pytest.mark.parametrize("name", MOE_MODELS)
each_family = pytest.mark.parametrize("name", [name for name in MOE_MODELS if name != "qwen3_moe_raw_weights"])


class Pass(NamedTuple):
    loss: Tensor
    logits: Tensor
    aux_loss: Tensor | None
    router_logits: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def run(model: Any, balanced: bool = True, **options: Any) -> Pass:
    """A training step's forward and backward, with the auxiliary loss where the model has one."""
    model.zero_grad()
    if balanced and model.config.model_type != "deepseek_v3":
        options["output_router_logits"] = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**batch(), **options)
        output.loss.backward()
    return Pass(
        output.loss.detach(),
        output.logits.detach(),
        output.get("aux_loss"),
        output.router_logits or (),
        gradients(model),
    )


@functools.cache
def stock(name: str, dtype: torch.dtype) -> Pass:
    return run(tiny(name, dtype))


@functools.cache
def fused(name: str, dtype: torch.dtype) -> Pass:
    model = tiny(name, dtype)
    replace_moe(model)
    return run(model)


@each_model
def test_values_and_gradients_are_those_of_the_stock_model(name: str) -> None:
    ours, exact, eager = fused(name, torch.float32), stock(name, torch.float64), stock(name, torch.float32)
    assert_as_accurate(ours.logits, exact.logits, eager.logits, name="logits")
    torch.testing.assert_close(ours.loss, exact.loss)
    assert len(ours.router_logits) == len(eager.router_logits)
    for mine, theirs, plain in zip(ours.router_logits, exact.router_logits, eager.router_logits, strict=True):
        assert_as_accurate(mine, theirs, plain, name="router logits")
    assert sum("experts" in key or "gate" in key or "router" in key for key in ours.gradients) >= 3
    assert_gradients(ours.gradients, exact.gradients, eager.gradients)
    assert all(gradient.stride() == eager.gradients[key].stride() for key, gradient in ours.gradients.items())
    if eager.aux_loss is not None:
        torch.testing.assert_close(ours.aux_loss, exact.aux_loss)


@each_model
def test_float64(name: str) -> None:
    """gpt-oss to float64's accuracy; the other models of transformers round their routers' scores to float32."""
    ours, theirs = fused(name, torch.float64), stock(name, torch.float64)
    precision = {"rtol": 0.0, "atol": 1e-13} if name == "gpt_oss" else {"rtol": 1.3e-6, "atol": 2e-6}
    torch.testing.assert_close(ours.logits, theirs.logits, **precision)
    torch.testing.assert_close(ours.gradients, theirs.gradients, **precision)


@each_family
def test_bfloat16_is_as_near_to_the_exact_result(name: str) -> None:
    exact = tiny(name, torch.bfloat16).double()
    exact.set_experts_implementation("eager")
    expected = run(exact)
    eager, ours = stock(name, torch.bfloat16), fused(name, torch.bfloat16)
    assert ours.logits.dtype == torch.bfloat16
    assert_as_accurate(ours.logits, expected.logits, eager.logits, name="logits")
    assert_gradients(ours.gradients, expected.gradients, eager.gradients)


@each_family
def test_nothing_of_the_model_but_its_forward_changes(name: str, tmp_path: Path) -> None:
    model = tiny(name).eval()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    ids = batch()["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    blocks = replace_moe(model)
    assert blocks == tuple(f"model.layers.{layer}.mlp" for layer in range(FIRST.get(name, 0), 2))
    assert replace_moe(model) == blocks  # again
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, before)
        after = model(ids).logits
        assert not torch.equal(after, before)  # so it is indeed another computation
        torch.testing.assert_close(after, before)
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids).logits, after)
        model.load_state_dict(copied.state_dict())
        assert restore_moe(model) == blocks
        assert torch.equal(model(ids).logits, before)
    fresh = tiny(name)
    for (key, module), other in zip(model.named_modules(), fresh.modules(), strict=True):
        assert type(module) is type(other), key
        assert vars(module).keys() == vars(other).keys(), key
    assert restore_moe(model) == ()


@each_family
def test_generate_gives_the_same_tokens(name: str) -> None:
    model = tiny(name).eval()
    arguments = {"input_ids": batch(1, rows=2, length=5)["input_ids"].clamp(min=3), "max_new_tokens": 8}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(**arguments)
    with replaced_moe(model):
        assert torch.equal(model.generate(**arguments), expected)


@each_family
def test_checkpointing_computes_the_same_bits(name: str) -> None:
    model = tiny(name)
    replace_moe(model)
    without = run(model, balanced=False)
    for reentrant in (False, True):  # which loses the gradient of captured logits, in stock models, too
        plain = without if reentrant else fused(name, torch.float32)
        model = tiny(name)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        replace_moe(model)
        again = run(model, balanced=not reentrant, use_cache=False)
        assert torch.equal(again.logits, plain.logits)
        assert all(torch.equal(gradient, plain.gradients[key]) for key, gradient in again.gradients.items())


@pytest.mark.parametrize("early", [False, True])
def test_router_logits_whenever_they_are_first_asked_for(early: bool) -> None:
    """transformers hooks the routers when their logits are asked for, which may be before or after."""
    model, ids = tiny("qwen3_moe").eval(), batch()["input_ids"]
    expected = stock("qwen3_moe", torch.float32).router_logits
    if early:
        model(ids, output_router_logits=True)
    with replaced_moe(model):
        inside = model(ids, output_router_logits=True).router_logits
    outside = model(ids, output_router_logits=True).router_logits
    assert len(inside) == len(outside) == len(expected) == 2
    torch.testing.assert_close(inside, outside)


def test_jitter_of_mixtral() -> None:
    runs = []
    for replaced in (False, True):
        model = tiny("mixtral")
        for layer in model.model.layers:
            layer.mlp.jitter_noise = 0.3
        if replaced:
            replace_moe(model)
        runs.append(run(model))
    torch.testing.assert_close(runs[1].logits, runs[0].logits)
    assert not torch.allclose(runs[0].logits, stock("mixtral", torch.float32).logits)


@each_family
def test_options_reach_the_experts(name: str) -> None:
    model = tiny(name)
    replace_moe(model, save="input")
    less = run(model)
    assert torch.equal(less.logits, fused(name, torch.float32).logits)
    replace_moe(model, recipe="fp8_block128", fp8_wgrad=True)
    captured: list[Any] = []
    experts = next(module for module in model.modules() if hasattr(module, "moe_options"))
    experts.register_forward_hook(lambda module, inputs, output: captured.append((inputs, output)))
    run(model)
    (tokens, ids, weights), output = captured[0]
    turn = name == "gpt_oss"
    biases = {"gate_up_bias": experts.gate_up_proj_bias, "down_bias": experts.down_proj_bias} if turn else {}
    expected = moe_experts(
        tokens,
        experts.gate_up_proj.mT if turn else experts.gate_up_proj,
        experts.down_proj.mT if turn else experts.down_proj,
        (weights, ids),
        **biases,
        activation="clamped_swiglu" if turn else "swiglu",
        swiglu_alpha=1.5,
        swiglu_limit=0.5,
        interleaved=turn,
        recipe="fp8_block128",
        fp8_wgrad=True,
    )
    assert torch.equal(output, expected)
    assert ids.dtype == torch.int64
    assert int(ids.max()) < EXPERTS


def test_autocast() -> None:
    model = tiny("qwen3_moe")
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model)
        replace_moe(model)
        ours = run(model)
    exact = stock("qwen3_moe", torch.float64)
    assert ours.logits.dtype == eager.logits.dtype
    assert_as_accurate(ours.logits, exact.logits, eager.logits)


def test_an_exception_restores() -> None:
    model = tiny("mixtral")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"):
        with replaced_moe(model):
            raise RuntimeError("inside")
    assert [type(module) for module in model.modules()] == kinds


def test_a_replaced_model_can_be_pickled() -> None:
    model = tiny("gpt_oss").eval()
    replace_moe(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again, ids = torch.load(file, weights_only=False), batch()["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


# what is refused ---------------------------------------------------------------------------------------------------


def refused(model: Any, *parts: str, **options: Any) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:
        replace_moe(model, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert [type(module) for module in model.modules()] == kinds


def test_a_dense_model_is_refused_by_name() -> None:
    refused(tiny("llama"), "LlamaForCausalLM", "no MoE block")
    with pytest.raises(TypeError, match="got str"):
        replace_moe("a path")


def test_another_moe_model_is_refused_by_name() -> None:
    config = transformers.OlmoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=4
    )
    refused(transformers.OlmoeForCausalLM(config), "OlmoeForCausalLM", "OlmoeExperts", "register_experts")


def test_another_activation_is_refused_by_name() -> None:
    model = tiny("qwen3_moe")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
    refused(model, "Qwen3MoeExperts", "GELU")


def test_what_would_pass_the_new_forward_by_is_refused() -> None:
    model = tiny("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.forward = experts.forward
    refused(model, "layers.0.mlp.experts of Qwen3MoeForCausalLM", "forward of its own")
    model = tiny("gpt_oss")
    router = model.model.layers[0].mlp.router
    router.__class__ = type("FSDPGptOssTopKRouter", (type(router),), {})
    refused(model, "FSDPGptOssTopKRouter", "replace first")
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    refused(model, "expert-parallel")


def test_quantised_experts_are_refused_by_name() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach().to(torch.uint8), requires_grad=False)
    refused(model, "MixtralExperts", "uint8")


def test_options_are_checked() -> None:
    refused(tiny("mixtral"), "recipe", recipe="fp4")
    refused(tiny("mixtral"), "save", save="nothing")
    refused(tiny("mixtral"), "fp8_wgrad", fp8_wgrad=True)


def test_wrapped_after_the_replacement() -> None:
    model = tiny("mixtral")
    replace_moe(model)
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("FSDPMixtralExperts", (type(experts),), {})
    with pytest.raises(ValueError, match="FSDPMixtralExperts"):
        restore_moe(model)
