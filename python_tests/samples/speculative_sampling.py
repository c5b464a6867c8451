"""Samples of verify_draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from python_tests.samples import BadCall, Call

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(5, 4, 37, generator=GENERATOR) * 2
TARGET[1, 0, :20] = float("-inf")
DRAFT = TARGET[:, :3] + torch.randn(5, 3, 37, generator=GENERATOR)
IDS = torch.tensor([[36, 25, 3], [30, 12, 5], [0, 1, 2], [7, 7, 7], [9, 8, 11]])
LENGTHS = torch.tensor([3, 2, 0, 1, 3])
TEMPERATURES = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.7])
TOP_K = torch.tensor([5, 0, 37, 40, 12])
TOP_P = torch.tensor([0.9, 0.5, 1.0, 0.99, 0.3])
SEEDS = torch.tensor([0, -1, 2**62, 12345, 7])
OFFSETS = torch.tensor([0, 3, 2**33, 1, 0])
SPOILED = TARGET.clone()
SPOILED[0, 1, 5] = float("nan")
SPOILED[3, 0, 36] = float("inf")
SPOILED[4, 3] = float("-inf")

OPS = {
    "verify_draft": [
        (TARGET, IDS, DRAFT, None, None, None, None, SEEDS, None, "token"),
        (TARGET, IDS.int(), DRAFT, LENGTHS, TEMPERATURES, TOP_K, TOP_P, SEEDS, OFFSETS, "block"),
        (TARGET.bfloat16(), IDS, None, LENGTHS, None, TOP_K, None, SEEDS, OFFSETS, "token"),
        (TARGET.half()[:, :, :36], IDS % 36, DRAFT.half()[:, :, :36], None, None, None, TOP_P, SEEDS, None, "block"),
        (TARGET, IDS, None, LENGTHS, None, None, None, SEEDS, None, "greedy"),
        (TARGET[:1].expand(5, 4, 37)[:, :1], IDS[:, :0], None, None, None, None, None, SEEDS, None, "token"),
        (TARGET[:0], IDS[:0], DRAFT[:0], None, None, None, None, SEEDS[:0], None, "token"),
    ],
}


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


def _everything(mode: str) -> Call:
    return Call(
        f"everything_{mode}",
        lambda x, i, d, n, t, k, p, s, o: grpo_kernels.verify_draft(
            x, i, draft_logits=d, draft_lengths=n, temperature=t, top_k=k, top_p=p, seeds=s, offsets=o, mode=mode
        ),
        _make(TARGET, IDS, DRAFT, LENGTHS, TEMPERATURES, TOP_K, TOP_P, SEEDS, OFFSETS),
    )


CALLS = [
    Call(
        "plain",
        lambda x, i, d, s: grpo_kernels.verify_draft(x, i, draft_logits=d, seeds=s),
        _make(TARGET, IDS, DRAFT, SEEDS),
    ),
    _everything("token"),
    _everything("block"),
    _everything("greedy"),
    Call(
        "certain_drafts",
        lambda x, i, s: grpo_kernels.verify_draft(x, i, seeds=s, temperature=0.7, top_k=9, top_p=0.8),
        _make(TARGET.bfloat16(), IDS.int(), SEEDS),
    ),
    Call(
        "certain_block",
        lambda x, i, s, n: grpo_kernels.verify_draft(x, i, seeds=s, draft_lengths=n, mode="block"),
        _make(TARGET.half(), IDS, SEEDS, LENGTHS.int()),
    ),
    Call(
        "spoiled",
        lambda x, i, d, s, n: grpo_kernels.verify_draft(x, i, draft_logits=d, seeds=s, draft_lengths=n),
        _make(SPOILED, IDS, DRAFT, SEEDS, LENGTHS),
    ),
    Call("greedy", lambda x, i: grpo_kernels.verify_draft(x, i, mode="greedy"), _make(TARGET, IDS)),
    Call(
        "sampling",
        lambda x, i, s: grpo_kernels.verify_draft(x[:, :1], i[:, :0], seeds=s, top_p=0.95),
        _make(TARGET, IDS, SEEDS),
    ),
    Call(
        "shared_rows",
        lambda x, i, s: grpo_kernels.verify_draft(x[:1].expand(5, -1, -1), i, seeds=s),
        _make(TARGET, IDS, SEEDS),
    ),
    Call(
        "strided",
        lambda x, i, d, s: grpo_kernels.verify_draft(
            x.transpose(0, 1).contiguous().transpose(0, 1)[..., :30], i.clamp(max=29), draft_logits=d[..., :30], seeds=s
        ),
        _make(TARGET, IDS, DRAFT, SEEDS),
    ),
    Call(
        "needs_a_copy",
        lambda x, i, d, s: grpo_kernels.verify_draft(
            x.transpose(1, 2).contiguous().transpose(1, 2), i, draft_logits=d[..., :1].expand(-1, -1, 37), seeds=s
        ),
        _make(TARGET, IDS, DRAFT, SEEDS),
    ),
    Call(
        "empty",
        lambda x, i, d, s: grpo_kernels.verify_draft(x, i, draft_logits=d, seeds=s, mode="block"),
        _make(TARGET[:0], IDS[:0], DRAFT[:0], SEEDS[:0]),
    ),
]


def _bad(
    name: str, error: type[Exception], *says: str, target: Any = TARGET, ids: Any = IDS, **options: Any
) -> BadCall:
    return BadCall(f"verify_draft_{name}", lambda: grpo_kernels.verify_draft(target, ids, **options), error, says)


def _filled(row: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones, and `value` in a row."""
    return torch.where(torch.arange(5) == row, value, 1).to(dtype)


BAD_CALLS = [
    _bad("list", TypeError, "target_logits must be a torch.Tensor, got list", target=[1.0]),
    _bad("integer", TypeError, "target_logits must have dtype float32", target=IDS),
    _bad("matrix", ValueError, "must have shape [B, K + 1, V]", "got [5, 37]", target=TARGET[:, 0]),
    _bad("no_rows", ValueError, "with K >= 0 and V >= 1, got [5, 0, 37]", target=TARGET[:, :0]),
    _bad("no_vocab", ValueError, "with K >= 0 and V >= 1, got [5, 4, 0]", target=TARGET[..., :0]),
    _bad("ids", TypeError, "draft_ids must be a torch.Tensor", ids=[1]),
    _bad("ids_shape", ValueError, "draft_ids must have shape [B, K] = [5, 3], got [5, 2]", ids=IDS[:, :2]),
    _bad("ids_dtype", TypeError, "draft_ids must have dtype int64, int32, got float32", ids=IDS.float()),
    _bad("ids_device", ValueError, "draft_ids must be on cpu like target_logits, got meta", ids=IDS.to("meta")),
    _bad("ids_range", ValueError, "draft_ids[0, 0] must be in [0, V) = [0, 36), got 36", target=TARGET[..., :36]),
    _bad("ids_negative", ValueError, "draft_ids[2, 0] must be in [0, V)", "got -1", ids=IDS - 1),
    _bad("draft_dtype", TypeError, "draft_logits must have dtype float32, got bfloat16", draft_logits=DRAFT.bfloat16()),
    _bad("draft_shape", ValueError, "draft_logits must have shape [B, K, V] = [5, 3, 37]", draft_logits=TARGET),
    _bad("draft_type", TypeError, "draft_logits must be a torch.Tensor, got str", draft_logits="q"),
    _bad("draft_device", ValueError, "draft_logits must be on cpu", draft_logits=DRAFT.to("meta")),
    _bad("lengths", TypeError, "draft_lengths must have dtype int64, int32", draft_lengths=TEMPERATURES),
    _bad("lengths_shape", ValueError, "draft_lengths must have shape [B] = [5], got [4]", draft_lengths=LENGTHS[:4]),
    _bad("lengths_long", ValueError, "draft_lengths[0] must be in [0, K] = [0, 3], got 4", draft_lengths=LENGTHS + 1),
    _bad("lengths_short", ValueError, "draft_lengths[2] must be in [0, K]", "got -1", draft_lengths=LENGTHS - 1),
    _bad("temperature", ValueError, "temperature must be finite and > 0, got 0", temperature=0.0),
    _bad("temperature_type", TypeError, "temperature must be a number, got str", temperature="cold"),
    _bad("temperature_row", ValueError, "temperature[3] must be finite and > 0", temperature=_filled(3, 0.0)),
    _bad("temperature_nan", ValueError, "temperature[1] must be", "got nan", temperature=_filled(1, float("nan"))),
    _bad("temperature_shape", ValueError, "temperature must have shape [B] = [5]", temperature=torch.tensor(1.0)),
    _bad("top_k_type", TypeError, "top_k must be an int, got float", top_k=2.0),
    _bad("top_k_dtype", TypeError, "top_k must have dtype int64, int32, got float32", top_k=TOP_P),
    _bad("top_p", ValueError, "top_p must be finite and > 0 and <= 1, got 1.5", top_p=1.5),
    _bad("top_p_row", ValueError, "top_p[4] must be in (0, 1], got 2", top_p=_filled(4, 2.0)),
    _bad("top_p_zero", ValueError, "top_p[0] must be in (0, 1], got 0", top_p=_filled(0, 0.0)),
    _bad("top_p_shape", ValueError, "top_p must have shape [B] = [5], got [2]", top_p=TOP_P[:2]),
    _bad("seeds", TypeError, "seeds must have dtype int64, got int32", seeds=SEEDS.int()),
    _bad("seeds_type", TypeError, "seeds must be a torch.Tensor, got int", seeds=3),
    _bad("offsets_shape", ValueError, "offsets must have shape [B] = [5], got [2]", offsets=OFFSETS[:2]),
    _bad("mode", ValueError, "mode must be one of 'token', 'block', 'greedy', got 'tree'", mode="tree"),
]
