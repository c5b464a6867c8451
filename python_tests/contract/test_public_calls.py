"""What every public function must keep: clear errors, backends that agree, compilation, autocast, checkpointing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import grpo_kernels
from grpo_kernels import _dispatch, _extension
from python_tests import samples
from python_tests.samples import BadCall, Call, assert_gradients_agree, tensors

CALLS = [
    pytest.param(call, id=f"{op}-{call.name}") for op, module in samples.modules().items() for call in module.CALLS
]
BAD_CALLS = [pytest.param(bad, id=bad.name) for module in samples.modules().values() for bad in module.BAD_CALLS]
BACKENDS = ["native", "reference"]
DIFFERENTIABLE = [param for param in CALLS if param.values[0].differentiable]


def _need(backend: str) -> None:
    if backend == "native" and _extension.cpu_problem():
        pytest.skip(f"native CPU kernels: {_extension.cpu_problem()}")


def _run(call: Call, function: Any, device: str = "cpu") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of a call, and the gradients of a fixed weighting of its differentiable outputs."""
    inputs = list(call.make(device))
    leaves = []
    for index in call.differentiable:
        inputs[index] = inputs[index].detach().clone().requires_grad_()
        leaves.append(inputs[index])
    outputs = tensors(function(*inputs))
    loss = sum(
        (output * torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output)).sum()
        for output in outputs
        if output.requires_grad
    )
    gradients = list(torch.autograd.grad(loss, leaves)) if isinstance(loss, torch.Tensor) and leaves else []
    return [output.detach() for output in outputs], gradients


def _assert_same(
    left: tuple[list[torch.Tensor], ...], right: tuple[list[torch.Tensor], ...], **tolerance: float
) -> None:
    for a_list, b_list in zip(left, right, strict=True):
        for a, b in zip(a_list, b_list, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_kernels_drop_no_tangents(call: Call) -> None:
    """Forward-mode differentiation would go through a kernel as through a constant."""
    _need("native")
    inputs = list(call.make("cpu"))
    first = call.differentiable[0]
    with forward_ad.dual_level():
        inputs[first] = forward_ad.make_dual(inputs[first].detach(), torch.ones_like(inputs[first]))
        with pytest.raises(RuntimeError, match="forward-mode"):
            call.function(*inputs)


def test_every_public_function_has_samples() -> None:
    functions = "\n".join(open(module.__file__).read() for module in samples.modules().values())  # noqa: SIM115
    assert [op for op in _dispatch.public_ops() if f"grpo_kernels.{op}(" not in functions] == []


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_input_raises_one_clear_error(bad: BadCall) -> None:
    with pytest.raises(bad.error) as caught:
        bad.call()
    assert type(caught.value) is bad.error
    for words in bad.says:
        assert words in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_backends_agree(call: Call) -> None:
    _need("native")
    with grpo_kernels.backend("native"):
        native = _run(call, call.function)
    with grpo_kernels.backend("reference"):
        reference = _run(call, call.function)
    for a_list, b_list in zip(native, reference, strict=True):
        assert [(a.shape, a.dtype) for a in a_list] == [(b.shape, b.dtype) for b in b_list]
    _assert_same(native[:1], reference[:1])
    assert_gradients_agree(call, native[1], reference[1])


@pytest.mark.parametrize("call", CALLS)
def test_meta_tensors_give_what_others_do_but_for_the_data(call: Call) -> None:
    found, expected = _run(call, call.function, "meta"), _run(call, call.function)
    for meta_list, list_ in zip(found, expected, strict=True):
        assert [(a.shape, a.dtype, a.device.type) for a in meta_list] == [(b.shape, b.dtype, "meta") for b in list_]


# How graphs are made: symbolic sizes are a matter of the graph's capture, which the reference, of a hundred operators
# each of which AOTAutograd would write down with symbols, shares with "eager". What AOTAutograd makes of it needs none.
COMPILATIONS = [("native", "aot_eager", True), ("reference", "eager", True), ("reference", "aot_eager", False)]


@pytest.mark.parametrize(("backend", "compiler", "dynamic"), COMPILATIONS, ids=["native", "reference", "reference-aot"])
@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_a_graph_break(call: Call, backend: str, compiler: str, dynamic: bool) -> None:
    _need(backend)
    torch._dynamo.reset()
    with grpo_kernels.backend(backend):
        compiled = torch.compile(call.function, fullgraph=True, backend=compiler, dynamic=dynamic)
        _assert_same(_run(call, compiled), _run(call, call.function))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_autocast_casts_the_operands_of_products_and_nothing_else(call: Call, backend: str) -> None:
    """Of an op without products it changes nothing. Of one with them the gradients are those of the casts, each rounded
    in its way, and since those are wider than the operands, sums may be formed in another order.
    """
    _need(backend)

    def cast(*inputs: Any) -> Any:
        return call.function(*(v.bfloat16() if i in call.autocast else v for i, v in enumerate(inputs)))

    with grpo_kernels.backend(backend):
        plain = _run(call, cast)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = _run(call, call.function)
    if call.autocast:
        _assert_same(autocast[:1], plain[:1])  # to rounding in float32, a thousandth of bfloat16's
        assert_gradients_agree(dataclasses.replace(call, rounds=torch.bfloat16), autocast[1], plain[1])
    else:
        _assert_same(autocast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_activation_checkpoint_gives_the_same_gradients(call: Call, backend: str) -> None:
    _need(backend)
    with grpo_kernels.backend(backend):
        plain = _run(call, call.function)
        recomputed = _run(call, lambda *inputs: checkpoint(call.function, *inputs, use_reentrant=False))
    _assert_same(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_backward_keeps_the_backend_of_the_forward(call: Call) -> None:
    """The `with` block has ended when the backward runs; it must not fall to another backend, nor look one up."""
    _need("native")
    inputs = list(call.make("cpu"))
    for index in call.differentiable:
        inputs[index] = inputs[index].detach().clone().requires_grad_()
    with grpo_kernels.backend("native"):
        outputs = [output for output in tensors(call.function(*inputs)) if output.requires_grad]
        expected = _run(call, call.function)[1]
    with grpo_kernels.backend("reference"):
        loss = sum((o * torch.linspace(0.5, 1.5, o.numel()).view(o.shape).to(o)).sum() for o in outputs)
        gradients = torch.autograd.grad(loss, [inputs[index] for index in call.differentiable])
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=0, equal_nan=True)


def test_backend_names_are_checked() -> None:
    with pytest.raises(ValueError, match="backend: name must be one of 'native', 'triton', 'reference', got 'cuda'"):
        with grpo_kernels.backend("cuda"):
            pass


def test_an_explicit_backend_that_cannot_serve_says_why() -> None:
    with grpo_kernels.backend("triton"), pytest.raises(grpo_kernels.BackendUnavailable, match="has no triton kernel"):
        grpo_kernels.group_advantages(torch.ones(4), group_size=2)
