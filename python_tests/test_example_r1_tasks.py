"""The training example: problems, demonstrations, verifiers, rewards and characters."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
import torch

from examples.r1 import rewards, vocabulary
from examples.r1.grpo import shuffle_in_groups
from examples.r1.rollout import encode_prompts
from examples.r1.tasks import TASKS, Problem


def _sorting_problem() -> Problem:
    return Problem("S314159>", {"answer": "113459"})


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("<t>1,1,3,4,5,9</t><a>113459</a>", True, (1.0, 1.0, 1.0)),
        ("<t>1,1,3,4,5,9</t><a>113495</a>", True, (0.0, 1.0, 1.0)),
        ("<t>1α1β3,4,5,9</t><a>113459</a>", True, (1.0, 1.0, 9 / 11)),
        ("<t></t><a>113459</a>", True, (1.0, 1.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>", False, (0.0, 0.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>1", True, (0.0, 0.0, 0.0)),
        ("113459", True, (0.0, 0.0, 0.0)),
    ],
)
def test_rewards_of_digit_sorting(completion: str, finished: bool, expected: tuple[float, float, float]) -> None:
    assert rewards.score(TASKS["digit_sorting"](), _sorting_problem(), completion, finished) == expected


def test_spelling_is_scored_by_the_verifier_of_reasoning_gym() -> None:
    task = TASKS["spell_backward"]()
    problem = task.draw(Random(0), held_out=False)
    word = problem.entry["metadata"]["word"]
    assert problem.prompt == f"Spell this word backward (example: sun -> nus): {word}"
    right = word[::-1]
    wrong = right[:-1] + ("x" if right[-1].lower() != "x" else "y")
    assert rewards.score(task, problem, f"<t>{','.join(right)}</t><a>{right}</a>", True) == (1.0, 1.0, 1.0)
    accuracy, form, language = rewards.score(task, problem, f"<t>{'γ'.join(right)}</t><a>{wrong}</a>", True)
    assert accuracy == pytest.approx((len(word) - 1) / len(word))
    assert form == 1.0
    assert language == pytest.approx(len(word) / (2 * len(word) - 1))


@pytest.mark.parametrize("name", TASKS)
def test_problems_fit_and_training_never_sees_held_out_prompts(name: str) -> None:
    task = TASKS[name]()
    held_out = task.held_out(300)
    prompts = frozenset(problem.prompt for problem in held_out)
    assert len(prompts) == 300
    assert [problem.prompt for problem in task.held_out(300)] == [problem.prompt for problem in held_out]
    rng = Random(1)
    shares = []
    for problem in islice(task.training(rng, prompts), 1000):
        assert problem.prompt not in prompts
        demonstration = task.demonstrate(problem, rng)
        assert len(vocabulary.encode(demonstration)) + 1 <= task.completion_length
        assert len(problem.prompt) <= task.prompt_length
        accuracy, form, _ = rewards.score(task, problem, demonstration, True)
        assert form == 1.0
        shares.append(accuracy == 1.0)
    right = (1 - task.misread_share) * (1 - task.wrong_share)
    assert right - 0.06 < sum(shares) / len(shares) < right + 0.1  # an exchange of equal items does no harm


def test_texts_survive_the_vocabulary_and_unknown_characters_are_refused() -> None:
    text = "Spell this word backward (example: sun -> nus): Zürich".replace("ü", "γ")
    assert vocabulary.decode([vocabulary.PAD, *vocabulary.encode(text), vocabulary.END, 7]) == text
    with pytest.raises(ValueError, match="'ü' is not in the vocabulary"):
        vocabulary.encode("Zürich")
    with pytest.raises(ValueError, match="4 tokens does not fit in 3"):
        vocabulary.pad_left([1, 2, 3, 4], 3)


def test_shuffled_rewards_stay_in_their_group() -> None:
    scores = torch.arange(48.0).view(16, 3)
    shuffled = shuffle_in_groups(scores, 8, 5)
    for group in (slice(0, 8), slice(8, 16)):
        assert torch.equal(shuffled[group].sort(dim=0).values, scores[group])
        assert torch.equal(shuffled[group][:, 1] - shuffled[group][:, 0], torch.ones(8))  # rows move as a whole
    assert not torch.equal(shuffled, scores)
    assert not torch.equal(shuffled, shuffle_in_groups(scores, 8, 6))


def test_prompts_end_at_the_same_column() -> None:
    task = TASKS["digit_sorting"]()
    prompts = encode_prompts(task, [Problem("S12>", {}), _sorting_problem()], torch.device("cpu"))
    assert prompts.shape == (2, 8)
    assert vocabulary.decode(prompts[0].tolist()) == "S12>"
    assert int(prompts[0, -1]) == int(prompts[1, -1]) == vocabulary.encode(">")[0]
