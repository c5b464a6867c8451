"""moe_router: values and gradients of every gate against float64, dtypes, views, determinism, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grpo_kernels
from grpo_kernels import moe_router
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_gates import GATES, INF, NAN, Gate, assert_best, losses_of, weights_at

pytestmark = pytest.mark.usefixtures("native_cpu")
BACKENDS = ["native", "reference"]
COEFFICIENTS = {"z_loss_coef": 0.7, "aux_loss_coef": 1.3, "seq_aux_loss_coef": 0.9}
TOKENS = 41
ENDS = torch.tensor([0, 7, 7, 30, 41], dtype=torch.int32)


def run(logits: Tensor, gate: Gate, grad: Tensor, **options: Any) -> tuple[grpo_kernels.RouterOutput, Tensor]:
    """The output, and the gradient of <topk_weights, grad> plus the losses."""
    leaf = logits.detach().clone().requires_grad_()
    out = moe_router(leaf, gate.top_k, **options)
    loss = (out.topk_weights * grad).sum() + out.z_loss + out.aux_loss + out.seq_aux_loss
    return out, torch.autograd.grad(loss, leaf)[0]


def defined(
    logits: Tensor, ids: Tensor, gate: Gate, grad: Tensor, dtype: torch.dtype, live: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, ...]:
    """Weights, the three losses and the gradient by the formulas, in `dtype`, at the ids that a kernel chose."""
    leaf = logits.to(dtype).requires_grad_()
    alive = torch.ones(logits.shape[0], dtype=torch.bool) if live is None else live
    weights = torch.where(alive[:, None], weights_at(leaf, ids.clamp(min=0), gate), 0.0)
    total = (weights * grad.to(dtype)).sum()
    losses: tuple[Tensor, ...] = ()
    if live is not None:
        factors = COEFFICIENTS.values()
        losses = tuple(c * x for c, x in zip(factors, losses_of(leaf, ids, gate, alive, ends), strict=True))
        total = total + sum(losses)
    (gradient,) = torch.autograd.grad(total, leaf)
    return weights.detach(), *(loss.detach() for loss in losses), gradient


def check(logits: Tensor, gate: Gate, live: Tensor | None = None, ends: Tensor | None = None, **options: Any) -> None:
    """Values and gradients within the budget at the ids that were chosen, and the choice itself."""
    bias = gate.make_bias()
    grad = torch.randn(logits.shape[0], gate.top_k)
    extra = {} if live is None else {**COEFFICIENTS, "token_mask": live, "cu_seqlens": ends}
    out, gradient = run(logits, gate, grad, **gate.options(bias), **extra, **options)
    ids = out.topk_ids
    rows = slice(None) if live is None else live
    if "replay_ids" not in options:
        assert_best(logits[rows].float(), ids[rows], gate, bias)
    assert torch.equal(out.tokens_per_expert, torch.bincount(ids[rows].reshape(-1), minlength=gate.experts).int())
    expected = defined(logits, ids, gate, grad, torch.float64, live, ends)
    eager = defined(logits, ids, gate, grad, torch.float32, live, ends)
    names = ["topk_weights", "gradient"] if live is None else ["topk_weights", *COEFFICIENTS, "gradient"]
    losses = [] if live is None else [out.z_loss, out.aux_loss, out.seq_aux_loss]
    for name, a, e, f in zip(names, (out.topk_weights, *losses, gradient), expected, eager, strict=True):
        assert_as_accurate(a, e, f, name=name)
    if live is not None:
        assert (ids[~live] == -1).all()
        assert (out.topk_weights[~live] == 0).all()
        assert (gradient[~live] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GATES)
def test_weights_and_gradients(name: str, backend: str) -> None:
    with grpo_kernels.backend(backend):
        check(torch.randn(TOKENS, GATES[name].experts) * 2, GATES[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_many_slots(backend: str) -> None:
    """Of 32 weights and their gradients, for so many tokens that eager is exact by chance for none."""
    with grpo_kernels.backend(backend):
        check(torch.randn(100 * TOKENS, 32) * 2, GATES["every_expert"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GATES)
def test_losses_masks_and_sequences(name: str, backend: str) -> None:
    with grpo_kernels.backend(backend):
        check(torch.randn(TOKENS, GATES[name].experts), GATES[name], live=torch.rand(TOKENS) < 0.8, ends=ENDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "deepseek_v4", "qwen2", "gpt_oss"])
def test_narrow_logits_are_read_exactly_and_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(TOKENS, GATES[name].experts) * 2).to(dtype)
    check(logits, GATES[name])
    check(logits, GATES[name], live=torch.rand(TOKENS) < 0.8, ends=None)
    options = GATES[name].options(GATES[name].make_bias())
    narrow, wide = (moe_router(z, GATES[name].top_k, z_loss_coef=1.0, **options) for z in (logits, logits.float()))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "deepseek_v3", "deepseek_v4", "gpt_oss", "largest"])
def test_logits_of_any_size(name: str, scale: float) -> None:
    gate = GATES[name]
    logits = torch.randn(TOKENS, gate.experts) * scale
    grad = torch.randn(TOKENS, gate.top_k)
    bias = gate.make_bias()
    with grpo_kernels.backend("reference"):
        out64, grad64 = run(logits.double(), gate, grad, **gate.options(bias), **COEFFICIENTS)
        route = {**gate.options(bias), **COEFFICIENTS, "replay_ids": out64.topk_ids}
        out32, grad32 = run(logits, gate, grad, **route)
    out, gradient = run(logits, gate, grad, **route)
    for name_, a, e, f in zip(out._fields, out, out64, out32, strict=True):
        if a.dtype.is_floating_point:
            assert_as_accurate(a, e, f, name=name_)
    assert_as_accurate(gradient, grad64, grad32, name="gradient")
    free = moe_router(logits, gate.top_k, **gate.options(bias))
    assert_best(logits, free.topk_ids, gate, bias)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "groups_of_one", "biased_logits", "every_expert"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scoring_func", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
def test_gradcheck_through_the_kernel(scoring_func: str, norm: bool, name: str) -> None:
    gate = GATES[name].with_(scoring_func=scoring_func, norm_topk_prob=norm, experts=8, top_k=2)
    gate = gate.with_(n_group=4, topk_group=2) if gate.n_group > 1 else gate
    bias = gate.make_bias()
    logits = torch.randn(5, 8, dtype=torch.float64)
    logits[1, 2] = -INF
    finite = logits.isfinite()
    leaf = logits.masked_fill(~finite, 0.0).requires_grad_()

    def function(z: Tensor) -> tuple[Tensor, ...]:
        out = moe_router(
            z.masked_fill(~finite, -INF), 2, **gate.options(bias), **COEFFICIENTS, cu_seqlens=torch.tensor([0, 2, 5])
        )
        return out.topk_weights, out.z_loss, out.aux_loss, out.seq_aux_loss

    with grpo_kernels.backend("native"):
        assert torch.autograd.gradcheck(function, (leaf,))


@given(data=st.data())
def test_kernel_and_definition_agree_on_anything(data: st.DataObject) -> None:
    """float64, with NaN, infinities and ties: every output and the gradient, ids exactly."""
    draw = data.draw
    experts = draw(st.sampled_from([1, 2, 5, 16, 31, 33, 64, 100, 256, 500, 1024]))
    top_k = draw(st.integers(1, min(32, experts)))
    tokens = draw(st.sampled_from([0, 1, 3, 64, 130]))
    n_group = draw(st.sampled_from([g for g in (1, 2, 4, 8, 25) if experts % g == 0]))
    topk_group = draw(st.sampled_from([g for g in range(1, n_group + 1) if g * (experts // n_group) >= top_k]))
    logits = torch.randn(tokens, experts, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 6.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties, also between groups
    for value in (-INF, NAN, INF):
        if draw(st.integers(0, 3)) == 0:
            logits[torch.rand(tokens, experts) < (0.3 if value == -INF else 0.003)] = value
    replay = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k]
    replay = torch.where(torch.rand(tokens, top_k) < 0.4, -1, replay)
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    gate = Gate(
        experts, top_k, draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])),
        n_group=n_group, topk_group=topk_group, group_score=draw(st.sampled_from(["top2_sum", "max"])),
        norm_topk_prob=draw(st.booleans()), routed_scaling_factor=2.5,
    )  # fmt: skip
    bias = draw(st.sampled_from([None, torch.randn(experts).round(), torch.randn(experts, dtype=torch.float64)]))
    options = {
        **gate.options(bias),
        **{name: value for name, value in COEFFICIENTS.items() if draw(st.booleans())},
        "token_mask": draw(st.sampled_from([None, torch.rand(tokens) < 0.7])),
        "replay_ids": draw(st.sampled_from([None, replay.int(), replay, replay.short()])),
        "cu_seqlens": draw(st.sampled_from([None, torch.tensor([0, *cuts, tokens])])),
    }
    grad = torch.randn(tokens, top_k, dtype=torch.float64)
    results = {}
    for backend in BACKENDS:
        with grpo_kernels.backend(backend):
            out, gradient = run(logits, gate, grad, **options)
        results[backend] = (*out, gradient)
    for a, b in zip(results["native"], results["reference"], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, equal_nan=True)


def test_a_token_has_the_same_bits_in_any_company() -> None:
    gate = GATES["deepseek_v3"]
    bias, logits = gate.make_bias(), torch.randn(300, gate.experts)
    grad = torch.randn(300, gate.top_k)
    out, gradient = run(logits, gate, grad, **gate.options(bias))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for part in (slice(0, 1), slice(17, 150), slice(299, 300)):
            alone, alone_gradient = run(logits[part], gate, grad[part], **gate.options(bias))
            assert torch.equal(alone.topk_ids, out.topk_ids[part])
            assert torch.equal(alone.topk_weights, out.topk_weights[part])
            assert torch.equal(alone_gradient, gradient[part])
    finally:
        torch.set_num_threads(threads)


def test_a_pass_without_gradients_routes_alike() -> None:
    """The rollout's, the old policy's and the training pass share routes, bit for bit."""
    gate = GATES["deepseek_v4"]
    bias, logits = gate.make_bias(), torch.randn(64, gate.experts)
    trained = moe_router(logits.clone().requires_grad_(), gate.top_k, **gate.options(bias), z_loss_coef=1.0)
    with torch.no_grad():
        scored = moe_router(logits, gate.top_k, **gate.options(bias))
    assert torch.equal(trained.topk_ids, scored.topk_ids)
    assert torch.equal(trained.topk_weights, scored.topk_weights)


def test_losses_are_equal_from_run_to_run_and_for_any_number_of_threads() -> None:
    logits = torch.randn(3000, 64)
    ends = torch.tensor([0, 1, 500, 501, 2900, 3000])
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            out, gradient = run(logits, GATES["mixtral"], torch.zeros(3000, 2), cu_seqlens=ends, **COEFFICIENTS)
            results.append((*out, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


def test_views_are_read_where_they_lie() -> None:
    storage = torch.randn(10, 3, 64)
    for view in (storage[:, 1], storage[::2, 0, 8:40], storage[:, :, 0].t()[:, :8].t(), storage[0, 0].expand(4, 64)):
        a, b = (moe_router(z, 2, aux_loss_coef=1.0) for z in (view, view.clone()))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_only_what_is_asked_for_needs_a_gradient() -> None:
    leaf = torch.randn(4, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    out = moe_router(leaf, 2, e_score_correction_bias=bias, aux_loss_coef=0.5)
    assert out.topk_weights.requires_grad
    assert out.aux_loss.requires_grad
    assert [out.topk_ids.requires_grad, out.tokens_per_expert.requires_grad, out.replay_mismatch.requires_grad] == [
        False
    ] * 3
    assert moe_router(leaf, 2).z_loss.requires_grad is False
    (out.topk_weights.sum() + out.aux_loss).backward()
    assert bias.grad is None
    only_loss = torch.autograd.grad(moe_router(leaf, 2, z_loss_coef=1.0).z_loss, leaf)[0]
    expected = torch.autograd.grad(torch.logsumexp(leaf, -1).square().mean(), leaf)[0]
    torch.testing.assert_close(only_loss, expected)


def test_coefficients_may_be_tensors() -> None:
    leaf = torch.randn(9, 8, requires_grad=True)
    numbers = moe_router(leaf, 2, **COEFFICIENTS)
    tensors = moe_router(leaf, 2, **{name: torch.tensor(value) for name, value in COEFFICIENTS.items()})
    for a, b in zip(numbers, tensors, strict=True):
        assert torch.equal(a, b)
    zero = moe_router(leaf, 2, z_loss_coef=torch.tensor(0.0))
    assert zero.z_loss == 0
    assert moe_router(leaf, 2).z_loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coefficients", [{}, {"aux_loss_coef": 0.5}, COEFFICIENTS])
def test_losses_may_be_added_up_in_place(backend: str, coefficients: dict[str, float]) -> None:
    """Layer by layer into the first one's, and none of them changes with another."""
    with grpo_kernels.backend(backend):
        first, leaf = torch.randn(9, 8), torch.randn(9, 8, requires_grad=True)
        for z in (first, first.clone().requires_grad_()):
            total, added = moe_router(z, 2, **coefficients), moe_router(leaf, 2, **coefficients)
            others = (total.z_loss.item(), total.seq_aux_loss.item())
            loss, before = total.aux_loss, total.aux_loss.item()
            loss += added.aux_loss
            loss += added.topk_weights[:, 0].sum()
            expected = before + added.aux_loss.item() + added.topk_weights[:, 0].sum().item()
            torch.testing.assert_close(loss.item(), expected)
            assert (total.z_loss.item(), total.seq_aux_loss.item()) == others
            (gradient,) = torch.autograd.grad(loss, leaf)
            parts = moe_router(leaf, 2, **coefficients)
            alone = parts.aux_loss + parts.topk_weights[:, 0].sum()
            assert torch.equal(gradient, torch.autograd.grad(alone, leaf)[0])


def test_checkpoint_recomputes_the_same_routes() -> None:
    gate = GATES["deepseek_v3"]
    bias = gate.make_bias()
    leaf = torch.randn(33, gate.experts, requires_grad=True)

    def layer(z: Tensor) -> Tensor:
        out = moe_router(z.tanh(), gate.top_k, **gate.options(bias), aux_loss_coef=0.1)
        return (out.topk_weights * out.topk_ids).sum() + out.aux_loss

    layer(leaf).backward()
    for reentrant in (False, True):
        other = leaf.detach().clone().requires_grad_()
        checkpoint(layer, other, use_reentrant=reentrant).backward()
        assert torch.equal(other.grad, leaf.grad)


def test_compiles_once_for_all_lengths_and_coefficients() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(z: Tensor, ends: Tensor, aux: float, z_coef: float) -> tuple[Tensor, ...]:
        out = moe_router(z, 2, cu_seqlens=ends, aux_loss_coef=aux, z_loss_coef=z_coef, seq_aux_loss_coef=0.3)
        return out.topk_weights.square().sum() + out.aux_loss + out.z_loss + out.seq_aux_loss, out.topk_ids

    for index in range(10):
        tokens = 5 + 3 * index
        leaf = torch.randn(tokens, 8, requires_grad=True)
        ends = torch.tensor([0, *range(1, 2 + index), tokens])
        coefficients = 0.1 + 0.01 * index, 0.2 + 0.03 * index
        loss, ids = step(leaf, ends, *coefficients)
        (gradient,) = torch.autograd.grad(loss, leaf)
        out, expected = run(
            leaf, GATES["mixtral"], 2 * moe_router(leaf, 2).topk_weights.detach(), cu_seqlens=ends,
            aux_loss_coef=coefficients[0], z_loss_coef=coefficients[1], seq_aux_loss_coef=0.3,
        )  # fmt: skip
        assert torch.equal(ids, out.topk_ids)
        torch.testing.assert_close(gradient, expected)
    assert counter.frame_count <= 2
