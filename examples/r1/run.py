"""What all stages of a run share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor

from examples.r1.parallel import Ranks
from examples.r1.policy import vocabulary
from examples.r1.policy.model import CharTransformer, ModelConfig
from examples.r1.randomness import python_rng, stream_seed
from examples.r1.settings import Settings
from examples.r1.settings_checks import MOST_EVALUATION_PROMPTS, check_shares
from examples.r1.shards import own_state, shard_names
from examples.r1.tasks import TASKS, Problem, Task
from grpo_kernels.distributed import ExpertParallel


@dataclass(frozen=True)
class Run:
    """Options, ranks and tasks."""

    settings: Settings
    ranks: Ranks
    tasks: dict[str, Task]
    held_out: dict[str, list[Problem]]  # that it is evaluated on
    excluded: frozenset[str]  # prompts that training never sees: those of every run's evaluations
    device: torch.device

    @classmethod
    def prepare(cls, settings: Settings, ranks: Ranks | None = None) -> Run:
        ranks = Ranks.single(settings.device) if ranks is None else ranks
        check_shares(settings, ranks)
        device = ranks.device
        if device.type == "cpu":
            torch.set_num_threads(settings.threads)
        tasks = {name: make() for name, make in TASKS.items()}
        apart = {name: task.held_out(MOST_EVALUATION_PROMPTS) for name, task in tasks.items()}
        held_out = {name: problems[: settings.evaluation_prompts] for name, problems in apart.items()}
        excluded = frozenset(problem.prompt for problems in apart.values() for problem in problems)
        return cls(settings, ranks, tasks, held_out, excluded, device)

    @property
    def all_held_out(self) -> list[Problem]:
        """Of all tasks, one after the other."""
        return [problem for problems in self.held_out.values() for problem in problems]

    @property
    def prompt_length(self) -> int:
        return max(task.prompt_length for task in self.tasks.values())

    @property
    def completion_length(self) -> int:
        return max(task.completion_length for task in self.tasks.values())

    def problems(self, task: str, rng: Random) -> Iterator[Problem]:
        """Endless training problems."""
        return self.tasks[task].training(rng, self.excluded)

    def draw(self, task: str, count: int, *source: object) -> list[Problem]:
        """Training problems that are a function of the seed and the source."""
        return list(islice(self.problems(task, python_rng(self.settings.seed, task, *source)), count))

    def encode_prompts(self, problems: Sequence[Problem]) -> Tensor:
        """[N, P] int64, padded on the left."""
        rows = [vocabulary.pad_left(vocabulary.encode(problem.prompt), self.prompt_length) for problem in problems]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).view(-1, self.prompt_length)

    def encode_completions(self, texts: Sequence[str]) -> Tensor:
        """[N, C] int64, END and then padding."""
        rows = [
            vocabulary.pad_right([*vocabulary.encode(text), vocabulary.END], self.completion_length) for text in texts
        ]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).view(-1, self.completion_length)

    def build_policy(self) -> CharTransformer:
        """The base model: its parameters depend on the seed and the sizes alone, however experts are spread."""
        settings = self.settings
        return self._build(
            "policy",
            experts=settings.experts if settings.model == "moe" else 0,
            experts_per_token=settings.experts_per_token,
            shared_expert=settings.shared_expert,
            recipe=settings.recipe,
            balance_coef=settings.balance_coef,
            mtp=settings.mtp,
        )

    def build_judge(self) -> CharTransformer:
        """A fresh reward model: dense, whatever the policy is."""
        return self._build("judge")

    def _build(self, name: str, **options: object) -> CharTransformer:
        settings = self.settings
        torch.manual_seed(stream_seed(settings.seed, name))
        config = ModelConfig(
            max_length=self.prompt_length + self.completion_length,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            **options,  # type: ignore[arg-type]
        )
        model = CharTransformer(config)
        if settings.expert_parallel and config.experts:
            whole, model = model, CharTransformer(config, ExpertParallel(config.experts, self.ranks.process_group))
            model.load_state_dict(own_state(self.ranks, whole.state_dict(), shard_names(model)))
        return model.to(self.device)
