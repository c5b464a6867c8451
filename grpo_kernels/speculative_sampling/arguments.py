"""Checks of verify_draft's arguments, and what its kernels take in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.speculative_sampling.ops import MODES

OP = "verify_draft"


def check_tensors(
    target_logits: Tensor, draft_ids: Tensor, draft_logits: Tensor | None, draft_lengths: Tensor | None
) -> None:
    """Types, shapes and devices of what is verified."""
    for name, value in (("target_logits", target_logits), ("draft_ids", draft_ids)):
        _checks.check_tensor(OP, name, value)
    _checks.check_dtype(OP, "target_logits", target_logits)
    if target_logits.ndim != 3 or target_logits.shape[1] == 0 or target_logits.shape[2] == 0:
        shape = list(target_logits.shape)
        raise ValueError(f"{OP}: target_logits must have shape [B, K + 1, V] with K >= 0 and V >= 1, got {shape}")
    batch, positions, vocab = target_logits.shape
    _checks.check_shape(OP, "draft_ids", draft_ids, ("[B, K]", (batch, positions - 1)))
    _checks.check_dtype(OP, "draft_ids", draft_ids, _checks.INTEGER)
    _checks.check_same_device(OP, "draft_ids", draft_ids, "target_logits", target_logits)
    if draft_logits is not None:
        _checks.check_tensor(OP, "draft_logits", draft_logits)
        _checks.check_dtype(OP, "draft_logits", draft_logits, (target_logits.dtype,))
        _checks.check_shape(OP, "draft_logits", draft_logits, ("[B, K, V]", (batch, positions - 1, vocab)))
        _checks.check_same_device(OP, "draft_logits", draft_logits, "target_logits", target_logits)
    if draft_lengths is not None:
        check_per_row("draft_lengths", draft_lengths, target_logits, _checks.INTEGER)


def check_per_row(name: str, value: Any, target_logits: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """`value` is a tensor with a number for each row."""
    _checks.check_tensor(OP, name, value)
    _checks.check_dtype(OP, name, value, dtypes)
    _checks.check_shape(OP, name, value, ("[B]", target_logits.shape[:1]))
    _checks.check_same_device(OP, name, value, "target_logits", target_logits)


def check_options(
    target_logits: Tensor, temperature: Any, top_k: Any, top_p: Any, seeds: Any, offsets: Any, mode: str
) -> None:
    """Types and ranges of everything else."""
    _checks.check_choice(OP, "mode", mode, MODES)
    numbers = not torch.compiler.is_compiling()  # there a comparison would tie the graph to the value
    if isinstance(temperature, Tensor):
        check_per_row("temperature", temperature, target_logits, _checks.FLOATING)
    elif numbers:
        _checks.check_number(OP, "temperature", temperature, above=0.0)
    if isinstance(top_k, Tensor):
        check_per_row("top_k", top_k, target_logits, _checks.INTEGER)
    elif top_k is not None and numbers:
        _checks.check_integer(OP, "top_k", top_k, minimum=torch.iinfo(torch.int64).min)
    if isinstance(top_p, Tensor):
        check_per_row("top_p", top_p, target_logits, _checks.FLOATING)
    elif top_p is not None and numbers:
        _checks.check_number(OP, "top_p", top_p, above=0.0, maximum=1.0)
    for name, value in (("seeds", seeds), ("offsets", offsets)):
        if value is not None:
            check_per_row(name, value, target_logits, (torch.int64,))


def per_row(value: Any, like: Tensor, dtype: torch.dtype, neutral: float | None) -> Tensor | None:
    """A number or a tensor [B] as the tensor [B] that kernels take; None for None, and for the number that changes
    nothing."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().to(dtype)
    if torch.compiler.is_compiling():
        # A product, because the compiler turns it into tensor arithmetic; torch.full would be specialised to the value.
        filled: Tensor = torch.ones(like.shape[:1], device=like.device, dtype=dtype) * value
        return filled
    if value == neutral:
        return None
    if dtype.is_floating_point:  # a number that the dtype does not hold becomes infinite, and is named as such
        return torch.full(like.shape[:1], value, device=like.device, dtype=torch.float64).to(dtype)
    return torch.full(like.shape[:1], min(value, torch.iinfo(dtype).max), device=like.device, dtype=dtype)


def raise_if_faulty(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_lengths: Tensor | None,
    temperatures: Tensor | None,
    top_p: Tensor | None,
) -> None:
    """On the CPU, where looking is free: raises where a row's own numbers are out of range, naming the first."""
    if target_logits.device.type != "cpu" or torch.compiler.is_compiling():
        return
    drafts, vocab = draft_ids.shape[1], target_logits.shape[2]
    if draft_lengths is not None:
        _raise_first(
            "draft_lengths", draft_lengths, (draft_lengths < 0) | (draft_lengths > drafts), f"in [0, K] = [0, {drafts}]"
        )
    outside = (draft_ids < 0) | (draft_ids >= vocab)
    if draft_lengths is not None:
        outside = outside & (torch.arange(drafts) < draft_lengths[:, None])
    _raise_first("draft_ids", draft_ids, outside, f"in [0, V) = [0, {vocab})")
    if temperatures is not None:
        _raise_first("temperature", temperatures, ~((temperatures > 0) & temperatures.isfinite()), "finite and > 0")
    if top_p is not None:
        _raise_first("top_p", top_p, ~((top_p > 0) & (top_p <= 1)), "in (0, 1]")


def _raise_first(name: str, values: Tensor, wrong: Tensor, wanted: str) -> None:
    if wrong.any():
        place = int(wrong.reshape(-1).to(torch.uint8).argmax())
        where = _checks.position(name, values.shape, place)
        found = values.reshape(-1)[place].item()
        raise ValueError(f"{OP}: {where} must be {wanted}, got {f'{found:g}' if isinstance(found, float) else found}")
