"""The public linear_grpo_loss: argument checks, and one or two passes over the head."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype, gemm_dtype
from grpo_kernels.distributed import VocabShard
from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput
from grpo_kernels.linear_log_probs import ops_one_pass
from grpo_kernels.linear_log_probs.arguments import check_head
from grpo_kernels.linear_log_probs.attach import attach, cast, may_form_gradients, needs_gradient, requests
from grpo_kernels.linear_log_probs.function import Options, Wanted
from grpo_kernels.linear_log_probs.head import Head, LoRAFactors
from grpo_kernels.linear_log_probs.policy import Policy, check_layout
from grpo_kernels.linear_log_probs.sums import Gradients
from grpo_kernels.linear_log_probs.two_pass import rows_of_head
from grpo_kernels.token_log_probs.arguments import check_rows, check_transform, raise_if_outside, split_temperature

_OP = "linear_grpo_loss"
_DEFAULT_CONFIG = GRPOLossConfig()


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoRAFactors | None = None,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_coef: Tensor | float | None = None,
    entropy_coef: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
    vocab_shard: VocabShard | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> GRPOLossOutput:
    """The GRPO policy loss and its variants straight from hidden states: the logits are never formed for all rows.

    What `linear_token_log_probs` and `grpo_loss` give together, for any `GRPOLossConfig`. Where the derivative of the
    loss by a token's log-prob is known as soon as that log-prob is, the gradients are formed in the forward, a chunk
    of rows at a time, while the chunk's logits are there: 6 N H V operations instead of 8. That holds for everything
    but

    - reduction "none", whose upstream gradient is one per token; `top_entropy_quantile` < 1, surrogates "clip_cov" and
      "kl_cov", statistics of all tokens;
    - terms of a whole sequence's log-probs (`ratio_level` but "token", surrogates "vespo" and "gmpo",
      `off_policy_threshold`; a `sampler_correction` of sequences without old_log_probs) where sequences are packed or
      longer than a chunk;
    - float16 products, whose loss is scaled before its gradients are formed; a `vocab_shard`; and devices without
      kernels for the loss.

    There the backward forms the logits again. `metrics.passes` says which way was taken.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens. bf16, fp16, fp32 or fp64. The hidden states that predict
            token_ids.
        weight: [V, H], as `nn.Linear` has it; any V and H.
        token_ids: [B, T] or [N] int32 or int64, in [0, V). The sampled tokens. Negative = masked.
        old_log_probs: same shape, or None. Under the policy that the ratio refers to. None means on-policy.
        advantages: [B] or [B, T] ([B] or [N] packed; where B = N it is [B]).
        mask: [B, T] or [N], or None for all. True or non-zero = the token counts. Masked tokens and their hidden
            states may hold anything.
        config: the variant.
        bias: [V].
        temperature: number, 0-d tensor, or [B, T] ([N]) tensor, > 0, that the logits are divided by. Not
            differentiated.
        logit_scale: finite, non-zero factor of the logits.
        softcap: > 0, or None for none.
        lora: low-rank factors that are added to the head.
        ref_log_probs, sampler_log_probs, token_weights, kl_coef, entropy_coef, cu_seqlens, num_items, max_length: as
            in `grpo_loss`.
        vocab_shard: weight, bias and lora.b hold the rows [start, end) of the vocabulary, other ranks the rest.
        weight_grad_accumulator: [V, H] fp32 (fp64 for an fp64 weight). The backward adds the gradient of the weight
            there, and the weight gets none.

    Returns:
        GRPOLossOutput(loss, metrics, log_probs, entropy), float32 (float64 for float64 inputs). The loss is
        differentiable in hidden, weight, bias and the LoRA factors; log_probs and entropy, [B, T] or [N], are not.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, is missing, or
            contradicts the config; on the CPU also where the id of a live token is >= V. On other devices such a
            token is NaN.
        BackendUnavailable: vocab_shard or weight_grad_accumulator need kernels, and there are none for this device
            and dtype.

    Numerics:
        As `linear_token_log_probs` and `grpo_loss`; the loss and its metrics are those of `grpo_loss` on the returned
        log-probs, bit for bit. Gradients in bfloat16 are rounded once more if the upstream gradient is no power of
        two.

    Source:
        Gradients in the forward: Liger's fused linear losses. Variants: the presets of `GRPOLossConfig`.
    """
    batch = check_layout(_OP, "hidden", hidden, cu_seqlens)
    arguments = check_head(_OP, hidden, weight, bias, lora, vocab_shard, weight_grad_accumulator)
    check_rows(_OP, hidden, "hidden", arguments.leading, "token_ids", token_ids, None)
    check_transform(_OP, hidden, "hidden", arguments.leading, temperature, logit_scale, softcap)
    dtype = gemm_dtype(hidden, weight)
    exact = accumulation_dtype(dtype)
    backend = _dispatch.resolve(_OP, weight if weight.dtype == torch.float64 else hidden)
    policy = Policy.of(
        _OP, hidden, "hidden", batch, token_ids, exact, backend, old_log_probs, advantages, mask, config,
        ref_log_probs=ref_log_probs, sampler_log_probs=sampler_log_probs, token_weights=token_weights,
        kl_coef=kl_coef, entropy_coef=entropy_coef, cu_seqlens=cu_seqlens, num_items=num_items, max_length=max_length,
    )  # fmt: skip
    if vocab_shard is None:
        raise_if_outside(_OP, token_ids, policy.rows.live, arguments.vocab)
    temperatures, number = split_temperature(_OP, temperature, hidden.device, exact)
    if temperatures is not None and temperatures.ndim > 0:
        temperatures = temperatures.reshape(-1)
    options = Options(
        _OP, dtype, arguments.head.lora_scale, number, float(logit_scale), 0.0 if softcap is None else float(softcap),
        Wanted(entropy=True), vocab_shard, backend,
    )  # fmt: skip
    call = _Call(options, policy, arguments.hidden, arguments.head, token_ids.reshape(-1), temperatures)
    leaves = (arguments.hidden, *arguments.head[:4])
    if not needs_gradient(leaves):
        return _two_passes(call, weight_grad_accumulator, 1)
    if may_form_gradients(options) and policy.takes_one_pass(len(arguments.head.weight)):
        return _one_pass(call, weight_grad_accumulator)
    return _two_passes(call, weight_grad_accumulator, 2)


class _Call(NamedTuple):
    """A call after its checks."""

    options: Options
    policy: Policy
    hidden: Tensor  # [N, H]
    head: Head
    token_ids: Tensor  # [N]
    temperatures: Tensor | None


def _two_passes(call: _Call, accumulator: Tensor | None, count: int) -> GRPOLossOutput:
    mask = call.policy.rows.live.reshape(-1)
    found = rows_of_head(call.options, call.hidden, call.head, call.token_ids, mask, call.temperatures, accumulator)
    if found.entropy is None:
        raise RuntimeError(f"{_OP}: no entropy")
    return call.policy.output(found.log_probs, found.entropy, count)


def _one_pass(call: _Call, accumulator: Tensor | None) -> GRPOLossOutput:
    leaves = (call.hidden, *call.head[:4])
    with torch.no_grad():
        terms = call.policy.terms()
        again = partial(_run, call.options, requests(leaves, accumulator), tuple(terms[8:]))
        others = (call.token_ids, call.policy.rows.live.reshape(-1), call.temperatures, *terms[:8])
        (log_probs, entropy), gradients = again(*leaves, *others)
        output = call.policy.output(log_probs, entropy, 1)
    return output._replace(loss=attach(output.loss, gradients, leaves, others, again, accumulator))


def _run(options: Options, wanted: tuple[Any, ...], constants: tuple[Any, ...], *tensors: Any) -> tuple[Any, Gradients]:
    hidden, head = cast(options, *tensors[:5])
    token_ids, mask, temperatures, *terms = tensors[5:]
    log_probs, entropy, _, _, a, b, c, d, e = ops_one_pass.linear_grpo_loss(
        hidden, *head, token_ids, mask, temperatures, options.temperature, options.logit_scale, options.softcap,
        *terms, *constants, None, 0.0, False, *wanted, options.backend,
    )  # fmt: skip
    return (log_probs, entropy), Gradients(a, b, c, d, e)
