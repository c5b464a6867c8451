"""moe_router: equal to the gates of published models, written here from their formulas; the losses by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import moe_router
from grpo_kernels.moe_router import options as router_options
from grpo_kernels.moe_router import reference
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_gates import Gate as Options
from python_tests.moe_gates import losses_of, probabilities

pytestmark = pytest.mark.usefixtures("native_cpu")
TOKENS = 64
Routes = tuple[Tensor, Tensor]


def deepseek_v3(z: Tensor, bias: Tensor) -> Routes:
    """Sigmoid; biased scores choose, 4 of 8 groups by their two best; plain scores weigh, normalised, times 2.5."""
    s = z.sigmoid()
    choice = s + bias
    groups = choice.view(-1, 8, choice.shape[1] // 8)
    group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(4, dim=-1).indices, 1.0)
    ids = choice.masked_fill(~kept.bool().repeat_interleave(groups.shape[-1], dim=1), -torch.inf).topk(8).indices
    w = s.gather(1, ids)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, ids


def deepseek_v2(z: Tensor, bias: Tensor) -> Routes:
    """Softmax; 3 of 8 groups by their best; not normalised, times 16."""
    s = z.softmax(dim=-1)
    groups = s.view(-1, 8, s.shape[1] // 8)
    kept = torch.zeros_like(groups[..., 0]).scatter_(1, groups.amax(-1).topk(3, dim=-1).indices, 1.0)
    w, ids = s.masked_fill(~kept.bool().repeat_interleave(groups.shape[-1], dim=1), -torch.inf).topk(6)
    return w * 16.0, ids


def mixtral(z: Tensor, bias: Tensor) -> Routes:
    """Softmax over all, the two best, divided by their sum."""
    w, ids = z.softmax(dim=-1).topk(2, dim=-1)
    return w / w.sum(dim=-1, keepdim=True), ids


def qwen3(z: Tensor, bias: Tensor) -> Routes:
    w, ids = z.softmax(dim=-1).topk(8, dim=-1)
    return w / w.sum(dim=-1, keepdim=True), ids


def qwen2(z: Tensor, bias: Tensor) -> Routes:
    """norm_topk_prob=False: the weights stay those of the softmax over all."""
    return z.softmax(dim=-1).topk(4, dim=-1)


def gpt_oss(z: Tensor, bias: Tensor) -> Routes:
    """The bias is the router's own, part of its logits: topk, then softmax over the chosen."""
    w, ids = z.topk(4, dim=-1)
    return w.softmax(dim=-1), ids


def kimi_k2(z: Tensor, bias: Tensor) -> Routes:
    s = z.sigmoid()
    ids = (s + bias).topk(8, dim=-1).indices
    w = s.gather(1, ids)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20) * 2.827, ids


def deepseek_v4(z: Tensor, bias: Tensor) -> Routes:
    s = torch.nn.functional.softplus(z).sqrt()
    ids = (s + bias).topk(6, dim=-1).indices
    w = s.gather(1, ids)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20) * 1.5, ids


def llama4(z: Tensor, bias: Tensor) -> Routes:
    w, ids = z.topk(1, dim=-1)
    return w.sigmoid(), ids


BIASED = {"scoring_func": "sigmoid", "bias": True}
MODELS: dict[str, tuple[Callable[[Tensor, Tensor], Routes], int, int, dict[str, Any]]] = {
    "deepseek_v3": (deepseek_v3, 256, 8, {**BIASED, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    "deepseek_v2": (deepseek_v2, 160, 6, {"n_group": 8, "topk_group": 3, "group_score": "max", "norm_topk_prob": False,
                                          "routed_scaling_factor": 16.0}),
    "mixtral": (mixtral, 8, 2, {}),
    "qwen3": (qwen3, 128, 8, {}),
    "qwen2": (qwen2, 60, 4, {"norm_topk_prob": False}),
    "gpt_oss": (gpt_oss, 128, 4, {"scoring_func": "topk_softmax"}),
    "kimi_k2": (kimi_k2, 384, 8, {**BIASED, "routed_scaling_factor": 2.827}),
    "deepseek_v4": (deepseek_v4, 256, 6, {"scoring_func": "sqrtsoftplus", "bias": True, "routed_scaling_factor": 1.5}),
    "llama4": (llama4, 128, 1, {"scoring_func": "sigmoid", "norm_topk_prob": False}),
}  # fmt: skip


def dense(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[T, E]. Weights at their experts, 0 elsewhere: whatever the order of the slots."""
    return torch.zeros(weights.shape[0], experts, dtype=weights.dtype).scatter(1, ids.long(), weights)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("model", MODELS)
def test_equal_to_the_gates_of_models(model: str, backend: str) -> None:
    gate, experts, top_k, options = MODELS[model]
    options = dict(options)
    bias = torch.randn(experts) * 0.1 + 0.5
    if options.pop("bias", False):
        options["e_score_correction_bias"] = bias
    logits, upstream = torch.randn(TOKENS, experts), torch.randn(TOKENS, experts)

    def results(dtype: torch.dtype, route: Callable[[Tensor], Routes]) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        weights, ids = route(leaf)
        spread = dense(weights, ids, experts)
        return spread.detach(), torch.autograd.grad((spread * upstream.to(dtype)).sum(), leaf)[0], ids

    with grpo_kernels.backend(backend):
        ours = results(torch.float32, lambda z: moe_router(z, top_k, **options)[:2])
    exact = results(torch.float64, lambda z: gate(z, bias.double()))
    eager = results(torch.float32, lambda z: gate(z, bias))
    assert torch.equal(ours[2].long().sort(-1).values, exact[2].sort(-1).values)
    assert_as_accurate(ours[0], exact[0], eager[0], name="weights")
    assert_as_accurate(ours[1], exact[1], eager[1], name="gradient")


def test_softmax_before_and_after_the_choice_is_one_thing() -> None:
    """Normalised, they are equal; not normalised, they are not."""
    logits = torch.randn(TOKENS, 64, dtype=torch.float64)
    before, after, raw = (
        moe_router(logits, 8, scoring_func=name, norm_topk_prob=norm)
        for name, norm in (("softmax", True), ("topk_softmax", True), ("softmax", False))
    )
    assert torch.equal(before.topk_weights, after.topk_weights)
    assert not torch.allclose(before.topk_weights, raw.topk_weights)
    torch.testing.assert_close(before.topk_weights, raw.topk_weights / raw.topk_weights.sum(-1, keepdim=True))


def test_losses_by_hand(backend: str) -> None:
    """Two tokens, two experts, probabilities of 3/4 and 1/4: both choose expert 0."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64).log()
    out = moe_router(logits, 1, z_loss_coef=1.0, aux_loss_coef=1.0, seq_aux_loss_coef=1.0)
    log4 = torch.tensor(4.0, dtype=torch.float64).log()
    torch.testing.assert_close(out.z_loss, log4 * log4)
    torch.testing.assert_close(out.aux_loss, torch.tensor(2 / (1 * 4) * (2 * 1.5 + 0 * 0.5), dtype=torch.float64))
    torch.testing.assert_close(out.seq_aux_loss, torch.tensor(2 / (1 * 2) * 2 * 0.75, dtype=torch.float64))
    uniform = moe_router(torch.zeros(6, 16, dtype=torch.float64), 4, aux_loss_coef=2.0)
    torch.testing.assert_close(uniform.aux_loss, torch.tensor(2.0, dtype=torch.float64))  # coef * 1 where p is uniform


@pytest.mark.parametrize("scoring_func", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
def test_sequences_are_balanced_each_for_itself(scoring_func: str, backend: str) -> None:
    """Packed sequences give the mean of their losses alone; empty and masked ones are not in it."""
    logits = torch.randn(30, 24, dtype=torch.float64)
    bias = torch.randn(24)
    options = {"scoring_func": scoring_func, "e_score_correction_bias": bias, "n_group": 4, "topk_group": 2}
    mask = torch.ones(30, dtype=torch.bool)
    mask[10:14] = False
    ends = torch.tensor([0, 0, 3, 10, 14, 14, 30, 30])
    packed = moe_router(logits, 4, **options, token_mask=mask, cu_seqlens=ends, seq_aux_loss_coef=0.5)
    alone = [
        moe_router(logits[a:b], 4, **options, seq_aux_loss_coef=0.5).seq_aux_loss
        for a, b in ((0, 3), (3, 10), (14, 30))
    ]
    torch.testing.assert_close(packed.seq_aux_loss, torch.stack(alone).mean())
    gate = Options(24, 4, scoring_func)
    by_loops = losses_of(logits, packed.topk_ids.clamp(min=0), gate, mask, ends)[2]
    torch.testing.assert_close(packed.seq_aux_loss, 0.5 * by_loops)


def test_the_sequence_loss_counts_plain_scores_and_the_auxiliary_loss_the_routes(backend: str) -> None:
    """f of DeepSeek-V3's equation 18 is of the unbiased scores; the auxiliary loss is about where tokens went."""
    logits = torch.randn(40, 16, dtype=torch.float64)
    gate = Options(16, 3, "sigmoid")
    bias = torch.randn(16)
    everything = {"aux_loss_coef": 1.0, "seq_aux_loss_coef": 1.0, "scoring_func": "sigmoid"}
    live = torch.ones(40, dtype=torch.bool)
    plain = moe_router(logits, 3, **everything)
    biased = moe_router(logits, 3, **everything, e_score_correction_bias=bias)
    replay = torch.rand(40, 16).argsort(1)[:, :3]
    replayed = moe_router(logits, 3, **everything, replay_ids=replay)
    assert biased.seq_aux_loss == plain.seq_aux_loss == replayed.seq_aux_loss
    for out in (plain, biased, replayed):
        _, aux, sequence = losses_of(logits, out.topk_ids, gate, live)
        torch.testing.assert_close(out.aux_loss, aux)
        torch.testing.assert_close(out.seq_aux_loss, sequence)
    torch.testing.assert_close(plain.aux_loss, plain.seq_aux_loss)  # of one sequence without a bias they are one thing


def test_counts_carry_no_gradient_and_probabilities_do(backend: str) -> None:
    logits = torch.randn(20, 12, dtype=torch.float64).requires_grad_()
    out = moe_router(logits, 2, scoring_func="sqrtsoftplus", aux_loss_coef=1.0)
    counts = out.tokens_per_expert.double()
    p = probabilities(logits, Options(12, 2, "sqrtsoftplus"))
    by_hand = 12 / (2 * 400) * (counts * p.sum(0)).sum()
    torch.testing.assert_close(out.aux_loss, by_hand)
    (a,) = torch.autograd.grad(out.aux_loss, logits)
    (b,) = torch.autograd.grad(by_hand, logits)
    torch.testing.assert_close(a, b)


def test_tokens_that_no_sequence_holds() -> None:
    """Where nothing can raise: they are routed and weighed, and are not in the sequence-wise loss."""
    logits = torch.randn(8, 6, dtype=torch.float64)
    asked = router_options.RouterOptions(2, "softmax", 1, 1, "max", True, 1.0, False, False, True)
    part = reference.moe_router(logits, None, None, None, torch.tensor([2, 6]), asked)[3]
    alone = reference.moe_router(logits[2:6], None, None, None, None, asked)[3]
    torch.testing.assert_close(part, alone)
