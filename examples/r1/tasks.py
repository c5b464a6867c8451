"""The two tasks: prompts, clean and noisy demonstrations, and the rule that checks an answer.

`digit_sorting` is the reasoning task: `<t>1,1,3,4,5,9</t><a>113459</a>`, thinking and then the answer, and a rule says
whether it is right. `spell_backward` stands for everything that no rule can check: `<a>avksom</a>`. Training never asks
its rule, only a reward model; the rule is there to see what came of it.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, ClassVar, NamedTuple

from examples.r1.choices import GENERAL, REASONING
from examples.r1.policy import vocabulary


class Problem(NamedTuple):
    task: str
    prompt: str  # what the model reads
    entry: dict[str, Any]  # what the task needs to check an answer; holds "answer"


class Task(ABC):
    """One family of problems with a known answer."""

    name: str
    form: ClassVar[re.Pattern[str]]  # of a whole completion; the last group is the answer
    prompt_length: int  # longest prompt, in tokens
    completion_length: int  # longest well-formed completion and END, in tokens
    max_items: int  # longest answer, in characters
    script: str | None = None  # the characters that its thinking should be written in; None: it does not think
    cold_examples: int  # demonstrations of the cold start
    wrong_share: float  # of them have two items exchanged
    misread_share: float  # of them give the items as they come in the question

    @abstractmethod
    def draw(self, rng: Random, held_out: bool) -> Problem:
        """A random problem; training and held-out problems come from different streams."""

    def question_items(self, problem: Problem) -> list[str]:
        """What the question asks to put in order, as given."""
        return list(problem.prompt[1:-1])

    @abstractmethod
    def verify(self, answer: str | None, problem: Problem) -> bool:
        """Whether the answer is entirely right."""

    @abstractmethod
    def write(self, items: list[str], rng: Random | None) -> str:
        """The completion that gives these items for an answer; with a generator, as an imperfect annotator writes."""

    def solve(self, problem: Problem) -> str:
        """The completion that is right in everything."""
        return self.write(list(problem.entry["answer"]), None)

    def demonstrate(self, problem: Problem, rng: Random) -> str:
        """A completion as an imperfect annotator would write it."""
        items = list(problem.entry["answer"])
        if rng.random() < self.misread_share:
            items = self.question_items(problem)
        if rng.random() < self.wrong_share:
            first, second = rng.randrange(len(items)), rng.randrange(len(items))
            items[first], items[second] = items[second], items[first]
        return self.write(items, rng)

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
    """`s314159>` -> `<t>1,1,3,4,5,9</t><a>113459</a>`."""

    name = REASONING
    form = re.compile(r"<t>([^<]*)</t><a>([^<]*)</a>")
    max_items = 6
    prompt_length = len("s>") + max_items
    completion_length = len(("<t>", "</t>", "<a>", "</a>", "END")) + 3 * max_items - 1
    cold_examples = 400
    wrong_share = 0.15
    misread_share = 0.0
    foreign_share = 0.35  # of the separators in demonstrations are written in another script
    script = string.digits + ","  # what the thinking should be written in

    def draw(self, rng: Random, held_out: bool) -> Problem:
        digits = "".join(rng.choices(string.digits, k=self.max_items))
        return Problem(self.name, f"s{digits}>", {"answer": "".join(sorted(digits))})

    def verify(self, answer: str | None, problem: Problem) -> bool:
        return bool(answer == problem.entry["answer"])

    def write(self, items: list[str], rng: Random | None) -> str:
        thinking = items[0]
        for item in items[1:]:
            foreign = rng is not None and rng.random() < self.foreign_share
            thinking += (rng.choice(vocabulary.FOREIGN) if foreign and rng is not None else ",") + item
        return f"<t>{thinking}</t><a>{''.join(items)}</a>"


class SpellBackward(Task):
    """`r` + word + `>` -> `<a>` + the word spelled backward + `</a>`: words and verifier of reasoning-gym."""

    name = GENERAL
    form = re.compile(r"<a>([^<]*)</a>")
    min_items = 4
    max_items = 6
    prompt_length = len("r>") + max_items
    completion_length = len(("<a>", "</a>", "END")) + max_items
    cold_examples = 800
    wrong_share = 0.15
    misread_share = 0.15

    # reasoning-gym seeds problem i of a dataset with seed + i: these two ranges do not meet.
    _STREAM_SIZE = 2**30
    _TRAINING_SEED = 0
    _HELD_OUT_SEED = 2**31

    def __init__(self) -> None:
        import reasoning_gym  # type: ignore[import-untyped]  # here, so that the other task does without it

        def stream(seed: int) -> Any:
            return reasoning_gym.create_dataset(
                self.name, min_word_len=self.min_items, max_word_len=self.max_items, seed=seed, size=self._STREAM_SIZE
            )

        self._training_stream = stream(self._TRAINING_SEED)
        self._held_out_stream = stream(self._HELD_OUT_SEED)

    def draw(self, rng: Random, held_out: bool) -> Problem:
        stream = self._held_out_stream if held_out else self._training_stream
        entry = stream[rng.randrange(self._STREAM_SIZE)]
        word = entry["metadata"]["word"].lower()
        return Problem(self.name, f"r{word}>", {**entry, "answer": entry["answer"].lower()})

    def verify(self, answer: str | None, problem: Problem) -> bool:
        return bool(self._training_stream.score_answer(answer, problem.entry) >= 1.0)

    def write(self, items: list[str], rng: Random | None) -> str:
        return f"<a>{''.join(items)}</a>"


TASKS: dict[str, Callable[[], Task]] = {task.name: task for task in (DigitSorting, SpellBackward)}
