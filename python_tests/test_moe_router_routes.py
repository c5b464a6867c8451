"""moe_router: which experts are chosen at the edges, replayed routes, and the faults of other routers as tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_kernels import moe_router
from grpo_kernels.moe_router import options as router_options
from grpo_kernels.moe_router import reference
from python_tests.moe_gates import GATES, INF, NAN, assert_best, weights_at

pytestmark = pytest.mark.usefixtures("native_cpu", "backend")
SCORINGS = ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"]


def by_hand(row: list[float], top_k: int) -> list[int]:
    """Larger first, NaN after -inf, the lower id first among equals."""
    order = sorted(range(len(row)), key=lambda i: (row[i] != row[i], -row[i] if row[i] == row[i] else 0.0, i))
    return order[:top_k]


# --- the order of keys ---


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (32, 32), (33, 32), (100, 9), (256, 8), (1024, 32)])
def test_order_of_ties_zeros_infinities_and_nan(experts: int, top_k: int) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, INF, -INF, NAN, 2.0**-140, -(2.0**-140), 3.4e38])
    logits = values[torch.randint(len(values), (60, experts))]
    logits[0], logits[1], logits[2], logits[3] = 0.0, NAN, -INF, INF  # rows of nothing but ties
    ids = moe_router(logits, top_k).topk_ids
    assert ids.tolist() == [by_hand(row, top_k) for row in logits.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_order_in_every_dtype(dtype: torch.dtype) -> None:
    logits = (torch.randn(40, 64) * 3).round().to(dtype)
    logits[::3, ::5], logits[1::3, ::7] = NAN, -INF
    assert moe_router(logits, 20).topk_ids.tolist() == [by_hand(row, 20) for row in logits.tolist()]


@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_logits_rank_where_scores_are_equal(scoring_func: str) -> None:
    """A sigmoid is 1 from 17 on and a softmax 0 below -104: experts would be chosen by their number alone."""
    logits = 20.0 + torch.arange(64.0).flip(0)[None] * torch.tensor([[1.0], [0.25], [-0.5]])
    logits[0, 3] = 1000.0
    ids = moe_router(logits, 8, scoring_func=scoring_func).topk_ids
    assert ids.tolist() == [by_hand(row, 8) for row in logits.tolist()]


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_row_is_nan_and_no_other(value: float, scoring_func: str) -> None:
    logits = torch.randn(5, 16)
    broken = logits.clone()
    broken[2, 9] = value
    bias = torch.randn(16)
    leaves = [z.requires_grad_() for z in (logits, broken)]
    options = {"scoring_func": scoring_func, "e_score_correction_bias": bias, "n_group": 4, "topk_group": 2}
    outs = [moe_router(z, 4, **options, z_loss_coef=1.0, aux_loss_coef=1.0) for z in leaves]
    grads = [torch.autograd.grad(out.topk_weights.square().sum(), z)[0] for out, z in zip(outs, leaves, strict=True)]
    others = [0, 1, 3, 4]
    assert torch.equal(outs[0].topk_ids[others], outs[1].topk_ids[others])
    assert torch.equal(outs[0].topk_weights[others], outs[1].topk_weights[others])
    assert torch.equal(grads[0][others], grads[1][others])
    ids = outs[1].topk_ids[2].tolist()
    assert len(set(ids)) == 4
    assert set(ids) <= set(range(16))
    assert outs[1].topk_weights[2].isnan().all()
    assert grads[1][2].isnan().all()
    assert outs[1].z_loss.isnan()
    assert outs[1].aux_loss.isnan()
    assert outs[1].tokens_per_expert.sum() == 20


@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_minus_infinity_is_probability_zero(scoring_func: str) -> None:
    """Also where such an expert is chosen, because too few others are left."""
    logits = torch.randn(6, 8)
    logits[:, 3:] = -INF
    leaf = logits.requires_grad_()
    out = moe_router(leaf, 5, scoring_func=scoring_func, aux_loss_coef=1.0, z_loss_coef=1.0)
    (gradient,) = torch.autograd.grad((out.topk_weights * torch.randn(6, 5)).sum() + out.aux_loss + out.z_loss, leaf)
    assert out.topk_ids[:, 3:].tolist() == [[3, 4]] * 6
    assert (out.topk_weights[:, :3] > 0).all()
    assert (out.topk_weights[:, 3:] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[:, 3:] == 0).all()


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("norm", [True, False])
def test_nothing_but_minus_infinity(norm: bool, scoring_func: str) -> None:
    leaf = torch.full((2, 8), -INF).index_fill_(0, torch.tensor([1]), 0.0).requires_grad_()
    out = moe_router(leaf, 3, scoring_func=scoring_func, norm_topk_prob=norm)
    (gradient,) = torch.autograd.grad(out.topk_weights.sum(), leaf)
    assert out.topk_ids.tolist() == [[0, 1, 2]] * 2
    if "softmax" in scoring_func:
        assert out.topk_weights[0].isnan().all()
        assert gradient[0].isnan().all()
    else:  # no experts at all: 0 / (0 + 1e-20)
        assert (out.topk_weights[0] == 0).all()
        assert (gradient[0] == 0).all()
    assert out.topk_weights[1].isfinite().all()
    assert gradient[1].isfinite().all()


def test_a_broken_row_is_nan_whatever_is_differentiated() -> None:
    """A softmax over replayed experts that all have probability 0: no weights, so no losses and no gradient either."""
    logits = torch.randn(3, 8)
    logits[1, 4:] = -INF
    leaf = logits.requires_grad_()
    replay = torch.tensor([[0, 1], [5, 6], [2, 3]])
    out = moe_router(leaf, 2, replay_ids=replay, z_loss_coef=1.0, aux_loss_coef=1.0, seq_aux_loss_coef=1.0)
    assert out.topk_weights.isnan().all(-1).tolist() == [False, True, False]
    for loss in (out.z_loss, out.aux_loss, out.seq_aux_loss):
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


def test_normalisation_never_divides_zero_by_zero() -> None:
    """Scores that underflow: a softmax over the chosen does not know, the others divide by 1e-20 more."""
    logits = torch.full((1, 8), -300.0).index_fill_(1, torch.tensor([5]), 300.0)
    bias = torch.zeros(8)
    bias[5] = -10.0  # the expert that holds all of the softmax is not chosen
    out = moe_router(logits, 2, e_score_correction_bias=bias)
    assert out.topk_weights.tolist() == [[0.5, 0.5]]
    for scoring_func in ("sigmoid", "sqrtsoftplus"):
        out = moe_router(torch.full((1, 8), -1000.0), 2, scoring_func=scoring_func)
        assert out.topk_weights.tolist() == [[0.0, 0.0]]


# --- groups and bias: the traps of DeepSeek-V3's gate ---


def test_experts_of_losing_groups_stay_out_when_every_key_is_negative() -> None:
    """Trap 1: losers masked with 0 beat winners whose biased score is below 0."""
    gate = GATES["deepseek_v3"]
    logits = torch.randn(64, 256)
    bias = torch.randn(256) * 0.1 - 1.5
    out = moe_router(logits, 8, **gate.options(bias))
    assert_best(logits, out.topk_ids, gate, bias)
    key = torch.sigmoid(logits) + bias
    value = key.view(64, 8, 32).topk(2).values.sum(-1)
    kept = torch.zeros(64, 8, dtype=torch.bool).scatter(1, value.topk(4).indices, True)
    assert kept.gather(1, out.topk_ids.long() // 32).all()
    zeroed = key.masked_fill(~kept.repeat_interleave(32, 1), 0.0).topk(8).indices
    assert not kept.gather(1, zeroed // 32).all()  # the fault would show on this data


def test_losing_groups_stay_out_even_behind_minus_infinity_and_nan() -> None:
    logits = torch.full((2, 8), 1.0)
    logits[:, 4:6] = torch.tensor([9.0, -INF])  # the third of four groups wins by its best
    logits[1, 5] = NAN
    out = moe_router(logits, 2, scoring_func="topk_softmax", n_group=4, topk_group=1, group_score="max")
    assert out.topk_ids.tolist() == [[4, 5], [4, 5]]


def test_ties_between_groups() -> None:
    logits = torch.zeros(1, 16)
    out = moe_router(logits, 4, scoring_func="sigmoid", n_group=8, topk_group=3)
    assert out.topk_ids.tolist() == [[0, 1, 2, 3]]
    logits[0, 9] = 1.0
    out = moe_router(logits, 4, scoring_func="sigmoid", n_group=8, topk_group=3)
    assert out.topk_ids.tolist() == [[9, 0, 1, 2]]


def test_group_scores() -> None:
    """One strong expert wins by "max", two good ones by the sum of two."""
    logits = torch.tensor([[5.0, -5.0, -5.0, 1.0, 1.0, -5.0]])
    options = {"scoring_func": "topk_softmax", "n_group": 2, "topk_group": 1}
    assert moe_router(logits, 1, group_score="max", **options).topk_ids.tolist() == [[0]]
    assert moe_router(logits, 1, group_score="top2_sum", **options).topk_ids.tolist() == [[3]]
    narrow = moe_router(torch.tensor([[3.0, 1.0, 2.0]]), 2, scoring_func="topk_softmax", n_group=3, topk_group=2)
    assert narrow.topk_ids.tolist() == [[0, 2]]  # groups of one have no second


def test_the_bias_keeps_its_digits() -> None:
    """Trap 2: rounded to bf16 it would change the sets of many tokens; so bf16 is refused, and float32 kept."""
    gate = GATES["kimi_k2"]
    logits = torch.randn(200, gate.experts)
    bias = torch.randn(gate.experts) * 0.05 + 2.5
    out = moe_router(logits, gate.top_k, **gate.options(bias))
    assert_best(logits, out.topk_ids, gate, bias)
    rounded = moe_router(logits, gate.top_k, **gate.options(bias.bfloat16().float()))
    changed = (out.topk_ids.sort(-1).values != rounded.topk_ids.sort(-1).values).any(-1)
    assert changed.float().mean() > 0.2


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_weights_are_scores_and_not_keys_less_the_bias(scoring_func: str) -> None:
    """Trap 3: key - bias has lost the score's last bits, and train and rollout differ."""
    logits = torch.randn(50, 64)
    bias = torch.randn(64) + 8.0
    out = moe_router(logits, 6, scoring_func=scoring_func, e_score_correction_bias=bias, norm_topk_prob=False)
    plain = moe_router(logits, 6, scoring_func=scoring_func, norm_topk_prob=False, replay_ids=out.topk_ids)
    assert torch.equal(out.topk_weights, plain.topk_weights)
    score = weights_at(logits, out.topk_ids, GATES["llama4"].with_(scoring_func=scoring_func))
    at = bias[out.topk_ids.long()]
    assert not torch.equal((score + at) - at, score)  # the fault would show on this data


# --- masks, counts, sizes ---


@pytest.mark.parametrize("numbers", [torch.bool, torch.int32, torch.float32])
def test_masked_tokens_count_nowhere_whatever_they_hold(numbers: torch.dtype) -> None:
    live = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    logits = torch.randn(6, 16)
    logits[1], logits[3], logits[4, 2] = NAN, INF, NAN
    replay = torch.randint(16, (6, 1))
    replay[~live] = 99  # no route, and no matter
    ends = torch.tensor([0, 2, 4, 6])
    options = {"z_loss_coef": 1.0, "aux_loss_coef": 1.0, "seq_aux_loss_coef": 1.0}
    leaf = logits.requires_grad_()
    out = moe_router(leaf, 1, token_mask=live.to(numbers), replay_ids=replay, cu_seqlens=ends, **options)
    (gradient,) = torch.autograd.grad(out.topk_weights.sum() + out.z_loss + out.aux_loss + out.seq_aux_loss, leaf)
    alone = leaf.detach()[live].requires_grad_()
    same = moe_router(alone, 1, replay_ids=replay[live], cu_seqlens=torch.tensor([0, 1, 2, 3]), **options)
    (expected,) = torch.autograd.grad(same.topk_weights.sum() + same.z_loss + same.aux_loss + same.seq_aux_loss, alone)
    assert (out.topk_ids[~live] == -1).all()
    assert (out.topk_weights[~live] == 0).all()
    assert (gradient[~live] == 0).all()
    assert torch.equal(out.topk_ids[live], same.topk_ids)
    assert torch.equal(out.tokens_per_expert, same.tokens_per_expert)
    torch.testing.assert_close(gradient[live], expected)
    for a, b in ((out.z_loss, same.z_loss), (out.aux_loss, same.aux_loss), (out.seq_aux_loss, same.seq_aux_loss)):
        torch.testing.assert_close(a, b)
    assert out.replay_mismatch == same.replay_mismatch


def test_nothing_is_routed() -> None:
    for logits, mask in ((torch.randn(0, 8), None), (torch.full((3, 8), NAN), torch.zeros(3))):
        leaf = logits.requires_grad_()
        out = moe_router(leaf, 2, token_mask=mask, z_loss_coef=1.0, aux_loss_coef=1.0, seq_aux_loss_coef=1.0)
        assert out.tokens_per_expert.tolist() == [0] * 8
        assert [out.z_loss.item(), out.aux_loss.item(), out.seq_aux_loss.item(), out.replay_mismatch.item()] == [
            0.0
        ] * 4
        assert (out.topk_ids == -1).all()
        (gradient,) = torch.autograd.grad(out.z_loss + out.aux_loss + out.seq_aux_loss + out.topk_weights.sum(), leaf)
        assert (gradient == 0).all()


def test_one_token_and_all_tokens_to_one_expert() -> None:
    logits = torch.zeros(1000, 300)
    logits[:, 299] = 5.0
    for part in (logits, logits[:1]):
        out = moe_router(part, 1, routed_scaling_factor=2.5)
        assert (out.topk_ids == 299).all()
        assert (out.topk_weights == 2.5).all()  # K = 1: the scaling still applies
        assert out.tokens_per_expert.tolist() == [0] * 299 + [part.shape[0]]


def test_high_ids_are_reached() -> None:
    """A kernel for 256 experts would never choose the others."""
    logits = torch.arange(1024.0).expand(3, 1024)
    out = moe_router(logits, 32)
    assert out.topk_ids.tolist() == [list(range(1023, 991, -1))] * 3


@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_options_reach_the_weights(scoring_func: str) -> None:
    logits = torch.randn(7, 12)
    out = moe_router(logits, 3, scoring_func=scoring_func, routed_scaling_factor=3.0)
    torch.testing.assert_close(out.topk_weights.sum(-1), torch.full((7,), 3.0))
    raw = moe_router(logits, 3, scoring_func=scoring_func, routed_scaling_factor=3.0, norm_topk_prob=False)
    gate = GATES["llama4"].with_(scoring_func=scoring_func, routed_scaling_factor=3.0)
    torch.testing.assert_close(raw.topk_weights, weights_at(logits, out.topk_ids, gate))
    assert torch.equal(raw.topk_weights, out.topk_weights) == (scoring_func == "topk_softmax")


# --- replay ---


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "gpt_oss", "qwen2"])
def test_replay_keeps_the_slots_and_weighs_by_the_live_logits(name: str, dtype: torch.dtype) -> None:
    gate = GATES[name]
    bias = gate.make_bias()
    recorded = moe_router(torch.randn(30, gate.experts), gate.top_k, **gate.options(bias)).topk_ids
    recorded = recorded[:, torch.randperm(gate.top_k)]  # the rollout's order of slots need not be ours
    logits = torch.randn(30, gate.experts, dtype=torch.float64).requires_grad_()
    out = moe_router(logits, gate.top_k, **gate.options(bias), replay_ids=recorded.to(dtype))
    assert torch.equal(out.topk_ids, recorded)
    expected = weights_at(logits, recorded, gate)
    torch.testing.assert_close(out.topk_weights, expected, rtol=1e-12, atol=1e-14)
    grad = torch.randn(30, gate.top_k, dtype=torch.float64)
    (a,) = torch.autograd.grad(out.topk_weights, logits, grad)
    (b,) = torch.autograd.grad(expected, logits, grad)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    live = moe_router(logits, gate.top_k, **gate.options(bias)).topk_ids
    differ = (live.sort(-1).values != recorded.sort(-1).values).any(-1).sum()
    assert out.replay_mismatch == differ
    assert torch.equal(out.tokens_per_expert, torch.bincount(recorded.reshape(-1), minlength=gate.experts).int())


def fill(replayed: list[int], live: list[int]) -> list[int]:
    """Slots of -1 get, in order, the best live experts that are not replayed."""
    spare = iter([i for i in live if i not in replayed])
    return [next(spare) if i == -1 else i for i in replayed]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "every_expert", "largest"])
def test_missing_slots_are_routed_live(name: str) -> None:
    gate = GATES[name]
    bias = gate.make_bias()
    logits = torch.randn(50, gate.experts)
    live = moe_router(logits, gate.top_k, **gate.options(bias)).topk_ids.tolist()
    replay = torch.rand(50, gate.experts).argsort(1)[:, : gate.top_k]
    replay[torch.rand(replay.shape) < 0.5] = -1
    replay[0], replay[1] = -1, torch.tensor(live[1])
    out = moe_router(logits, gate.top_k, **gate.options(bias), replay_ids=replay)
    assert out.topk_ids.tolist() == [fill(r, best) for r, best in zip(replay.tolist(), live, strict=True)]
    pairs = list(zip(replay.tolist(), out.topk_ids.tolist(), live, strict=True))
    assert out.replay_mismatch == sum(max(r) >= 0 and set(ids) != set(best) for r, ids, best in pairs)
    assert out.replay_mismatch.dtype == torch.int32


def test_ids_of_one_byte() -> None:
    logits = torch.randn(4, 256)
    ids = torch.tensor([[255, 0], [1, 200], [128, 127], [7, 254]])
    assert torch.equal(moe_router(logits, 2, replay_ids=ids.to(torch.uint8)).topk_ids, ids.int())
    signed = torch.where(ids > 127, -1, ids)
    out = moe_router(logits, 2, replay_ids=signed.to(torch.int8))
    live = moe_router(logits, 2).topk_ids.tolist()
    assert out.topk_ids.tolist() == [fill(r, best) for r, best in zip(signed.tolist(), live, strict=True)]


def test_ids_of_eight_bytes_do_not_wrap() -> None:
    with pytest.raises(ValueError, match=r"got \[4294967297, 0\] for token 1"):
        moe_router(torch.randn(2, 8), 2, replay_ids=torch.tensor([[0, 1], [2**32 + 1, 0]]))


def test_tails_padded_with_expert_zero_are_no_routes() -> None:
    replay = torch.tensor([[3, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"distinct .* got \[0, 0\] for token 1"):
        moe_router(torch.randn(2, 8), 2, replay_ids=replay)


def test_replay_of_a_recorded_pass_is_that_pass() -> None:
    gate = GATES["deepseek_v3"]
    bias, logits = gate.make_bias(), torch.randn(40, gate.experts)
    first = moe_router(logits, gate.top_k, **gate.options(bias), aux_loss_coef=1.0)
    second = moe_router(logits, gate.top_k, **gate.options(bias), aux_loss_coef=1.0, replay_ids=first.topk_ids)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_recorded_mask_is_replayed_live() -> None:
    """Ids of -1, which masked tokens have, mean routing by the logits where the mask is gone."""
    logits, mask = torch.randn(6, 8), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    recorded = moe_router(logits, 2, token_mask=mask).topk_ids
    assert torch.equal(moe_router(logits, 2, replay_ids=recorded).topk_ids, moe_router(logits, 2).topk_ids)


def test_faulty_replay_where_nothing_can_raise() -> None:
    """The definition on a device that cannot look: the slot is filled, the token is NaN."""
    logits = torch.randn(4, 8).requires_grad_()
    replay = torch.tensor([[1, 1], [9, 2], [-3, 4], [5, 6]])
    asked = router_options.RouterOptions(2, "softmax", 1, 1, "max", True, 1.0, False, False, False)
    weights, ids, *_ = reference.moe_router(logits, None, None, replay, None, asked)
    live: Tensor = moe_router(logits, 2).topk_ids
    wanted = [fill(r, best) for r, best in zip([[1, -1], [-1, 2], [-1, 4], [5, 6]], live.tolist(), strict=True)]
    assert ids.tolist() == wanted
    assert weights.isnan().all(-1).tolist() == [True, True, True, False]
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert gradient.isnan().all(-1).tolist() == [True, True, True, False]
