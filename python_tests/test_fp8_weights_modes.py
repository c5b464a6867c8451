"""FP8 copies of weights where PyTorch does not simply compute: compiled, traced, checkpointed, in inference mode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from grpo_kernels import fp8_quantize
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
    wide,
)

__all__ = ["made", "nothing_is_kept"]


E = 2


def _gradients(layer: Layer, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x) if forward is None else forward(x)
    grads = torch.autograd.grad(out.square().sum(), (x, layer.weight))
    return [out.detach(), *grads]


def _equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_compiled_graph_quantises_whenever_it_runs() -> None:
    layer, x = Layer(), torch.randn(E, 5, 140)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual = _gradients(layer, x, compiled)
        assert not fp8_weights._kept
        assert _equal(actual, _gradients(layer, x))
        clear_fp8_weight_cache()
        layer.weight.data.mul_(3)  # no version counts it


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_step_of_an_optimizer_drops_copies(kind: Any) -> None:
    """The step compiles once, and again with the first weight that is quantised, not with every step."""
    weight = nn.Parameter(torch.randn(E, 16, 16))
    quantized(weight)
    optimizer = kind([weight], 0.1)
    weight.grad = torch.ones_like(weight)
    step = torch.compile(optimizer.step, backend="eager")
    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            quantized(weight)
            assert len(fp8_weights._kept) == 1
            step()
            assert not fp8_weights._kept


def test_a_step_that_a_graph_will_run_again_ends_all_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_weights, "_unseen_steps", False)  # to be restored
    weight = nn.Parameter(torch.randn(E, 16, 16))
    optimizer = torch.optim.SGD([weight], 0.1)
    quantized(weight)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    quantized(weight)
    assert not fp8_weights._kept


def test_inference_mode_makes_copies_for_training_too(made: Made) -> None:
    layer, x = Layer(), torch.randn(E, 5, 140)
    with torch.inference_mode():
        layer(x)
        layer(x)
        copies = quantized(layer.weight)
        assert not copies.data.is_inference()
        quantized(layer.weight.transpose(1, 2), both=False)
        quantized(layer.weight.transpose(1, 2), both=False)
    assert made == [PLAIN, PLAIN]
    _gradients(layer, x)
    assert made == [PLAIN, PLAIN, TURNED]
    with torch.inference_mode():
        own = nn.Parameter(torch.randn(E, 16, 16))
        own.add_(1)
        assert same(quantized(own), fp8_quantize(own, (128, 128)))
    assert len(fp8_weights._kept) == 1


def test_saved_weights_that_come_back_as_other_tensors(made: Made) -> None:
    layer, x = Layer(), torch.randn(E, 5, 140)
    expected = _gradients(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert _equal(_gradients(layer, x), expected)
    assert made == [BOTH, TURNED]
    with torch.autograd.graph.save_on_cpu():
        assert _equal(_gradients(layer, x), expected)
    assert made == [BOTH, TURNED]


def _selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.bmm.default])


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": _selective}],
    ids=["reentrant", "hooks", "selective"],
)
def test_checkpointing(options: dict[str, Any], made: Made) -> None:
    layer, x = Layer(), torch.randn(E, 5, 140)
    expected = _gradients(layer, x)
    clear_fp8_weight_cache()
    made.clear()
    for _ in range(2):
        given = x.clone().requires_grad_()
        layer.weight.grad = None
        out = checkpoint(layer, given, **options)
        out.square().sum().backward()
        assert _equal([out.detach(), given.grad, layer.weight.grad], expected)  # type: ignore[list-item]
    assert made == ([PLAIN, TURNED] if options["use_reentrant"] else [BOTH])


def test_traced_and_mapped_weights_are_not_kept() -> None:
    weight, ones = nn.Parameter(torch.randn(E, 16, 16)), torch.ones(3)

    def scaled(x: Tensor) -> Tensor:
        return x * wide(quantized(weight)).abs().sum()

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(quantized(weight).data) is not Tensor
    graph = make_fx(scaled)(ones)
    expected = scaled(ones)
    clear_fp8_weight_cache()
    assert torch.equal(torch.func.vmap(scaled)(ones), expected)
    assert torch.equal(torch.func.grad(lambda x: scaled(x).sum())(ones), expected.detach())
    quantized(weight.to("meta"))
    assert not fp8_weights._kept
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(graph(ones), expected * 2)


class _Subclass(torch.Tensor):
    pass


def test_subclasses_are_not_kept() -> None:
    plain = nn.Parameter(torch.randn(E, 16, 16))
    for weight in (plain.as_subclass(_Subclass), plain.detach().as_subclass(_Subclass).requires_grad_()):
        assert same(quantized(weight), fp8_quantize(plain, (128, 128)))
    assert not fp8_weights._kept


def test_threads_meet() -> None:
    """Lookups, steps, frees and deaths at once: every answer is the weight's."""
    weights = [nn.Parameter(torch.randn(1, 16, 16)) for _ in range(6)]
    expected = [fp8_quantize(weight, (128, 128), transpose="both") for weight in weights]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            for i in range(150):
                j = (i * seed) % len(weights)
                plain, transposed = quantized(weights[j], BACKEND, both=i % 2 == 0), turned(weights[j])
                if not (same(plain, expected[j][0]) and same(transposed, expected[j][1])):
                    wrong.append(j)
                quantized(nn.Parameter(torch.ones(1, 16, 16)))
                if i % 10 == 0:
                    optimizer.step()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_streams_and_graphs(made: Made) -> None:
    """Another stream may run before the copies are written; a graph would run with copies of another day."""
    weight = nn.Parameter(torch.randn(E, 150, 140, device="cuda"))
    expected = fp8_quantize(weight, (128, 128))
    for _ in range(2):
        assert same(quantized(weight, "triton", False), expected)
    assert made == [PLAIN]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert same(quantized(weight, "triton", False), expected)
    torch.cuda.current_stream().wait_stream(side)
    assert made == [PLAIN, PLAIN]
    kept = quantized(weight, "triton", False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantized(weight, "triton", False)
    assert made == [PLAIN] * 4
    assert quantized(weight, "triton", False) is kept
    with torch.no_grad():
        weight.mul_(3)
    graph.replay()
    assert same(captured, fp8_quantize(weight, (128, 128)))
