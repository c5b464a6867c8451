"""Batched sampling with a key-value cache, and the batch that training reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from examples.r1 import draft, rewards, vocabulary
from examples.r1.draft import DraftCounts
from examples.r1.model import CharTransformer, KVCache
from examples.r1.routes import DraftRecorder, Recorder, Routes
from examples.r1.tasks import Problem, Task


class Sequences(NamedTuple):
    """Prompts with G completions each; completion i belongs to prompt i // G."""

    prompts: Tensor  # [N, P] int64, padded on the left
    completions: Tensor  # [N * G, C] int64, END, then padding
    mask: Tensor  # [N * G, C] bool, True up to and with END

    def groups(self, start: int, end: int) -> Sequences:
        """Prompts start to end with all their completions."""
        size = len(self.completions) // len(self.prompts)
        rows = slice(start * size, end * size)
        return Sequences(self.prompts[start:end], self.completions[rows], self.mask[rows])


def make_sequences(prompts: Tensor, completions: Tensor) -> Sequences:
    """Adds the mask: END counts; what follows it does not."""
    is_end = completions == vocabulary.END
    return Sequences(prompts, completions, (is_end.cumsum(dim=1) - is_end.long()) == 0)


def stream_seed(*parts: object) -> int:
    """A seed that is a function of its parts: (seed, task, stage, step) leaves no generator state to save."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def python_rng(*parts: object) -> Random:
    return Random(stream_seed(*parts))


def torch_rng(device: torch.device, *parts: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(*parts))


def encode_prompts(task: Task, problems: Sequence[Problem], device: torch.device) -> Tensor:
    """[N, P] int64, padded on the left."""
    rows = [vocabulary.pad_left(vocabulary.encode(problem.prompt), task.prompt_length) for problem in problems]
    return torch.tensor(rows, device=device)


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
) -> Tensor:
    """Completions [N * group_size, C], END and then padding. Without a generator: greedy.

    Every prompt is read once, whatever the group size. A recorder sees the routes of an MoE model.
    """

    def read(tokens: Tensor, cache: KVCache) -> Tensor:
        hidden: Tensor = model(tokens, cache, None if recorder is None else recorder.next_pass())
        return hidden[:, -1]

    batch = len(prompts) * group_size
    cache = KVCache.empty(model.config, len(prompts), model.head.weight)
    hidden = read(prompts, cache).repeat_interleave(group_size, dim=0)
    cache = cache.repeat(group_size)
    completions = torch.full((batch, completion_length), vocabulary.PAD, device=prompts.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    for column in range(completion_length):
        chosen = _choose(model.head(hidden), temperature, generator).masked_fill_(ended, vocabulary.PAD)
        completions[:, column] = chosen
        ended |= chosen == vocabulary.END
        if column + 1 == completion_length or (prompts.device.type == "cpu" and bool(ended.all())):
            break
        hidden = read(chosen[:, None], cache)
    return completions


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    draw = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draw, right=True).squeeze(1).clamp_max_(logits.shape[1] - 1)


class Rollout(NamedTuple):
    """Samples of a batch of problems with their rewards. Row i belongs to problem i // group_size."""

    sequences: Sequences
    rewards: Tensor  # [B, 3] float32, on the CPU
    texts: list[str]
    routes: Routes | None = None  # of an MoE model, if they were recorded
    log_probs: Tensor | None = None  # [B, C] float32 under the policy, and
    drafts: DraftCounts | None = None  # what drafts were worth: of a model that drafts

    @property
    def generated_tokens(self) -> int:
        return int(self.sequences.mask.sum())

    def totals(self) -> Tensor:
        """The weighted sum of each sample's rewards, [B] float32."""
        return self.rewards @ torch.tensor(rewards.WEIGHTS)

    def means(self) -> dict[str, float]:
        """Mean of each reward over the samples; for accuracy, the share that is entirely right."""
        means = dict(zip(rewards.NAMES, self.rewards.mean(dim=0).tolist(), strict=True))
        means["accuracy"] = float((self.rewards[:, 0] >= 1.0).float().mean())
        return means


def roll_out(
    model: CharTransformer,
    task: Task,
    problems: Sequence[Problem],
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    record_routes: bool = False,
) -> Rollout:
    """Samples `group_size` completions a problem (greedy without a generator) and scores them.

    A model with layers of multi-token prediction drafts. The samples are others than without, their law is the same.
    """
    prompts = encode_prompts(task, problems, model.head.weight.device)
    recorder: Recorder | None = None
    log_probs, counts = None, None
    if model.mtp is None:
        recorder = Recorder(model.config.experts) if record_routes else None
        completions = generate(
            model,
            prompts,
            task.completion_length,
            group_size=group_size,
            temperature=temperature,
            generator=generator,
            recorder=recorder,
        )
    else:
        recorder = DraftRecorder(model.config.experts) if record_routes else None
        completions, log_probs, counts = draft.generate(
            model,
            prompts,
            task.completion_length,
            group_size=group_size,
            temperature=temperature,
            generator=generator,
            recorder=recorder,
        )
    rows = completions.tolist()
    texts = [vocabulary.decode(row) for row in rows]
    finished = [vocabulary.END in row for row in rows]
    repeated = [problem for problem in problems for _ in range(group_size)]
    scores = rewards.score_all(task, repeated, texts, finished)
    sequences = make_sequences(prompts, completions.clone())
    routes = None if recorder is None else recorder.routes(len(completions), task.completion_length)
    return Rollout(sequences, scores, texts, routes, None if log_probs is None else log_probs.clone(), counts)
