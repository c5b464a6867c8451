"""The public linear_token_log_probs: argument checks and the choice of a backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype, gemm_dtype
from grpo_kernels.distributed import VocabShard
from grpo_kernels.linear_log_probs.arguments import check_head
from grpo_kernels.linear_log_probs.function import Options, Wanted
from grpo_kernels.linear_log_probs.head import LoRAFactors
from grpo_kernels.linear_log_probs.two_pass import rows_of_head
from grpo_kernels.token_log_probs import TokenLogProbsOutput
from grpo_kernels.token_log_probs.arguments import (
    check_outputs,
    check_rows,
    check_transform,
    split_temperature,
)

_OP = "linear_token_log_probs"


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    outputs: Iterable[str] = (),
    lora: LoRAFactors | None = None,
    vocab_shard: VocabShard | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> TokenLogProbsOutput:
    """Log-probs of chosen tokens straight from hidden states: the logits are never formed for all rows.

    What `token_log_probs` computes, of logits = hidden weight^T + bias + lora.scale (hidden lora.a^T) lora.b^T::

        z = softcap * tanh(logits * logit_scale / softcap) / temperature
        log_prob = z[token_id] - logsumexp(z)        entropy = -sum_j p_j log p_j        p = softmax(z)

    The backward forms the logits again, a slice of the vocabulary a time: 8 N H V operations in all against the 6 N H V
    of keeping them, in O(N + workspace) memory instead of O(N V).

    Args:
        hidden: [..., H] bf16, fp16, fp32 or fp64. Last hidden states. Copied if it cannot be viewed as [N, H].
        weight: [V, H], as `nn.Linear` has it; any V and H.
        token_ids: [...] int32 or int64, in [0, V). Negative = the row is masked.
        bias: [V].
        temperature: number, 0-d tensor, or [...] tensor, > 0. Not differentiated.
        logit_scale: finite, non-zero factor of the logits.
        softcap: > 0, or None for none.
        mask: [...] bool, or numbers of which non-zero counts. A masked row has log_prob 0, entropy 0,
            sum_squared_probs 0, top1_id -1 and gradient 0, whatever its hidden state contains.
        outputs: subset of {"entropy", "sum_squared_probs", "top1_ids"}.
        lora: low-rank factors that are added to the head. Its merged weight is never formed.
        vocab_shard: weight, bias and lora.b hold the rows [start, end) of the vocabulary, other ranks the rest;
            token_ids stay those of the whole vocabulary. Rows beyond end - start are padding. Every rank of the
            group makes the same call.
        weight_grad_accumulator: [V, H] fp32 (fp64 for an fp64 weight). The backward adds the gradient of the weight
            there, as to Megatron's main_grad, and the weight gets none.

    Returns:
        `TokenLogProbsOutput(log_probs, entropy, sum_squared_probs, top1_ids)`, float32 (float64 for float64 inputs).
        log_probs and entropy are differentiable, each with its own gradient per token. Gradients reach hidden, weight,
        bias, lora.a and lora.b; one that does not require a gradient costs no product.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where the
            token id of a live row is >= V. On other devices such a row is NaN.
        BackendUnavailable: vocab_shard needs kernels, and there are none for this device and dtype.

    Numerics:
        The product's operands have autocast's dtype, else the wider of those of hidden and weight (bf16 states with
        an fp32 weight: an fp32 head); LoRA factors are cast to it. Logits are accumulated in fp32 and never rounded
        to a narrower type before the log-sum-exp; dlogits are rounded to the operands' dtype on a GPU; the gradient of
        the weight is accumulated in fp32 and rounded once; that of the hidden states likewise. No atomics: equal
        calls give equal bits. What a GPU and the CPU compute differs in the order of the products' sums. -inf and NaN
        as in `token_log_probs`; a -inf in the bias takes a token out of the vocabulary.

    Source:
        TRL's chunked log-prob function and verl's linear_cross_entropy compute the same log-probs; the backward over
        slices of the vocabulary is verl's.
    """
    wanted = Wanted(*check_outputs(_OP, outputs))
    arguments = check_head(_OP, hidden, weight, bias, lora, vocab_shard, weight_grad_accumulator)
    leading, head = arguments.leading, arguments.head
    check_rows(_OP, hidden, "hidden", leading, "token_ids", token_ids, mask)
    check_transform(_OP, hidden, "hidden", leading, temperature, logit_scale, softcap)
    dtype = gemm_dtype(hidden, weight)
    temperatures, number = split_temperature(_OP, temperature, hidden.device, accumulation_dtype(dtype))
    if temperatures is not None and temperatures.ndim > 0:
        temperatures = temperatures.reshape(-1)
    token_ids = token_ids.reshape(-1)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)
    backend = _dispatch.resolve(_OP, weight if weight.dtype == torch.float64 else hidden)
    options = Options(
        _OP, dtype, head.lora_scale, number, float(logit_scale), 0.0 if softcap is None else float(softcap), wanted,
        vocab_shard, backend,
    )  # fmt: skip
    rows = rows_of_head(options, arguments.hidden, head, token_ids, mask, temperatures, weight_grad_accumulator)
    log_probs, *others = rows[:4]
    optional = (None if other is None else other.view(leading) for other in others)
    return TokenLogProbsOutput(log_probs.view(leading), *optional)
