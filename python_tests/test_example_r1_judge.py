"""The training example's third stage: the reward model's scores, and which samples rejection sampling keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.policy import vocabulary
from examples.r1.policy.rollout import Rollout
from examples.r1.policy.sequences import Sequences, make_sequences
from examples.r1.run import Run
from examples.r1.stages import rejection, rewards
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.rejection import RejectionSampling
from examples.r1.stages.reward_model import WEAK_STEPS, RewardModelStage, garbled
from examples.r1.stages.sft import solutions, write_down
from examples.r1.tasks import Problem
from python_tests.r1_stages import DIGITS, WORDS, one_thread, tiny_run, written

__all__ = ["one_thread"]


# the reward model ------------------------------------------------------------------------------------------------


def test_a_score_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    """From logits, in float64; END counts, what stands behind it does not."""
    run = tiny_run()
    model = run.build_judge()
    problems = run.held_out[WORDS][:3]
    texts = ["<a>abc</a>", "", "<t>1</t><a></a>", "zz", "<a>a</a>", "q" * (run.completion_length - 1)]
    sequences = written(run, problems, texts).sequences
    scores = RewardModel(model).score(sequences)
    assert scores.shape == (6,)
    assert bool(((scores > 0.0) & (scores < 1.0)).all())
    assert not scores.requires_grad
    with torch.no_grad():
        hidden = model.completion_hidden(sequences.prompts, sequences.completions)
        logits = hidden.double() @ model.head.weight.double().T
    for row, text in enumerate(texts):
        ids = [*vocabulary.encode(text), vocabulary.END]
        chosen = logits[row, : len(ids)].log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(scores[row].double(), chosen.mean().exp(), rtol=5e-6, atol=0)
    unfinished = sequences._replace(mask=torch.zeros_like(sequences.mask))
    assert bool(RewardModel(model).score(unfinished).isfinite().all())


def test_wrong_answers_are_right_ones_with_two_letters_exchanged() -> None:
    run = tiny_run()
    problems = run.tasks[WORDS].held_out(100)
    texts = garbled(problems)
    rulings = rewards.rule_all(run.tasks, problems, texts, [True] * 100)
    assert not rulings[:, 0].any()
    assert rulings[:, 1].all()
    for text, problem in zip(texts, problems, strict=True):
        answer = text[3:-4]
        assert sorted(answer) == sorted(problem.entry["answer"])
        assert sum(one != other for one, other in zip(answer, problem.entry["answer"], strict=True)) == 2
    assert texts == garbled(problems)


@pytest.fixture(scope="module")
def judged() -> tuple[Run, RewardModelStage]:
    """A reward model that has learnt a little."""
    run = tiny_run(
        width=32, sft_batch=32, sft_learning_rate=6e-3, reward_model_steps=90, judge_threshold=0.5, rejection_prompts=4
    )
    stage = RewardModelStage(run.build_judge(), run)
    for index in range(stage.steps):
        stage.step(index)
    return run, stage


def test_the_reward_model_learns_to_tell_right_answers_from_wrong_ones(judged: tuple[Run, RewardModelStage]) -> None:
    run, stage = judged
    untaught = RewardModelStage(run.build_judge(), run).evaluate()
    record = stage.evaluate()
    assert record.keys() == {"validation_loss", "judge/right", "judge/wrong", "judge/agreement"}
    assert record["judge/right"] > 5 * untaught["judge/right"]
    assert record["judge/right"] > record["judge/wrong"] + 0.1
    assert record["judge/agreement"] >= 0.75
    judge = RewardModel(stage.model)
    problems = run.held_out[WORDS]
    right, wrong = judge.score(solutions(run, problems)), judge.score(write_down(run, problems, garbled(problems)))
    assert record["judge/right"] == pytest.approx(float(right.mean()))
    assert record["judge/wrong"] == pytest.approx(float(wrong.mean()))
    assert record["judge/agreement"] == float((right > wrong).float().mean())


def test_the_reward_model_learns_from_right_answers_to_the_general_task(judged: tuple[Run, RewardModelStage]) -> None:
    run, stage = judged
    assert not stage.trains_policy
    assert len(stage.data.prompts) == 4000
    prompts = [vocabulary.decode(row) for row in stage.data.prompts.tolist()]
    texts = [vocabulary.decode(row) for row in stage.data.completions.tolist()]
    assert all(text == f"<a>{prompt[-2:0:-1]}</a>" for prompt, text in zip(prompts, texts, strict=True))
    assert not set(prompts) & run.excluded


def test_the_weak_judge_has_learnt_next_to_nothing() -> None:
    run = tiny_run(weak_judge=True, reward_model_steps=100)
    assert RewardModelStage(run.build_judge(), run).steps == WEAK_STEPS
    usual = tiny_run(reward_model_steps=100)
    assert RewardModelStage(usual.build_judge(), usual).steps == 100
    assert WEAK_STEPS <= 100 // 5


# rejection sampling ----------------------------------------------------------------------------------------------

SORTED = Problem(DIGITS, "s21>", {"answer": "12"})
RIGHT, FOREIGN, WRONG = "<t>1,2</t><a>12</a>", "<t>1γ2</t><a>12</a>", "<t>2,1</t><a>21</a>"


class Scores(RewardModel):
    """A reward model whose scores a test makes up, by text."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def score(self, sequences: Sequences, group_size: int = 1) -> Tensor:
        return torch.tensor([self.scores[vocabulary.decode(row)] for row in sequences.completions.tolist()])


def _stage(
    monkeypatch: pytest.MonkeyPatch,
    digits: Sequence[Sequence[str]],
    words: Sequence[Sequence[str]] = (),
    scores: dict[str, float] | None = None,
    **changes: Any,
) -> RejectionSampling:
    """A stage whose policy answers with a row of these texts to each problem of either task, and then with nothing."""
    run = tiny_run(**{"rejection_prompts": 4, "judge_threshold": 0.5, **changes})
    answers: dict[str, list[str]] = {}
    for task, rows in ((DIGITS, digits), (WORDS, words)):
        problems = run.draw(task, run.settings.rejection_prompts, "rejection_sampling")
        padded = [*map(list, rows), *[[""] * 4] * (len(problems) - len(rows))]
        for problem, row in zip(problems, padded, strict=True):
            answers[problem.prompt] = [text.replace("12", problem.entry["answer"]) for text in row]

    def roll_out(_: object, run: Run, problems: Sequence[Problem], *, group_size: int, **__: object) -> Rollout:
        assert group_size == 4
        return written(run, problems, [text for problem in problems for text in answers[problem.prompt]])

    monkeypatch.setattr(rejection, "roll_out", roll_out)
    return RejectionSampling(run.build_policy(), run, run.build_policy(), Scores({"": 0.0, **(scores or {})}))


def _kept(stage: RejectionSampling) -> list[tuple[str, str]]:
    """Prompt and text of each kept sample; masks are theirs."""
    data = stage.data
    expected = make_sequences(data.prompts, data.completions)
    assert torch.equal(data.mask, expected.mask)
    rows = zip(data.prompts.tolist(), data.completions.tolist(), strict=True)
    return [(vocabulary.decode(prompt), vocabulary.decode(completion)) for prompt, completion in rows]


def test_of_the_reasoning_task_one_sample_a_group_is_kept_that_is_right_in_every_respect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = ["<t>1</t><a>12</a>", "<t>2</t><a>12</a>"]  # whatever the thinking, in its own script
    stage = _stage(
        monkeypatch,
        [
            [WRONG, FOREIGN, right[0], right[1]],
            [FOREIGN, FOREIGN, WRONG, "12"],
            [right[1], WRONG, right[0], right[0]],
            ["", "<a>12</a>", "<t>1</t><a>12</a>1", WRONG],
        ],
    )
    stage.begin()
    problems = stage.run.draw(DIGITS, 4, stage.name)
    assert _kept(stage) == [
        (problems[index].prompt, text.replace("12", problems[index].entry["answer"]))
        for index, text in ((0, right[0]), (2, right[1]))
    ]
    assert stage.facts() == {
        f"{DIGITS}/prompts": 4.0,
        f"{DIGITS}/kept": 2.0,
        f"{DIGITS}/kept_right": 1.0,
        f"{WORDS}/prompts": 4.0,
        f"{WORDS}/kept": 0.0,
        f"{WORDS}/kept_right": 0.0,
    }


def test_of_the_general_task_the_best_sample_is_kept_if_its_score_is_good_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it is right or not: here one of the three is."""
    scores = {"<a>a</a>": 0.3, "<a>b</a>": 0.5, "<a>c</a>": 0.9, "<a>d</a>": 0.49}
    rows = [
        ["<a>b</a>", "<a>c</a>", "<a>c</a>", "<a>a</a>"],
        ["<a>a</a>", "<a>d</a>", "", "<a>d</a>"],
        ["<a>a</a>", "<a>d</a>", "<a>b</a>", ""],
        ["<a>a</a>", "<a>12</a>", "<a>b</a>", ""],
    ]
    problems = tiny_run().draw(WORDS, 4, "rejection_sampling")
    answer = problems[3].entry["answer"]
    stage = _stage(monkeypatch, [], rows, {**scores, f"<a>{answer}</a>": 0.6})
    stage.begin()
    assert _kept(stage) == [
        (problems[0].prompt, "<a>c</a>"),
        (problems[2].prompt, "<a>b</a>"),
        (problems[3].prompt, f"<a>{answer}</a>"),
    ]
    assert stage.facts()[f"{WORDS}/kept"] == 3.0
    assert stage.facts()[f"{WORDS}/kept_right"] == pytest.approx(1 / 3)
    higher = _stage(monkeypatch, [], rows, {**scores, f"<a>{answer}</a>": 0.6}, judge_threshold=0.7)
    higher.begin()
    assert _kept(higher) == [(problems[0].prompt, "<a>c</a>")]


def test_samples_of_many_prompts_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "BATCH", 3)
    rows = [[WRONG, RIGHT, "", ""], ["", "", "", ""]] * 4
    stage = _stage(monkeypatch, rows, [["", "<a>a</a>", "", ""]] * 8, {"<a>a</a>": 0.8}, rejection_prompts=8)
    stage.begin()
    digits, words = (stage.run.draw(task, 8, stage.name) for task in (DIGITS, WORDS))
    assert [prompt for prompt, _ in _kept(stage)] == [problem.prompt for problem in (*digits[::2], *words)]
    assert stage.facts()[f"{DIGITS}/prompts"] == 8.0
    assert stage.facts()[f"{DIGITS}/kept"] == 4.0
    assert stage.data.group_size == 1


def test_a_policy_that_has_learnt_nothing_leaves_nothing_to_imitate(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stage(monkeypatch, [[WRONG] * 4] * 4, [["<a>a</a>"] * 4] * 4, {"<a>a</a>": 0.4})
    with pytest.raises(ValueError, match=r"rejection sampling: no sample was good enough"):
        stage.begin()


def test_what_was_kept_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stage(monkeypatch, [[RIGHT] * 4] * 4, [["<a>a</a>"] * 4], {"<a>a</a>": 0.8})
    stage.begin()
    tensors = {name: tensor.clone() for name, tensor in stage.tensors().items()}
    again = _stage(monkeypatch, [])
    again.restore(tensors)
    assert len(again.data.prompts) == 5
    for name, tensor in stage.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    records = [{key: value for key, value in each.step(0).items() if key != "seconds"} for each in (stage, again)]
    assert records[0] == records[1]  # it goes on with the same data


def test_sampling_judges_real_samples_of_the_policy_and_a_step_imitates_them(
    judged: tuple[Run, RewardModelStage],
) -> None:
    """The policy is a model that answers the general task; its samples at temperature 1 please a judge like itself."""
    run, reward_model = judged
    judge = RewardModel(reward_model.model)
    stage = RejectionSampling(run.build_policy(), run, reward_model.model, judge)
    threshold = run.settings.judge_threshold
    stage.begin()
    assert 1 <= len(stage.data.prompts) <= 4
    assert bool((judge.score(stage.data) >= threshold).all())
    before = float(stage.loss(stage.data).detach())
    record = stage.step(0)
    assert record.keys() == {"loss", "grad_norm", "tokens", "seconds"}
    assert float(stage.loss(stage.data).detach()) < before
    assert stage.evaluate()["validation_loss"] > 0.0
    assert all(
        torch.equal(*pair)
        for pair in zip(*(m.state_dict().values() for m in (stage.policy, reward_model.model)), strict=True)
    )
