"""Samples of group_advantages, informative_groups and best_of_group."""

from __future__ import annotations

import torch

import grpo_kernels
from python_tests.samples import BadCall, Call

R = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.25, float("nan"), 0.25, 0.75])
R2 = torch.stack([R, R.flip(0)], dim=1)
IDS = torch.tensor([7, -1, 7, 7, -1, 3, 7, -1])
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
LENGTHS = torch.tensor([3, 0, 5, 1, 2, 9, 4, 4])
DEFAULTS = (None, 4, "mean", "group", "sum_then_normalize", "zero", 1e-4, 1e-4, 1)

OPS = {
    "group_advantages": [
        (R, None, None, *DEFAULTS),
        (
            *(R2.double(), IDS, torch.tensor([1.0, 0.5]), None, 1, "leave_one_out", "batch", "sum_then_normalize"),
            *("raw", 0.0, 1e-4, 0),
        ),
        (R2.bfloat16(), IDS, None, None, 1, "none", "group", "normalize_then_sum", "zero", 1e-4, 1e-4, 1),
        (
            *(R2, IDS, None, LENGTHS, 1, "length_weighted", "batch_tokens", "sum_then_normalize", "zero"),
            *(1e-4, 1e-8, 1),
        ),
        (R, None, None, LENGTHS.double(), 4, "second_best", "group", "sum_then_normalize", "raw", 1e-4, 1e-4, 0),
        (R[:0], None, None, *DEFAULTS),
    ],
    "informative_groups": [(R, None, None, 4, 1e-6), (R.half(), IDS, MASK, 1, 0.5), (R[:0], None, None, 4, 0.0)],
    "group_rank": [(R, None, None, 4), (R.bfloat16(), IDS, MASK, 1), (R[:0], None, None, 4)],
}

CALLS = [
    Call("equal_groups", lambda r: grpo_kernels.group_advantages(r, group_size=4), lambda device: (R.to(device),)),
    Call(
        "ragged_gdpo",
        lambda r, ids: grpo_kernels.group_advantages(r, group_ids=ids, aggregation="normalize_then_sum"),
        lambda device: (R2.to(device), IDS.to(device)),
    ),
    Call(
        "batch_statistics",
        lambda r: grpo_kernels.group_advantages(r, group_size=2, normalize_by="batch"),
        lambda device: (R.to(device),),
    ),
    Call(
        "tokens",
        lambda r, ids, lengths: grpo_kernels.group_advantages(
            r, group_ids=ids, lengths=lengths, baseline="length_weighted", normalize_by="batch_tokens"
        ),
        lambda device: (R2.to(device), IDS.to(device), LENGTHS.to(device)),
    ),
    Call(
        "second_best",
        lambda r: grpo_kernels.group_advantages(r, group_size=4, baseline="second_best"),
        lambda device: (R.to(device),),
    ),
    Call("empty", lambda r: grpo_kernels.group_advantages(r, group_size=4), lambda device: (R[:0].to(device),)),
    Call(
        "empty_ids",
        lambda r, i: grpo_kernels.group_advantages(r, group_ids=i),
        lambda device: (R[:0].to(device), IDS[:0].to(device)),
    ),
    Call("informative", lambda r: grpo_kernels.informative_groups(r, group_size=4), lambda device: (R.to(device),)),
    Call(
        "best_of_group",
        lambda r, ids, valid: grpo_kernels.best_of_group(r, 2, group_ids=ids, valid=valid),
        lambda device: (R.to(device), IDS.to(device), MASK.to(device)),
    ),
]


def _bad(name, error, *says, rewards=R, **options):
    return BadCall(f"group_advantages_{name}", lambda: grpo_kernels.group_advantages(rewards, **options), error, says)


BAD_CALLS = [
    _bad("list", TypeError, "rewards must be a torch.Tensor", "list", rewards=[1.0], group_size=1),
    _bad("integer", TypeError, "rewards must have dtype float32", "int64", rewards=IDS, group_size=4),
    _bad(
        "ndim", ValueError, "rewards must have shape [B] or [B, R]", "[2, 2, 2]", rewards=R.view(2, 2, 2), group_size=1
    ),
    _bad("no_functions", ValueError, "at least one reward function", "[8, 0]", rewards=R2[:, :0], group_size=4),
    _bad("no_groups", ValueError, "exactly one of group_size and group_ids", "neither"),
    _bad("both", ValueError, "exactly one of group_size and group_ids", "both", group_size=4, group_ids=IDS),
    _bad("zero_size", ValueError, "group_size must be >= 1, got 0", group_size=0),
    _bad("float_size", TypeError, "group_size must be an int, got float", group_size=4.0),
    _bad("partial", ValueError, "whole groups of group_size = 3, got B = 8", group_size=3),
    _bad("id_shape", ValueError, "group_ids must have shape [B] = [8], got [7]", group_ids=IDS[:7]),
    _bad("id_dtype", TypeError, "group_ids must have dtype int64, int32, got float32", group_ids=R),
    _bad("id_device", ValueError, "group_ids must be on cpu like rewards, got meta", group_ids=IDS.to("meta")),
    _bad(
        "weights",
        ValueError,
        "reward_weights must have shape [R] = [1], got [2]",
        group_size=4,
        reward_weights=torch.ones(2),
    ),
    _bad("baseline", ValueError, "baseline must be one of 'mean'", "'median'", group_size=4, baseline="median"),
    _bad("normalize_by", ValueError, "normalize_by must be one of", "'std'", group_size=4, normalize_by="std"),
    _bad("aggregation", ValueError, "aggregation must be one of", "'sum'", group_size=4, aggregation="sum"),
    _bad("singleton", ValueError, "singleton must be one of", "'one'", group_size=4, singleton="one"),
    _bad("eps", ValueError, "eps must be finite and >= 0, got -1", group_size=4, eps=-1.0),
    _bad("eps_type", TypeError, "eps must be a number, got str", group_size=4, eps="small"),
    _bad("group_alone", ValueError, "process_group needs torch.distributed", group_size=4, process_group=3),
    _bad("correction", ValueError, "correction must be >= 0, got -1", group_size=4, correction=-1),
    _bad(
        "gdpo",
        ValueError,
        'needs normalize_by="group" or "batch_tokens", got \'batch\'',
        group_size=4,
        aggregation="normalize_then_sum",
        normalize_by="batch",
    ),
    _bad(
        "no_lengths",
        ValueError,
        'lengths must be given with baseline="length_weighted", got None',
        group_size=4,
        baseline="length_weighted",
    ),
    _bad(
        "no_lengths_of_tokens",
        ValueError,
        'lengths must be given with normalize_by="batch_tokens", got None',
        group_size=4,
        normalize_by="batch_tokens",
    ),
    _bad("lengths_list", TypeError, "lengths must be a torch.Tensor, got list", group_size=4, lengths=[1] * 8),
    _bad("lengths_shape", ValueError, "lengths must have shape [B] = [8]", "[7]", group_size=4, lengths=LENGTHS[:7]),
    _bad("lengths_dtype", TypeError, "lengths must have dtype int64", "got bool", group_size=4, lengths=MASK),
    _bad(
        "lengths_device",
        ValueError,
        "lengths must be on cpu like rewards, got meta",
        group_size=4,
        lengths=LENGTHS.to("meta"),
    ),
    _bad(
        "batch_eps",
        ValueError,
        "batch_eps must be None where nothing is normalised over the batch, got 1e-08 with normalize_by='group'",
        group_size=4,
        batch_eps=1e-8,
    ),
    _bad(
        "negative_batch_eps",
        ValueError,
        "batch_eps must be finite and >= 0, got -1",
        group_size=4,
        normalize_by="batch",
        batch_eps=-1.0,
    ),
    BadCall(
        "informative_shape",
        lambda: grpo_kernels.informative_groups(R2, group_size=4),
        ValueError,
        ("informative_groups: rewards must have shape [B]", "[8, 2]"),
    ),
    BadCall(
        "informative_mask",
        lambda: grpo_kernels.informative_groups(R, group_size=4, mask=MASK[:4]),
        ValueError,
        ("mask must have shape [B] = [8], got [4]",),
    ),
    BadCall(
        "informative_tolerance",
        lambda: grpo_kernels.informative_groups(R, group_size=4, tolerance=float("nan")),
        ValueError,
        ("tolerance must be finite and >= 0",),
    ),
    BadCall(
        "best_of_group_k",
        lambda: grpo_kernels.best_of_group(R, 0, group_size=4),
        ValueError,
        ("best_of_group: k must be >= 1, got 0",),
    ),
    BadCall(
        "best_of_group_valid",
        lambda: grpo_kernels.best_of_group(R, 1, group_size=4, valid=[True] * 8),
        TypeError,
        ("valid must be a torch.Tensor, got list",),
    ),
]
