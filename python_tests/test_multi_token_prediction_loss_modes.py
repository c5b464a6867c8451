"""mtp_linear_cross_entropy in a training loop: compiled, backward twice, accumulators, memory, FusedLMHead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import grpo_kernels
from bench.machine import RETURNING, environment
from grpo_kernels import FusedLMHead, GRPOLossConfig, LoRAFactors, PolicyTerms, mtp_linear_cross_entropy
from grpo_kernels.multi_token_prediction import loss as loss_of_depths
from python_tests.linear_peaks import ROWS
from python_tests.linear_peaks import VOCAB as PEAK_VOCAB
from python_tests.mtp_problems import EVERY, LAYOUTS, LORA_SCALE, VOCAB, WIDTH, definition, problem, run, tokens

pytestmark = pytest.mark.usefixtures("native_cpu")
ROOT = Path(__file__).parents[1]


def _policy(shape: tuple[int, ...]) -> PolicyTerms:
    return PolicyTerms(
        -torch.rand(shape) - 3.0, torch.linspace(-1.0, 1.0, shape[0]), ref_log_probs=-torch.rand(shape) - 3
    )


# --- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("with_policy", [False, True])
@pytest.mark.parametrize("detach_head", [False, True])
def test_backward_twice(one_pass: bool, with_policy: bool, detach_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not one_pass:
        monkeypatch.setattr(loss_of_depths, "may_form_gradients", lambda options: False)
    layout = LAYOUTS["batch"]
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem(layout, 3).items()}
    policy = _policy(layout.leading) if with_policy else None
    output = mtp_linear_cross_entropy(
        leaves["hiddens"], leaves["weight"], tokens(layout), bias=leaves["bias"], policy=policy, shift=0, z_loss=0.1,
        lora=LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE), detach_head=detach_head,
    )  # fmt: skip
    wanted = list(leaves.values())
    first = torch.autograd.grad(output.loss, wanted, torch.tensor(0.3), retain_graph=True)
    second = torch.autograd.grad(output.loss, wanted, torch.tensor(0.3))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.any()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(output.loss, wanted)


def test_a_changed_weight_is_noticed() -> None:
    layout = LAYOUTS["batch"]
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem(layout, 2).items()}
    output = mtp_linear_cross_entropy(leaves["hiddens"], leaves["weight"], tokens(layout))
    with torch.no_grad():
        leaves["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


def test_only_the_loss_is_differentiable() -> None:
    layout = LAYOUTS["batch"]
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem(layout, 3).items()}
    for backend in ("native", "reference"):
        for options in ({}, {"policy": _policy(layout.leading), "shift": 0}, {"detach_head": True}):
            with grpo_kernels.backend(backend):
                output = mtp_linear_cross_entropy(leaves["hiddens"], leaves["weight"], tokens(layout), **options)
            assert output.loss.requires_grad
            assert not any(isinstance(value, Tensor) and value.requires_grad for value in output[1:])


@pytest.mark.parametrize("detach_head", [False, True])
def test_weight_grad_accumulator(detach_head: bool) -> None:
    layout = LAYOUTS["packed"]
    leaves, ids = {name: leaf.float() for name, leaf in problem(layout, 3).items()}, tokens(layout)
    expected = definition(leaves, ids, layout, torch.float32, upstream=-3.0, detach_head=detach_head)[1]
    accumulator = torch.ones(VOCAB, WIDTH)
    _, grads = run(
        leaves, ids, upstream=-3.0, weight_grad_accumulator=accumulator, detach_head=detach_head, **layout.options
    )
    torch.testing.assert_close(accumulator, 1 + expected["weight"], rtol=1e-4, atol=1e-5)
    assert not grads["weight"].any()
    for name in ("hiddens", "bias", "a", "b"):
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "policy"])
def test_compiled_calls_do_not_recompile(kind: str) -> None:
    """Ten lengths, each with other numbers."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem(LAYOUTS["batch"], 1).items()}
    weight, bias, config = leaves["weight"], leaves["bias"], GRPOLossConfig()

    def loss(hiddens: Tensor, ids: Tensor, given: Tensor, number: float, count: float) -> Tensor:
        options: dict[str, Any] = {"bias": bias, "temperature": number, "depth_weights": (1.0, number)}
        if kind == "policy":
            policy = PolicyTerms(given, given[:, 0].cos(), config, given.sin() - 3.0, kl_coef=number)
            return mtp_linear_cross_entropy(hiddens, weight, ids, policy=policy, shift=0, **options).loss * 0.5
        return mtp_linear_cross_entropy(
            hiddens, weight, ids, cu_seqlens=given, num_items=count, **options
        ).loss * 0.5  # fmt: skip

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for step in range(4, 14):  # none of the sizes is that of another axis
        shape = (step, step + 3) if kind == "policy" else (3 * step,)
        given = -torch.rand(shape) - 3.0 if kind == "policy" else torch.tensor([0, step, 2 * step, 3 * step])
        hiddens = torch.randn(2, *shape, WIDTH, requires_grad=True)
        arguments = (hiddens, torch.randint(VOCAB, shape), given, 0.5 + 0.1 * step, 3.0 * step)
        actual, expected = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(x, (hiddens, weight, bias)) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


# --- FusedLMHead -----------------------------------------------------------------------------------------------------


def test_fused_lm_head() -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = {name: leaf.float() for name, leaf in problem(layout, 3).items()}, tokens(layout)
    lora = LoRAFactors(nn.Parameter(leaves["a"]), nn.Parameter(leaves["b"]), LORA_SCALE)
    linear = nn.Linear(WIDTH, VOCAB)
    linear.load_state_dict({"weight": leaves["weight"], "bias": leaves["bias"]})
    head = FusedLMHead(linear, logit_scale=0.6, softcap=2.0, lora=lora)
    options = {"policy": _policy(layout.leading), "shift": 0, "z_loss": 0.1}
    expected, gradients = run(leaves, ids, upstream=1.0, logit_scale=0.6, softcap=2.0, **options)
    for hiddens in (leaves["hiddens"].clone().requires_grad_(), [x.clone() for x in leaves["hiddens"]]):
        output = head.mtp_cross_entropy(hiddens, ids, **options)
        head.zero_grad()
        output.loss.backward()
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.agreement, expected.agreement)
        found = (head.weight, head.bias, head.lora_a, head.lora_b)
        for name, parameter in zip(EVERY[1:], found, strict=True):
            assert torch.equal(parameter.grad, gradients[name])
    with pytest.raises(TypeError, match="FusedLMHead: bias is no option of a call"):
        head.mtp_cross_entropy(leaves["hiddens"], ids, bias=leaves["bias"])
    with pytest.raises(TypeError, match="FusedLMHead: hiddens must be a tensor, or a sequence of one tensor"):
        head.mtp_cross_entropy(None, ids)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs: only Linux has it")
def test_the_logits_of_no_depth_are_held() -> None:
    """Above inputs and gradients an eighth of what one cross-entropy of eager PyTorch takes for each depth."""
    command = [sys.executable, "-m", "python_tests.mtp_peaks"]
    done = subprocess.run(command, env=environment(RETURNING), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    logits = 4 * ROWS * PEAK_VOCAB
    assert 2 * logits < peaks["eager"]
    for name in ("all depths", "policy", "detached"):
        assert peaks[name] <= peaks["eager"] / 8, name
