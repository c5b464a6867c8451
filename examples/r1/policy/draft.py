"""Sampling with drafts: layers of multi-token prediction guess the next tokens, one pass of the model checks them all.

The samples follow the model alone, whatever the guesses are worth: `verify_draft` keeps the law. In a round a row gets
one token more than drafts were accepted, so rows are of different lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.r1.parallel import SINGLE, Ranks
from examples.r1.policy import vocabulary
from examples.r1.policy.model import CharTransformer, SharedPrefix
from examples.r1.policy.mtp import layers_of, read_prompts
from examples.r1.policy.ragged_cache import RaggedCache
from examples.r1.policy.routes import DraftRecorder
from examples.r1.results import Record
from grpo_kernels import VerifyDraftOutput, verify_draft


class DraftCounts(NamedTuple):
    """What drafts were worth. Only those that were looked at count: all before them accepted, and no END among them."""

    tokens: int
    passes: int  # of the model, each as often as rows took part
    looked_at: list[int]  # by depth, from 1 on
    accepted: list[int]

    def plus(self, other: DraftCounts) -> DraftCounts:
        """Of both."""

        def added(mine: list[int], theirs: list[int]) -> list[int]:
            return [sum(pair) for pair in zip(mine, theirs, strict=True)]

        return DraftCounts(
            self.tokens + other.tokens,
            self.passes + other.passes,
            added(self.looked_at, other.looked_at),
            added(self.accepted, other.accepted),
        )

    def record(self) -> Record:
        """tokens_per_pass, 1 without drafts; and the acceptance of every depth, where drafts were looked at."""
        record = {"tokens_per_pass": self.tokens / max(self.passes, 1)}
        for depth, (seen, taken) in enumerate(zip(self.looked_at, self.accepted, strict=True), start=1):
            if seen > 0:
                record[f"acceptance_{depth}"] = taken / seen
        return record


class Drafted(NamedTuple):
    """Samples, and what sampling them showed.

    The tensors are of inference mode: `clone` them outside it before autograd meets them.
    """

    completions: Tensor  # [N * group_size / ranks, C] int64, END, then padding
    log_probs: Tensor  # [N * group_size / ranks, C] float32, under the policy; 0 behind END
    counts: DraftCounts  # of all ranks


@torch.inference_mode()
def generate(
    model: CharTransformer,
    prompts: Tensor,
    completion_length: int,
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    recorder: DraftRecorder | None = None,
    ranks: Ranks = SINGLE,
) -> Drafted:
    """As `rollout.generate`, with drafts. Without a generator: greedy, the same tokens as without drafts."""
    seeds = torch.zeros((len(prompts) * group_size, 2), dtype=torch.int64, device=prompts.device)
    if generator is not None:
        seeds.random_(generator=generator)
    mode = "greedy" if generator is None else "block"
    noise = _Noise(ranks.own_samples(seeds, group_size), temperature, mode)
    own = ranks.own_prompts(prompts, group_size)
    rows = _Rows(model, own, completion_length, ranks.own_group(group_size), noise, recorder, ranks)
    while rows.alive():  # waits for the device: a round too many costs more
        rows.verify(*rows.draft())
    if recorder is not None:
        recorder.finish(rows.lengths)
    return rows.drafted()


_DRAFTS, _VERDICTS = 0, 1  # streams of noise


class _Noise:
    """Two seeds a row, for drafts and for the verdicts on them; every round takes fresh noise of both.

    Noise of a place in the sequence would not do for drafts: block verification looks at all of them, and a place
    behind the ones that stand gets another draft in the next round.
    """

    def __init__(self, seeds: Tensor, temperature: float, mode: str) -> None:
        self.mode = mode
        self.temperature = temperature
        self._seeds = seeds.t().contiguous()
        self._used = [0, 0]

    def _offsets(self, stream: int, count: int) -> Tensor:
        offsets = torch.full_like(self._seeds[stream], self._used[stream])
        self._used[stream] += count
        return offsets

    def draw(self, logits: Tensor) -> Tensor:
        """A draft [B] from logits [B, V]."""
        none = torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
        return self._verify(_DRAFTS, logits.unsqueeze(1), none, None, None).token_ids.squeeze(1)

    def verify(
        self, logits: Tensor, drafts: Tensor, draft_logits: Tensor | None, draft_lengths: Tensor | None
    ) -> VerifyDraftOutput:
        return self._verify(_VERDICTS, logits, drafts, draft_logits, draft_lengths)

    def _verify(
        self, stream: int, logits: Tensor, drafts: Tensor, draft_logits: Tensor | None, draft_lengths: Tensor | None
    ) -> VerifyDraftOutput:
        return verify_draft(
            logits,
            drafts,
            draft_logits=draft_logits,
            draft_lengths=draft_lengths,
            temperature=self.temperature,
            seeds=self._seeds[stream],
            offsets=self._offsets(stream, logits.shape[1]),
            mode=self.mode,
        )


class _Rows:
    """All samples of a batch, each as far as it has come."""

    def __init__(
        self,
        model: CharTransformer,
        prompts: Tensor,
        completion_length: int,
        group_size: int,
        noise: _Noise,
        recorder: DraftRecorder | None,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.noise = noise
        self.recorder = recorder
        self.mtp = layers_of(model)
        self.depths = len(self.mtp.layers)
        self.prompt_length = prompts.shape[1]
        self.completion_length = completion_length
        batch, device = len(prompts) * group_size, prompts.device
        room = completion_length + 3 * self.depths  # drafting looks at 2 D columns, and at tokens D - 1 ahead of them
        self.tokens = torch.full((batch, room), vocabulary.PAD, device=device)  # those to come are drafts
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0
        self.live = torch.ones(batch, dtype=torch.bool, device=device)
        self.batch_index = torch.arange(batch, device=device)
        self.passes = torch.zeros((), dtype=torch.int64, device=device)
        self.verdicts = torch.zeros((2, self.depths), dtype=torch.int64, device=device)  # looked at, accepted
        self._read(prompts, group_size)

    def _read(self, prompts: Tensor, group_size: int) -> None:
        """One pass over the prompts, which gives every row its first token."""
        prefix = SharedPrefix(group_size)
        hidden = self.model(prompts, prefix, None if self.recorder is None else self.recorder.next_pass())
        drafts_prefix = read_prompts(self.model, prompts, hidden, group_size)
        last, room = self.model.config.max_length - 1, self.tokens.shape[1]
        self.cache = RaggedCache(prefix, self.prompt_length + room, last)
        self.draft_cache = RaggedCache(drafts_prefix, self.prompt_length + room, last)
        first = hidden[:, -1:].repeat_interleave(group_size, dim=0)
        self.hidden = hidden.new_zeros((len(first), room, hidden.shape[-1]))  # [B, room, width] of each column
        self.log_probs = hidden.new_zeros((len(first), room))
        none = self.tokens[:, :0]
        self._take(first, none, None, torch.zeros_like(self.lengths))

    def alive(self) -> bool:
        """Whether a row anywhere goes on: all ranks make as many passes, since experts may need all of them."""
        return self.ranks.any(self.live)

    def draft(self) -> tuple[Tensor, Tensor]:
        """Drafts [B, D] of the next tokens and their logits [B, D, V].

        Depth k embeds the tokens k - 1 places ahead, so in its last k - 1 columns there were drafts in the last round.
        They are computed anew, with all columns since, from the model's hidden states and the tokens that came to be:
        a rejected draft leaves no trace. Two columns a depth are enough.
        """
        count = 2 * self.depths
        starts = (self.lengths - count).clamp(min=0)
        columns = starts.unsqueeze(1) + torch.arange(count, device=starts.device)
        place = self.prompt_length - 1  # of column 0
        self.draft_cache.begin(place + starts, count, place + max(self.longest, count))
        hidden = self.hidden[self.batch_index.unsqueeze(1), columns]
        newest = self.lengths - 1 - starts
        logits = []
        for depth, layer in enumerate(self.mtp.layers):
            embeds = self.model.token_embedding(self.tokens.gather(1, columns + depth))
            hidden = layer(hidden, embeds, cache=self.draft_cache)
            latest = hidden[self.batch_index, newest]
            logits.append(self.model.head(latest if self.mtp.final_norm is None else self.mtp.final_norm(latest)))
            drawn = self.noise.draw(logits[-1])
            self.tokens.scatter_(1, (self.lengths + depth).unsqueeze(1), drawn.unsqueeze(1))
        ahead = self.lengths.unsqueeze(1) + torch.arange(self.depths, device=starts.device)
        return self.tokens.gather(1, ahead), torch.stack(logits, dim=1)

    def verify(self, drafts: Tensor, draft_logits: Tensor) -> None:
        """One pass of the model over each row's newest token and its drafts."""
        count = self.depths + 1
        draft_lengths = (self.completion_length - self.lengths - 1).clamp(min=0, max=self.depths)
        steps = torch.arange(count, device=drafts.device)
        idle = (steps > draft_lengths.unsqueeze(1)) | ~self.live.unsqueeze(1)
        inputs = self.tokens.gather(1, self.lengths.unsqueeze(1) - 1 + steps).masked_fill_(idle, vocabulary.PAD)
        starts = self.prompt_length + self.lengths - 1
        self.cache.begin(starts, count, self.prompt_length + self.longest + self.depths)
        replay = None if self.recorder is None else self.recorder.next_pass(self.lengths)
        hidden = self.model(inputs, self.cache, replay)
        self._take(hidden, drafts, draft_logits, draft_lengths)

    def _take(self, hidden: Tensor, drafts: Tensor, draft_logits: Tensor | None, draft_lengths: Tensor) -> None:
        """Appends what the verdict on the drafts emits, up to END; hidden [B, K + 1, width] are the columns' own."""
        output = self.noise.verify(self.model.head(hidden), drafts, draft_logits, draft_lengths)
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        columns = self.lengths.unsqueeze(1) + steps
        is_end = output.token_ids == vocabulary.END
        before_end = (is_end.cumsum(dim=1) - is_end.long()) == 0
        kept = (steps <= output.num_accepted.unsqueeze(1)) & before_end & self.live.unsqueeze(1)
        self.hidden[self.batch_index.unsqueeze(1), columns] = hidden
        self.tokens.scatter_(1, columns, output.token_ids.masked_fill(~kept, vocabulary.PAD))
        self.log_probs.scatter_(1, columns, output.log_probs.masked_fill(~kept, 0.0))
        self.passes += self.live.sum()
        for depth in range(drafts.shape[1]):  # looked at: all before it were accepted, and END is not among them
            looked_at = kept[:, depth] & (draft_lengths > depth)
            self.verdicts[0, depth] += looked_at.sum()
            self.verdicts[1, depth] += (looked_at & (output.num_accepted > depth)).sum()
        self.lengths += kept.sum(dim=1)
        self.longest = int(self.lengths.max())
        self.live &= ~(is_end & kept).any(dim=1) & (self.lengths < self.completion_length)

    def drafted(self) -> Drafted:
        found = torch.cat((torch.stack((self.lengths.sum(), self.passes)), self.verdicts.flatten()))
        tokens, passes, *verdicts = self.ranks.sum_(found).tolist()
        counts = DraftCounts(tokens, passes, verdicts[: self.depths], verdicts[self.depths :])
        length = self.completion_length
        return Drafted(self.tokens[:, :length], self.log_probs[:, :length], counts)
