"""The public linear_cross_entropy: argument checks, and one or two passes over the head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels._gemm import accumulation_dtype, gemm_dtype
from grpo_kernels._token_ids import ignored_id, live_rows
from grpo_kernels.distributed import VocabShard
from grpo_kernels.linear_log_probs import ops_one_pass
from grpo_kernels.linear_log_probs.arguments import check_head
from grpo_kernels.linear_log_probs.attach import attach, cast, may_form_gradients, needs_gradient, requests
from grpo_kernels.linear_log_probs.function import Options, Wanted
from grpo_kernels.linear_log_probs.head import Head, LoRAFactors
from grpo_kernels.linear_log_probs.sums import Gradients
from grpo_kernels.linear_log_probs.two_pass import rows_of_head
from grpo_kernels.token_log_probs.arguments import check_rows, check_transform, raise_if_outside

_OP = "linear_cross_entropy"
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    lora: LoRAFactors | None = None,
    vocab_shard: VocabShard | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> Tensor:
    """Cross-entropy straight from hidden states, the loss of supervised fine-tuning: the logits are never formed for
    all rows.

    With z = softcap * tanh(logits * logit_scale / softcap) (without the tanh where there is no softcap), logits =
    hidden weight^T + bias + lora.scale (hidden lora.a^T) lora.b^T::

        token loss = logsumexp(z) - z[target] + z_loss * logsumexp(z)^2
        loss       = mean, sum, or all of the token losses that count

    For a mean or a sum, the gradients are formed in the forward, a chunk of rows at a time, while the chunk's logits
    are there: 6 N H V operations. With reduction "none", float16 products or a `vocab_shard` the backward forms the
    logits again, as in `linear_token_log_probs`.

    Args:
        hidden: [..., H] bf16, fp16, fp32 or fp64. Last hidden states.
        weight: [V, H], as `nn.Linear` has it; any V and H.
        target: [...] int32 or int64, in [0, V). Rows where it is `ignore_index` or negative do not count, whatever
            their hidden states hold.
        bias: [V].
        ignore_index: any integer.
        reduction: "mean" over the rows that count, "sum", or "none": the token losses, 0 where a row does not count.
        logit_scale: finite, non-zero factor of the logits.
        softcap: > 0, or None for none.
        z_loss: >= 0. Weight of the squared log-sum-exp, which keeps the logits from drifting.
        lora: low-rank factors that are added to the head.
        vocab_shard: weight, bias and lora.b hold the rows [start, end) of the vocabulary, other ranks the rest.
        weight_grad_accumulator: [V, H] fp32 (fp64 for an fp64 weight). The backward adds the gradient of the weight
            there, and the weight gets none.

    Returns:
        0-d, or [...] with reduction "none"; float32 (float64 for float64 inputs). Differentiable in hidden, weight,
        bias and the LoRA factors.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where the
            target of a row that counts is >= V. On other devices such a row is NaN.
        BackendUnavailable: vocab_shard or weight_grad_accumulator need kernels, and there are none for this device
            and dtype.

    Numerics:
        As `linear_token_log_probs`. A mean over no rows is 0 with gradient 0, where `F.cross_entropy` gives NaN.

    Source:
        `torch.nn.functional.linear_cross_entropy` and Liger's fused linear cross-entropy form gradients in the
        forward; the z-loss is PaLM's (arXiv 2204.02311).
    """
    arguments = check_head(_OP, hidden, weight, bias, lora, vocab_shard, weight_grad_accumulator)
    leading, head = arguments.leading, arguments.head
    check_rows(_OP, hidden, "hidden", leading, "target", target, None)
    check_transform(_OP, hidden, "hidden", leading, 1.0, logit_scale, softcap)
    _checks.check_choice(_OP, "reduction", reduction, _REDUCTIONS)
    _checks.check_number(_OP, "z_loss", z_loss, minimum=0.0)
    ignored = ignored_id(_OP, ignore_index, target.dtype)
    mask = None if ignored < 0 else target != ignored
    if vocab_shard is None:
        raise_if_outside(_OP, target, mask, arguments.vocab, "target")
    rows, mask = target.reshape(-1), None if mask is None else mask.reshape(-1)
    live = live_rows(rows, mask)
    backend = _dispatch.resolve(_OP, weight if weight.dtype == torch.float64 else hidden)
    options = Options(
        _OP, gemm_dtype(hidden, weight), head.lora_scale, 1.0, float(logit_scale),
        0.0 if softcap is None else float(softcap), Wanted(log_sum_exp=z_loss != 0.0), vocab_shard, backend,
    )  # fmt: skip
    factor = None
    if reduction != "none":
        exact = accumulation_dtype(options.gemm_dtype)
        ones = torch.ones((), dtype=exact, device=hidden.device)
        factor = ones / live.sum().clamp(min=1) if reduction == "mean" else ones
    if factor is not None and may_form_gradients(options) and needs_gradient((arguments.hidden, *head[:4])):
        return _one_pass(options, arguments.hidden, head, rows, mask, factor, float(z_loss), weight_grad_accumulator)
    values = rows_of_head(options, arguments.hidden, head, rows, mask, None, weight_grad_accumulator)
    losses = _losses(values.log_probs, values.log_sum_exp, float(z_loss))
    return losses.view(leading) if factor is None else losses.sum() * factor


def _losses(log_probs: Tensor, log_sum_exp: Tensor | None, z_loss: float) -> Tensor:
    return -log_probs if log_sum_exp is None else z_loss * log_sum_exp.square() - log_probs


def _one_pass(
    options: Options, hidden: Tensor, head: Head, target: Tensor, mask: Tensor | None, factor: Tensor, z_loss: float,
    accumulator: Tensor | None,
) -> Tensor:  # fmt: skip
    leaves = (hidden, *head[:4])
    again = partial(_run, options, z_loss, requests(leaves, accumulator))
    with torch.no_grad():
        (log_probs, log_sum_exp), gradients = again(*leaves, target, mask, factor)
        loss = _losses(log_probs, log_sum_exp if z_loss else None, z_loss).sum() * factor
    return attach(loss, gradients, leaves, (target, mask, factor), again, accumulator)


def _run(options: Options, z_loss: float, wanted: tuple[Any, ...], *tensors: Any) -> tuple[Any, Gradients]:
    hidden, head = cast(options, *tensors[:5])
    log_probs, log_sum_exp, _, a, b, c, d, e = ops_one_pass.linear_cross_entropy(
        hidden, *head, *tensors[5:7], None, options.temperature, options.logit_scale, options.softcap, tensors[7],
        z_loss, False, *wanted, options.backend,
    )  # fmt: skip
    return (log_probs, log_sum_exp), Gradients(a, b, c, d, e)
