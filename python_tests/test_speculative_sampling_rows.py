"""verify_draft: what holds for every row, whatever its logits, lengths and neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import verify_draft
from grpo_kernels.speculative_sampling import ops

INF, NAN = float("inf"), float("nan")
RULES = ["token", "block"]
BATCH, DRAFTS, VOCAB = 200, 3, 50

pytestmark = pytest.mark.usefixtures("native_cpu")


@pytest.fixture(params=["native", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Any:
    with grpo_kernels.backend(request.param):
        yield


def _problem(far: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    target = (torch.randn(BATCH, DRAFTS + 1, VOCAB) * 2).to(dtype)
    draft = (target[:, :DRAFTS] + torch.randn(BATCH, DRAFTS, VOCAB) * far).to(dtype)
    ids = torch.multinomial(draft.double().softmax(-1).flatten(0, 1), 1).view(BATCH, DRAFTS)
    return target, ids, draft


def _assert_rows_equal(a: Any, b: Any, rows: Tensor) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left[rows], right[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", [*RULES, "greedy"])
def test_accepted_drafts_come_first_then_one_token_then_nothing(mode: str) -> None:
    target, ids, draft = _problem()
    lengths = torch.randint(DRAFTS + 1, (BATCH,))
    out = verify_draft(target, ids, draft_logits=draft, draft_lengths=lengths, mode=mode)
    accepted, place = out.num_accepted[:, None], torch.arange(DRAFTS + 1)
    assert ((out.num_accepted >= 0) & (out.num_accepted <= lengths)).all()
    assert torch.unique(out.num_accepted).numel() > 2
    padded = torch.nn.functional.pad(ids, (0, 1))
    assert torch.equal(out.token_ids[place < accepted], padded[place < accepted])
    last = out.token_ids[place == accepted]
    assert ((last >= 0) & (last < VOCAB)).all()
    assert (out.token_ids[place > accepted] == -1).all()
    assert (out.log_probs[place <= accepted] < 0.0).all()
    assert (out.log_probs[place > accepted] == 0.0).all()


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.3, "top_k": 20, "top_p": 0.8}], ids=["plain", "filtered"])
def test_equal_distributions_accept_everything(mode: str, dtype: torch.dtype, filters: dict[str, Any]) -> None:
    """Even in rows of which rounding could spoil a ratio: p / q is exactly 1."""
    target, _, _ = _problem(dtype=dtype)
    draft = target[:, :DRAFTS].clone()
    ids = draft.argmax(-1)
    out = verify_draft(target, ids, draft_logits=draft, mode=mode, **filters)
    assert (out.num_accepted == DRAFTS).all()
    if not filters:
        any_ids = torch.randint(VOCAB, (BATCH, DRAFTS))
        assert (verify_draft(target, any_ids, draft_logits=draft, mode=mode).num_accepted == DRAFTS).all()


@pytest.mark.parametrize("mode", RULES)
def test_disjoint_supports_reject_the_first_draft(mode: str) -> None:
    target, _, draft = _problem()
    target[..., :20] = -INF
    draft[..., 20:] = -INF
    ids = torch.randint(20, (BATCH, DRAFTS))
    for drafted in (draft, None):
        out = verify_draft(target, ids, draft_logits=drafted, mode=mode)
        assert (out.num_accepted == 0).all()
        assert (out.token_ids[:, 0] >= 20).all()


@pytest.mark.parametrize("mode", RULES)
def test_a_draft_that_the_draft_could_not_have_drawn_is_rejected(mode: str) -> None:
    """q(x) = 0, by its logits or by the filters, also where p(x) = 0."""
    target, ids, draft = _problem()
    draft.scatter_(2, ids[..., None], -INF)
    assert (verify_draft(target, ids, draft_logits=draft, mode=mode).num_accepted == 0).all()
    target[:, :DRAFTS].scatter_(2, ids[..., None], -INF)
    assert (verify_draft(target, ids, draft_logits=draft, mode=mode).num_accepted == 0).all()
    target, _, draft = _problem()
    lowest = draft.argmin(-1)
    assert (verify_draft(target, lowest, draft_logits=draft, top_k=40, mode=mode).num_accepted == 0).all()


def test_greedy_is_greedy_decoding() -> None:
    target, ids, _ = _problem()
    target = target.round()  # equals: the lowest id counts
    likeliest = target.argmax(-1)
    right = torch.rand(BATCH, DRAFTS) < 0.7
    ids = torch.where(right, likeliest[:, :DRAFTS], (likeliest[:, :DRAFTS] + 1) % VOCAB)
    out = verify_draft(target, ids, mode="greedy", temperature=0.8, top_k=1, top_p=0.1)
    for row in range(BATCH):
        emitted: list[int] = []
        for i in range(DRAFTS + 1):
            best = target[row, i].max()
            emitted.append(next(j for j in range(VOCAB) if target[row, i, j] == best))
            if i == DRAFTS or ids[row, i] != emitted[-1]:
                break
        assert out.token_ids[row].tolist() == emitted + [-1] * (DRAFTS + 1 - len(emitted))
        assert out.num_accepted[row] == len(emitted) - 1


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("temperature", [1e-4, 1e-39], ids=["cold", "colder than a reciprocal"])
def test_a_temperature_near_0_is_greedy(mode: str, temperature: float) -> None:
    target, ids, draft = _problem()
    target.scatter_add_(2, target.argmax(-1, keepdim=True), torch.full_like(target, 0.1))  # apart from the others
    likeliest = target.argmax(-1)[:, :DRAFTS]
    ids = torch.where(torch.rand(BATCH, DRAFTS) < 0.7, likeliest, ids)
    cold = verify_draft(target, ids, temperature=temperature, mode=mode)
    greedy = verify_draft(target, ids, mode="greedy")
    assert torch.equal(cold.token_ids, greedy.token_ids)
    assert torch.equal(cold.num_accepted, greedy.num_accepted)
    assert (cold.log_probs > -1e-3).sum() == cold.log_probs.numel()
    sampled = verify_draft(target, draft.argmax(-1), draft_logits=draft, temperature=temperature, mode=mode)
    assert torch.equal(sampled.num_accepted, verify_draft(target, draft.argmax(-1), mode="greedy").num_accepted)


def _kept(logits: Tensor, top_k: int, top_p: float, temperature: float = 1.0) -> set[int]:
    """The filters of one row, token by token."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda j: -logits[j].item())
    limit = logits[ranked[top_k - 1]].item() if 0 < top_k < len(probs) else -INF
    kept = [j for j in ranked if logits[j].item() >= limit]
    total = sum(probs[j] for j in kept)
    return {j for j in kept if sum(probs[i] for i in kept if logits[i] > logits[j]) < top_p * total}


def test_filters_keep_what_they_say() -> None:
    """Seen by what is drawn in 4000 draws of each row, of which no token is rare; equals stay together."""
    generator = torch.Generator().manual_seed(2)
    for top_k, top_p, levels in ((5, 1.0, 30), (0, 0.6, 30), (7, 0.7, 30), (3, 1.0, 4), (0, 0.5, 3), (12, 0.01, 8)):
        logits = torch.randint(levels, (12,), generator=generator).float() / levels
        wanted = _kept(logits, top_k, top_p)
        options = {"top_k": torch.full((4000,), top_k), "top_p": top_p}
        shared, none = logits.expand(4000, 1, 12), torch.empty(4000, 0).long()
        drawn = verify_draft(shared, none, seeds=torch.arange(4000), **options).token_ids
        assert set(drawn.flatten().tolist()) == wanted, (top_k, top_p, levels)
        # The same of the draft: what it leaves out is rejected, of what it keeps equal distributions accept everything.
        both = logits.expand(12, 2, 12)
        every = torch.arange(12)[:, None]
        options["top_k"] = options["top_k"][:12]
        out = verify_draft(both, every, draft_logits=both[:, :1], **options)
        assert {j for j in range(12) if out.num_accepted[j] == 1} == wanted


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_that_is_zero_by_rounding_is_replaced_by_the_target(mode: str, dtype: torch.dtype) -> None:
    """Target and draft are equal but for a token that neither gives a weight; one draft is a token without one."""
    logits = torch.tensor([0.0, 0.5, -2000.0, 0.25], dtype=dtype)
    lower = torch.tensor([0.0, 0.5, -2100.0, 0.25], dtype=dtype)
    target, draft = lower.expand(300, 2, 4), logits.expand(300, 1, 4)
    out = verify_draft(target, torch.full((300, 1), 2), draft_logits=draft, seeds=torch.arange(300), mode=mode)
    assert (out.num_accepted == 0).all()
    assert set(out.token_ids[:, 0].tolist()) == {0, 1, 3}


@pytest.mark.parametrize("mode", RULES)
def test_impossible_tokens_are_never_drawn(mode: str) -> None:
    target, ids, draft = _problem()
    target[..., 1::2] = -INF
    target[:5, :, 1:] = -INF  # one token is left
    out = verify_draft(target, ids, draft_logits=draft, mode=mode)
    emitted = out.token_ids[out.token_ids >= 0]
    assert (emitted % 2 == 0).all()
    assert out.log_probs.isfinite().all()
    assert (out.token_ids[:5, 0] == 0).all()
    assert (out.log_probs[:5] == 0.0).all()


@pytest.mark.parametrize("mode", [*RULES, "greedy"])
@pytest.mark.parametrize("fault", [NAN, INF, -INF], ids=["nan", "inf", "all -inf"])
@pytest.mark.parametrize("of_draft", [False, True], ids=["target", "draft"])
def test_a_broken_row_of_logits_ends_its_sequence_alone(mode: str, fault: float, of_draft: bool) -> None:
    target, _, draft = _problem()
    draft = target[:, :DRAFTS].clone()  # everything is accepted
    ids = target.argmax(-1)[:, :DRAFTS]
    seeds = torch.arange(BATCH)
    whole = verify_draft(target, ids, draft_logits=draft, seeds=seeds, mode=mode)
    place = torch.arange(BATCH) % (DRAFTS + (0 if of_draft else 1))
    hit = torch.arange(BATCH) % 5 == 0
    spoiled = (draft if of_draft else target).clone()
    rows = torch.arange(BATCH)[hit]
    if fault == -INF:
        spoiled[rows, place[hit]] = fault
    else:
        spoiled[rows, place[hit], 17] = fault
    out = verify_draft(
        target if of_draft else spoiled, ids, draft_logits=spoiled if of_draft else draft, seeds=seeds, mode=mode
    )
    _assert_rows_equal(out, whole, ~hit)
    if mode == "greedy" and of_draft:
        return _assert_rows_equal(out, whole, hit)
    first = torch.where((place < DRAFTS) & (mode == "block"), 0, place)
    for row in rows.tolist():
        at = int(first[row])
        assert out.num_accepted[row] == at
        assert out.token_ids[row].tolist() == [*ids[row, :at].tolist(), *[-1] * (DRAFTS + 1 - at)]
        assert out.log_probs[row, at].isnan()
        assert torch.equal(out.log_probs[row, :at], whole.log_probs[row, :at])
        assert (out.log_probs[row, at + 1 :] == 0.0).all()


@pytest.mark.parametrize("mode", [*RULES, "greedy"])
def test_what_lies_behind_a_row_s_drafts_may_be_anything(mode: str) -> None:
    target, ids, draft = _problem()
    lengths = torch.randint(DRAFTS + 1, (BATCH,))
    options = {"draft_lengths": lengths.int(), "seeds": torch.arange(BATCH), "mode": mode, "top_p": 0.95}
    plain = verify_draft(target, ids, draft_logits=draft, **options)
    behind = torch.arange(DRAFTS) >= lengths[:, None]
    ids = torch.where(behind, torch.tensor([2**40, -5, VOCAB]), ids)
    draft[behind] = NAN
    target[:, 1:][behind] = torch.tensor(INF)
    again = verify_draft(target, ids, draft_logits=draft, **options)
    _assert_rows_equal(again, plain, torch.arange(BATCH))
    certain = verify_draft(target, ids, **options)
    assert certain.log_probs.isfinite().all()


@pytest.mark.parametrize("mode", [*RULES, "greedy"])
def test_the_smallest_sizes(mode: str) -> None:
    none = verify_draft(torch.zeros(0, 3, 9), torch.zeros(0, 2).long(), draft_logits=torch.zeros(0, 2, 9), mode=mode)
    assert [tuple(value.shape) for value in none] == [(0, 3), (0,), (0, 3)]
    one = verify_draft(torch.randn(7, 3, 1), torch.zeros(7, 2).int(), draft_logits=torch.randn(7, 2, 1), mode=mode)
    assert one.token_ids.tolist() == [[0, 0, 0]] * 7
    assert one.log_probs.tolist() == [[0.0, 0.0, 0.0]] * 7
    target, _, _ = _problem()
    seeds = torch.arange(BATCH)
    plain = verify_draft(target[:, :1], torch.empty(BATCH, 0).long(), seeds=seeds, mode=mode)
    empty = verify_draft(target, torch.zeros(BATCH, DRAFTS).long(), draft_lengths=seeds * 0, seeds=seeds, mode=mode)
    assert torch.equal(plain.token_ids[:, 0], empty.token_ids[:, 0])
    assert (empty.num_accepted == 0).all()
    assert torch.unique(plain.token_ids).numel() > 20


@pytest.mark.parametrize("mode", [*RULES, "greedy"])
def test_a_row_s_own_numbers_out_of_range_end_it_where_nothing_can_be_raised(mode: str) -> None:
    """As on a GPU: the op of the definition, past the check on the CPU."""
    target, ids, draft = _problem()
    seeds = torch.arange(BATCH)
    numbers = [torch.full((BATCH,), DRAFTS), torch.ones(BATCH), torch.full((BATCH,), 0.9)]
    plain = ops.verify_draft(target, ids, draft, *numbers[:2], None, numbers[2], seeds, None, mode, "reference")
    ids, (lengths, temperatures, top_p) = ids.clone(), (value.clone() for value in numbers)
    lengths[:2] = torch.tensor([-1, DRAFTS + 1])
    temperatures[2:5] = torch.tensor([0.0, NAN, INF])
    top_p[5:8] = torch.tensor([0.0, 1.5, NAN])
    ids[8, 2], ids[9, 0] = VOCAB, -1
    out = ops.verify_draft(target, ids, draft, lengths, temperatures, None, top_p, seeds, None, mode, "reference")
    _assert_rows_equal(out, plain, torch.arange(10, BATCH))
    assert (out[0][:10] == -1).all()
    assert (out[1][:10] == 0).all()
    assert out[2][:10, 0].isnan().all()
    assert (out[2][:10, 1:] == 0.0).all()


def test_nothing_is_differentiable() -> None:
    target, ids, draft = _problem()
    out = verify_draft(target.requires_grad_(), ids, draft_logits=draft.requires_grad_())
    assert not any(value.requires_grad for value in out)


def test_numbers_change_without_recompiling() -> None:
    """Ten temperatures, top_k and top_p, ten batches: at most two graphs."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def call(target: Tensor, ids: Tensor, seeds: Tensor, temperature: float, top_k: int, top_p: float) -> Any:
        return verify_draft(target, ids, seeds=seeds, temperature=temperature, top_k=top_k, top_p=top_p)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=count, fullgraph=True)
    target, ids, _ = _problem()
    for i in range(10):
        rows = slice(0, 20 + i)
        numbers = (target[rows], ids[rows], torch.arange(20 + i), 0.5 + 0.1 * i, 5 + i, 0.5 + 0.04 * i)
        _assert_rows_equal(compiled(*numbers), call(*numbers), torch.arange(20 + i))
    assert graphs <= 2


def test_seeds_are_drawn_in_a_compiled_graph() -> None:
    target, ids, _ = _problem()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, i: verify_draft(x, i), backend="aot_eager", fullgraph=True)
    first, second = compiled(target, ids), compiled(target, ids)
    assert (first.token_ids != second.token_ids).any()
    assert (first.num_accepted <= DRAFTS).all()
    assert (first.token_ids[:, 0] >= 0).all()


@pytest.mark.parametrize("mode", RULES)
def test_a_logit_out_of_range_of_the_largest_has_probability_zero(mode: str) -> None:
    """3e38 and -3e38 are further apart than float32 reaches: the draft cannot have drawn that token."""
    target = torch.tensor([[[3e38, -3e38, 0.0], [0.0, 0.0, 0.0]]])
    out = verify_draft(target, torch.tensor([[1]]), draft_logits=target[:, :1], seeds=torch.tensor([0]), mode=mode)
    assert out.token_ids.tolist() == [[0, -1]]
    assert out.log_probs.tolist() == [[0.0, 0.0]]


def test_a_huge_temperature_is_none_the_less_a_number() -> None:
    logits = torch.tensor([[[1.0, -math.inf, -1.0]]]).expand(64, 1, 3)
    torch.set_flush_denormal(True)
    try:
        out = verify_draft(logits, torch.empty(64, 0).long(), temperature=3e38)
    finally:
        torch.set_flush_denormal(False)
    assert set(out.token_ids[:, 0].tolist()) == {0, 2}
    torch.testing.assert_close(out.log_probs, torch.full((64, 1), -math.log(2.0)))


def test_numbers_that_no_dtype_holds() -> None:
    logits, none = torch.randn(2, 1, 5), torch.empty(2, 0).long()
    with pytest.raises(ValueError, match=r"temperature\[0\] must be finite and > 0, got inf"):
        verify_draft(logits, none, temperature=1e39)
    seeds = torch.arange(2)
    every = verify_draft(logits, none, seeds=seeds)
    for off in (2**70, 0, -1):
        assert torch.equal(verify_draft(logits, none, seeds=seeds, top_k=off).token_ids, every.token_ids)
    with pytest.raises(ValueError, match=r"draft_ids\[1, 0\] must be in \[0, V\) = \[0, 5\), got 123456789"):
        verify_draft(torch.randn(2, 2, 5), torch.tensor([[0], [123456789]]))
