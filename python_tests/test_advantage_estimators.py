"""Advantage estimators of trainers, in float64 with their masks and loops, against the arguments that the docs name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import group_advantages
from grpo_kernels.testing import assert_as_accurate
from python_tests.test_group_advantages import NAN

TOKENS = 9


class Batch:
    """40 responses with two rewards each, to 7 prompts in any order, with ties, an equal group and a prompt of one."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.ids = torch.randint(-3, 3, (40,), generator=generator)
        self.rewards = torch.randint(0, 4, (40, 2), generator=generator).double() / 3 - 0.25
        self.rewards[self.ids == 2] = 1 / 3
        self.ids[13] = 1000
        self.lengths = torch.randint(0, TOKENS + 1, (40,), generator=generator)
        self.lengths[self.ids == -3] = TOKENS
        self.mask = (torch.arange(TOKENS) < self.lengths[:, None]).double()
        self.total = self.rewards.sum(1)

    def by_group(self, rewards: Tensor, advantage: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """[B]. `advantage(rewards, lengths)` of every group of two or more; the reward itself for one alone."""
        result = rewards.clone()
        for identity in self.ids.unique():
            members = self.ids == identity
            if members.sum() > 1:
                result[members] = advantage(rewards[members], self.lengths[members].double())
        return result


BATCH = Batch()
WITHOUT_ONE_ALONE = BATCH.ids != 1000


def grpo(rewards: Tensor, eps: float) -> Tensor:
    grouped = BATCH.by_group(rewards, lambda r, _: (r - r.mean()) / (r.std() + eps))
    return torch.where(WITHOUT_ONE_ALONE, grouped, grouped / (1.0 + eps))


def rloo(rewards: Tensor) -> Tensor:
    return BATCH.by_group(rewards, lambda r, _: r - (r.sum() - r) / (len(r) - 1))


def length_weighted(rewards: Tensor) -> Tensor:
    return BATCH.by_group(rewards, lambda r, n: r - (n * r).sum() / n.sum())


def second_best(rewards: Tensor, eps: float | None) -> Tensor:
    def advantage(r: Tensor, _: Tensor) -> Tensor:
        (first, second), (best, _) = torch.topk(r, 2)
        return (torch.arange(len(r)) == best) * (first - second) / (1.0 if eps is None else r.std() + eps)

    return BATCH.by_group(rewards, advantage)


def whitened(x: Tensor, correction: int, eps: float = 0.0, floor: float = 0.0) -> Tensor:
    """[B]. `x` of every token, brought to mean 0 and variance 1 over the live tokens."""
    values, mask = x[:, None].expand(-1, TOKENS), BATCH.mask
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / (count - correction)
    return x.sub(mean) * (variance.clamp(min=floor) + eps).rsqrt()


def centred(rewards: Tensor) -> Tensor:
    return BATCH.by_group(rewards, lambda r, _: r - r.mean())


def verl_gdpo() -> Tensor:
    return whitened(grpo(BATCH.rewards[:, 0], 1e-6) + 0.5 * grpo(BATCH.rewards[:, 1], 1e-6), 1, eps=1e-8)


def nemo_gdpo() -> Tensor:
    summed = torch.zeros(40, dtype=torch.float64)
    for k in range(2):
        summed += torch.where(WITHOUT_ONE_ALONE, grpo(BATCH.rewards[:, k], 1e-6), 0.0)
    return (summed - summed.mean()) / summed.std()


TOKENWISE = {"normalize_by": "batch_tokens"}
NONE, RAW = {"normalize_by": "none"}, {"singleton": "raw"}
LOO, OPO, SECOND = ({"baseline": name} for name in ("leave_one_out", "length_weighted", "second_best"))
GDPO = {"aggregation": "normalize_then_sum"}
WEIGHTS = {"reward_weights": torch.tensor([1.0, 0.5], dtype=torch.float64)}

# (name, advantages of BATCH, arguments)
ESTIMATORS: list[tuple[str, Tensor, dict[str, Any]]] = [
    ("verl_grpo", grpo(BATCH.total, 1e-6), {"eps": 1e-6, **RAW}),
    ("verl_rloo", rloo(BATCH.total), {**LOO, **NONE, **RAW}),
    ("verl_rloo_vectorized", rloo(BATCH.total) * WITHOUT_ONE_ALONE, {**LOO, **NONE}),
    ("verl_opo", length_weighted(BATCH.total), {**OPO, **NONE, **RAW}),
    ("verl_grpo_passk", second_best(BATCH.total, 1e-6) * WITHOUT_ONE_ALONE, {**SECOND, "eps": 1e-6}),
    ("verl_grpo_passk_plain", second_best(BATCH.total, None) * WITHOUT_ONE_ALONE, {**SECOND, **NONE}),
    (
        "verl_reinforce_plus_plus_baseline",
        whitened(centred(BATCH.total), 1, eps=1e-8),
        {**TOKENWISE, **RAW, "batch_eps": 1e-8},
    ),
    (
        "verl_reinforce_plus_plus",
        whitened(BATCH.total, 1, eps=1e-8),
        {"baseline": "none", **TOKENWISE, "batch_eps": 1e-8},
    ),
    ("verl_gdpo", verl_gdpo(), {**GDPO, **TOKENWISE, **RAW, **WEIGHTS, "eps": 1e-6, "batch_eps": 1e-8}),
    ("verl_gpg", centred(BATCH.total), {**NONE, **RAW}),
    ("openrlhf_group_norm", grpo(BATCH.total, 1e-9) * WITHOUT_ONE_ALONE, {"eps": 1e-9}),
    (
        "openrlhf_reinforce_baseline",
        whitened(centred(BATCH.total) * WITHOUT_ONE_ALONE, 0, floor=1e-8),
        {**TOKENWISE, "correction": 0, "eps": 0.0},
    ),
    ("nemo_rl_gdpo", nemo_gdpo(), {**GDPO, "eps": 1e-6, "batch_eps": 0.0}),
    (
        "nemo_rl_raw_reward",
        whitened(BATCH.total, 0, floor=1e-8),
        {"baseline": "none", **TOKENWISE, "correction": 0, "eps": 0.0},
    ),
]


@pytest.mark.parametrize(("name", "expected", "options"), ESTIMATORS, ids=[row[0] for row in ESTIMATORS])
@pytest.mark.parametrize("lengths_dtype", [torch.int64, torch.float32])
def test_equals_the_estimator(
    backend: str, lengths_dtype: torch.dtype, name: str, expected: Tensor, options: dict[str, Any]
) -> None:
    rewards = BATCH.rewards if "aggregation" in options else BATCH.total
    lengths = BATCH.lengths.to(lengths_dtype)
    out = group_advantages(rewards, group_ids=BATCH.ids, lengths=lengths, **options)
    torch.testing.assert_close(out.advantages, expected, rtol=1e-12, atol=1e-12)
    assert_as_accurate(out.advantages.float(), expected, expected.float(), name=name)


def test_length_weighted_by_hand(backend: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0])
    lengths = torch.tensor([30, 10, 0, 0, 7], dtype=torch.int32)
    options = {"baseline": "length_weighted", "normalize_by": "none", "group_ids": torch.tensor([1, 1, 2, 2, 3])}
    out = group_advantages(rewards, lengths=lengths, **options)
    assert out.advantages.tolist() == [0.25, -0.75, 0.0, 0.0, 0.0]  # 30/40; no tokens; no peers
    assert out.mean.tolist() == [0.5, 0.5, 0.5, 0.5, 5.0]
    assert group_advantages(rewards, lengths=lengths, singleton="raw", **options).advantages[4] == 5.0


def test_second_best_by_hand(backend: str) -> None:
    groups = torch.tensor([[1.0, 3.0, 2.5, -9.0], [2.0, 2.0, 1.0, 0.0], [NAN, 0.5, 0.25, NAN], [NAN, NAN, 7.0, NAN]])
    expected = torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0] * 4, [0.0, 0.25, 0.0, 0.0], [0.0] * 4])
    options = {"baseline": "second_best", "normalize_by": "none"}
    out = group_advantages(groups.flatten(), group_size=4, **options)
    assert torch.equal(out.advantages.view(4, 4), expected)
    raw = group_advantages(groups.flatten(), group_size=4, singleton="raw", **options)
    assert raw.advantages.view(4, 4)[3].tolist() == [0.0, 0.0, 7.0, 0.0]


def test_whitening_over_tokens_is_that_of_repeated_samples(backend: str) -> None:
    """A response of n tokens counts as n responses of one: mean 0 and variance 1 over the tokens."""
    lengths = torch.tensor([3, 0, 1, 2, 5, 1])
    rewards = torch.randn(6, dtype=torch.float64)
    options = {"baseline": "none", "normalize_by": "batch_tokens", "group_size": 6, "eps": 0.0}
    advantages = group_advantages(rewards, lengths=lengths, **options).advantages
    repeated = advantages.repeat_interleave(lengths)
    torch.testing.assert_close(repeated.mean(), torch.zeros_like(repeated[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(repeated.var(), torch.ones_like(repeated[0]), rtol=1e-12, atol=0)
    alone = group_advantages(rewards.repeat_interleave(lengths), lengths=torch.ones(12), **{**options, "group_size": 1})
    torch.testing.assert_close(alone.advantages, repeated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [0, 1, 0, 0]])
def test_a_batch_without_a_variance_of_tokens(backend: str, lengths: list[int]) -> None:
    options = {"baseline": "none", "normalize_by": "batch_tokens", "group_size": 2, "eps": 0.25}
    out = group_advantages(torch.tensor([1.0, 1.0, 1.0, 1.0]), lengths=torch.tensor(lengths), **options)
    mean = float(any(lengths))
    assert out.advantages.tolist() == [2.0 * (1.0 - mean)] * 4


@pytest.mark.parametrize("bad", [-1.0, NAN, float("inf")])
def test_what_is_no_length_shows(backend: str, bad: float) -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    lengths = torch.tensor([2.0, bad, 3.0, 1.0])
    opo = group_advantages(rewards, lengths=lengths, group_size=2, baseline="length_weighted").advantages
    assert opo[:2].isnan().all()
    assert opo[2:].isfinite().all()
    assert group_advantages(rewards, lengths=lengths, group_size=2, normalize_by="batch_tokens")[0].isnan().all()
    unscored = torch.tensor([0.0, NAN, 0.0, 1.0])
    clean = group_advantages(unscored, lengths=torch.tensor([2, 7, 3, 1]), group_size=2, normalize_by="batch_tokens")
    assert torch.equal(
        group_advantages(unscored, lengths=lengths, group_size=2, normalize_by="batch_tokens")[0], clean[0]
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_rewards(backend: str, sign: float) -> None:
    rewards = torch.tensor([0.0, sign * float("inf"), 1.0, 0.0, 1.0, 2.0])
    for options in (
        {"baseline": "second_best"},
        {"baseline": "second_best", "normalize_by": "none"},
        {"baseline": "length_weighted"},
    ):
        lengths = torch.tensor([2, 3, 1, 4, 4, 2])
        out = group_advantages(rewards, group_size=3, lengths=lengths, **options)
        clean = group_advantages(rewards[3:], group_size=3, lengths=lengths[3:], **options)
        assert out.advantages[:3].isnan().all()
        assert torch.equal(out.advantages[3:], clean.advantages)
    without_tokens = {"lengths": torch.tensor([2, 0, 1, 4, 4, 2]), "group_size": 3, "normalize_by": "none"}
    opo = group_advantages(rewards, baseline="length_weighted", **without_tokens).advantages
    assert opo[[0, 2]].tolist() == pytest.approx([-1 / 3, 2 / 3])
    rewards[0] = -rewards[1]  # infinities of both signs
    assert group_advantages(rewards, group_size=3, baseline="second_best").advantages[:3].isnan().all()


def test_large_offsets_and_lengths_do_not_cancel(backend: str) -> None:
    rewards = 1e6 + torch.tensor([0.0, 0.5, 1.0, 0.25])
    lengths = torch.tensor([10**9, 3, 2**31 + 5, 1])
    for options in ({"baseline": "length_weighted"}, {"normalize_by": "batch_tokens", "baseline": "none"}):
        exact = group_advantages(rewards.double(), group_size=4, lengths=lengths, **options).advantages
        actual = group_advantages(rewards, group_size=4, lengths=lengths, **options).advantages
        assert_as_accurate(actual, exact, exact.float())
        offset_free = group_advantages(rewards.double() - 1e6, group_size=4, lengths=lengths, **options).advantages
        torch.testing.assert_close(exact, offset_free, rtol=1e-9, atol=1e-9)


def test_strided_lengths_and_empty_batches(backend: str) -> None:
    rewards, lengths = torch.randn(8), torch.arange(16)[::2]
    options = {"baseline": "length_weighted", "normalize_by": "batch_tokens"}
    strided = group_advantages(rewards, lengths=lengths, group_size=4, **options)
    dense = group_advantages(rewards, lengths=lengths.clone(), group_size=4, **options)
    assert torch.equal(strided.advantages, dense.advantages)
    empty = group_advantages(rewards[:0], lengths=lengths[:0], group_size=4, **options)
    assert [tensor.shape for tensor in empty] == [(0,)] * 3
