"""The public mtp_linear_cross_entropy: argument checks, and what is known of every depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import _checks, _dispatch
from grpo_kernels._gemm import accumulation_dtype, gemm_dtype
from grpo_kernels._token_ids import ignored_id
from grpo_kernels.distributed import VocabShard
from grpo_kernels.grpo_loss import GRPOLossConfig
from grpo_kernels.linear_log_probs.arguments import check_head
from grpo_kernels.linear_log_probs.function import Options, Wanted
from grpo_kernels.linear_log_probs.head import LoRAFactors
from grpo_kernels.linear_log_probs.policy import Policy
from grpo_kernels.multi_token_prediction import ops
from grpo_kernels.multi_token_prediction.arguments import (
    depth_weights_of,
    raise_if_outside,
    shares_of,
    stacked,
)
from grpo_kernels.multi_token_prediction.documents import Documents, check_shift, documents
from grpo_kernels.multi_token_prediction.loss import Depths, Losses, losses_of
from grpo_kernels.multi_token_prediction.outputs import MTPLossOutput, PolicyTerms
from grpo_kernels.token_log_probs.arguments import check_rows, check_transform, split_temperature

_OP = "mtp_linear_cross_entropy"


def mtp_linear_cross_entropy(
    hiddens: Tensor | Sequence[Tensor],
    weight: Tensor,
    token_ids: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: int = 1,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    depth_weights: Sequence[float] | Tensor | None = None,
    normalizer: str = "valid",
    num_items: Tensor | float | None = None,
    policy: PolicyTerms | None = None,
    detach_head: bool = False,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    lora: LoRAFactors | None = None,
    vocab_shard: VocabShard | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> MTPLossOutput:
    """The loss of multi-token prediction: all depths share one pass over the head, whose logits are never formed for
    all rows.

    Depth 0 is the model itself; row i of depth k predicts token_ids[i + k + shift]. With z the logits after
    logit_scale, softcap and temperature::

        token loss     = logsumexp(z) - z[token] + z_loss * logsumexp(z)^2
        depth_loss[k]  = sum of the token losses of the rows that predict a token that counts / their number
        loss           = sum_k depth_weights[k] * depth_loss[k]

    A row predicts a token where that token exists in the row's own document, its id is not negative and not
    ignore_index, and the mask counts it. Tokens are neither rolled nor copied. Gradients are formed in the forward as
    in `linear_cross_entropy`, and with a policy as in `linear_grpo_loss`, under the conditions of these.

    Args:
        hiddens: [D + 1, N, H] or [D + 1, B, T, H], bf16, fp16, fp32 or fp64; or a sequence of D + 1 tensors, which are
            stacked. Hidden states of depth 0 and of the D that predict further ahead, every row in its place. Rows that
            predict nothing may hold anything.
        weight: [V, H], as `nn.Linear` has it. The head that all depths share.
        token_ids: [N] or [B, T] int32 or int64, in [0, V). Negative = no token.
        positions: [N] or [B, T] int32 or int64, by row. Place of every row in its document: a document goes on as long
            as they go on by one. Negative = padding. In [B, T] no document goes from one row of the batch to the next.
        cu_seqlens: [S + 1] int32 or int64, for token_ids [N] and in place of positions: where each document starts,
            and the end of the last. With neither, each row of a batch is a document, or all of [N].
        shift: >= 0. 1: token_ids went into the model, row i holds token i. 0: token_ids[i] is what row i of depth 0
            predicts, as in `linear_cross_entropy` and `linear_grpo_loss`.
        mask: [N] or [B, T] bool, or numbers of which non-zero counts. By token: mask[j] is that of token_ids[j].
        ignore_index: any integer.
        depth_weights: D + 1 numbers, or [D + 1] tensor. None: 1 for depth 0, 0.3 / D for the others. Not
            differentiated.
        normalizer: "valid": each depth is divided by the number of its own rows that count; "tokens": all by that of
            depth 0. No less than 1.
        num_items: number or 0-d tensor that every depth is divided by instead, such as a count over all ranks and
            micro-batches; below 1 it counts as 1. With a policy depth 0 takes PolicyTerms.num_items in its place.
        policy: depth 0 carries the GRPO loss of these instead of cross-entropy. Needs shift = 0, and hidden states
            [D + 1, B, T, H], or [D + 1, N, H] with cu_seqlens. The mask is that of the policy, too.
        detach_head: the depths behind 0 give weight, bias and LoRA factors no gradient. Takes two passes of rows, of
            the same operations in all.
        bias: [V].
        temperature: number, 0-d tensor, or [N] or [B, T] tensor by row, > 0, of all depths. Not differentiated.
        logit_scale: finite, non-zero factor of the logits.
        softcap: > 0, or None for none.
        z_loss: >= 0. Weight of the squared log-sum-exp, in every depth that carries cross-entropy.
        lora: low-rank factors that are added to the head.
        vocab_shard: weight, bias and lora.b hold the rows [start, end) of the vocabulary, other ranks the rest.
        weight_grad_accumulator: [V, H] fp32 (fp64 for an fp64 weight). The backward adds the gradient of the weight
            there, and the weight gets none.

    Returns:
        `MTPLossOutput`, float32 (float64 for float64 inputs). The loss is differentiable in hiddens, weight, bias and
        the LoRA factors; nothing else is.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or contradicts another; on
            the CPU also where a token that a row predicts is >= V. On other devices such a row is NaN.
        BackendUnavailable: vocab_shard or weight_grad_accumulator need kernels, and there are none for this device
            and dtype.

    Numerics:
        As `linear_cross_entropy`; with a policy as `linear_grpo_loss`, whose metrics and loss depth 0 has, bit for bit
        those of `grpo_loss` on the log-probs. Sums over rows are in float32 and in a fixed order. The gradient of the
        weight is accumulated over all depths and rounded once. A depth without rows that count gives 0.

    Source:
        DeepSeek-V3 (arXiv 2412.19437, section 2.2), whose report divides by the number of tokens ("tokens"); Megatron
        divides each depth by its own count ("valid").
    """
    hiddens = stacked(_OP, hiddens)
    _checks.check_dtype(_OP, "hiddens", hiddens)
    arguments = check_head(_OP, hiddens, weight, bias, lora, vocab_shard, weight_grad_accumulator)
    depths, *rows_shape = arguments.leading
    leading = torch.Size(rows_shape)
    check_rows(_OP, hiddens, "hiddens", leading, "token_ids", token_ids, mask)
    check_transform(_OP, hiddens, "hiddens", leading, temperature, logit_scale, softcap)
    shift = check_shift(_OP, shift)
    ignored = ignored_id(_OP, ignore_index, token_ids.dtype)
    _checks.check_number(_OP, "z_loss", z_loss, minimum=0.0)
    if not isinstance(detach_head, bool):
        raise TypeError(f"{_OP}: detach_head must be a bool, got {type(detach_head).__name__}")
    placed = documents(_OP, token_ids, positions, cu_seqlens)
    dtype = gemm_dtype(hiddens, weight)
    exact = accumulation_dtype(dtype)
    backend = _dispatch.resolve(_OP, weight if weight.dtype == torch.float64 else hiddens)
    targets, counts = _targets(token_ids, placed, mask, depths, shift, ignored, backend)
    checked = (
        None if policy is None else _policy(policy, hiddens, token_ids, targets, cu_seqlens, shift, exact, backend)
    )
    if vocab_shard is None:
        raise_if_outside(_OP, targets, token_ids, shift, arguments.vocab)
    temperatures, number = split_temperature(_OP, temperature, hiddens.device, exact)
    options = Options(
        _OP, dtype, arguments.head.lora_scale, number, float(logit_scale), 0.0 if softcap is None else float(softcap),
        Wanted(entropy=policy is not None, top1_ids=True, log_sum_exp=z_loss != 0.0), vocab_shard, backend,
    )  # fmt: skip
    found = _found(
        Depths(
            options, arguments.hidden.view(depths, targets.shape[1], hiddens.shape[-1]), arguments.head, targets,
            temperatures if temperatures is None or temperatures.ndim == 0 else temperatures.reshape(-1),
            depth_weights_of(_OP, depth_weights, depths, hiddens, exact),
            shares_of(_OP, counts, normalizer, num_items, exact), float(z_loss), checked, weight_grad_accumulator,
        ),
        detach_head and depths > 1,
    )  # fmt: skip
    acceptance, agreement = _hits(targets, found.top1_ids, counts, exact)
    of_policy = found.policy
    return MTPLossOutput(
        found.loss, found.depth_losses, counts, acceptance, agreement, found.log_probs[0].view(leading),
        None if of_policy is None else of_policy.entropy, None if of_policy is None else of_policy.metrics,
    )  # fmt: skip


def _targets(
    token_ids: Tensor, placed: Documents, mask: Tensor | None, depths: int, shift: int, ignored: int, backend: str
) -> tuple[Tensor, Tensor]:
    """What row i of depth k predicts, [depths, N], -1 where nothing; and how many of each depth do."""
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)
    found: tuple[Tensor, Tensor] = ops.mtp_targets(
        token_ids.reshape(-1), placed.positions, mask, depths, shift, placed.sequence_length, ignored, backend
    )
    return found


def _policy(
    terms: PolicyTerms,
    hiddens: Tensor,
    token_ids: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    shift: int,
    dtype: torch.dtype,
    backend: str,
) -> Policy:
    if not isinstance(terms, PolicyTerms):
        raise TypeError(f"{_OP}: policy must be a PolicyTerms, got {type(terms).__name__}")
    if shift != 0:
        raise ValueError(
            f"{_OP}: shift must be 0 with a policy, whose token_ids are what the rows predict, got {shift}"
        )
    if isinstance(terms.config, GRPOLossConfig) and terms.config.reduction == "none":
        raise ValueError(f"{_OP}: policy.config must reduce the loss to one number, got reduction='none'")
    if token_ids.ndim == 1 and cu_seqlens is None:
        raise ValueError(f"{_OP}: cu_seqlens must be given with a policy and hiddens [D + 1, N, H], got None")
    batch = token_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Policy.of(
        _OP, hiddens, "hiddens", batch, token_ids, dtype, backend, terms.old_log_probs, terms.advantages,
        (targets[0] >= 0).view(token_ids.shape), terms.config, ref_log_probs=terms.ref_log_probs,
        sampler_log_probs=terms.sampler_log_probs, token_weights=terms.token_weights, kl_coef=terms.kl_coef,
        entropy_coef=terms.entropy_coef, cu_seqlens=cu_seqlens, num_items=terms.num_items, max_length=terms.max_length,
    )  # fmt: skip


def _found(depths: Depths, apart: bool) -> Losses:
    """The losses; `apart`: those of the depths behind 0 on a head that takes no gradient."""
    if not apart:
        return losses_of(depths)
    first, others = depths.split()
    return losses_of(first).followed_by(losses_of(others))


def _hits(targets: Tensor, top1_ids: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shares [D + 1] of the rows whose likeliest token is the target, and is that of depth 0 for the same place."""
    depths, rows = targets.shape
    valid = (targets >= 0) & (top1_ids >= 0)
    following = F.pad(top1_ids[0], (0, depths), value=-1)
    of_model = torch.stack([following[depth : depth + rows] for depth in range(depths)])
    found = torch.stack([(valid & (top1_ids == other)).sum(1) for other in (targets, of_model)])
    acceptance, agreement = (found.to(dtype) / counts.clamp(min=1)).unbind()
    return acceptance, agreement
