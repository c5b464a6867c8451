"""Group statistics: the definition, kernels against it, properties, conventions of other trainers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import grpo_kernels
from grpo_kernels import best_of_group, group_advantages, informative_groups
from grpo_kernels.testing import assert_as_accurate

BACKENDS = ["native", "reference"]
NAN = float("nan")

# Every combination of options that means something. Singletons and corrections are crossed with the mean alone.
OPTIONS = [
    {"baseline": b, "normalize_by": n, "aggregation": a, "singleton": s, "correction": c}
    for b, n, a, s, c in itertools.product(
        ("mean", "leave_one_out", "length_weighted", "second_best", "none"),
        ("group", "batch", "batch_tokens", "none"),
        ("sum_then_normalize", "normalize_then_sum"),
        ("zero", "raw"),
        (0, 1),
    )
    if (a == "sum_then_normalize" or n in ("group", "batch_tokens")) and (b == "mean" or c == (s == "zero"))
]


def definition(
    rewards: list[list[float]],
    ids: list[int],
    weights: list[float],
    lengths: list[float],
    *,
    baseline,
    normalize_by,
    aggregation,
    singleton,
    correction,
    eps=1e-4,
    batch_eps=1e-4,
) -> tuple[list[float], list[float], list[float]]:
    """Straight from the docstring, one Python float at a time: independent of the package."""

    by_group = normalize_by == "group" or aggregation == "normalize_then_sum"

    def stats(values: list[float], counts: list[float] | None = None) -> tuple[float, float]:
        counts = counts or [1.0] * len(values)
        size = math.fsum(counts)
        mean = math.fsum(c * v for c, v in zip(counts, values, strict=True)) / size if size else 0.0
        spread = math.fsum(c * (v - mean) ** 2 for c, v in zip(counts, values, strict=True))
        return mean, math.sqrt(spread / (size - correction)) if size > correction else 0.0

    def advantage(value: float, members: list[tuple[float, float]], scale_by: list[float] | None) -> float:
        """Of one value among the (value, length) of the group's scored members."""
        peers = [peer for peer, _ in members]
        mean, std = stats(peers)
        uses_group = baseline != "none" or by_group
        if len(peers) == 1 and singleton == "raw":
            mean, std = 0.0, 1.0
        if len(peers) == 1 and uses_group:
            centred = value if singleton == "raw" else 0.0
        elif baseline == "none":
            centred = value
        elif baseline == "mean":
            centred = value - mean
        elif baseline == "length_weighted":
            tokens = math.fsum(length for _, length in members)
            centred = value - math.fsum(length * peer for peer, length in members) / tokens if tokens else 0.0
        elif baseline == "second_best":
            best, second = sorted(peers, reverse=True)[:2]
            centred = best - second if value == best else 0.0
        else:
            others = math.fsum(peers) - value
            centred = value - others / (len(peers) - 1)
        if normalize_by == "batch":
            return centred / (stats(scale_by or [])[1] + batch_eps) if centred != 0 else 0.0
        if not by_group:
            return centred
        return centred / (std + eps) if centred != 0 else 0.0

    def group_of(i: int) -> list[int]:
        return [j for j in range(len(ids)) if ids[j] == ids[i]]

    def scored(members: list[int], k: int) -> list[tuple[float, float]]:
        return [(rewards[j][k], lengths[j]) for j in members if not math.isnan(rewards[j][k])]

    total = [
        math.fsum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))
        if any(not math.isnan(r) for r in row)
        else NAN
        for row in rewards
    ]
    live = [t for t in total if not math.isnan(t)]
    out, means, stds = [], [], []
    for i, row in enumerate(rewards):
        peers = [(total[j], lengths[j]) for j in group_of(i) if not math.isnan(total[j])]
        mean, std = stats([peer for peer, _ in peers]) if peers else (0.0, 0.0)
        if len(peers) == 1 and singleton == "raw":
            mean, std = 0.0, 1.0
        means.append(mean)
        stds.append(std)
        if math.isnan(total[i]):
            out.append(NAN)
        elif aggregation == "sum_then_normalize":
            out.append(advantage(total[i], peers, live))
        else:
            out.append(
                math.fsum(
                    w * advantage(r, scored(group_of(i), k), None)
                    for k, (w, r) in enumerate(zip(weights, row, strict=True))
                    if not math.isnan(r)
                )
            )
    by_tokens = normalize_by == "batch_tokens"
    if aggregation == "normalize_then_sum" or by_tokens:
        sums = [(o, length if by_tokens else 1.0) for o, length in zip(out, lengths, strict=True) if not math.isnan(o)]
        mean, std = stats([o for o, _ in sums], [count for _, count in sums]) if sums else (0.0, 0.0)
        divisor = math.sqrt(std**2 + batch_eps) if by_tokens else std + batch_eps
        out = [NAN if math.isnan(o) else (o - mean) / divisor if o != mean else 0.0 for o in out]
    return [0.0 if math.isnan(o) else o for o in out], means, stds


def sample_batch() -> tuple[Tensor, Tensor]:
    """24 samples, 3 reward functions, ragged and unsorted groups, a singleton, an unscored group, unscored entries."""
    generator = torch.Generator().manual_seed(7)
    rewards = torch.randn(24, 3, generator=generator)
    rewards[torch.rand(24, 3, generator=generator) < 0.15] = NAN
    ids = torch.randint(-2, 3, (24,), generator=generator)
    ids[5], ids[11], ids[17] = 100, 200, 200
    rewards[11] = rewards[17] = NAN
    rewards[2] = NAN
    rewards[5] = torch.tensor([0.5, NAN, 1.0])
    return rewards, ids


def sample_lengths(batch: int, seed: int = 0) -> Tensor:
    """Of which some are 0, and every eleventh large."""
    lengths = torch.randint(0, 9, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(batch) % 11 == 3, 30_000, lengths)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_definition(backend: str, options: dict) -> None:
    rewards, ids = sample_batch()
    weights, lengths = torch.tensor([1.0, 0.5, 2.0]), sample_lengths(24)
    given = {"group_ids": ids, "reward_weights": weights, "lengths": lengths, **options}
    expected = definition(rewards.double().tolist(), ids.tolist(), weights.tolist(), lengths.tolist(), **options)
    in_double = group_advantages(rewards.double(), **given)
    in_single = group_advantages(rewards, **given)
    for name, double, single, wanted in zip(in_double._fields, in_double, in_single, expected, strict=True):
        exact = torch.tensor(wanted, dtype=torch.float64)
        assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
        assert_as_accurate(double, exact, exact.float(), name=name)
        assert_as_accurate(single, exact, exact.float(), name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group_size", [1, 2, 8, 31, 300])
def test_equal_groups_are_ragged_groups_of_one_size(backend: str, dtype: torch.dtype, group_size: int) -> None:
    rewards = torch.randn(5 * group_size).to(dtype)
    ids = torch.arange(5).repeat_interleave(group_size)
    tokens = {"normalize_by": "batch_tokens", "lengths": sample_lengths(5 * group_size)}
    for options in (
        {},
        {"normalize_by": "batch"},
        {"baseline": "leave_one_out", "normalize_by": "none"},
        {"baseline": "length_weighted", **tokens},
        {"baseline": "second_best"},
    ):
        equal = group_advantages(rewards, group_size=group_size, **options)
        ragged = group_advantages(rewards, group_ids=ids, **options)
        expected = group_advantages(rewards.double(), group_size=group_size, **options)
        for a, b, wanted in zip(equal, ragged, expected, strict=True):
            assert torch.equal(a, b)
            assert_as_accurate(a, wanted, wanted.float())


def test_order_of_samples_does_not_matter(backend: str) -> None:
    rewards, ids = sample_batch()
    permutation = torch.randperm(24)
    lengths = sample_lengths(24)
    tokens = {"baseline": "length_weighted", "normalize_by": "batch_tokens"}
    for options in ({}, {"baseline": "second_best"}, tokens):
        straight = group_advantages(rewards, group_ids=ids, lengths=lengths, **options)
        shuffled = group_advantages(
            rewards[permutation], group_ids=ids[permutation], lengths=lengths[permutation], **options
        )
        torch.testing.assert_close(shuffled.advantages, straight.advantages[permutation])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.3e-5])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_rewards_give_exactly_zero(backend: str, value: float, eps: float) -> None:
    rewards = torch.full((3 * 7,), value)
    for options in (
        {},
        {"normalize_by": "batch"},
        {"aggregation": "normalize_then_sum"},
        {"baseline": "leave_one_out"},
        {"baseline": "length_weighted"},
        {"baseline": "second_best"},
        {"normalize_by": "batch_tokens"},
        {"baseline": "none", "normalize_by": "batch_tokens"},
        {"aggregation": "normalize_then_sum", "normalize_by": "batch_tokens"},
    ):
        out = group_advantages(rewards, group_size=7, eps=eps, lengths=sample_lengths(21), **options)
        assert torch.equal(out.advantages, torch.zeros(21))
        assert torch.equal(out.std, torch.zeros(21))
        assert torch.equal(out.mean, rewards)


@pytest.mark.parametrize("group", [{"group_size": 5}, {"group_ids": torch.tensor([3, 3, 3, 3, 3])}])
def test_equal_weighted_rewards_give_exactly_zero(backend: str, group: dict) -> None:
    """The weighted sum is formed more than once; every time with the same bits."""
    rewards = torch.tensor([[0.1, 0.7, 1 / 3]]).repeat(5, 1)
    weights = torch.tensor([0.3, 1.7, 0.9])
    whitened = {"baseline": "length_weighted", "normalize_by": "batch_tokens", "lengths": sample_lengths(5)}
    for options in ({}, {"normalize_by": "batch"}, {"aggregation": "normalize_then_sum"}, whitened):
        out = group_advantages(rewards, reward_weights=weights, eps=0.0, **group, **options)
        assert torch.equal(out.advantages, torch.zeros(5))


def test_large_offsets_do_not_cancel(backend: str) -> None:
    """E[x^2] - E[x]^2 in float32 would lose everything here."""
    rewards = 1e6 + torch.tensor([0.0, 0.5, 1.0, 0.25])
    exact = group_advantages(rewards.double(), group_size=4).advantages
    assert_as_accurate(group_advantages(rewards, group_size=4).advantages, exact, exact.float())
    assert group_advantages(rewards, group_size=4).advantages.std() > 0.9


def test_trl_and_verl_conventions(backend: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    grouped = rewards.view(2, 3).double()
    trl = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(group_advantages(rewards.double(), group_size=3).advantages, trl, rtol=1e-13, atol=0)
    alone = group_advantages(torch.tensor([2.0]), group_size=1, singleton="raw", eps=1e-6)
    assert alone.advantages.item() == pytest.approx(2.0 / (1.0 + 1e-6), rel=1e-7)
    assert group_advantages(torch.tensor([2.0]), group_size=1).advantages.item() == 0.0


def test_infinite_reward_poisons_its_group_alone(backend: str) -> None:
    rewards = torch.tensor([0.0, float("inf"), 1.0, 0.0, 1.0, 2.0])
    out = group_advantages(rewards, group_size=3)
    clean = group_advantages(rewards[3:], group_size=3)
    assert out.advantages[:3].isnan().all()
    assert torch.equal(out.advantages[3:], clean.advantages)


def test_a_total_that_is_no_number_shows(backend: str) -> None:
    infinity = float("inf")
    rewards, weight = torch.tensor([infinity, 1.0, 2.0]), torch.zeros(1)
    out = group_advantages(rewards, group_size=3, reward_weights=weight, normalize_by="none")
    assert out.advantages.isnan().tolist() == [True, False, False]
    rewards = torch.tensor([[infinity, -infinity], [1.0, 2.0]])
    out = group_advantages(rewards, group_size=1, baseline="leave_one_out", normalize_by="none")
    assert out.advantages.isnan().tolist() == [True, False]


def test_strided_rewards_and_no_gradient(backend: str) -> None:
    base = torch.randn(2, 12)
    out = group_advantages(base.t().requires_grad_(), group_size=4)
    assert torch.equal(out.advantages, group_advantages(base.t().contiguous(), group_size=4).advantages)
    assert not out.advantages.requires_grad


def test_a_group_does_not_depend_on_the_others(backend: str) -> None:
    rewards = torch.randn(8 * 16)
    together = group_advantages(rewards, group_size=16)
    for group in range(8):
        part = slice(group * 16, group * 16 + 16)
        assert torch.equal(group_advantages(rewards[part], group_size=16).advantages, together.advantages[part])


@given(rewards=hnp.arrays("float32", st.integers(1, 8).map(lambda g: g * 4), elements=st.floats(-8, 8, width=16)))
def test_properties(rewards) -> None:
    r = torch.from_numpy(rewards)
    out = group_advantages(r.double(), group_size=4, eps=0.0).advantages.view(-1, 4)
    torch.testing.assert_close(out.sum(1), torch.zeros_like(out[:, 0]), rtol=0, atol=1e-9)
    scaled = group_advantages(r.double() * 4 + 32, group_size=4, eps=0.0).advantages.view(-1, 4)
    torch.testing.assert_close(scaled, out, rtol=1e-9, atol=1e-9)
    leave_one_out = group_advantages(r.double(), group_size=4, baseline="leave_one_out", normalize_by="none").advantages
    mean = group_advantages(r.double(), group_size=4, normalize_by="none").advantages
    torch.testing.assert_close(leave_one_out, mean * 4 / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rewards", "mask", "expected"),
    [
        ([0.0, 1.0, 1.0, 1.0], None, [1, 1, 0, 0]),
        ([0.0, 1e-7, 0.0, 1e-5], None, [0, 0, 1, 1]),
        ([0.0, NAN, 0.0, 1.0], None, [0, 0, 1, 1]),
        ([0.0, 1.0, 0.0, 1.0], [True, False, True, True], [0, 0, 1, 1]),
        ([NAN, NAN, 0.0, float("inf")], None, [0, 0, 1, 1]),
    ],
)
def test_informative_groups(backend: str, rewards: list[float], mask: list[bool] | None, expected: list[int]) -> None:
    flags = None if mask is None else torch.tensor(mask)
    assert informative_groups(torch.tensor(rewards), group_size=2, mask=flags).int().tolist() == expected
    ids = torch.tensor([4, 4, -9, -9])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = informative_groups(
        torch.tensor(rewards)[order], group_ids=ids[order], mask=None if flags is None else flags[order].int()
    )
    assert shuffled.int().tolist() == [expected[i] for i in order]


def test_best_of_group(backend: str) -> None:
    scores = torch.tensor([0.5, 0.9, 0.5, NAN, -float("inf"), 2.0, 2.0, 1.0])
    valid = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    out = best_of_group(scores, 2, group_size=4, valid=valid)
    assert out.rank.tolist() == [1, 0, 2, -1, 2, -1, 0, 1]
    assert out.selected.int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert (out.rank.dtype, out.selected.dtype) == (torch.int32, torch.bool)


def test_best_of_group_of_a_large_ragged_batch(backend: str) -> None:
    scores = torch.randint(0, 50, (1000,)).float()
    ids = torch.randint(0, 7, (1000,))
    rank = best_of_group(scores, 3, group_ids=ids).rank
    for group in range(7):
        members = (ids == group).nonzero().flatten().tolist()
        order = sorted(members, key=lambda i: (-scores[i].item(), i))
        assert rank[order].tolist() == list(range(len(order)))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*OPTIONS[::7], {}], ids=lambda o: "-".join(map(str, o.values())))
def test_cuda_equals_the_reference(options: dict) -> None:
    rewards, ids = sample_batch()
    for kwargs in ({"group_ids": ids.cuda()}, {"group_size": 8}):
        lengths = sample_lengths(24).cuda()
        actual = group_advantages(rewards.cuda(), lengths=lengths, **kwargs, **options)
        with grpo_kernels.backend("reference"):
            expected = group_advantages(rewards.double().cuda(), lengths=lengths, **kwargs, **options)
        for a, b in zip(actual, expected, strict=True):
            assert_as_accurate(a, b, b.float())
    scores = rewards[:, 0]
    expected_rank = best_of_group(scores, 2, group_ids=ids).rank
    assert torch.equal(best_of_group(scores.cuda(), 2, group_ids=ids.cuda()).rank.cpu(), expected_rank)
    expected_flags = informative_groups(scores, group_ids=ids)
    assert torch.equal(informative_groups(scores.cuda(), group_ids=ids.cuda()).cpu(), expected_flags)
