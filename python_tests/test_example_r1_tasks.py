"""The training example: problems, demonstrations, verifiers and characters, and what a run draws from its seed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch

from examples.r1.policy import vocabulary
from examples.r1.randomness import python_rng, stream_seed, torch_rng
from examples.r1.run import Run
from examples.r1.stages import rewards
from examples.r1.stages.sft import demonstrations, solutions
from examples.r1.tasks import TASKS, Problem
from python_tests.r1_stages import CPU, DIGITS, WORDS, one_thread, tiny_run

__all__ = ["one_thread"]

SORTING = Problem(DIGITS, "s314159>", {"answer": "113459"})


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("<t>1,1,3,4,5,9</t><a>113459</a>", True, (True, 1.0, 1.0)),
        ("<t>1,1,3,4,5,9</t><a>113495</a>", True, (False, 1.0, 1.0)),
        ("<t>1α1β3,4,5,9</t><a>113459</a>", True, (True, 1.0, 9 / 11)),
        ("<t>1a1,3,4,5,9</t><a>113459</a>", True, (True, 1.0, 10 / 11)),  # letters are not of the script either
        ("<t></t><a>113459</a>", True, (True, 1.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>", False, (False, 0.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>1", True, (False, 0.0, 0.0)),
        ("<t>1,<t>1</t><a>113459</a>", True, (False, 0.0, 0.0)),
        ("<a>113459</a>", True, (False, 0.0, 0.0)),
        ("113459", True, (False, 0.0, 0.0)),
        ("", True, (False, 0.0, 0.0)),
    ],
)
def test_rulings_of_digit_sorting(completion: str, finished: bool, expected: tuple[bool, float, float]) -> None:
    assert rewards.rule(TASKS[DIGITS](), SORTING, completion, finished) == expected


def test_spelling_is_judged_by_the_verifier_of_reasoning_gym() -> None:
    task = tiny_run().tasks[WORDS]
    problem = task.draw(Random(0), held_out=False)
    word = problem.entry["metadata"]["word"].lower()
    assert problem.prompt == f"r{word}>"
    right = word[::-1]
    wrong = right[:-1] + ("x" if right[-1] != "x" else "y")
    for text, finished, expected in (
        (f"<a>{right}</a>", True, (True, 1.0)),
        (f"<a>{wrong}</a>", True, (False, 1.0)),
        (f"<a>{right}x</a>", True, (False, 1.0)),
        ("<a></a>", True, (False, 1.0)),
        (f"<a>{right}</a>", False, (False, 0.0)),
        (f"<t>{right}</t><a>{right}</a>", True, (False, 0.0)),
        (right, True, (False, 0.0)),
    ):
        ruling = rewards.rule(task, problem, text, finished)
        assert ruling[:2] == expected, text
        assert math.isnan(ruling.language)  # there is no thinking to look at


@pytest.mark.parametrize("name", TASKS)
def test_problems_fit_and_training_never_sees_held_out_prompts(name: str) -> None:
    task = tiny_run().tasks[name]
    held_out = task.held_out(300)
    prompts = frozenset(problem.prompt for problem in held_out)
    assert len(prompts) == 300
    assert [problem.prompt for problem in task.held_out(300)] == [problem.prompt for problem in held_out]
    rng = Random(1)
    right = []
    for problem in islice(task.training(rng, prompts), 1000):
        assert problem.task == name
        assert problem.prompt not in prompts
        assert len(vocabulary.encode(problem.prompt)) <= task.prompt_length
        for text in (task.demonstrate(problem, rng), task.solve(problem)):
            assert len(vocabulary.encode(text)) + 1 <= task.completion_length
            ruling = rewards.rule(task, problem, text, True)
            assert ruling.format == 1.0
            right.append(ruling.right)
        assert ruling.right
        assert ruling.language == 1.0 or name == WORDS
    demonstrated = right[::2]
    expected = (1 - task.misread_share) * (1 - task.wrong_share)
    assert expected - 0.06 < sum(demonstrated) / 1000 < expected + 0.1  # an exchange of equal items does no harm


def test_a_share_of_the_separators_in_demonstrations_is_foreign() -> None:
    task = tiny_run().tasks[DIGITS]
    rng = Random(2)
    texts = "".join(task.demonstrate(problem, rng) for problem in islice(task.training(rng, frozenset()), 400))
    foreign = sum(character in vocabulary.FOREIGN for character in texts)
    assert foreign / (foreign + texts.count(",")) == pytest.approx(0.35, abs=0.05)
    assert set(vocabulary.FOREIGN) <= set(texts)


def test_texts_survive_the_vocabulary_and_unknown_characters_are_refused() -> None:
    text = "<t>s3α1,θ</t><a>rsun></a>"
    ids = vocabulary.encode(text)
    assert len(ids) == 4 + len("s3α1,θrsun>")  # a tag is one token
    assert len({vocabulary.PAD, vocabulary.END, *ids}) == 2 + len({"<t>", "</t>", "<a>", "</a>", *"s3α1,θrun>"})
    assert max(ids) < vocabulary.SIZE
    assert vocabulary.decode([vocabulary.PAD, *ids, vocabulary.END, 7]) == text
    with pytest.raises(ValueError, match="'ü' is not in the vocabulary"):
        vocabulary.encode("zürich")
    with pytest.raises(ValueError, match="'<' is not in the vocabulary"):
        vocabulary.encode("<b>")
    for pad in (vocabulary.pad_left, vocabulary.pad_right):
        with pytest.raises(ValueError, match="4 tokens does not fit in 3"):
            pad([1, 2, 3, 4], 3)


# what a run draws ------------------------------------------------------------------------------------------------


def test_prompts_end_and_completions_begin_at_the_same_column() -> None:
    run = tiny_run()
    prompts = run.encode_prompts([Problem(WORDS, "rsun>", {}), SORTING])
    assert prompts.shape == (2, max(task.prompt_length for task in run.tasks.values()))
    assert vocabulary.decode(prompts[0].tolist()) == "rsun>"
    assert prompts[0].tolist()[:-5] == [vocabulary.PAD] * (prompts.shape[1] - 5)
    assert int(prompts[0, -1]) == int(prompts[1, -1]) == vocabulary.encode(">")[0]
    completions = run.encode_completions(["<a>nus</a>", "1"])
    assert completions.shape == (2, max(task.completion_length for task in run.tasks.values()))
    rest = [vocabulary.PAD] * (completions.shape[1] - 2)
    assert completions[1].tolist() == [*vocabulary.encode("1"), vocabulary.END, *rest]


def test_what_a_run_draws_is_a_function_of_the_seed_and_the_source() -> None:
    run = tiny_run()

    def drawn(seed: int, *source: object) -> list[str]:
        problems = tiny_run(seed=seed).draw(WORDS, 20, *source)
        assert all(problem.task == WORDS for problem in problems)
        return [problem.prompt for problem in problems]

    assert drawn(0, "rl", 3, 0) == drawn(0, "rl", 3, 0)
    assert len({tuple(drawn(*source)) for source in ((0, "rl", 3, 0), (0, "rl", 3, 1), (0, "rl", 4, 0))}) == 3
    assert drawn(0, "rl", 3, 0) != drawn(1, "rl", 3, 0)
    assert drawn(0, "rl", 3, 0) != drawn(0, "sft", 3, 0)
    first = [problem for problems in run.held_out.values() for problem in problems]
    assert {problem.task for problem in first} == {DIGITS, WORDS}
    assert run.excluded > {problem.prompt for problem in first}


def test_no_run_trains_on_what_another_one_is_evaluated_on() -> None:
    """A run may start from the models of one that evaluated fewer prompts."""
    few, many = (Run.prepare(replace(tiny_run().settings, evaluation_prompts=count)) for count in (2, 1000))
    assert few.excluded == many.excluded
    for task, problems in many.held_out.items():
        assert len(problems) == 1000
        assert problems[:2] == few.held_out[task]
        assert {problem.prompt for problem in problems} <= few.excluded


def test_generators_are_functions_of_their_parts() -> None:
    assert stream_seed(1, "a") == stream_seed(1, "a")
    assert len({stream_seed(*parts) for parts in ((1, 23), (12, 3), (1, 2, 3), (3, 2, 1))}) == 4
    assert 0 <= stream_seed("x") < 2**63  # what torch takes
    assert python_rng(5).random() == python_rng(5).random() != python_rng(6).random()
    first, again, other = (torch.rand(4, generator=torch_rng(CPU, part)) for part in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_demonstrations_are_noisy_and_solutions_are_not() -> None:
    run = tiny_run()
    problems = run.held_out[DIGITS]
    noisy, again, other = (demonstrations(run, problems, source) for source in (1, 1, 2))
    assert torch.equal(noisy.completions, again.completions)
    assert not torch.equal(noisy.completions, other.completions)
    assert torch.equal(noisy.prompts, run.encode_prompts(problems))
    right = solutions(run, problems)
    texts = [vocabulary.decode(row) for row in right.completions.tolist()]
    assert texts == [run.tasks[DIGITS].solve(problem) for problem in problems]
    assert right.mask.sum(dim=1).tolist() == [len(vocabulary.encode(text)) + 1 for text in texts]


def test_models_are_functions_of_the_seed_and_the_sizes() -> None:
    run = tiny_run()
    policy, again, other, judge = (
        run.build_policy(), run.build_policy(), tiny_run(seed=1).build_policy(), run.build_judge(),
    )  # fmt: skip
    for name, value in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not torch.equal(other.head.weight, policy.head.weight)
    assert not torch.equal(judge.head.weight, policy.head.weight)
    drafting = tiny_run(model="moe", mtp=1)
    assert drafting.build_policy().moe_layers
    assert drafting.build_policy().mtp is not None
    for name, value in drafting.build_judge().state_dict().items():  # dense, whatever the policy is
        assert torch.equal(judge.state_dict()[name], value), name
