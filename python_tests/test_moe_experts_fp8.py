"""moe_experts(recipe="fp8_block128") against its definition, slot by slot, and what must not change its bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import MoE, fp8_dequantize, fp8_quantize, moe_experts
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_fp8_problems import Fp8Problem
from python_tests.moe_problems import Problem

PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
EVERYTHING = ("x", *PARAMETERS, "weights")
GPT_OSS: dict[str, Any] = {"activation": "clamped_swiglu", "interleaved": True, "swiglu_limit": 1.5}
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
WGRADS = pytest.mark.parametrize("fp8_wgrad", [False, True])

pytestmark = pytest.mark.usefixtures("native_cpu")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["swiglu", "gpt_oss"])
@WGRADS
@BACKENDS
def test_against_the_definition(backend: str, fp8_wgrad: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sizes that are no multiples of a tile; two tiles of K; some slots and one expert are left out."""
    problem = Fp8Problem.make(dtype, tokens=40, hidden=150, width=70, bias=True, **options)
    with grpo_kernels.backend(backend):
        problem.assert_close_to_definition(problem.run(fp8_wgrad=fp8_wgrad), fp8_wgrad)


@pytest.mark.parametrize(("hidden", "width", "tokens"), [(1, 1, 3), (128, 128, 16), (16, 300, 9), (257, 33, 1)])
@WGRADS
def test_other_sizes(fp8_wgrad: bool, hidden: int, width: int, tokens: int) -> None:
    problem = Fp8Problem.make(tokens=tokens, hidden=hidden, width=width)
    problem.assert_close_to_definition(problem.run(fp8_wgrad=fp8_wgrad), fp8_wgrad)


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**50])
@WGRADS
def test_gradients_of_any_size(fp8_wgrad: bool, scale: float) -> None:
    """A power of two in the upstream gradient is the same in every gradient: their scales are powers of two."""
    problem = Fp8Problem.make(hidden=40, bias=True)
    plain = problem.run(fp8_wgrad=fp8_wgrad)
    larger = Fp8Problem(problem.tensors, problem.ids, problem.upstream * scale, problem.options)
    found = larger.run(fp8_wgrad=fp8_wgrad)
    assert_equal({name: value / scale for name, value in found.items() if name != "y"}, plain)


@WGRADS
def test_it_is_close_to_wide_products(fp8_wgrad: bool) -> None:
    """e4m3 rounds by 1/16 at most, by less than 1/32 on average: three roundings in a row."""
    tensors = Problem.make(tokens=128, hidden=160, width=96)
    problem = Fp8Problem(*tensors)
    wide, found = tensors.run(), problem.run(fp8_wgrad=fp8_wgrad)
    for name, value in found.items():
        error = (value - wide[name]).norm() / wide[name].norm()
        assert 0.01 < error < 3 / 32, (name, error)


def test_large_numbers_of_float16() -> None:
    """Beside 65504 e4m3 has only 65536: infinite in float16, and no reason for NaN in the gradients."""
    problem = Fp8Problem.make(torch.float16, hidden=32, width=16)
    problem.tensors["x"][0, 0] = 65504.0
    problem.tensors["gate_up"][:] *= 1e-3
    problem.upstream[:] *= 1e-3
    for value in problem.run().values():
        assert value.isfinite().all()


# --- what changes no bits --------------------------------------------------------------------------------------------


@WGRADS
@BACKENDS
def test_what_is_kept_changes_no_bits(backend: str, fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(torch.bfloat16, hidden=150, width=70, bias=True)
    with grpo_kernels.backend(backend):
        expected = problem.run(fp8_wgrad=fp8_wgrad)
        assert_equal(problem.run(fp8_wgrad=fp8_wgrad, save="input"), expected)
        assert_equal(problem.run(fp8_wgrad=fp8_wgrad), expected)


@WGRADS
def test_each_gradient_alone_has_the_bits_of_all(fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(bias=True, **GPT_OSS)
    whole = problem.run(fp8_wgrad=fp8_wgrad)
    for trained in itertools.chain.from_iterable(itertools.combinations(EVERYTHING, n) for n in (1, 2)):
        found = problem.run(trained, fp8_wgrad=fp8_wgrad)
        assert found.keys() == {"y", *trained}
        assert_equal(found, whole)
    with torch.no_grad():
        assert torch.equal(problem.call(problem.tensors, recipe="fp8_block128", fp8_wgrad=fp8_wgrad), whole["y"])


@pytest.mark.parametrize(("alignment", "fp8_wgrad"), [(16, False), (256, True)])
def test_alignment(alignment: int, fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(bias=True)
    problem.assert_close_to_definition(problem.run(alignment=alignment, fp8_wgrad=fp8_wgrad), fp8_wgrad)


@WGRADS
def test_parameters_that_lie_the_other_way(fp8_wgrad: bool) -> None:
    """Views of [E, H, 2I] and [E, I, H]: the same bits, and gradients that lie as they do."""
    problem = Fp8Problem.make(hidden=40)
    expected = problem.run(fp8_wgrad=fp8_wgrad)
    leaves = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    for name in ("gate_up", "down"):
        leaves[name] = leaves[name].mT.contiguous().requires_grad_()
    turned = leaves | {name: leaves[name].mT for name in ("gate_up", "down")}
    problem.call(turned, recipe="fp8_block128", fp8_wgrad=fp8_wgrad).backward(problem.upstream)
    for name in ("gate_up", "down"):
        torch.testing.assert_close(leaves[name].grad.mT, expected[name], rtol=1e-6, atol=1e-6)
        assert leaves[name].grad.is_contiguous()


@WGRADS
def test_gradient_accumulators(fp8_wgrad: bool) -> None:
    """Two backwards add up in float32, and the weights get no gradient."""
    problem = Fp8Problem.make(torch.bfloat16)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    sums = tuple(
        torch.ones_like(leaves[name], dtype=torch.float32, requires_grad=False) for name in ("gate_up", "down")
    )
    for _ in range(2):
        more = {"recipe": "fp8_block128", "fp8_wgrad": fp8_wgrad, "weight_grad_accumulators": sums}
        problem.call(leaves, **more).backward(problem.upstream)
    assert leaves["gate_up"].grad is leaves["down"].grad is None
    exact, plain = (problem.define(dtype, torch.bfloat16, fp8_wgrad) for dtype in (torch.float64, torch.float32))
    for total, name in zip(sums, ("gate_up", "down"), strict=True):
        assert_as_accurate(total, 1 + 2 * exact[name], 1 + 2 * plain[name], name=name)


def test_a_second_backward_gives_the_same() -> None:
    problem = Fp8Problem.make(torch.bfloat16, bias=True)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    result = problem.call(leaves, recipe="fp8_block128")
    first, second = (
        torch.autograd.grad(result, list(leaves.values()), problem.upstream, retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_master_weights_are_read_alone_and_need_not_be_narrow() -> None:
    """float32 parameters under autocast are quantised as they are, and their gradients are float32."""
    problem = Fp8Problem.make(hidden=150, width=70)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
        result = problem.call(leaves, recipe="fp8_block128")
        result.backward(problem.upstream.bfloat16())
    assert result.dtype == torch.bfloat16
    narrow = Fp8Problem(problem.tensors, problem.ids, problem.upstream.bfloat16().float(), problem.options)
    exact, plain = (narrow.define(dtype, torch.bfloat16) for dtype in (torch.float64, torch.float32))
    found = {"y": result.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    for name, value in found.items():
        assert name == "y" or value.dtype == torch.float32
        assert_as_accurate(value.bfloat16(), exact[name], plain[name], name=name)
        assert name == "y" or torch.equal(leaves[name].detach(), before[name])


# --- edges -----------------------------------------------------------------------------------------------------------


@WGRADS
@BACKENDS
def test_nothing_routed(backend: str, fp8_wgrad: bool) -> None:
    for tokens in (0, 5):
        ids = torch.full((tokens, 3), -1)
        problem = Fp8Problem.make(tokens=tokens, ids=ids, bias=True)
        with grpo_kernels.backend(backend):
            for name, value in problem.run(fp8_wgrad=fp8_wgrad).items():
                assert value.count_nonzero() == 0, name
                assert value.shape == (problem.tensors["x"].shape if name == "y" else problem.tensors[name].shape)


@WGRADS
def test_experts_without_tokens_have_gradients_of_zero(fp8_wgrad: bool) -> None:
    problem = Fp8Problem.make(experts=9, ids=torch.tensor([[3, 7, 3]] * 4 + [[7, -1, 7]]), tokens=5, bias=True)
    found = problem.run(fp8_wgrad=fp8_wgrad)
    for name in PARAMETERS:
        used = found[name].flatten(1).count_nonzero(1) > 0
        assert used.nonzero().flatten().tolist() == [3, 7], name


@WGRADS
@BACKENDS
def test_nan_stays_where_it_is(backend: str, fp8_wgrad: bool) -> None:
    """Of a token without experts it reaches nothing; of another, its own row and its experts' gradients."""
    ids = torch.tensor([[0, 1], [-1, -1], [2, 3], [0, 1]])
    problem = Fp8Problem.make(tokens=4, ids=ids, experts=5)
    with grpo_kernels.backend(backend):
        expected = problem.run(fp8_wgrad=fp8_wgrad)
        problem.tensors["x"][1] = float("nan")
        unrouted = problem.run(fp8_wgrad=fp8_wgrad)
        assert_equal({name: unrouted[name] for name in ("y", "gate_up", "down", "weights")}, {**unrouted, **expected})
        assert unrouted["x"][1].count_nonzero() == 0
        problem.tensors["x"][2, 5] = float("nan")
        found = problem.run(fp8_wgrad=fp8_wgrad)
    assert found["y"].isnan().any(1).tolist() == [False, False, True, False]
    for name in ("gate_up", "down"):
        assert found[name].flatten(1).isnan().any(1).tolist() == [False, False, True, True, False], name


def test_a_part_of_the_experts() -> None:
    problem = Fp8Problem.make(hidden=40, bias=True)
    whole = problem.run()
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        tensors = {name: value[part] if name in PARAMETERS else value for name, value in problem.tensors.items()}
        piece = Fp8Problem(tensors, problem.ids, problem.upstream, problem.options)
        parts.append(piece.run(expert_range=(part.start, part.stop), num_experts=6))
    torch.testing.assert_close(parts[0]["y"] + parts[1]["y"], whole["y"])
    torch.testing.assert_close(parts[0]["x"] + parts[1]["x"], whole["x"])
    for name in PARAMETERS:
        assert torch.equal(torch.cat([parts[0][name], parts[1][name]]), whole[name])


def test_the_layer_takes_the_recipe() -> None:
    torch.manual_seed(0)
    layer = MoE(32, 24, 5, 2, recipe="fp8_block128", fp8_wgrad=True, shared_intermediate_size=8)
    x = torch.randn(3, 4, 32)
    output = layer(x)
    routes = (output.router.topk_weights, output.router.topk_ids)
    tokens = x.reshape(-1, 32)
    experts = layer.experts
    expected = moe_experts(tokens, experts.gate_up_proj, experts.down_proj, routes, recipe="fp8_block128")
    assert torch.equal(output.hidden, (expected + layer.shared_experts(tokens)).view(3, 4, 32))
    assert "recipe='fp8_block128', fp8_wgrad=True" in repr(layer)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["preact", "input"])
def test_tokens_and_pre_activations_are_kept_in_eight_bits(save: str) -> None:
    """[T, H] and [R, 2I] codes, and a scale for 128 of them; nothing else of their size."""
    problem = Fp8Problem.make(torch.bfloat16, tokens=32, hidden=256, width=128)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    own = {leaves[name].data_ptr() for name in ("gate_up", "down")}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.call(leaves, recipe="fp8_block128", save=save)
    large = [t for t in kept if t.data_ptr() not in own and t.dtype not in (torch.int32, torch.int64) and t.ndim == 2]
    shapes = [(tuple(t.shape), t.dtype) for t in large if t.data_ptr() != leaves["weights"].data_ptr()]
    tokens = [((32, 256), torch.float8_e4m3fn), ((32, 2), torch.float32)]
    preact = [((96, 256), torch.float8_e4m3fn), ((96, 2), torch.float32)]
    assert shapes == tokens + (preact if save == "preact" else [])
    x = fp8_dequantize(fp8_quantize(problem.tensors["x"]), torch.float32)
    found = next(t for t in large if t.shape == (32, 256))
    assert torch.equal(fp8_dequantize(grpo_kernels.ScaledTensor(found, large[1]), torch.float32), x)
