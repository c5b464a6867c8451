"""Verification of drafts through Triton: the launcher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels._extension import pointer
from grpo_kernels._launch import on_device
from grpo_kernels.speculative_sampling._block_triton import block_kernel, chain_kernel, residual_kernel
from grpo_kernels.speculative_sampling._config_triton import (
    MAX_RACES,
    MAX_SPLITS,
    LaunchConfig,
    launch_config,
    race_config,
)
from grpo_kernels.speculative_sampling._filter_triton import filter_kernel
from grpo_kernels.speculative_sampling._kernels_triton import greedy_kernel, statistics_kernel, token_kernel
from grpo_kernels.speculative_sampling._race_triton import choose_kernel, race_kernel
from grpo_kernels.speculative_sampling._tiles_triton import RECORD
from grpo_kernels.speculative_sampling.ops import empty_outputs

_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""How many bits of a float32 a logit of a dtype never has, however small it is."""


class _Problem(NamedTuple):
    """What every kernel is told: the arguments, how rows lie, and how they are cut."""

    target: Tensor
    draft: Tensor | None
    draft_ids: Tensor
    lengths: Tensor | None
    temperatures: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    seeds: Tensor
    offsets: Tensor | None
    config: LaunchConfig

    @property
    def sizes(self) -> tuple[int, int, int]:
        """V, K, and the rows of logits that a sequence has."""
        drafts = self.draft_ids.shape[1]
        return self.target.shape[2], drafts, drafts + 1 + (0 if self.draft is None else drafts)

    @property
    def target_strides(self) -> tuple[int, int]:
        return self.target.stride(0), self.target.stride(1)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        draft = (0, 0) if self.draft is None else (self.draft.stride(0), self.draft.stride(1))
        return *self.target_strides, *draft

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "HAS_DRAFT": self.draft is not None,
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_TEMPERATURES": self.temperatures is not None,
        }

    @property
    def tiles(self) -> dict[str, Any]:
        config = self.config
        return {
            "SLOTS": config.slots, "WIDTH": config.width, "NEIGHBOURS": config.neighbours,
            "num_warps": config.num_warps,
        }  # fmt: skip


class _Buffers(NamedTuple):
    """What kernels leave for each other."""

    partials: Tensor  # [rows of logits, 2, splits]
    ids: Tensor  # [rows of logits, splits], of the greedy rule
    candidates: Tensor  # [rows of logits, room] of their dtype
    masses: Tensor  # [rows of logits]
    thresholds: Tensor
    records: Tensor  # [B, RECORD]
    kinds: Tensor  # [B]
    chain: Tensor  # [B, K + 1]
    window: Tensor  # [B]
    residuals: Tensor  # [B, K, splits]


def _buffers(of: _Problem, mode: str) -> _Buffers:
    batch = of.target.shape[0]
    _, drafts, sources = of.sizes
    splits, rows = of.config.splits, batch * sources
    filtered = rows if _filtered(of) else 0
    drawn, block = batch * (mode != "greedy"), batch * (mode == "block")

    def real(*shape: int) -> Tensor:
        return of.target.new_empty(shape, dtype=torch.float32)

    def whole(*shape: int) -> Tensor:
        return of.target.new_empty(shape, dtype=torch.int32)

    return _Buffers(
        real(rows, 2, splits), whole(rows if mode == "greedy" else 0, splits),
        of.target.new_empty((filtered, of.config.room)), real(filtered), real(filtered), real(drawn, RECORD.value),
        whole(drawn), real(block, drafts + 1), whole(block), real(block, drafts, splits),
    )  # fmt: skip


def _filtered(of: _Problem) -> bool:
    """Whether there are filters. They leave a vocabulary of one as it is."""
    return (of.top_k is not None or of.top_p is not None) and of.target.shape[2] > 1


def _dense(tensor: Tensor) -> Tensor:
    """With a dense last axis, other strides as they are."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _aligned(tensor: Tensor | None) -> bool:
    """Whether every row starts at a multiple of 16 bytes, and Triton can know: it sees multiples of 16 elements."""
    return tensor is None or (
        pointer(tensor) % 16 == 0 and all(stride % 16 == 0 for stride in (tensor.stride(0), tensor.stride(1)))
    )


def _statistics(of: _Problem, to: _Buffers, greedy: bool) -> None:
    splits, columns = of.config.splits, of.config.columns
    rows, filtered = len(to.partials), _filtered(of)
    statistics_kernel[(rows, splits)](
        of.target, of.draft, of.lengths, of.temperatures, to.partials, to.ids, to.candidates, *of.sizes, splits,
        columns, *of.strides, **of.flags, GREEDY=greedy, ROOM=of.config.room if filtered else 0, **of.tiles,
    )  # fmt: skip
    if filtered:
        config = of.config
        filter_kernel[(rows,)](
            of.target, of.draft, of.lengths, of.temperatures, of.top_k, of.top_p, to.partials, to.candidates, to.masses,
            to.thresholds, *of.sizes, splits, *of.strides, **of.flags, HAS_TOP_K=of.top_k is not None,
            HAS_TOP_P=of.top_p is not None, SHIFT=_SHIFT[of.target.dtype], SPLITS=MAX_SPLITS, GROUPS=config.slots,
            ROOM=config.room, SLOTS=config.filter_slots, WIDTH=config.width, NEIGHBOURS=config.neighbours,
            num_warps=config.filter_warps,
        )  # fmt: skip


def _greedy(of: _Problem, to: _Buffers, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    vocab, drafts, _ = of.sizes
    greedy_kernel[(len(outputs[1]),)](
        of.draft_ids, of.lengths, of.temperatures, to.partials, to.ids, *outputs, vocab, drafts, of.config.splits,
        HAS_LENGTHS=of.lengths is not None, HAS_TEMPERATURES=of.temperatures is not None, SPLITS=MAX_SPLITS,
        num_warps=1,
    )  # fmt: skip


def _token(of: _Problem, to: _Buffers, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    token_kernel[(len(outputs[1]),)](
        of.target, of.draft, of.draft_ids, of.lengths, of.temperatures, of.top_p, of.seeds, of.offsets, to.partials,
        to.masses, to.thresholds, *outputs, to.records, to.kinds, *of.sizes, of.config.splits, *of.strides, **of.flags,
        HAS_TOP_P=of.top_p is not None, HAS_OFFSETS=of.offsets is not None, FILTERED=_filtered(of), SPLITS=MAX_SPLITS,
        num_warps=1,
    )  # fmt: skip


def _block(of: _Problem, to: _Buffers, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    token_ids, num_accepted, log_probs = outputs
    batch = len(num_accepted)
    _, drafts, sources = of.sizes
    splits = of.config.splits
    common: dict[str, Any] = {"FILTERED": _filtered(of), "SPLITS": MAX_SPLITS}
    chain_kernel[(batch,)](
        of.target, of.draft, of.draft_ids, of.lengths, of.temperatures, of.top_p, of.seeds, of.offsets, to.partials,
        to.masses, to.thresholds, token_ids, log_probs, to.chain, to.window, *of.sizes, splits, *of.strides,
        **of.flags, HAS_TOP_P=of.top_p is not None, HAS_OFFSETS=of.offsets is not None, **common, num_warps=1,
    )  # fmt: skip
    if of.draft is not None and drafts > 1:
        residual_kernel[(batch * (drafts - 1), splits)](
            of.target, of.draft, of.lengths, of.temperatures, to.partials, to.masses, to.thresholds, to.chain,
            to.window, to.residuals, *of.sizes, splits, of.config.columns, *of.strides,
            HAS_LENGTHS=of.lengths is not None, HAS_TEMPERATURES=of.temperatures is not None, **common, **of.tiles,
        )  # fmt: skip
    block_kernel[(batch,)](
        of.target, of.draft_ids, of.lengths, of.temperatures, of.seeds, of.offsets, to.partials, to.masses,
        to.thresholds, to.chain, to.window, to.residuals, *outputs, to.records, to.kinds, drafts, sources, splits,
        *of.target_strides, **of.flags, HAS_OFFSETS=of.offsets is not None, **common, num_warps=1,
    )  # fmt: skip


def _race(of: _Problem, to: _Buffers, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    token_ids, num_accepted, log_probs = outputs
    batch, config = len(num_accepted), of.config
    vocab, drafts, _ = of.sizes
    columns, parts = race_config(batch, vocab, of.target.element_size())
    scores, ids = to.records.new_empty((batch, parts)), to.kinds.new_empty((batch, parts))
    flags: dict[str, Any] = {
        "HAS_TEMPERATURES": of.temperatures is not None, "HAS_OFFSETS": of.offsets is not None,
        "FILTERED": _filtered(of), "WIDTH": config.width,
    }  # fmt: skip
    race_kernel[(batch, parts)](
        of.target, of.draft, of.draft_ids, of.temperatures, of.seeds, of.offsets, to.records, to.kinds, num_accepted,
        scores, ids, vocab, drafts, parts, columns, *of.strides, HAS_DRAFT=of.draft is not None, **flags, SLOTS=32,
        num_warps=1,
    )  # fmt: skip
    choose_kernel[(batch,)](
        of.target, of.draft_ids, of.temperatures, of.seeds, of.offsets, to.records, to.kinds, num_accepted, scores,
        ids, token_ids, log_probs, vocab, drafts, parts, *of.target_strides, SPLITS=MAX_RACES, **flags,
        SLOTS=config.slots, num_warps=config.num_warps,
    )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def verify_draft(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_logits: Tensor | None,
    draft_lengths: Tensor | None,
    temperatures: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    offsets: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = empty_outputs(target_logits)
    if target_logits.shape[0] == 0:
        return outputs
    if mode == "greedy":
        draft_logits = top_k = top_p = None
    if draft_ids.shape[1] == 0:
        draft_logits = None
    target, draft = _dense(target_logits), None if draft_logits is None else _dense(draft_logits)
    config = launch_config(target_logits.shape[2], target.element_size(), _aligned(target) and _aligned(draft))
    of = _Problem(
        target, draft, draft_ids.contiguous(), _contiguous(draft_lengths), _contiguous(temperatures),
        _contiguous(top_k), _contiguous(top_p), seeds.contiguous(), _contiguous(offsets), config,
    )  # fmt: skip
    to = _buffers(of, mode)
    with on_device(target):
        _statistics(of, to, mode == "greedy")
        if mode == "greedy":
            _greedy(of, to, outputs)
        else:
            (_token if mode == "token" else _block)(of, to, outputs)
            _race(of, to, outputs)
    return outputs
