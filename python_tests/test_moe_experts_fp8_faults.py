"""moe_experts(recipe="fp8_block128") where something is odd: faults in one place, layouts, and how it is trained."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import grpo_kernels
from grpo_kernels import MoE
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from grpo_kernels.moe_experts.parts import Routes
from python_tests.moe_fp8_problems import Fp8Problem

GPT_OSS: dict[str, Any] = {"activation": "clamped_swiglu", "interleaved": True, "swiglu_limit": 1.5}
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
WGRADS = pytest.mark.parametrize("fp8_wgrad", [False, True])
OPTIONS = pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["swiglu", "gpt_oss"])
IDS = torch.tensor([[0, 1], [-1, -1], [2, 3], [0, 1], [1, -1]])  # expert 4 has no rows
T, H, I, E, K = 12, 144, 80, 3, 2

pytestmark = pytest.mark.usefixtures("native_cpu")


def _faults(value: Tensor) -> list[int]:
    """Rows, or experts, that hold anything not finite."""
    return [i for i, part in enumerate(value) if not part.isfinite().all()]


def _small(**options: Any) -> Fp8Problem:
    return Fp8Problem.make(tokens=5, ids=IDS, experts=5, hidden=150, width=70, bias=True, **options)


# --- faults stay where they are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@OPTIONS
@WGRADS
@BACKENDS
def test_a_fault_in_the_upstream_gradient_of_a_token(
    backend: str, fp8_wgrad: bool, options: dict[str, Any], fault: float
) -> None:
    """It reaches that token's gradients and those of its experts; of a token without experts, nothing."""
    problem = _small(**options)
    with grpo_kernels.backend(backend):
        expected = problem.run(fp8_wgrad=fp8_wgrad)
        problem.upstream[2, 7], problem.upstream[1] = fault, fault
        found = problem.run(fp8_wgrad=fp8_wgrad)
    assert torch.equal(found.pop("y"), expected["y"])
    for name, value in found.items():
        reached = [2] if name in ("x", "weights") else [2, 3]
        assert _faults(value) == reached, name
        others = [i for i in range(5) if i not in reached]
        assert torch.equal(value[others], expected[name][others]), name


@pytest.mark.parametrize("name", ["gate_up", "down", "gate_up_bias", "down_bias", "weights"])
@OPTIONS
@WGRADS
@BACKENDS
def test_a_fault_in_a_parameter(backend: str, fp8_wgrad: bool, options: dict[str, Any], name: str) -> None:
    """It reaches the tokens and the gradients of its expert; of an expert without rows, nothing."""
    problem = _small(**options)
    value = problem.tensors[name]
    places = [(2, 0), (1, 0), (4, 1)] if name == "weights" else [(2, 3), (4, 3)]  # slots without an expert; an expert
    for first, second in places:
        value[first, second] = float("nan")
    with grpo_kernels.backend(backend):
        found = problem.run(fp8_wgrad=fp8_wgrad)
    assert _faults(found["y"]) == [2]
    for value in found.values():
        assert set(_faults(value)) <= {2}


# --- layouts ---------------------------------------------------------------------------------------------------------


def _moved(x: Tensor) -> Tensor:
    """At an odd place in memory."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@WGRADS
@BACKENDS
def test_any_layout_of_tokens_and_gradients(backend: str, fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(torch.bfloat16, hidden=150, width=70, bias=True)
    layouts = (
        _moved,
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:1, :1].expand_as(x),
    )
    with grpo_kernels.backend(backend):
        for layout in layouts:
            x, upstream = layout(problem.tensors["x"]), layout(problem.upstream)
            results = []
            for of_x, of_upstream in ((x, upstream), (x.contiguous(), upstream.contiguous())):
                leaves = {**problem.tensors, "x": of_x.detach()}
                for leaf in leaves.values():
                    leaf.requires_grad_()
                y = problem.call(leaves, recipe="fp8_block128", fp8_wgrad=fp8_wgrad)
                results.append([y, *torch.autograd.grad(y, list(leaves.values()), of_upstream)])
            assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["gate_up", "down"])
@WGRADS
def test_weights_that_share_their_numbers(name: str, fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(hidden=150, width=70)
    weight = problem.tensors[name]
    for axis in range(3):
        of = weight.narrow(axis, 0, 1).expand_as(weight)
        results = []
        for value in (of, of.contiguous()):
            leaves = {**{n: t.clone() for n, t in problem.tensors.items()}, name: value.detach()}
            for leaf in leaves.values():
                leaf.requires_grad_()
            y = problem.call(leaves, recipe="fp8_block128", fp8_wgrad=fp8_wgrad)
            results.append([y, *torch.autograd.grad(y, list(leaves.values()), problem.upstream)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


# --- training --------------------------------------------------------------------------------------------------------


def _layer(seed: int = 0, **options: Any) -> MoE:
    torch.manual_seed(seed)
    return MoE(H, I, E, K, recipe="fp8_block128", **options)


def _of_new_copies(layer: MoE, x: Tensor) -> Tensor:
    clear_fp8_weight_cache()
    return layer(x).hidden.detach()


@pytest.mark.parametrize("save", ["preact", "input"])
def test_a_weight_that_changes_before_the_backward_is_an_error(save: str) -> None:
    layer, x = _layer(save=save, expert_bias=True), torch.randn(T, H)
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        result = layer(x).hidden.sum()
        with torch.no_grad():
            getattr(layer.experts, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


@WGRADS
@pytest.mark.parametrize("save", ["preact", "input"])
def test_tokens_may_change_before_the_backward(save: str, fp8_wgrad: bool) -> None:
    """What is kept of them is a copy."""
    problem = Fp8Problem.make(hidden=150, width=70)
    expected = problem.run(fp8_wgrad=fp8_wgrad, save=save)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem.tensors.items()}
    x = leaves["x"].clone()
    y = problem.call({**leaves, "x": x}, recipe="fp8_block128", fp8_wgrad=fp8_wgrad, save=save)
    with torch.no_grad():
        x.fill_(float("nan"))
    y.backward(problem.upstream)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize(("inner", "outer"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@WGRADS
@BACKENDS
def test_a_backward_inside_autocast(backend: str, fp8_wgrad: bool, inner: torch.dtype, outer: torch.dtype) -> None:
    problem = Fp8Problem.make(hidden=150, width=70, bias=True)
    results = []
    for inside in (False, True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in problem.tensors.items()}
        with grpo_kernels.backend(backend), torch.autocast("cpu", outer), torch.autocast("cpu", inner):
            y = problem.call(leaves, recipe="fp8_block128", fp8_wgrad=fp8_wgrad)
            with torch.autocast("cpu", inner, enabled=inside):
                y.backward(problem.upstream.to(inner))
        assert y.dtype == inner
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    assert all(map(torch.equal, *results))


def test_optimizers_that_step_within_the_backward() -> None:
    layer, x = _layer(), torch.randn(T, H)
    optimizers = {parameter: torch.optim.SGD([parameter], 0.01) for parameter in layer.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        hidden = layer(x).hidden
        assert torch.equal(hidden, _of_new_copies(layer, x))
        hidden.square().sum().backward()


@BACKENDS
def test_forward_mode_is_refused(backend: str) -> None:
    """Rounding has no derivative: the tangents would be lost in plain PyTorch, too."""
    layer = _layer()
    with grpo_kernels.backend(backend), forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(T, H), torch.ones(T, H))
        routes = Routes(torch.full((T, K), 0.5), torch.arange(K, dtype=torch.int32).repeat(T, 1))
        with pytest.raises(RuntimeError, match=r"moe_experts: .*forward-mode"):
            layer.experts(x, routes)


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_weights_that_are_computed_are_never_old_and_leave_nothing() -> None:
    layer, x = _layer(), torch.randn(T, H)
    parametrize.register_parametrization(layer.experts, "gate_up_proj", _Half())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    counts = []
    for _ in range(6):
        hidden = layer(x).hidden
        assert torch.equal(hidden, _of_new_copies(layer, x))
        hidden.square().mean().backward()
        del hidden
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[2] == counts[-1]


def test_threads_that_train_their_own_models_compute_what_each_would_alone() -> None:
    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        layer = layers[seed]
        optimizer = torch.optim.SGD(layer.parameters(), 0.05)
        for _ in range(10):
            layer(torch.randn(T, H, generator=generator)).hidden.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in layer.parameters()]

    layers = [_layer(seed, fp8_wgrad=seed == 1) for seed in range(3)]
    alone = [train(seed) for seed in range(3)]
    layers = [_layer(seed, fp8_wgrad=seed == 1) for seed in range(3)]
    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: train(seed)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        assert all(map(torch.equal, together[seed], expected))


def test_a_scaled_loss() -> None:
    """Its scale is a power of two, which changes no bits; where the loss is infinite the step is left out."""
    layer, x = _layer(), torch.randn(T, H)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loss = layer(x).hidden.square().mean()
    expected = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad / 2**16, grad)
    optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    scaler.scale(layer(x).hidden.square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, layer.parameters()))
    assert scaler.get_scale() == 2.0**15
