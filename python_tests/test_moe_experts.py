"""moe_experts: values and gradients against float64, models' experts, routes at the edge, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels
from grpo_kernels import moe_experts
from grpo_kernels.testing import accuracy_budget, accuracy_error, assert_as_accurate, poisoned_allocations
from python_tests.moe_problems import Problem, assert_all_accurate

pytestmark = pytest.mark.usefixtures("native_cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLAMPED = {"activation": "clamped_swiglu", "swiglu_limit": 1.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "interleaved": {"interleaved": True, "bias": True},
    "clamped": {**CLAMPED, "swiglu_alpha": 0.9},
    "gpt_oss": {**CLAMPED, "interleaved": True, "bias": True},
}
NAN = float("nan")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("save", ["preact", "input"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, options: str, save: str) -> None:
    """So many tokens that the largest error of PyTorch, which is the budget, does not hang on a lucky few."""
    problem = Problem.make(dtype, tokens=120, **OPTIONS[options])
    with poisoned_allocations():
        problem.assert_accurate(problem.run(save=save, alignment=1 if save == "preact" else 8))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition_against_float64(dtype: torch.dtype, options: str) -> None:
    problem = Problem.make(dtype, **OPTIONS[options])
    with grpo_kernels.backend("reference"):
        problem.assert_accurate(problem.run())


def test_small_activations_keep_their_digits() -> None:
    """Tokens of 1e-5 times the usual size: an absolute tolerance would pass any kernel."""
    problem = Problem.make(scale=1e-5)
    found = problem.run()
    assert found["y"].abs().max() < 1e-8
    problem.assert_accurate(found)


def test_wide_experts_against_float64() -> None:
    """Rows longer than a block of the activation's kernel, more tokens than a task of it."""
    problem = Problem.make(tokens=60, hidden=12, width=600, experts=4, top_k=2)
    problem.assert_accurate(problem.run())


def test_the_budget_notices_a_missing_term() -> None:
    """A router weight's gradient without the expert's bias, and an activation without its last column."""
    problem = Problem.make(bias=True)
    expected, plain, found = problem.define(torch.float64), problem.define(torch.float32), problem.run()
    without = Problem({**problem.tensors, "down_bias": torch.zeros(6, 24)}, *problem[1:]).run()
    narrow = {**problem.tensors, "down": problem.tensors["down"].clone()}
    narrow["down"][..., -1] = 0
    for wrong in (without["weights"], Problem(narrow, *problem[1:]).run()["weights"]):
        budget = accuracy_budget(torch.float32, accuracy_error(plain["weights"], expected["weights"]))
        assert accuracy_error(found["weights"], expected["weights"]) <= budget
        assert accuracy_error(wrong, expected["weights"]) > 100 * budget


@given(data=st.data())
def test_any_routes(data: st.DataObject) -> None:
    """Repeated experts, missing slots, empty experts, any alignment and any part of the experts."""
    tokens, top_k, experts = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    ids = data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    routes = torch.tensor(ids, dtype=torch.int64).view(tokens, top_k)
    problem = Problem.make(
        torch.float64, tokens=tokens, hidden=3, width=2, experts=experts, top_k=top_k, bias=True, ids=routes
    )
    problem.assert_accurate(problem.run(alignment=data.draw(st.integers(1, 4)), save="input"))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _gradients(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def _gpt_oss(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, routing: Tensor) -> Tensor:
    """The experts of the published model: every expert for every token, weighted by a dense [T, E], mostly 0."""
    hidden = torch.bmm(x.repeat(len(up), 1, 1), up) + up_bias[:, None]
    gate, linear = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(min=-7.0, max=7.0)
    y = torch.bmm((linear + 1) * (gate * torch.sigmoid(gate * 1.702)), down) + down_bias[:, None]
    return (y * routing.t()[..., None]).sum(0)


def test_gpt_oss_experts() -> None:
    """Parameters [E, in, out] as in the checkpoints: passed turned, their gradients come back as they lie."""
    tokens, hidden, width, experts = 20, 16, 12, 5
    scales = ((experts, hidden, 2 * width), (experts, 2 * width), (experts, width, hidden), (experts, hidden))
    given = [torch.randn(tokens, hidden), *(torch.randn(*shape) * 3 for shape in scales)]
    chosen = torch.randn(tokens, experts).topk(2)
    ids = chosen.indices

    def published(dtype: torch.dtype) -> list[Tensor]:
        leaves = _leaves(*(tensor.to(dtype) for tensor in (*given, chosen.values)))
        weights = leaves[5].softmax(-1)
        routing = torch.zeros(tokens, experts, dtype=dtype).scatter(1, ids, weights)
        return _gradients(_gpt_oss(*leaves[:5], routing), leaves)

    leaves = _leaves(*given, chosen.values)
    x, up, up_bias, down, down_bias, scores = leaves
    result = moe_experts(
        x, up.transpose(1, 2), down.transpose(1, 2), (scores.softmax(-1), ids), gate_up_bias=up_bias,
        down_bias=down_bias, activation="clamped_swiglu", interleaved=True,
    )  # fmt: skip
    found = _gradients(result, leaves)
    assert (given[0] @ given[1][0] + given[2][0]).abs().max() > 7  # limits are met
    assert [grad.stride() for grad in found[2:6]] == [tensor.stride() for tensor in leaves[1:5]]
    for value, expected, plain in zip(found, published(torch.float64), published(torch.float32), strict=True):
        assert_as_accurate(value, expected, plain)


class _Expert(torch.nn.Module):
    """An expert of Qwen3-MoE, Mixtral and DeepSeek-V3: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden, width, bias=False)
        self.up_proj = torch.nn.Linear(hidden, width, bias=False)
        self.down_proj = torch.nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_qwen3_and_deepseek_experts() -> None:
    """A module for each expert, each with the tokens that chose it, results added where the tokens are."""
    tokens, hidden, width, count = 24, 16, 12, 6
    chosen = torch.rand(tokens, count).topk(3)
    x, ids = torch.randn(tokens, hidden), chosen.indices
    modules = torch.nn.ModuleList(_Expert(hidden, width) for _ in range(count))

    def published(dtype: torch.dtype) -> list[Tensor]:
        experts = modules.to(dtype)
        leaf, weights = _leaves(x.to(dtype), chosen.values.to(dtype))
        result = torch.zeros_like(leaf)
        for index, expert in enumerate(experts):
            token, slot = torch.where(ids == index)
            result = result.index_add(0, token, expert(leaf[token]) * weights[token, slot, None])
        y, *grads = _gradients(result, [leaf, weights, *experts.parameters()])
        ups = [torch.cat([gate, up]) for gate, up in zip(grads[2::3], grads[3::3], strict=True)]
        return [y, *grads[:2], torch.stack(ups), torch.stack(grads[4::3])]

    expected = published(torch.float64)
    plain = published(torch.float32)
    up = torch.stack([torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in modules])
    down = torch.stack([expert.down_proj.weight for expert in modules])
    leaf, weights, up, down = _leaves(x, chosen.values, up, down)
    found = _gradients(moe_experts(leaf, up, down, (weights, ids)), [leaf, weights, up, down])
    for value, exact, eager in zip(found, expected, plain, strict=True):
        assert_as_accurate(value, exact, eager)


# --- routes at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("save", ["preact", "input"])
def test_masked_tokens_may_hold_nan(backend: str, save: str) -> None:
    problem = Problem.make(bias=True)
    problem.ids[5:9] = -1
    with grpo_kernels.backend(backend):
        clean = problem.run(save=save)
        for name in ("x", "weights"):
            problem.tensors[name][5:9] = NAN
        problem.upstream[5:9] = NAN
        found = problem.run(save=save)
    assert_equal(found, clean)
    for name in ("y", "x", "weights"):
        assert found[name][5:9].count_nonzero() == 0, name


def test_nan_stays_in_its_row() -> None:
    problem = Problem.make()
    clean = problem.run()
    problem.tensors["x"][7] = NAN
    found = problem.run()
    others = torch.arange(30) != 7
    for name in ("y", "x", "weights"):
        assert torch.equal(found[name][others], clean[name][others]), name
    assert found["y"][7].isnan().all()
    assert found["x"][7].isnan().all()


def _routes(kind: str, tokens: int, experts: int) -> Tensor:
    if kind == "nobody":
        return torch.full((tokens, 2), -1)
    if kind == "one":
        return torch.full((tokens, 1), experts - 1)
    return torch.stack([torch.arange(tokens) % experts, (torch.arange(tokens) * 7 + 3) % experts], 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("kind", "tokens", "experts"),
    [("spread", 0, 4), ("spread", 1, 4), ("nobody", 9, 4), ("one", 40, 6), ("spread", 12, 1), ("spread", 20, 256)],
)
def test_experts_without_tokens(kind: str, tokens: int, experts: int, backend: str) -> None:
    ids = _routes(kind, tokens, experts)
    problems = [Problem.make(tokens=tokens, experts=experts, hidden=8, width=4, bias=True, ids=ids) for _ in range(16)]
    with grpo_kernels.backend(backend), poisoned_allocations():
        runs = [(problem, problem.run()) for problem in problems]
    assert_all_accurate(runs)
    empty = torch.tensor([expert not in ids for expert in range(experts)])
    for _, found in runs:
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            assert found[name][empty].count_nonzero() == 0, name


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ranges_of_experts_add_up(backend: str) -> None:
    """What the ranks of an expert-parallel group compute, one of them without a token, equals the whole."""
    problem = Problem.make(torch.float64, bias=True, experts=7, **CLAMPED)  # nobody goes to expert 6
    total: dict[str, Tensor] = {}
    with grpo_kernels.backend(backend):
        whole = problem.run()
        for first, last in ((0, 1), (1, 6), (6, 7)):
            own = {name: t if name in ("x", "weights") else t[first:last] for name, t in problem.tensors.items()}
            found = Problem(own, *problem[1:]).run(expert_range=(first, last), num_experts=7)
            for name, value in found.items():
                if name in ("y", "x", "weights"):
                    total[name] = value if name not in total else total[name] + value
                else:
                    assert_as_accurate(value, whole[name][first:last], value, name=name)
    for name, value in total.items():
        assert_as_accurate(value, whole[name], value, name=name)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ids_of_either_width_and_outputs_of_a_router(backend: str) -> None:
    problem = Problem.make()
    with grpo_kernels.backend(backend):
        expected = problem.run()
        assert_equal(Problem(problem.tensors, problem.ids.int(), *problem[2:]).run(), expected)
        logits = torch.randn(30, 6, requires_grad=True)
        routes = grpo_kernels.moe_router(logits, 3)
        parameters = [problem.tensors[name] for name in ("x", "gate_up", "down")]
        y = moe_experts(*parameters, routes)
        assert torch.equal(y, moe_experts(*parameters, (routes.topk_weights, routes.topk_ids)))
        assert torch.autograd.grad(y.sum(), logits)[0].count_nonzero() > 0


def test_weights_of_any_dtype() -> None:
    """bfloat16 weights are taken as their float32 values, and get a bfloat16 gradient of those."""
    problem = Problem.make(torch.bfloat16)
    narrow = {**problem.tensors, "weights": problem.tensors["weights"].bfloat16()}
    wide = {**narrow, "weights": narrow["weights"].float()}
    found, expected = (Problem(tensors, *problem[1:]).run() for tensors in (narrow, wide))
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["weights"], expected["weights"].bfloat16())
