"""Routes of the mixture-of-experts model: recorded when sampling, taken again by every pass over the samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.r1.parallel import SINGLE, Ranks
from examples.r1.results import Record
from grpo_kernels import MoE, MoEOutput, RouterOutput, RouterReplay


class Pass(NamedTuple):
    """One pass of tokens through the layers: what the routers are told, and where they report."""

    live: Tensor  # [B, T] bool, False for padding, which is routed nowhere
    replay: RouterReplay | None
    reports: list[tuple[int, RouterOutput]] | None

    def through(self, moe: MoE, x: Tensor) -> Tensor:
        """The layer's output for x [B, T, width]."""
        output: MoEOutput = moe(x, token_mask=self.live, replay=self.replay)
        if self.reports is not None and moe.gate.layer_id is not None:
            self.reports.append((moe.gate.layer_id, output.router))
        return output.hidden


class Routes:
    """The routes of a batch: of the pass over its prompts and of that over its completions; None routes live."""

    def __init__(self, prompts: RouterReplay | None = None, completions: RouterReplay | None = None) -> None:
        self.prompts = prompts
        self.completions = completions
        self.prompt_reports: list[tuple[int, RouterOutput]] = []  # by layer, of all passes since the last `metrics`
        self.completion_reports: list[tuple[int, RouterOutput]] = []

    @property
    def reports(self) -> list[tuple[int, RouterOutput]]:
        """Of prompts, then of completions."""
        return self.prompt_reports + self.completion_reports

    def again(self) -> Routes:
        """The same routes for another pass, with reports of its own."""
        return Routes(self.prompts, self.completions)

    def select(self, groups: Tensor | slice, prompts: int) -> Routes:
        """Those of the prompts of these indices, of as many as there are, and of their completions."""

        def part(replay: RouterReplay | None) -> RouterReplay | None:
            if replay is None or replay.num_tokens is None:
                return None
            packed = replay.pack()
            rows = packed.view(prompts, -1, *packed.shape[1:])[groups]
            return RouterReplay.from_packed(rows.flatten(0, 1), replay.num_experts, replay.layer_ids)

        return Routes(part(self.prompts), part(self.completions))

    def followed_by(self, other: Routes) -> Routes:
        """Those of this batch and of another behind it."""

        def both(mine: RouterReplay | None, theirs: RouterReplay | None) -> RouterReplay | None:
            if mine is None or theirs is None:
                return None
            packed = torch.cat((mine.pack(), theirs.pack()))
            return RouterReplay.from_packed(packed, mine.num_experts, mine.layer_ids)

        return Routes(both(self.prompts, other.prompts), both(self.completions, other.completions))

    def balance_loss(self) -> Tensor:
        """The balance losses of the layers, each a mean over sequences; prompts and completions count half each."""
        return torch.stack([router.seq_aux_loss for _, router in self.reports]).sum() / 2

    def loads(self) -> Tensor:
        """[layers, E] int64. Tokens of each expert in all passes since the last `metrics`."""
        return _loads(self.reports)

    def metrics(self, top_k: int, ranks: Ranks = SINGLE, group_size: int = 1) -> Record:
        """How even the loads were and how often live routing would have gone elsewhere; forgets the passes.

        expert_load: the busiest expert's tokens over the mean, in the layer where that is largest; 1 is even.
        route_mismatch: share of tokens and layers whose live experts are not those that were replayed.

        Of all ranks together. Where they share groups, of `group_size` in all, each reads every prompt, which counts
        once.
        """
        reports = self.reports if group_size == 1 or ranks.is_main else self.completion_reports
        loads = ranks.sum_(_loads(reports).double())
        mismatches = ranks.sum_(torch.stack([router.replay_mismatch for _, router in reports]).sum())
        self.prompt_reports, self.completion_reports = [], []
        busiest = (loads.amax(dim=1) / loads.mean(dim=1).clamp(min=1.0)).max()
        routed = (loads.sum() / top_k).clamp(min=1.0)
        return {"expert_load": float(busiest), "route_mismatch": float(mismatches / routed)}


def _loads(reports: list[tuple[int, RouterOutput]]) -> Tensor:
    """[layers, E] int64. Tokens of each expert."""
    layers = sorted({layer for layer, _ in reports})
    counts = [[router.tokens_per_expert for layer, router in reports if layer == wanted] for wanted in layers]
    return torch.stack([torch.stack(rows).long().sum(dim=0) for rows in counts])


class Recorder:
    """Records the routes of a rollout, where the prompts are one pass and each column of the completions another."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._passes: list[RouterReplay] = []

    def next_pass(self) -> RouterReplay:
        """A fresh object: the same layers see other tokens in every pass."""
        self._passes.append(RouterReplay(self.experts))
        return self._passes[-1]

    def routes(self, samples: int, completion_length: int) -> Routes:
        """Those of prompts [N * P] and completions [samples * (C - 1)]: no pass follows the last token.

        Columns after all samples have ended have no route.
        """
        prompts, *columns = self._passes
        first = prompts.pack()
        packed = first.new_full((samples, completion_length - 1, *first.shape[1:]), -1)  # as an engine sends them
        for index, column in enumerate(columns):
            packed[:, index] = column.pack()
        return Routes(prompts, RouterReplay.from_packed(packed.flatten(0, 1), self.experts, prompts.layer_ids))


class DraftRecorder(Recorder):
    """The same where a pass brings each row several tokens at its own place, and what was rejected is overwritten."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self._starts: list[Tensor] = []
        self._lengths = torch.zeros(0)

    def next_pass(self, lengths: Tensor | None = None) -> RouterReplay:
        """Of the prompts; or of a round in which completions of lengths [samples] go on from their newest token."""
        if lengths is not None:
            self._starts.append(lengths - 1)
        return super().next_pass()

    def finish(self, lengths: Tensor) -> None:
        """Completions are of these lengths; what was recorded from their last token on were guesses."""
        self._lengths = lengths

    def routes(self, samples: int, completion_length: int) -> Routes:
        prompts, *rounds = self._passes
        first = prompts.pack()
        parts = [part.pack().view(samples, -1, *first.shape[1:]) for part in rounds]
        room = completion_length + max((part.shape[1] for part in parts), default=0)
        packed = first.new_full((samples, room, *first.shape[1:]), -1)
        places = torch.arange(room, device=packed.device)
        rows = torch.arange(samples, device=packed.device).unsqueeze(1)
        for part, starts in zip(parts, self._starts, strict=True):
            packed[rows, starts.unsqueeze(1) + places[: part.shape[1]]] = part
        packed[places >= self._lengths.unsqueeze(1) - 1] = -1
        known = packed[:, : completion_length - 1].flatten(0, 1)
        return Routes(prompts, RouterReplay.from_packed(known, self.experts, prompts.layer_ids))
