"""FP8 copies of weights: made once per optimizer step, never older than the weight, gone with it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grpo_kernels import _extension, fp8_quantize
from grpo_kernels.moe_experts import fp8_weights
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from python_tests.fp8_weight_products import (
    BACKEND,
    BOTH,
    PLAIN,
    TURNED,
    Layer,
    Made,
    made,
    nothing_is_kept,
    quantized,
    same,
    turned,
)

__all__ = ["made", "nothing_is_kept"]


E, N, K = 2, 150, 140


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (E, N, K))))


def _rows(layer: Layer) -> Tensor:
    return torch.randn(E, 5, layer.weight.shape[2], requires_grad=True)


def _is_current(weight: Tensor) -> bool:
    """Do the copies say what the weight says now?"""
    plain, transposed = fp8_quantize(weight.detach().clone(), (128, 128), transpose="both")
    return same(quantized(weight), plain) and same(turned(weight), transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "view", [lambda p: p, lambda p: p.transpose(1, 2), lambda p: p[1:]], ids=["p", "p.mT", "p[1:]"]
)
def test_bits_are_those_of_fp8_quantize(dtype: torch.dtype, backend: str, view: Callable[[Tensor], Tensor]) -> None:
    if backend == "native" and _extension.cpu_problem():
        pytest.skip(_extension.cpu_problem())
    weight = view(nn.Parameter(torch.randn(E, N, K, dtype=dtype)))
    plain, transposed = fp8_quantize(weight, (128, 128), transpose="both")
    assert same(quantized(weight, backend, True), plain)
    assert same(turned(weight, backend), transposed)
    clear_fp8_weight_cache()
    assert same(turned(weight, backend), transposed)
    assert same(quantized(weight, backend, True), plain)


def test_a_second_call_takes_the_copies_of_the_first(made: Made) -> None:
    weight = _parameter()
    plain, transposed = quantized(weight), turned(weight)
    assert quantized(weight).data.data_ptr() == plain.data.data_ptr()
    assert turned(weight).scale.data_ptr() == transposed.scale.data_ptr()
    assert made == [BOTH]
    assert not plain.data.requires_grad
    assert not transposed.scale.requires_grad


def test_copies_are_of_one_backend(made: Made) -> None:
    weight = _parameter()
    for backend in ("reference", BACKEND, "reference"):
        quantized(weight, backend, False)
    assert made == ([PLAIN] if BACKEND == "reference" else [PLAIN] * 3)


class _ThroughData(torch.optim.Optimizer):
    """Writes as Megatron and DeepSpeed do: no version counts it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "custom": lambda p: _ThroughData(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_quantisation_per_optimizer_step(optimizer: str, made: Made) -> None:
    layer = Layer()
    steps = OPTIMIZERS[optimizer](layer.parameters())
    for step in range(1, 3):
        for _ in range(3):
            x = _rows(layer)
            layer(x).square().sum().backward()
            assert x.grad is not None
        assert made == [BOTH] * step
        before = layer.weight.detach().clone()
        steps.step()
        assert not torch.equal(layer.weight, before)
        assert _is_current(layer.weight)


def test_forwards_without_gradients_come_first(made: Made) -> None:
    layer = Layer()
    with torch.no_grad():
        layer(_rows(layer))
        layer(_rows(layer))
    assert made == [PLAIN]
    layer(_rows(layer)).sum().backward()
    layer(_rows(layer)).sum().backward()
    assert made == [PLAIN, TURNED]
    assert _is_current(layer.weight)


def _in_place(layer: Layer) -> None:
    with torch.no_grad():
        layer.weight.mul_(3)


def _new_memory(layer: Layer) -> None:
    layer.weight.data = layer.weight.data * 3


def _state_dict(layer: Layer) -> None:
    layer.load_state_dict({"weight": layer.weight.detach() * 3})


def _assigned(layer: Layer) -> None:
    layer.load_state_dict({"weight": layer.weight.detach() * 3}, assign=True)


def _moved(layer: Layer) -> None:
    layer.to(torch.bfloat16)


def _written_behind_its_back(layer: Layer) -> None:
    layer.weight.data.mul_(3)
    clear_fp8_weight_cache()


CHANGES = [_in_place, _new_memory, _state_dict, _assigned, _moved, _written_behind_its_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("view", [lambda p: p, lambda p: p.transpose(1, 2)], ids=["p", "p.mT"])
def test_a_changed_weight_is_quantised_anew(change: Callable[[Layer], None], view: Any, made: Made) -> None:
    layer = Layer()
    quantized(view(layer.weight))
    change(layer)
    assert made == [BOTH]
    assert _is_current(view(layer.weight))
    assert made == [BOTH, BOTH]


def test_other_memory_at_the_same_address() -> None:
    numbers = np.ones((E, N, K), np.float32)
    weight = nn.Parameter(torch.from_numpy(numbers))
    quantized(weight)
    version, address = weight._version, weight.data_ptr()
    weight.data = torch.empty(0)
    numbers *= 3
    weight.data = torch.from_numpy(numbers)
    assert (weight._version, weight.data_ptr()) == (version, address)
    assert _is_current(weight)


def test_views_hit_and_do_not_meet(made: Made) -> None:
    weight = _parameter(3, 130, 130)
    for _ in range(3):
        for view in (weight, weight.transpose(1, 2), weight[1:], weight[:2]):
            assert _is_current(view)
    with torch.no_grad():
        quantized(weight.transpose(1, 2), both=False)
    assert made == [BOTH] * 4
    torch.optim.SGD([weight], 0.1).step()
    assert _is_current(weight[1:])
    assert made == [BOTH] * 5


@pytest.mark.parametrize("take", [lambda p: p.data, lambda p: p.detach(), lambda p: p.data[1:]])
def test_of_what_may_change_unseen_nothing_is_kept(take: Callable[[Tensor], Tensor], made: Made) -> None:
    weight = _parameter()
    held = take(weight)
    quantized(held)
    weight.data.mul_(3)
    assert same(quantized(held), fp8_quantize(held, (128, 128)))
    turned(held)
    assert made == [PLAIN, PLAIN, TURNED]
    assert not fp8_weights._kept


def test_a_copied_module_shares_nothing(made: Made) -> None:
    layer = Layer()
    layer(_rows(layer)).sum().backward()
    other = copy.deepcopy(layer)
    _in_place(other)
    assert _is_current(other.weight)
    assert _is_current(layer.weight)
    assert made == [BOTH, BOTH]


def test_saved_parameters_bring_no_copies() -> None:
    layer = Layer()

    def saved() -> bytes:
        buffer = io.BytesIO()
        torch.save([layer, layer.state_dict()], buffer)
        return buffer.getvalue()

    before = saved()
    layer(_rows(layer)).sum()
    assert len(fp8_weights._kept) == 1
    assert saved() == before


def test_copies_go_with_their_weight() -> None:
    layer = Layer()
    layer(_rows(layer)).sum().backward()
    view = layer.weight[1:]
    codes = [weakref.ref(quantized(tensor).data) for tensor in (layer.weight, view)]
    assert [code() is None for code in codes] == [False, False]
    del layer, view
    gc.collect()
    assert [code() for code in codes] == [None, None]
    assert not fp8_weights._kept


def test_copies_go_with_the_step() -> None:
    weight = _parameter()
    code = weakref.ref(turned(weight).data)
    torch.optim.SGD([weight], 0.1).step()
    assert code() is None


@pytest.mark.parametrize(
    "free", [lambda p: p.untyped_storage().resize_(0), lambda p: setattr(p, "data", torch.empty(0))]
)
def test_copies_of_freed_weights_go_with_the_next_quantisation(free: Callable[[Tensor], Any], made: Made) -> None:
    """Of layers that are gathered one at a time, one layer's copies are there."""
    layers = [_parameter() for _ in range(4)]
    for layer in layers:
        quantized(layer)
        quantized(layer[1:])
        free(layer)
    assert len(fp8_weights._kept) == 1
    layers[0].data = torch.randn(E, N, K)
    assert _is_current(layers[0])
    assert len(fp8_weights._kept) == 1
    assert len(made) == 9
