"""The linear log-probs on the CPU: slices of logits through the BLAS, each reduced by the C++ row kernels.

Rows that do not count, and in the backward those without an upstream gradient, are left out: every tensor here holds
the others alone, whatever the caller's hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._gemm import accumulation_dtype, wide, without_autocast
from grpo_kernels._token_ids import live_rows, part_ids
from grpo_kernels.linear_log_probs.head import Head, slices
from grpo_kernels.linear_log_probs.losses import implementations
from grpo_kernels.linear_log_probs.ops import empty_gradients
from grpo_kernels.linear_log_probs.partial import Part, Products, Slice
from grpo_kernels.token_log_probs import ops as rows
from grpo_kernels.token_log_probs.arguments import raise_if_outside

_BACKEND = "native"
_TOP1, _STATISTICS = 3, 4  # places of outputs

linear_cross_entropy, linear_grpo_loss = implementations(_BACKEND)


class _Rows(NamedTuple):
    """The rows that count, in the form of the row kernels."""

    places: Tensor | None  # None: all rows
    hidden: Tensor  # [n, H], widened
    token_ids: Tensor
    temperatures: Tensor | None

    @classmethod
    def select(cls, keep: Tensor, hidden: Tensor, token_ids: Tensor, temperatures: Tensor | None) -> _Rows:
        index = None if bool(keep.all()) else keep.nonzero()[:, 0]
        per_row = temperatures is not None and temperatures.ndim > 0
        if index is not None:
            hidden, token_ids = hidden[index], token_ids[index]
            temperatures = temperatures[index] if temperatures is not None and per_row else temperatures
        return cls(index, wide(hidden), token_ids, temperatures)

    def of(self, values: Tensor | None) -> Tensor | None:
        """These rows of [..., N] values."""
        return values if values is None or self.places is None else values[..., self.places]

    def slices(self, head: Head, projected: Tensor | None) -> Iterator[Slice]:
        """One after another, in one buffer."""
        count, dtype = len(self.hidden), accumulation_dtype(head.weight.dtype)
        parts = list(slices(count, len(head.weight), dtype.itemsize))
        buffer = self.hidden.new_empty(count * (parts[0][1] - parts[0][0]), dtype=dtype)
        for start, end in parts:
            part = head.part(start, end)
            logits = buffer[: count * (end - start)].view(count, end - start)
            part.logits(logits, self.hidden, projected)
            yield Slice(start, end, part, logits)


@without_autocast
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    entropy: bool,
    sum_squared_probs: bool,
    top1_ids: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    raise_if_outside("linear_token_log_probs", token_ids, mask, len(weight))
    wanted = (True, entropy, sum_squared_probs, top1_ids, statistics)
    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    live = _Rows.select(live_rows(token_ids, mask), hidden, token_ids, temperature_tensor)
    merged: Part | None = None
    for part in live.slices(head, head.project(live.hidden)):
        whole = part.end - part.start == len(weight)
        ids = live.token_ids if whole else part_ids(live.token_ids, part.start, part.end, 0)
        *results, values = rows.token_log_probs(
            part.logits, ids, None, live.temperatures, temperature, logit_scale, softcap, entropy, sum_squared_probs,
            top1_ids, statistics or not whole, _BACKEND,
        )  # fmt: skip
        if whole:
            return _spread((*results, values), wanted, live, len(hidden))
        optional = (result if want else None for result, want in zip(results[2:], wanted[2:4], strict=True))
        found = Part.of(part.start, part.end, live.token_ids, results[0], values, *optional)
        merged = found if merged is None else merged.merged_with(found)
    if merged is None:
        raise RuntimeError("linear_token_log_probs: a vocabulary without tokens")
    return _spread((*merged.finished(entropy), merged.values), wanted, live, len(hidden))


def _spread(
    results: tuple[Tensor | None, ...], wanted: tuple[bool, ...], live: _Rows, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of all rows from the results of those that count; absent ones are empty."""
    exact = accumulation_dtype(live.hidden.dtype)
    outputs = []
    for place, (result, want) in enumerate(zip(results, wanted, strict=True)):
        dtype = torch.int64 if place == _TOP1 else exact
        if result is None or not want:
            outputs.append(live.hidden.new_empty(0, dtype=dtype))
        elif live.places is None:
            outputs.append(result.to(dtype))
        else:
            masked = -1 if place == _TOP1 else 0
            output = live.hidden.new_full((*result.shape[:-1], count), masked, dtype=dtype)
            if place == _STATISTICS:
                output[1] = 1.0
            output[..., live.places] = result.to(dtype)
            outputs.append(output)
    log_probs, entropy, squared, top1, statistics = outputs
    return log_probs, entropy, squared, top1, statistics


@without_autocast
def linear_token_log_probs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    statistics: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora: bool,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = empty_gradients(
        hidden, weight, lora_a, need_hidden, need_weight and weight_grad_accumulator is None, need_bias, need_lora,
        hidden_dtype, weight_dtype,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias, grad_a, grad_b = outputs
    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    upstream = [grad for grad in (grad_log_probs, grad_entropy, grad_log_sum_exp) if grad is not None]
    keep = live_rows(token_ids, mask)
    keep = keep & (torch.stack(upstream) != 0).any(0) if upstream else torch.zeros_like(keep)
    live = _Rows.select(keep, hidden, token_ids, temperature_tensor)
    projected = head.project(live.hidden)
    products = Products(
        live.hidden,
        projected,
        lora_scale,
        need_hidden=need_hidden,
        weight=(grad_weight if weight_grad_accumulator is None else weight_grad_accumulator) if need_weight else None,
        bias=grad_bias if need_bias else None,
        lora_a=grad_a if need_lora else None,
        lora_b=grad_b if need_lora else None,
        accumulate=weight_grad_accumulator is not None,
    )
    first = statistics.new_zeros(len(hidden)) if grad_log_probs is None else grad_log_probs
    given = [live.of(values) for values in (statistics, first, grad_entropy, grad_log_sum_exp)]
    for part in live.slices(head, projected):
        ids = live.token_ids
        if part.end - part.start < len(weight):
            ids = part_ids(ids, part.start, part.end, part.end - part.start)
        rows.token_log_probs_backward_(
            part.logits, ids, None, live.temperatures, temperature, logit_scale, softcap, *given, _BACKEND
        )
        products.add(part.start, part.end, part.head, part.logits)
    sums = products.finish(lora_a)
    if sums is not None:
        _scatter(grad_hidden, sums, live.places)
    if weight_grad_accumulator is not None:
        torch.autograd.graph.increment_version(weight_grad_accumulator)
    return outputs


def _scatter(out: Tensor, values: Tensor, index: Tensor | None) -> None:
    """Rows of `out`, zero but for those at `index`."""
    if index is None:
        out.copy_(values)
    else:
        out.zero_()[index] = values.to(out.dtype)
