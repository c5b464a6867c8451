"""The tasks: prompts, noisy cold-start demonstrations, and the rule that checks an answer.

A completion has the form `<t>1,1,3,4,5,9</t><a>113459</a>`: thinking, then the answer.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

from examples.r1 import vocabulary


class Problem(NamedTuple):
    prompt: str  # what the model reads
    entry: dict[str, Any]  # what the task needs to check an answer; holds "answer"


class Task(ABC):
    """One family of problems with a verifiable answer."""

    name: str
    prompt_length: int  # longest prompt, in characters
    max_items: int  # longest answer, in characters
    script: str  # the characters that the thinking should be written in
    cold_examples = 400  # demonstrations of the cold start
    foreign_share = 0.35  # of the separators in them are written in another script
    wrong_share = 0.15  # of the demonstrations have two items exchanged
    misread_share = 0.0  # of the demonstrations copy the question's items in the order given
    sft_steps = 120
    grpo_steps = 75

    @property
    def completion_length(self) -> int:
        """Longest well-formed completion and END, in tokens."""
        return len("<t></t><a></a>") + 3 * self.max_items

    @abstractmethod
    def draw(self, rng: Random, held_out: bool) -> Problem:
        """A random problem; training and held-out problems come from different streams."""

    @abstractmethod
    def verify(self, answer: str | None, problem: Problem) -> float:
        """Accuracy reward in [0, 1]; 1 only for a correct answer."""

    @abstractmethod
    def question_items(self, problem: Problem) -> list[str]:
        """What the question asks to put in order, as given."""

    def demonstrate(self, problem: Problem, rng: Random) -> str:
        """A completion as an imperfect annotator would write it."""
        items = list(problem.entry["answer"])
        if rng.random() < self.misread_share:
            items = self.question_items(problem)
        if rng.random() < self.wrong_share:
            first, second = rng.randrange(len(items)), rng.randrange(len(items))
            items[first], items[second] = items[second], items[first]
        thinking = items[0]
        for item in items[1:]:
            foreign = rng.random() < self.foreign_share
            thinking += (rng.choice(vocabulary.FOREIGN) if foreign else ",") + item
        return f"<t>{thinking}</t><a>{''.join(items)}</a>"

    def held_out(self, count: int) -> list[Problem]:
        """The same `count` distinct problems for every seed; training never sees their prompts."""
        rng = Random(f"{self.name}/held-out")
        problems: dict[str, Problem] = {}
        while len(problems) < count:
            problem = self.draw(rng, held_out=True)
            problems.setdefault(problem.prompt, problem)
        return list(problems.values())

    def training(self, rng: Random, exclude: frozenset[str]) -> Iterator[Problem]:
        """Endless training problems whose prompts are not in `exclude`."""
        while True:
            problem = self.draw(rng, held_out=False)
            if problem.prompt not in exclude:
                yield problem


class DigitSorting(Task):
    """`S314159>` -> `<t>1,1,3,4,5,9</t><a>113459</a>`."""

    name = "digit_sorting"
    max_items = 6
    prompt_length = max_items + 2
    script = string.digits + ","

    def draw(self, rng: Random, held_out: bool) -> Problem:
        digits = "".join(rng.choices(string.digits, k=self.max_items))
        return Problem(f"S{digits}>", {"answer": "".join(sorted(digits))})

    def question_items(self, problem: Problem) -> list[str]:
        return list(problem.prompt[1:-1])

    def verify(self, answer: str | None, problem: Problem) -> float:
        return float(answer == problem.entry["answer"])


class SpellBackward(Task):
    """`spell_backward` of reasoning-gym: its prompts, its verifier (which gives partial credit per letter)."""

    name = "spell_backward"
    min_items = 4
    max_items = 6
    prompt_length = len("Spell this word backward (example: sun -> nus): ") + max_items
    script = string.ascii_letters + ","
    misread_share = 0.3
    cold_examples = 1000
    sft_steps = 180
    grpo_steps = 90

    # reasoning-gym seeds problem i of a dataset with seed + i: these two ranges do not meet.
    _STREAM_SIZE = 2**30
    _TRAINING_SEED = 0
    _HELD_OUT_SEED = 2**31

    def __init__(self) -> None:
        import reasoning_gym  # type: ignore[import-untyped]  # here, so that the other tasks do without it

        def stream(seed: int) -> Any:
            return reasoning_gym.create_dataset(
                self.name, min_word_len=self.min_items, max_word_len=self.max_items, seed=seed, size=self._STREAM_SIZE
            )

        self._training_stream = stream(self._TRAINING_SEED)
        self._held_out_stream = stream(self._HELD_OUT_SEED)

    def draw(self, rng: Random, held_out: bool) -> Problem:
        stream = self._held_out_stream if held_out else self._training_stream
        entry = stream[rng.randrange(self._STREAM_SIZE)]
        return Problem(entry["question"], entry)

    def question_items(self, problem: Problem) -> list[str]:
        return list(problem.entry["metadata"]["word"])

    def verify(self, answer: str | None, problem: Problem) -> float:
        return float(self._training_stream.score_answer(answer, problem.entry))


TASKS: dict[str, Callable[[], Task]] = {task.name: task for task in (DigitSorting, SpellBackward)}
