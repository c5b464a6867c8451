"""Dynamic sampling in the training example: which groups a step learns from, and that all of a group stays together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.policy.draft import DraftCounts
from examples.r1.policy.rollout import Rollout
from examples.r1.policy.routes import Routes
from examples.r1.stages import grpo, rewards
from examples.r1.stages.grpo import DiverseRL, ReasoningRL, RLStage, Samples
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from examples.r1.tasks import Problem
from grpo_kernels import RouterReplay
from python_tests.r1_stages import DIGITS, WORDS, one_thread, tiny_run

__all__ = ["one_thread"]

WANTED, GROUP = 4, 4


class Rounds:
    """Watches the rounds of a stage's sampling, and says itself which of their groups are informative."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, informative: Sequence[Sequence[int]]) -> None:
        self.rollouts: list[Rollout] = []
        self.tables: list[Tensor] = []
        self.informative = informative
        self._roll_out: Callable[..., Rollout] = grpo.roll_out
        monkeypatch.setattr(grpo, "roll_out", self.roll_out)
        monkeypatch.setattr(rewards, "training_rewards", self.training_rewards)

    def roll_out(self, *arguments: Any, **options: Any) -> Rollout:
        found = self._roll_out(*arguments, **options)
        self.rollouts.append(
            found._replace(rulings=torch.rand(found.rulings.shape))
        )  # of an untrained policy all are 0
        return self.rollouts[-1]

    def training_rewards(self, rulings: Tensor, *_: object) -> Tensor:
        """Accuracy differs in the informative groups; the column of the format numbers the samples of all rounds."""
        round_ = len(self.tables)
        table = torch.full((len(rulings), 4), rewards.NOT_SCORED)
        table[:, rewards.FORMAT] = torch.arange(len(rulings)) + 1000.0 * round_
        groups = torch.isin(torch.arange(WANTED), torch.tensor(self.informative[round_], dtype=torch.int64))
        table[:, rewards.ACCURACY] = (
            groups.repeat_interleave(GROUP) & (torch.arange(len(rulings)) % GROUP == 2)
        ).float()
        self.tables.append(table)
        return table


def _stage(**changes: Any) -> RLStage:
    run = tiny_run(**changes)
    return ReasoningRL(run.build_policy(), run)


def _chosen(samples: Samples) -> list[tuple[int, int]]:
    """Round and group of each group, as the rewards tell."""
    numbers = samples.rewards[:, rewards.FORMAT].view(-1, GROUP).long()
    assert torch.equal(numbers, numbers[:, :1] + torch.arange(GROUP))  # whole groups, in order
    return [(number // 1000, number % 1000 // GROUP) for number in numbers[:, 0].tolist()]


@pytest.mark.parametrize(
    ("most", "informative", "rounds", "chosen"),
    [
        (1, [[1]], 1, [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (3, [[0, 1, 2, 3], [], []], 1, [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (3, [[1, 3], [0, 1, 2], []], 2, [(0, 1), (0, 3), (1, 0), (1, 1)]),
        (2, [[1, 3], [0, 1]], 2, [(0, 1), (0, 3), (1, 0), (1, 1)]),
        (2, [[3], [2]], 2, [(0, 0), (0, 1), (0, 3), (1, 2)]),  # filled up with the first that teach nothing
        (3, [[], [1], [0, 2]], 3, [(0, 0), (1, 1), (2, 0), (2, 2)]),
        (3, [[], [], []], 3, [(0, 0), (0, 1), (0, 2), (0, 3)]),
    ],
)
def test_informative_groups_come_first_and_keep_their_order(
    most: int,
    informative: list[list[int]],
    rounds: int,
    chosen: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = _stage(dynamic_sampling=most)
    watched = Rounds(monkeypatch, informative)
    samples = stage.sample(5)
    assert samples.rounds == rounds == len(watched.rollouts)
    assert len({tuple(problem.prompt for problem in rollout.problems) for rollout in watched.rollouts}) == rounds
    assert _chosen(samples) == chosen
    assert samples.informative == sum(map(len, informative[:rounds])) / (WANTED * rounds)
    assert [problem.prompt for problem in samples.rollout.problems] == [
        watched.rollouts[round_].problems[group].prompt for round_, group in chosen
    ]


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> tuple[RLStage, Rounds, Samples]:
    """Groups 1 and 3 of a first round and 0 and 2 of a second, of an MoE model that drafts, in float64."""
    stage = _stage(dynamic_sampling=2, model="moe", mtp=2)
    stage.model.double()
    watched = Rounds(monkeypatch, [[1, 3], [0, 2]])
    samples = stage.sample(0)
    assert _chosen(samples) == [(0, 1), (0, 3), (1, 0), (1, 2)]
    return stage, watched, samples


def _routes(routes: Routes | None, prompts: int) -> list[Tensor]:
    """Experts by prompt, [N, ...], of the prompts' tokens and of the completions'."""
    assert routes is not None
    replays = (routes.prompts, routes.completions)
    return [replay.pack().view(prompts, -1) for replay in replays if replay is not None]


def test_all_that_belongs_to_a_group_stays_together(mixed: tuple[RLStage, Rounds, Samples]) -> None:
    _, watched, samples = mixed
    found = samples.rollout
    for place, (round_, group) in enumerate(_chosen(samples)):
        source = watched.rollouts[round_]
        own, old = (slice(index * GROUP, (index + 1) * GROUP) for index in (place, group))
        assert found.problems[place] == source.problems[group]
        assert found.texts[own] == source.texts[old]
        assert torch.equal(found.sequences.prompts[place], source.sequences.prompts[group])
        for name in ("completions", "mask"):
            assert torch.equal(getattr(found.sequences, name)[own], getattr(source.sequences, name)[old])
        torch.testing.assert_close(found.rulings[own], source.rulings[old], rtol=0, atol=0, equal_nan=True)
        assert found.log_probs is not None
        assert source.log_probs is not None
        assert torch.equal(found.log_probs[own], source.log_probs[old])
        torch.testing.assert_close(samples.rewards[own], watched.tables[round_][old], rtol=0, atol=0, equal_nan=True)
        routes = zip(_routes(found.routes, WANTED), _routes(source.routes, WANTED), strict=True)
        assert all(torch.equal(mine[place], theirs[group]) for mine, theirs in routes)
    assert len({tuple(row.tolist()) for row in found.sequences.completions}) > 12  # or there would be little to mix up


def test_routes_and_log_probs_are_those_of_the_samples_they_stand_beside(
    mixed: tuple[RLStage, Rounds, Samples],
) -> None:
    """Live routing of the chosen samples would go the same ways, and their log-probs are the model's."""
    stage, _, samples = mixed
    rollout = samples.rollout
    assert rollout.routes is not None
    assert rollout.log_probs is not None
    routes = rollout.routes.again()
    stage.model.completion_hidden(rollout.sequences.prompts, rollout.sequences.completions, routes)
    assert routes.metrics(2)["route_mismatch"] == 0.0
    expected = sequence_log_probs(stage.model, rollout.sequences, stage.temperature)
    torch.testing.assert_close(rollout.log_probs, expected.to(rollout.log_probs.dtype), rtol=1e-5, atol=1e-6)


def test_drafts_of_all_rounds_are_counted(mixed: tuple[RLStage, Rounds, Samples]) -> None:
    _, watched, samples = mixed
    first, second = (rollout.drafts for rollout in watched.rollouts)
    assert first is not None
    assert second is not None
    assert samples.rollout.drafts == DraftCounts(
        first.tokens + second.tokens,
        first.passes + second.passes,
        [mine + other for mine, other in zip(first.looked_at, second.looked_at, strict=True)],
        [mine + other for mine, other in zip(first.accepted, second.accepted, strict=True)],
    )
    assert first.tokens == int(watched.rollouts[0].sequences.mask.sum())


def test_routes_are_selected_and_joined_by_prompt() -> None:
    """Three prompts of two tokens, two completions each of three routed tokens, two layers, two experts a token."""

    def routes(first: int) -> Routes:
        prompts, completions = (torch.arange(count) + first for count in (6, 18))
        replays = [
            RouterReplay.from_packed(
                torch.stack((tokens, tokens + 1), dim=-1)[:, None].expand(-1, 2, -1) % 64, 64, [0, 1]
            )
            for tokens in (prompts, completions)
        ]
        return Routes(*replays)

    def tokens(replay: RouterReplay | None) -> list[int]:
        assert replay is not None
        packed = replay.pack()
        assert packed.shape[1:] == (2, 2)
        return [int(token) for token in packed[:, 1, 0]]

    chosen = routes(0).select(torch.tensor([2, 0]), prompts=3)
    assert tokens(chosen.prompts) == [4, 5, 0, 1]
    assert tokens(chosen.completions) == [*range(12, 18), *range(6)]
    joined = routes(0).followed_by(routes(30))
    assert tokens(joined.prompts) == [*range(6), *range(30, 36)]
    assert tokens(joined.completions) == [*range(18), *range(30, 48)]
    assert Routes().select(torch.tensor([0]), prompts=3).completions is None
    assert Routes().followed_by(Routes()).prompts is None


# what is informative ---------------------------------------------------------------------------------------------


def test_groups_are_informative_by_what_they_are_asked_for() -> None:
    """Accuracy, or the judge's score; not by the form of the answer or the language of the thinking."""
    stage = _stage()
    nan = rewards.NOT_SCORED
    digits = [
        ([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], True),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.2, 0.1], False),  # right, in several languages
        ([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0], False),
    ]
    words = [
        ([0.5, 0.5, 0.5, 0.6], True),
        ([0.5, 0.5, 0.5, 0.502], True),
        ([0.5, 0.5, 0.5, 0.5005], False),  # what rounding does to equal answers is no reason
        ([0.0, 0.0, 0.0, 0.0], False),
    ]
    rows = [
        [right, 1.0, spoken, nan]
        for asked, language, _ in digits
        for right, spoken in zip(asked, language, strict=True)
    ]
    rows += [[nan, float(index % 2), nan, score] for asked, _ in words for index, score in enumerate(asked)]
    expected = [useful for *_, useful in (*digits, *words)]
    assert stage._informative(torch.tensor(rows)).tolist() == expected


def test_both_tasks_are_sampled_and_judged_in_one_batch() -> None:
    run = tiny_run(prompts=5)
    judge = RewardModel(run.build_judge())
    stage = DiverseRL(run.build_policy(), run, judge)
    assert [problem.task for problem in stage.problems(2, 0)] == [DIGITS, WORDS, DIGITS, WORDS, DIGITS]
    samples = stage.sample(2)
    words = rewards.of_task(samples.rollout.problem_of_each, WORDS)
    assert words.tolist() == [index // GROUP % 2 == 1 for index in range(20)]
    scores = judge.score(samples.rollout.sequences)
    torch.testing.assert_close(samples.rewards[words, rewards.JUDGE], scores[words])
    assert bool(samples.rewards[~words, rewards.JUDGE].isnan().all())
    assert torch.equal(samples.rewards[~words, rewards.ACCURACY], samples.rollout.rulings[~words, 0])


def test_prompts_are_functions_of_step_and_round() -> None:
    run = tiny_run(prompts=16)
    reasoning = ReasoningRL(run.build_policy(), run)
    diverse = DiverseRL(run.build_policy(), run, RewardModel(run.build_judge()))
    assert {problem.task for problem in reasoning.problems(0, 0)} == {DIGITS}
    for stage in (reasoning, diverse):

        def prompts(index: int, round_: int, stage: RLStage = stage) -> tuple[str, ...]:
            problems: list[Problem] = stage.problems(index, round_)
            return tuple(problem.prompt for problem in problems)

        assert prompts(3, 1) == prompts(3, 1)
        assert len({prompts(*where) for where in ((3, 0), (3, 1), (4, 0))}) == 3
        assert not set(prompts(3, 0)) & run.excluded


def test_rounds_draw_fresh_noise() -> None:
    """The same prompts in two rounds, yet other samples; the same round again is the same."""
    stage = _stage(dynamic_sampling=2)
    problems = stage.problems(0, 0)
    stage.problems = lambda index, round_: problems  # type: ignore[method-assign]
    first, again, second = (stage._sample_round(0, round_)[0].sequences.completions for round_ in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, stage._sample_round(1, 0)[0].sequences.completions)
