"""The training example's rewards: what training may see of either task, totals, and the advantages they make."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from examples.r1.run import Run
from examples.r1.stages import rewards
from examples.r1.stages.grpo import DiverseRL, Samples, shuffle_in_groups
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.rejection import RejectionSampling
from examples.r1.tasks import Problem, SpellBackward
from python_tests.r1_stages import DIGITS, WORDS, one_thread, tiny_run, written

__all__ = ["one_thread"]

NAN = float("nan")
DIGIT, WORD = Problem(DIGITS, "s21>", {"answer": "12"}), Problem(WORDS, "rsun>", {"answer": "nus"})


def test_rules_score_each_task_by_its_own_columns() -> None:
    texts = ["<t>1,2</t><a>12</a>", "<a>nus</a>", "<t>1γ2</t><a>21</a>", "<a>sun</a>", "<a>12</a>", "nus"]
    problems = [DIGIT, WORD] * 3
    table = rewards.rule_all(tiny_run().tasks, problems, texts, [True] * 6)
    expected = [[1.0, 1.0, 1.0], [1.0, 1.0, NAN], [0.0, 1.0, 2 / 3], [0.0, 1.0, NAN], [0.0, 0.0, 0.0], [0.0, 0.0, NAN]]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-7, equal_nan=True)
    assert rewards.rule_all(tiny_run().tasks, [], [], []).shape == (0, 3)
    assert rewards.of_task(problems, WORDS).tolist() == [False, True] * 3


def test_training_sees_rules_of_the_one_task_and_the_judge_of_the_other() -> None:
    rulings = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, NAN], [0.0, 1.0, 1.0], [0.0, 0.0, NAN]])
    problems = [DIGIT, WORD] * 2
    judged = torch.tensor([0.9, 0.8, 0.7, 0.6])
    table = rewards.training_rewards(rulings, problems, judged)
    expected = [[1.0, 1.0, 0.5, NAN], [NAN, 1.0, NAN, 0.8], [0.0, 1.0, 1.0, NAN], [NAN, 0.0, NAN, 0.6]]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    unjudged = torch.tensor(expected)
    unjudged[:, rewards.JUDGE] = NAN
    found = rewards.training_rewards(rulings, problems)
    torch.testing.assert_close(found, unjudged, rtol=0, atol=0, equal_nan=True)
    assert rulings[1, 0] == 1.0  # they are not written over


def test_totals_weigh_what_was_scored() -> None:
    table = torch.tensor([[1.0, 1.0, 0.5, NAN], [NAN, 1.0, NAN, 0.8], [0.0, 0.0, 0.0, NAN], [NAN] * 4])
    assert rewards.WEIGHTS == (1.0, 0.1, 0.2, 1.0)
    assert rewards.totals(table).tolist() == pytest.approx([1.0 + 0.1 + 0.2 * 0.5, 0.1 + 0.8, 0.0, 0.0])


def _judge(run: Run) -> RewardModel:
    return RewardModel(run.build_judge())


ANSWERS = ("abcd", "a", "", "bc")
WRITTEN = [f"<a>{answer}</a>" for answer in ANSWERS]


def _claims(patch: pytest.MonkeyPatch, answers: tuple[str, ...]) -> None:
    """From now on the rule of the general task finds these answers right, whatever was asked."""
    patch.setattr(SpellBackward, "verify", lambda task, answer, problem: answer in answers)


def test_reinforcement_never_learns_what_the_rule_says_of_the_general_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in the right form, so that the rule is asked; models after a step are equal to the bit."""
    run = tiny_run(dynamic_sampling=2)
    base = run.build_policy().state_dict()
    models, records = [], []
    for claimed in ((), ("a",), ("abcd", "bc")):
        with monkeypatch.context() as patch:
            _claims(patch, claimed)
            stage = DiverseRL(run.build_policy(), run, _judge(run))
            problems = stage.problems(0, 0)
            texts = [text for problem in problems for text in (WRITTEN if problem.task == WORDS else ["12"] * 4)]
            rollout = written(run, problems, texts)
            patch.setattr("examples.r1.stages.grpo.roll_out", lambda *_, found=rollout, **__: found)
            table = stage.sample(0).rewards
            assert bool(table[:, rewards.ACCURACY].isnan().any())
            record = stage.step(0)
        assert record.pop(f"{WORDS}/accuracy") == len(claimed) / 4
        records.append({key: record[key] for key in record if "seconds" not in key})
        models.append(stage.model.state_dict())
    assert records[0] == records[1] == records[2]
    for name, value in models[0].items():
        assert torch.equal(models[1][name], value), name
        assert torch.equal(models[2][name], value), name
    assert not torch.equal(models[0]["head.weight"], base["head.weight"])  # from the judge it learns


def test_rejection_sampling_never_learns_what_the_rule_says_of_the_general_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_run(judge_threshold=0.0)
    monkeypatch.setattr(
        "examples.r1.stages.rejection.roll_out",
        lambda policy, run, problems, **_: written(run, problems, WRITTEN * len(problems)),
    )
    kept = []
    for claimed in ((), ANSWERS):
        with monkeypatch.context() as patch:
            _claims(patch, claimed)
            stage = RejectionSampling(run.build_policy(), run, run.build_policy(), _judge(run))
            stage.begin()
        assert stage.facts()[f"{WORDS}/kept_right"] == len(claimed) / 4
        kept.append(stage.tensors())
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


# advantages ------------------------------------------------------------------------------------------------------


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    """With the unbiased variance; 0 of a single one."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _normalised(values: list[float]) -> list[float]:
    """NaN stays NaN and counts nowhere."""
    scored = [value for value in values if not math.isnan(value)]
    if not scored:
        return values
    mean, std = _mean_and_std(scored)
    return [(value - mean) / (std + 1e-4) for value in values]


def _gdpo(table: list[list[float]], group_size: int) -> list[float]:
    """GDPO: every column in its group, then the weighted sum over the batch. Plain loops in float64."""
    sums = [0.0] * len(table)
    for start in range(0, len(table), group_size):
        for column, weight in enumerate(rewards.WEIGHTS):
            z = _normalised([row[column] for row in table[start : start + group_size]])
            for offset, value in enumerate(z):
                sums[start + offset] += 0.0 if math.isnan(value) else weight * value
    mean, std = _mean_and_std(sums)
    return [(value - mean) / (std + 1e-4) for value in sums]


def _sum_then_normalise(table: list[list[float]], group_size: int) -> list[float]:
    totals = [
        math.fsum(
            0.0 if math.isnan(value) else weight * value for value, weight in zip(row, rewards.WEIGHTS, strict=True)
        )
        for row in table
    ]
    found: list[float] = []
    for start in range(0, len(totals), group_size):
        found += _normalised(totals[start : start + group_size])
    return found


def _mixed_table() -> Tensor:
    """Four groups of four, of both tasks in turn; language is equal in the first, nothing is right in the third."""
    table = torch.rand(16, 4, generator=torch.Generator().manual_seed(3))
    table[:, :2] = table[:, :2].round()
    digits = torch.tensor([True, False]).repeat_interleave(4).repeat(2)
    table[digits, rewards.JUDGE] = NAN
    table[~digits, rewards.ACCURACY] = NAN
    table[~digits, rewards.LANGUAGE] = NAN
    table[:4, rewards.LANGUAGE] = 1.0
    table[8:12, rewards.ACCURACY] = 0.0
    return table


@pytest.mark.parametrize(
    ("aggregation", "by_hand"), [("normalize_then_sum", _gdpo), ("sum_then_normalize", _sum_then_normalise)]
)
def test_advantages_of_mixed_rewards_are_those_of_the_formula(aggregation: str, by_hand: object) -> None:
    """Each task's groups are normalised by the columns that scored them; the batch is that of both tasks."""
    run = tiny_run(aggregation=aggregation)
    stage = DiverseRL(run.build_policy(), run, _judge(run))
    samples = stage.sample(0)
    assert [problem.task for problem in samples.rollout.problems] == [DIGITS, WORDS] * 2
    table = _mixed_table()
    found = stage.loss_inputs(samples._replace(rewards=table), 0).advantages
    expected = torch.tensor(by_hand(table.double().tolist(), 4), dtype=torch.float64)  # type: ignore[operator]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    other = _sum_then_normalise if by_hand is _gdpo else _gdpo
    assert float((found - torch.tensor(other(table.tolist(), 4))).abs().max()) > 0.05  # the two are not alike


def test_groups_whose_rewards_are_equal_teach_nothing() -> None:
    run = tiny_run(aggregation="sum_then_normalize")
    stage = DiverseRL(run.build_policy(), run, _judge(run))
    table = _mixed_table()
    table[4:8] = table[4].clone()
    found = stage.loss_inputs(Samples(stage.sample(0).rollout, table, 1.0, 1, {}), 0).advantages
    assert not found[4:8].any()
    assert found[:4].all()


def test_shuffled_rewards_stay_in_their_group() -> None:
    scores = torch.arange(64.0).view(16, 4)
    scores[8:, 3] = NAN
    shuffled = shuffle_in_groups(scores, 8, 5)
    for group in (slice(0, 8), slice(8, 16)):
        assert torch.equal(shuffled[group, :3].sort(dim=0).values, scores[group, :3])
        assert torch.equal(shuffled[group, 1] - shuffled[group, 0], torch.ones(8))  # rows move as a whole
    assert shuffled[:, 3].isnan().tolist() == [False] * 8 + [True] * 8
    assert not torch.equal(shuffled[:8], scores[:8])
    assert not torch.equal(shuffled[:8], shuffle_in_groups(scores, 8, 6)[:8])


def test_the_control_shuffles_what_the_advantages_are_made_of() -> None:
    run = tiny_run(shuffle_rewards=True)
    stage = DiverseRL(run.build_policy(), run, _judge(run))
    samples = stage.sample(0)._replace(rewards=_mixed_table())
    shuffled = stage.loss_inputs(samples, 3).advantages
    expected = _gdpo(shuffle_in_groups(_mixed_table(), 4, 0, "diverse_rl", 3).double().tolist(), 4)
    torch.testing.assert_close(shuffled.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    plain = _gdpo(_mixed_table().double().tolist(), 4)
    assert float((shuffled - torch.tensor(plain)).abs().max()) > 0.05
