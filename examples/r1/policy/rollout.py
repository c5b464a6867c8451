"""Batched sampling with a key-value cache, and what the rules say of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.r1.parallel import SINGLE, Ranks
from examples.r1.policy import draft, vocabulary
from examples.r1.policy.draft import DraftCounts
from examples.r1.policy.model import CharTransformer, KVCache
from examples.r1.policy.routes import DraftRecorder, Recorder, Routes
from examples.r1.policy.sequences import Sequences, concatenate, make_sequences, rows_of_groups
from examples.r1.run import Run
from examples.r1.stages import rewards
from examples.r1.tasks import Problem


@torch.inference_mode()
def generate(
    model: CharTransformer,
    prompts: Tensor,
    completion_length: int,
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    recorder: Recorder | None = None,
    ranks: Ranks = SINGLE,
) -> Tensor:
    """Completions [N * group_size / ranks, C], END and then padding: this rank's. Without a generator: greedy.

    Every prompt is read once, whatever the group size. A recorder sees the routes of an MoE model. All ranks make as
    many passes, since experts may need all of them.
    """

    def read(tokens: Tensor, cache: KVCache) -> Tensor:
        hidden: Tensor = model(tokens, cache, None if recorder is None else recorder.next_pass())
        return hidden[:, -1]

    def draw() -> Tensor | None:
        """A number in [0, 1) for each row; all ranks draw those of all rows."""
        if generator is None:
            return None
        numbers = torch.rand(len(prompts) * group_size, 1, generator=generator, device=prompts.device)
        return ranks.own_samples(numbers, group_size)

    own, times = ranks.own_prompts(prompts, group_size), ranks.own_group(group_size)
    batch = len(own) * times
    cache = KVCache.empty(model.config, len(own), model.head.weight)
    hidden = read(own, cache).repeat_interleave(times, dim=0)
    cache = cache.repeat(times)
    completions = torch.full((batch, completion_length), vocabulary.PAD, device=prompts.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    for column in range(completion_length):
        chosen = _choose(model.head(hidden), temperature, draw()).masked_fill_(ended, vocabulary.PAD)
        completions[:, column] = chosen
        ended |= chosen == vocabulary.END
        if column + 1 == completion_length or (prompts.device.type == "cpu" and not ranks.any(~ended)):
            break
        hidden = read(chosen[:, None], cache)
    return completions


def _choose(logits: Tensor, temperature: float, draw: Tensor | None) -> Tensor:
    if draw is None:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
    return found.squeeze(1).clamp_max_(logits.shape[1] - 1)


class Rollout(NamedTuple):
    """Samples of a batch of problems, and what the rules say of them. Row i belongs to problem i // group_size.

    Every rank knows the texts of all, and keeps of its own what training reads.
    """

    problems: list[Problem]
    sequences: Sequences  # this rank's
    texts: list[str]  # B of them
    rulings: Tensor  # [B, 3] float32, on the CPU: right, format, language
    routes: Routes | None = None  # of an MoE model, if they were recorded: this rank's
    log_probs: Tensor | None = None  # [B / ranks, C] float32 under the policy, and
    drafts: DraftCounts | None = None  # what drafts were worth, on all ranks: of a model that drafts

    @property
    def group_size(self) -> int:
        return len(self.texts) // max(len(self.problems), 1)

    @property
    def problem_of_each(self) -> list[Problem]:
        """The problem of every sample."""
        return [problem for problem in self.problems for _ in range(self.group_size)]

    def select(self, groups: Tensor) -> Rollout:
        """The groups of these indices, in this order."""
        rows, own = rows_of_groups(groups, self.group_size), rows_of_groups(groups, self.sequences.group_size)
        return Rollout(
            [self.problems[index] for index in groups.tolist()],
            self.sequences.select(groups.to(self.sequences.prompts.device)),
            [self.texts[index] for index in rows.tolist()],
            self.rulings[rows],
            None if self.routes is None else self.routes.select(groups, len(self.problems)),
            None if self.log_probs is None else self.log_probs[own.to(self.log_probs.device)],
            self.drafts,
        )

    def followed_by(self, other: Rollout) -> Rollout:
        """The groups of both."""
        return Rollout(
            self.problems + other.problems,
            concatenate((self.sequences, other.sequences)),
            self.texts + other.texts,
            torch.cat((self.rulings, other.rulings)),
            None if self.routes is None or other.routes is None else self.routes.followed_by(other.routes),
            None if self.log_probs is None or other.log_probs is None else torch.cat((self.log_probs, other.log_probs)),
            None if self.drafts is None or other.drafts is None else self.drafts.plus(other.drafts),
        )

    def means(self) -> dict[str, float]:
        """`<task>/accuracy`, `<task>/format` and `<task>/language`: means over the task's samples."""
        means: dict[str, float] = {}
        for task in dict.fromkeys(problem.task for problem in self.problems):
            rows = self.rulings[rewards.of_task(self.problem_of_each, task)]
            for name, column in zip(("accuracy", "format", "language"), rows.T, strict=True):
                if not bool(column.isnan().all()):
                    means[f"{task}/{name}"] = float(column.mean())
        return means


def roll_out(
    model: CharTransformer,
    run: Run,
    problems: Sequence[Problem],
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    record_routes: bool = False,
    ranks: Ranks | None = None,
) -> Rollout:
    """Samples `group_size` completions a problem (greedy without a generator) and asks the rules about them.

    The ranks, those of the run unless others are named, share the samples of every group, and groups of one among
    them. A model with layers of multi-token prediction drafts. The samples are others than without, their law is the
    same.
    """
    ranks = run.ranks if ranks is None else ranks
    prompts = run.encode_prompts(problems)
    options: dict[str, Any] = {"group_size": group_size, "temperature": temperature, "generator": generator}
    options["ranks"] = ranks
    length = run.completion_length
    recorder: Recorder | None = None
    log_probs, counts = None, None
    if model.mtp is None:
        recorder = Recorder(model.config.experts) if record_routes else None
        completions = generate(model, prompts, length, recorder=recorder, **options)
    else:
        recorder = DraftRecorder(model.config.experts) if record_routes else None
        completions, log_probs, counts = draft.generate(model, prompts, length, recorder=recorder, **options)
    completions = completions.clone()  # no tensor of inference mode
    rows = ranks.gather_samples(completions, group_size).tolist()
    texts = [vocabulary.decode(row) for row in rows]
    finished = [vocabulary.is_whole(row) for row in rows]
    repeated = [problem for problem in problems for _ in range(group_size)]
    return Rollout(
        list(problems),
        make_sequences(ranks.own_prompts(prompts, group_size), completions),
        texts,
        rewards.rule_all(run.tasks, repeated, texts, finished),
        None if recorder is None else recorder.routes(len(completions), length),
        None if log_probs is None else log_probs.clone(),
        counts,
    )
