"""Linear log-probs through Triton: the launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from grpo_kernels._gemm import multiply, without_autocast
from grpo_kernels._launch import architecture, loads, matrix, precision, programs, run
from grpo_kernels._math_triton import host_factors
from grpo_kernels._token_ids import live_rows
from grpo_kernels.linear_log_probs._config_triton import MAX_SPLITS, LaunchConfig, launch_config, slice_width
from grpo_kernels.linear_log_probs._kernels_triton import dlogits_kernel, forward_kernel, merge_kernel
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.losses import implementations
from grpo_kernels.linear_log_probs.ops import empty_gradients, empty_outputs

linear_cross_entropy, linear_grpo_loss = implementations("triton")

_ROWS_OF_MERGE = 4
_ROWS_AT_A_TIME = 4096  # that are widened to float32 for the gradient of the LoRA factor


class _Operands(NamedTuple):
    """What both GEMM kernels take, and their configuration."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: LaunchConfig


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).contiguous()


def _parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, ...] of `dtype`. Their sum is `values`, float32: three times eight bits of bfloat16 hold its 24."""
    if dtype == torch.float32:
        return values[None]
    parts = []
    limit = torch.finfo(dtype).max
    for _ in range(3):
        parts.append(
            values.clamp(-limit, limit).to(dtype)
        )  # float16: what is too large for one part is left to the next
        values = values - parts[-1]
    return torch.stack(parts)


def _operands(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    parts: Tensor | None,
    kernel: str,
) -> _Operands:
    vocab, width = head.weight.shape
    target = architecture(hidden)
    x, w = matrix(hidden), matrix(head.weight)
    way = loads(target, x, w)
    lora_b = None if head.lora_b is None else matrix(head.lora_b)
    rank = 0 if parts is None else parts.shape[2]
    config = launch_config(vocab, width, hidden.element_size(), target, way, rank, softcap > 0.0, kernel)
    in_factor, in_low, out_factor, kind = host_factors(temperature_tensor, temperature, logit_scale, softcap)
    arguments = {
        "hidden": x.tensor,
        "weight": w.tensor,
        "bias": None if head.bias is None else head.bias.contiguous(),
        "projected": parts,
        "lora_b": None if lora_b is None else lora_b.tensor,
        "token_ids": token_ids.contiguous(),
        "temperatures": _vector(temperature_tensor),
        "in_factor": in_factor,
        "in_low": in_low,
        "out_factor": out_factor,
        "rows": hidden.shape[0],
        "vocab": vocab,
        "width": width,
        "rank": rank,
        "hidden_stride": x.stride,
        "weight_stride": w.stride,
        "lora_stride": 0 if lora_b is None else lora_b.stride,
        "group": config.group,
    }
    constants = {
        "TMA": way == "tma",
        "HAS_BIAS": head.bias is not None,
        "PARTS": 0 if parts is None else len(parts),
        "TEMPERATURE": kind,
        "CAPPED": softcap > 0.0,
        "PRECISION": precision(hidden.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "PIECES": config.pieces,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.max_registers is not None:
        constants["maxnreg"] = config.max_registers
    return _Operands(arguments, constants, config)


def _projected(hidden: Tensor, head: Head) -> Tensor | None:
    """[P, N, r]. scale * hidden a^T in parts of the head's dtype; None without LoRA."""
    projected = head.project(hidden)
    return None if projected is None else _parts(projected * head.lora_scale, hidden.dtype)


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
    outputs = empty_outputs(hidden, entropy, sum_squared_probs, top1_ids, statistics)
    rows = hidden.shape[0]
    if rows == 0:
        return outputs
    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    parts = _projected(hidden, head)
    arguments, constants, config = _operands(
        hidden, head, token_ids, temperature_tensor, temperature, logit_scale, softcap, parts, "forward"
    )
    partials = hidden.new_empty((2 + entropy + sum_squared_probs, config.splits, rows), dtype=torch.float32)
    shared = {
        "mask": None if mask is None else mask.contiguous(),
        "partials": partials,
        "partial_ids": hidden.new_empty((config.splits, rows), dtype=torch.int32) if top1_ids else None,
        "targets": hidden.new_empty(rows, dtype=torch.float32),
        "splits": config.splits,
        "HAS_MASK": mask is not None,
        "ENTROPY": entropy,
        "SQUARED": sum_squared_probs,
        "TOP1": top1_ids,
    }
    of_merge = ("token_ids", "temperatures", "out_factor", "rows", "vocab")
    grid = programs(hidden, triton.cdiv(rows, config.block_m) * config.splits, config.on_each)

    def launch() -> None:
        forward_kernel[(grid,)](**arguments, **shared, **constants, tiles_per_split=config.tiles_per_split)
        merge_kernel[(triton.cdiv(rows, _ROWS_OF_MERGE),)](
            **shared,
            **{name: arguments[name] for name in of_merge},
            log_probs=outputs[0],
            entropy=outputs[1],
            sum_squared_probs=outputs[2],
            top1_ids=outputs[3],
            statistics=outputs[4],
            TEMPERATURE=constants["TEMPERATURE"],
            STATISTICS=statistics,
            SPLITS=MAX_SPLITS,
            ROWS=_ROWS_OF_MERGE,
            num_warps=4,
        )

    run(hidden, launch)
    return outputs


class _Gradients(NamedTuple):
    """Where the products of a slice go; None where nobody needs them."""

    hidden: Tensor | None  # [N, H] float32
    weight: Tensor | None  # [V, H]
    accumulate: bool  # add to `weight`
    bias: Tensor | None  # [V]
    lora_b: Tensor | None  # [V, r]
    through: Tensor | None  # [N, r] float32: gradient of hidden a^T, before the scale

    def add(self, start: int, grad: Tensor, clean: Tensor | None, head: Head, parts: Tensor | None) -> None:
        """Adds the products of the slice of dlogits that begins at column `start`."""
        end = start + grad.shape[1]
        if self.hidden is not None:
            multiply(self.hidden, grad, head.weight[start:end], add=start > 0)
        if self.weight is not None and clean is not None:
            multiply(self.weight[start:end], grad.t(), clean, add=self.accumulate)
        if self.bias is not None:
            torch.sum(grad, 0, dtype=torch.float32, out=self.bias[start:end])
        if self.through is not None and head.lora_b is not None:
            multiply(self.through, grad, head.lora_b[start:end], add=start > 0)
        if self.lora_b is not None and parts is not None:
            count, rows, rank = parts.shape
            products = grad.new_empty((end - start, count * rank), dtype=torch.float32)
            multiply(products, grad.t(), parts.transpose(0, 1).reshape(rows, count * rank))
            torch.sum(products.view(end - start, count, rank), 1, out=self.lora_b[start:end])


def _active_rows(token_ids: Tensor, mask: Tensor | None, upstream: list[Tensor]) -> Tensor:
    """[N] bool. Rows that count and have a gradient. The others may hold anything, 0 * NaN in a product included."""
    active = torch.zeros_like(token_ids, dtype=torch.bool)
    for grad in upstream:
        active |= grad != 0
    return active & live_rows(token_ids, mask)


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
    accumulate = weight_grad_accumulator is not None
    outputs = empty_gradients(
        hidden, weight, lora_a, need_hidden, need_weight and not accumulate, need_bias, need_lora,
        hidden_dtype, weight_dtype,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias, grad_a, grad_b = outputs
    upstream = [_vector(grad) for grad in (grad_log_probs, grad_entropy, grad_log_sum_exp)]
    active = _active_rows(token_ids, mask, [grad for grad in upstream if grad is not None])
    if hidden.shape[0] == 0:
        for output in outputs:
            output.zero_()
        return outputs
    head = Head(weight, bias, lora_a, lora_b, lora_scale)
    if need_weight or need_lora:
        hidden = torch.where(active[:, None], hidden, 0)
    parts = _projected(hidden, head)
    direct = hidden_dtype == torch.float32 or not need_hidden
    sums = grad_hidden if direct else torch.empty_like(hidden, dtype=torch.float32)
    through = None if parts is None or not (need_hidden or need_lora) else parts.new_empty(
        parts.shape[1:], dtype=torch.float32
    )  # fmt: skip
    gradients = _Gradients(
        sums if need_hidden else None,
        (grad_weight if weight_grad_accumulator is None else weight_grad_accumulator) if need_weight else None,
        accumulate,
        grad_bias if need_bias else None,
        grad_b if need_lora else None,
        through,
    )
    operands = _operands(
        hidden, head, token_ids, temperature_tensor, temperature, logit_scale, softcap, parts, "dlogits"
    )
    _walk_slices(operands, gradients, head, hidden, parts, active, statistics, upstream)
    if through is not None and lora_a is not None:
        through *= lora_scale
        if need_lora:
            _lora_gradient(grad_a, through, hidden)
        if need_hidden:
            multiply(sums, through, lora_a.float(), add=True)
    if need_hidden and sums is not grad_hidden:
        grad_hidden.copy_(sums)
    if weight_grad_accumulator is not None:
        torch.autograd.graph.increment_version(weight_grad_accumulator)
    return outputs


def _walk_slices(
    operands: _Operands,
    gradients: _Gradients,
    head: Head,
    hidden: Tensor,
    parts: Tensor | None,
    active: Tensor,
    statistics: Tensor,
    upstream: list[Tensor | None],
) -> None:
    """Slice after slice of the vocabulary: its dlogits into the workspace, and from there into the gradients."""
    arguments, constants, config = operands
    rows, vocab = hidden.shape[0], head.weight.shape[0]
    width = slice_width(rows, vocab, hidden.element_size())
    workspace = hidden.new_empty((rows, width))
    statistics = statistics.contiguous()
    for start in range(0, vocab, width):
        end = min(start + width, vocab)
        column_blocks = triton.cdiv(end - start, config.block_n)
        grid = programs(hidden, triton.cdiv(rows, config.block_m) * column_blocks, config.on_each)

        def launch(start: int = start, column_blocks: int = column_blocks, grid: int = grid) -> None:
            dlogits_kernel[(grid,)](
                **arguments,
                **constants,
                active=active,
                statistics=statistics,
                grad_log_probs=upstream[0],
                grad_entropy=upstream[1],
                grad_log_sum_exp=upstream[2],
                dlogits=workspace,
                dlogits_stride=width,
                first=start,
                column_blocks=column_blocks,
                LOG_PROBS=upstream[0] is not None,
                ENTROPY=upstream[1] is not None,
                LOG_SUM_EXP=upstream[2] is not None,
            )

        run(hidden, launch)
        gradients.add(start, workspace[:, : end - start], hidden, head, parts)


def _lora_gradient(grad_a: Tensor, through: Tensor, hidden: Tensor) -> None:
    """grad_a = through^T hidden, both float32: rounding the left one to the head's dtype would cost what it gained."""
    for start in range(0, len(hidden), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        multiply(grad_a, through[rows].t(), hidden[rows].float(), add=start > 0)
