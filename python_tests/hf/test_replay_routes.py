"""replay_routes: the routes of a pass of a replaced model, recorded and taken again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

from grpo_kernels import RouterReplay
from grpo_kernels.integrations.transformers import replace_moe, replay_routes
from python_tests.hf.tiny import EXPERTS, TOP_K, batch, gradients, tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]
TOKENS = batch()["input_ids"].numel()


def perturb(model: nn.Module) -> None:
    """Another policy, with other routes."""
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "router.weight" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def routes(model: Any, replay: RouterReplay) -> Tensor:
    with torch.no_grad(), replay_routes(model, replay):
        model(**batch())
    return replay.pack()


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_a_second_pass_takes_the_recorded_experts(name: str) -> None:
    model, policy = tiny(name), tiny(name)
    replace_moe(model)
    replace_moe(policy)
    perturb(policy)
    replay = RouterReplay()
    with torch.no_grad(), replay_routes(model, replay):
        expected = model(**batch()).logits
    assert replay.layer_ids == ((1,) if name == "deepseek_v3" else (0, 1))
    assert replay.pack().shape == (TOKENS, len(replay.layer_ids), TOP_K)
    assert not torch.equal(routes(policy, RouterReplay()), replay.pack())
    given = RouterReplay.from_packed(replay.pack(), EXPERTS, replay.layer_ids)
    with replay_routes(policy, given):
        output = policy(**batch())
    output.loss.backward()
    assert sum(int(count) for count in given.mismatches().values()) > 0
    routers = [p for key, p in policy.named_parameters() if "gate.weight" in key or "router.weight" in key]
    assert all(router.grad.abs().max() > 0 for router in routers)
    with torch.no_grad(), replay_routes(model, given):
        assert torch.equal(model(**batch()).logits, expected)
        with pytest.raises(ValueError, match="another replay_routes"):
            with replay_routes(model, RouterReplay()):
                raise AssertionError


def test_with_checkpointing_the_backward_is_in_the_block() -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny("qwen3_moe")
        replay = RouterReplay.from_packed(torch.rand(TOKENS, 2, EXPERTS).argsort(2)[:, :, :TOP_K], EXPERTS, (0, 1))
        if results:
            replay = results[0][0]
        replace_moe(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with replay_routes(model, replay):
            model(**batch(), use_cache=False).loss.backward()
        results.append((replay, gradients(model)))
    assert all(torch.equal(gradient, results[0][1][key]) for key, gradient in results[1][1].items())


def test_faults() -> None:
    model = tiny("mixtral")
    with pytest.raises(ValueError, match="replace_moe"), replay_routes(model, RouterReplay()):
        pass
    replace_moe(model)
    with pytest.raises(TypeError, match="RouterReplay, got dict"), replay_routes(model, {}):
        pass
    layer = model.model.layers[0].mlp  # alone: in no numbered layer
    replace_moe(layer)
    block = nn.Sequential(tiny("mixtral").model.layers[0].mlp)
    replace_moe(block)
    with pytest.raises(ValueError, match="no numbered layer"), replay_routes(block, RouterReplay()):
        block(torch.randn(1, 3, 32))
