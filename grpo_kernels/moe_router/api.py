"""The public function: argument checks and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks, _direct
from grpo_kernels._autocast import no_autocast
from grpo_kernels._dispatch import resolve
from grpo_kernels.moe_router import arguments, ops, reference
from grpo_kernels.moe_router.function import route
from grpo_kernels.moe_router.options import RouterOptions

_OP = "moe_router"
_TYPES = (int, str, int, int, str, bool, float, bool, bool, bool)
"""Of options that are equal only if they are alike: 1 and True are not."""
_known: dict[tuple[bytes | None, RouterOptions], None] = {}
"""Calls that have passed the checks."""


class RouterOutput(NamedTuple):
    """What `moe_router` returns. Floats are float32, or float64 for float64 logits.

    Attributes:
        topk_weights: [T, K] float. Weights of the chosen experts; 0 for masked tokens. Differentiable.
        topk_ids: [T, K] int32. The chosen experts, distinct, in descending order of their keys (replayed slots in the
            order of the replay); -1 for masked tokens.
        tokens_per_expert: [E] int32. Slots of tokens that are not masked.
        z_loss: 0-d float. Differentiable.
        aux_loss: 0-d float. Differentiable.
        seq_aux_loss: 0-d float. Differentiable.
        replay_mismatch: 0-d int32. How many tokens with a replayed id have another set of experts than live routing
            would choose.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    tokens_per_expert: Tensor
    z_loss: Tensor
    aux_loss: Tensor
    seq_aux_loss: Tensor
    replay_mismatch: Tensor


def moe_router(
    logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    e_score_correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    token_mask: Tensor | None = None,
    replay_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    z_loss_coef: Tensor | float = 0.0,
    aux_loss_coef: Tensor | float = 0.0,
    seq_aux_loss_coef: Tensor | float = 0.0,
) -> RouterOutput:
    """Chooses K of E experts for every token and weighs them; counts, balance losses and replay in the same pass.

    score = softmax(logits), sigmoid(logits) or sqrt(softplus(logits)); the K experts with the largest
    score + e_score_correction_bias, of the best groups if there are groups, are chosen; their weights are their
    scores without the bias, divided by their sum if `norm_topk_prob`, times `routed_scaling_factor`.

    Args:
        logits: [T, E] bf16, fp16, fp32 or fp64. E <= 1024. A view with a dense last axis is not copied. -inf means
            probability 0.
        top_k: K, at most 32 and at most E.
        scoring_func: "softmax" over all experts (Qwen, Mixtral), "topk_softmax" over the logits of the chosen
            (gpt-oss), "sigmoid" (DeepSeek-V3) or "sqrtsoftplus" (DeepSeek-V4).
        e_score_correction_bias: [E] float32 (or float64 with float64 logits). Decides who is chosen, and nothing else;
            has no gradient. Added to the logits with "topk_softmax".
        n_group: Experts form groups of E / n_group neighbours.
        topk_group: How many groups may be chosen from. They must hold K experts or more.
        group_score: What a group is worth: "top2_sum", the sum of its two best biased scores (DeepSeek-V3), or "max".
        norm_topk_prob: Divide the weights by their sum. No difference with "topk_softmax", whose sum is 1.
        routed_scaling_factor: > 0. Factor of the weights.
        token_mask: [T] bool, or numbers of which non-zero counts. A masked token gets ids -1, weights 0 and gradient 0,
            and counts nowhere, whatever its logits and replayed ids are.
        replay_ids: [T, K] int32, int64, int16, int8, or uint8 (which has no -1). Routes to take instead: a slot keeps
            its id, and a slot of -1 gets the best expert of the token that is not replayed already. The weights are
            those of the logits of this pass, so the router learns.
        cu_seqlens: [B + 1] int32 or int64. Where each packed sequence starts, and the end of the last one, T; used by
            the sequence-wise loss. None: one sequence.
        z_loss_coef: Factor of z_loss = mean logsumexp(logits)^2 over the tokens. Number or 0-d tensor; the number 0
            computes nothing. So with the next two.
        aux_loss_coef: Factor of aux_loss = E / (K T^2) sum_e count_e sum_t p_te, with p the scores divided by their sum
            over all experts, and the counts after replay.
        seq_aux_loss_coef: Factor of seq_aux_loss, the mean over the sequences that have tokens of sum_e f_e P_e with
            P_e the mean of p_te and f_e = E / (K T) count_e, counting the K best scores without bias, groups or replay.

    Returns:
        `RouterOutput(topk_weights, topk_ids, tokens_per_expert, z_loss, aux_loss, seq_aux_loss, replay_mismatch)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device, range or option; on the CPU also
            where a replayed id is a repetition or outside [-1, E), or where cu_seqlens does not rise from 0 to T.
            Elsewhere such a slot is filled as if it were -1 and the token's weights and gradient are NaN; a token
            that no sequence holds is not in the sequence-wise loss.

    Numerics:
        float32 (float64 for float64 logits). Keys are in a total order: larger first, NaN last, the lower id wins a
        tie; there are always K distinct ids. Without bias and groups the key is the logit, which does not saturate;
        an expert of a group that lost comes after all others. "softmax" with `norm_topk_prob` is the softmax of the
        chosen logits. A token with a NaN or +inf logit, or under a softmax with no finite chosen one, has NaN weights
        and gradient, and so have the losses; no other token. No tokens: the losses are 0. Counts have no gradient. A
        token's bits depend on that token alone. Deterministic; no host synchronisation.

    Source:
        DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; Switch Transformer (2101.03961) eq. 4; ST-MoE (2202.08906) eq. 5;
        routing replay: 2510.11370.
    """
    coefficients = (z_loss_coef, aux_loss_coef, seq_aux_loss_coef)
    asked = [isinstance(value, Tensor) or value != 0 for value in coefficients]
    options = RouterOptions(
        top_k, scoring_func, n_group, topk_group, group_score, norm_topk_prob, routed_scaling_factor, *asked
    )
    tensors = (logits, e_score_correction_bias, token_mask, replay_ids, cu_seqlens)
    alike = _direct.signature(tensors)
    plain = alike is not None and tuple(map(type, options)) == _TYPES
    if not plain or (alike, options) not in _known:
        arguments.check_logits(logits)
        arguments.check_options(logits.shape[0], logits.shape[1], options)
        arguments.check_tensors(logits, top_k, *tensors[1:])
        if plain:
            _direct.remember(_known, (alike, options), None)
    factors = _factors(coefficients, asked, logits) if any(asked) else None
    if n_group > 1 and topk_group == n_group:  # every group wins
        options = options._replace(n_group=1, topk_group=1)
    bias = None if e_score_correction_bias is None else e_score_correction_bias.detach()
    mask = token_mask if token_mask is None or token_mask.dtype == torch.bool else token_mask != 0
    inputs = (logits, bias, mask, replay_ids, cu_seqlens if options.seq_aux_loss else None)

    backend = resolve(_OP, logits)
    if backend == "reference":
        arguments.raise_faults(logits, mask, replay_ids, inputs[-1])
        with no_autocast(logits.device.type):
            results = reference.moe_router(*inputs, options)
    else:
        results = route(*inputs, options, backend, alike is not None)  # type: ignore[assignment]
    weights, ids, per_expert, losses, mismatch = results
    z_loss, aux_loss, seq_aux_loss = losses.unbind()
    if factors is None:  # not as views: autograd lets no one add to those in place
        z_loss, aux_loss, seq_aux_loss = z_loss.detach(), aux_loss.detach(), seq_aux_loss.detach()
    else:
        z_loss, aux_loss, seq_aux_loss = z_loss * factors[0], aux_loss * factors[1], seq_aux_loss * factors[2]
    return RouterOutput(weights, ids, per_expert, z_loss, aux_loss, seq_aux_loss, mismatch)


def _factors(coefficients: tuple[Tensor | float, ...], asked: list[bool], logits: Tensor) -> list[Tensor | float]:
    """What the losses are multiplied by; 1 where nothing is asked for and the loss is 0."""
    names = ("z_loss_coef", "aux_loss_coef", "seq_aux_loss_coef")
    factors: list[Tensor | float] = []
    for name, value, want in zip(names, coefficients, asked, strict=True):
        tensor, number = None, 1.0
        if want:
            tensor, number = _checks.scalar_argument(_OP, name, value, logits.device, ops.result_dtype(logits))
        factors.append(number if tensor is None else tensor)
    return factors
