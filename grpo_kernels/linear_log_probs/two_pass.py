"""The values of rows on any backend, differentiable: what a loss is made of that forms no gradients in its forward."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._autocast import no_autocast
from grpo_kernels.linear_log_probs import reference
from grpo_kernels.linear_log_probs.function import LinearRows, Options, linear_rows
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.token_log_probs.arguments import raise_if_outside


def rows_of_head(
    options: Options,
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    accumulator: Tensor | None,
) -> LinearRows:
    """`linear_rows`, also in plain PyTorch."""
    if options.backend != "reference":
        return linear_rows(options, hidden, head, token_ids, mask, temperatures, accumulator)
    if options.shard is not None or accumulator is not None:
        raise _dispatch.BackendUnavailable(f"{options.op}: vocab_shard and weight_grad_accumulator need kernels")
    raise_if_outside(options.op, token_ids, mask, len(head.weight))
    divisor = options.temperature if temperatures is None else temperatures
    with no_autocast(hidden.device.type):
        results = reference.linear_token_log_probs(
            hidden.to(options.gemm_dtype), head.to(options.gemm_dtype), token_ids, mask, divisor, options.logit_scale,
            options.softcap, options.wanted[:3], options.wanted.log_sum_exp,
        )  # fmt: skip
    return LinearRows(*results)
