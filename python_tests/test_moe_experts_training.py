"""moe_experts: what is kept for the backward, what the backward leaves out, and the activation's own kernels."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from grpo_kernels import moe_experts
from grpo_kernels.moe_experts import ops
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_problems import Problem, activation

pytestmark = pytest.mark.usefixtures("native_cpu")

PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
EVERYTHING = ("x", *PARAMETERS, "weights")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# --- what is kept ----------------------------------------------------------------------------------------------------


def _kept_bytes(problem: Problem, trained: tuple[str, ...] = EVERYTHING, **more: Any) -> int:
    """Bytes of what autograd keeps of a forward, each memory once, without the parameters."""
    leaves = {name: tensor.detach().clone().requires_grad_(name in trained) for name, tensor in problem.tensors.items()}
    own = {leaves[name].untyped_storage().data_ptr() for name in PARAMETERS if name in leaves}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = problem.call(leaves, **more)
        del result
    return sum(kept.values())


def _routes_bytes(problem: Problem, rows: int) -> int:
    """The two maps, the ends of the experts' segments, and the weights."""
    slots, experts = problem.ids.numel(), len(problem.tensors["gate_up"])
    return 4 * slots + 4 * rows + 4 * experts + 4 * slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_kept(dtype: torch.dtype, bias: bool) -> None:
    """2 T H bytes of tokens and 4 T K I of pre-activations in bfloat16, nothing else of their size."""
    tokens, hidden, width, top_k = 30, 24, 20, 3
    problem = Problem.make(dtype, tokens=tokens, hidden=hidden, width=width, top_k=top_k, bias=bias)
    routes, x_bytes = _routes_bytes(problem, tokens * top_k), tokens * hidden * dtype.itemsize
    preact_bytes = tokens * top_k * 2 * width * dtype.itemsize
    assert _kept_bytes(problem) == x_bytes + preact_bytes + routes
    assert _kept_bytes(problem, save="input") == x_bytes + routes
    rows = (tokens * top_k + 6 * 7) // 8 * 8
    aligned = rows * 2 * width * dtype.itemsize + _routes_bytes(problem, rows)
    assert _kept_bytes(problem, alignment=8) == x_bytes + aligned


def test_what_nobody_needs_is_not_kept() -> None:
    """Frozen up-projections need no tokens; frozen everything keeps nothing; nor does a pass without gradients."""
    problem = Problem.make(bias=True)
    routes, preact_bytes = _routes_bytes(problem, 90), 90 * 40 * 4
    assert _kept_bytes(problem, ("x", "weights")) == preact_bytes + routes
    assert _kept_bytes(problem, ("down",)) == preact_bytes + routes
    assert _kept_bytes(problem, ("down_bias",)) == routes
    assert _kept_bytes(problem, ()) == 0
    with torch.no_grad():
        assert _kept_bytes(problem) == 0


def test_kept_bytes_of_a_layer_of_deepseek_v3() -> None:
    """0.12 GB of tokens and 0.54 of pre-activations at T = 8192, counted on 128 tokens that are a 16th as wide."""
    tokens, hidden, width, top_k = 128, 7168 // 16, 2048 // 16, 8
    problem = Problem.make(torch.bfloat16, tokens=tokens, hidden=hidden, width=width, experts=16, top_k=top_k)
    scale = 8192 / tokens * 16
    large = (_kept_bytes(problem) - _routes_bytes(problem, tokens * top_k)) * scale
    assert large == 8192 * 7168 * 2 + 8192 * 8 * 2 * 2048 * 2
    assert round(large / 1e9, 2) == 0.65


# --- what is left out ------------------------------------------------------------------------------------------------


class _Counts(TorchDispatchMode):
    """How often each registered op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "grpo_kernels":
            self.calls[function.name().removeprefix("grpo_kernels::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", ["preact", "input"])
def test_each_gradient_alone_has_the_bits_of_all(save: str) -> None:
    problem = Problem.make(bias=True, interleaved=True, activation="clamped_swiglu", swiglu_limit=1.1)
    whole = problem.run(save=save)
    for trained in itertools.chain.from_iterable(itertools.combinations(EVERYTHING, n) for n in (1, 2)):
        found = problem.run(trained, save=save)
        assert found.keys() == {"y", *trained}
        assert_equal(found, whole)


@pytest.mark.parametrize(
    ("trained", "products", "weight_products"),
    [
        (("x",), 2, 0),
        (("weights",), 2, 0),  # through the bias too
        (("down",), 0, 1),
        (("gate_up",), 1, 1),
        (("down_bias",), 0, 0),
        (EVERYTHING, 3, 2),
    ],
)
def test_dead_products_are_left_out(trained: tuple[str, ...], products: int, weight_products: int) -> None:
    problem = Problem.make(bias=True)
    leaves = {name: tensor.detach().clone().requires_grad_(name in trained) for name, tensor in problem.tensors.items()}
    result = problem.call(leaves)
    with _Counts() as counts:
        torch.autograd.grad(result, [leaves[name] for name in trained], problem.upstream)
    assert counts.calls["grouped_gemm"] == products
    assert counts.calls["grouped_gemm_wgrad"] == weight_products


@pytest.mark.parametrize("save", ["preact", "input"])
def test_a_second_backward_gives_the_same(save: str) -> None:
    problem = Problem.make(torch.bfloat16, bias=True)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    result = problem.call(leaves, save=save)
    first, second = (
        torch.autograd.grad(result, list(leaves.values()), problem.upstream, retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_accumulators(dtype: torch.dtype) -> None:
    """Two backwards add up in float32, and the weights get no gradient."""
    problem = Problem.make(dtype)
    expected, exact = problem.run(), torch.promote_types(dtype, torch.float32)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    sums = tuple(torch.ones_like(leaves[name], dtype=exact, requires_grad=False) for name in ("gate_up", "down"))
    for _ in range(2):
        problem.call(leaves, weight_grad_accumulators=sums).backward(problem.upstream)
    assert leaves["gate_up"].grad is leaves["down"].grad is None
    assert torch.equal(leaves["weights"].grad, 2 * expected["weights"])
    defined, plain = problem.define(torch.float64), problem.define(torch.float32, dtype)
    for total, name in zip(sums, ("gate_up", "down"), strict=True):
        assert_as_accurate(total, 1 + 2 * defined[name], 1 + 2 * plain[name], name=name)
    single = problem.call(leaves, weight_grad_accumulators=(None, sums[1]))
    assert torch.equal(torch.autograd.grad(single, leaves["gate_up"], problem.upstream)[0], expected["gate_up"])


def test_accumulators_need_kernels() -> None:
    problem = Problem.make()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    with grpo_kernels.backend("reference"), pytest.raises(grpo_kernels.BackendUnavailable, match="need kernels"):
        problem.call(leaves, weight_grad_accumulators=(torch.zeros_like(leaves["gate_up"]).detach(), None))


def test_lengths_do_not_recompile() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    problems = [Problem.make(tokens=tokens, hidden=8, width=4) for tokens in (5, 6, 9, 12, 30)]
    parameters = [problems[0].tensors[name].requires_grad_() for name in ("gate_up", "down")]
    compiled = torch.compile(lambda x, w, i: moe_experts(x, *parameters, (w, i)), fullgraph=True, backend=counter)
    for problem in problems:
        x, weights = problem.tensors["x"].requires_grad_(), problem.tensors["weights"].requires_grad_()
        results = [f(x, weights, problem.ids) for f in (compiled, lambda x, w, i: moe_experts(x, *parameters, (w, i)))]
        grads = [torch.autograd.grad(y, [x, weights, *parameters], problem.upstream) for y in results]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


# --- the activation's kernels ----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "clamped": {"activation": "clamped_swiglu", "swiglu_alpha": 1.3, "swiglu_limit": 1.5},
}


def numbers(kind: str, interleaved: bool) -> tuple[bool, float, float, bool]:
    """The registered ops' form of the activation."""
    options = KINDS[kind]
    alpha, limit = options.get("swiglu_alpha", 1.0), options.get("swiglu_limit", 1.0)
    return kind == "clamped", alpha, limit, interleaved


def expected_of(
    preact: Tensor, grad: Tensor, inv_map: Tensor, weights: Tensor, kind: str, interleaved: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Activation, gradient of the pre-activations, s * A and the gradient of the weights, by autograd in `dtype`."""
    live = inv_map >= 0
    leaf = torch.where(live[:, None], preact.to(dtype), 0.0).requires_grad_()
    slots = weights.to(dtype).reshape(-1).requires_grad_()
    s = torch.where(live, slots[inv_map.clamp(min=0).long()], 0.0)[:, None]
    a = torch.where(live[:, None], activation(leaf, **KINDS[kind], interleaved=interleaved), 0.0)
    upstream = torch.where(live[:, None], grad.to(dtype), 0.0)
    grads = torch.autograd.grad((s * a * upstream).sum(), (leaf, slots))
    return [a.detach(), grads[0], (s * a).detach(), grads[1].view_as(weights)]


@pytest.mark.parametrize("width", [1, 19, 256, 700])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activation_against_float64(dtype: torch.dtype, kind: str, interleaved: bool, width: int) -> None:
    rows = 24 if width > 1 else 400
    preact, grad = (torch.randn(rows, columns * width).mul(2).to(dtype) for columns in (2, 1))
    inv_map = torch.randperm(2 * rows)[:rows].int()
    inv_map[3::7] = -1
    preact[3::7], grad[3::7] = float("nan"), float("nan")
    weights = torch.rand(rows, 2, dtype=torch.promote_types(dtype, torch.float32))
    options = numbers(kind, interleaved)
    found = [
        ops.moe_glu(preact, inv_map, None, *options, "native"),
        *ops.moe_glu_backward(preact, grad, inv_map, weights, None, *options, True, True, True, "native"),
    ]
    of = (preact, grad, inv_map, weights, kind, interleaved)
    exact, plain = expected_of(*of, torch.float64), expected_of(*of, torch.float32)
    for value, expected, eager in zip(found, exact, plain, strict=True):
        assert_as_accurate(value, expected, eager)
    assert_as_accurate(ops.moe_glu(preact, inv_map, weights, *options, "native"), exact[2], plain[2])
    terms = torch.randn(rows, dtype=weights.dtype)
    arguments = (inv_map, weights, terms, *options, False, False, True)
    more = ops.moe_glu_backward(preact, grad, *arguments, "native")[2]
    added = torch.zeros(2 * rows, dtype=weights.dtype)
    added[inv_map[inv_map >= 0].long()] = terms[inv_map >= 0]
    assert_as_accurate(more, exact[3] + added.view_as(more), plain[3] + added.view_as(more))


def test_gates_far_from_zero() -> None:
    """silu and its derivative where e^-x overflows, vanishes, or leaves 1 - sigmoid nothing but rounding."""
    gate = torch.tensor([[-1e4, -300.0, -104.0, -88.0, -17.0, -1e-6, 0.0, 1e-6, 9.0, 17.0, 30.0, 90.0, 1e4]])
    preact, grad = torch.cat([gate, torch.ones_like(gate)], 1), torch.ones_like(gate)
    inv_map, weights = torch.zeros(1, dtype=torch.int32), torch.ones(1, 1)
    arguments = (inv_map, weights, None, *numbers("swiglu", False), True, True, True, "native")
    found = ops.moe_glu_backward(preact, grad, *arguments)
    exact = expected_of(preact, grad, inv_map, weights, "swiglu", False, torch.float64)[1:]
    for value, expected in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clamps_pass_gradients_at_the_limit_as_torch_does(dtype: torch.dtype) -> None:
    """At the limit the gradient passes, beyond it stops, and so it does for NaN."""
    gate = torch.tensor([1.5, 1.5000001, 9.0, -1.5, -9.0, float("nan")], dtype=dtype)
    up = torch.tensor([1.5, -1.5, -1.5000001, 1.5000001, 0.5, float("nan")], dtype=dtype)
    gates, ups = (values.reshape(1, 36) for values in torch.meshgrid(gate, up, indexing="ij"))
    preact, grad = torch.cat([gates, ups], 1), torch.ones(1, 36, dtype=dtype)
    inv_map, weights = torch.zeros(1, dtype=torch.int32), torch.ones(1, 1, dtype=dtype)
    arguments = (inv_map, weights, None, *numbers("clamped", False), True, True, True, "native")
    found = ops.moe_glu_backward(preact, grad, *arguments)[0]
    expected = expected_of(preact, grad, inv_map, weights, "clamped", False, dtype)[1]
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, equal_nan=True)
