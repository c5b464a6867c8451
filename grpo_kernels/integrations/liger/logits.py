"""Liger's GRPO loss and log-probs from logits, by `token_log_probs` and `grpo_loss`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import _checks
from grpo_kernels.grpo_loss import GRPOLossConfig, grpo_loss
from grpo_kernels.integrations.liger.variant import Variant, live_tokens, metrics, sampler_log_probs
from grpo_kernels.token_log_probs import token_log_probs

_OP = "triton_grpo_loss"


class _Tokens(NamedTuple):
    """What the loss takes of the tokens, [B, L]."""

    log_probs: Tensor
    old: Tensor | None
    ref: Tensor | None
    live: Tensor


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss`: the GRPO loss of logits, on any device.

    Args:
        logits: [B, L + 1, V] bf16, fp16, fp32 or fp64. The last position predicts nothing and gets gradient 0.
        old_logp: [B, L]; None: on-policy.
        ref_logp: [B, L]. Needed where beta is not 0.
        completion_ids: [B, L] int32 or int64. Negative = masked.
        advantages: [B], or [B, L].
        completion_mask: [B, L] of any dtype, non-zero = the token counts; None for all. Masked tokens may hold
            anything.
        inplace: the backward puts the gradient into the storage of the logits. Who uses the logits in autograd
            afterwards gets PyTorch's error.
        max_completion_length: denominator of "dr_grpo"; None: L.
        reduce: a loss rather than token losses.
        num_items_in_batch: used with reduce=True.
        temperature, beta, eps_low, eps_high and the others: as in `LigerFusedLinearGRPOLoss`. Not the same defaults.

    Returns:
        reduce=False: (token losses, token KLs or None where beta is 0, 1.0 where a token is clipped), [B, L] float32,
        0 where masked. reduce=True: (loss, [kl, clip_ratio]), 0-d, the KL only where beta is not 0. Only the losses
        are differentiable.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value, is missing, or contradicts another.
    """
    variant = Variant(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        max_completion_length=max_completion_length,
    )
    variant.config(_OP)  # raises before anything runs
    if delta is not None and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(f"{_OP}: delta must be None with loss_type={loss_type!r}, got {delta}")
    if beta != 0.0 and ref_logp is None:
        raise ValueError(f"{_OP}: ref_logp must be given with beta={beta}, got None")
    _check_logits(_OP, logits, "completion_ids", completion_ids)
    log_probs = _log_probs(logits, completion_ids, temperature, completion_mask, inplace)
    live = live_tokens(completion_ids, completion_mask)
    tokens = _Tokens(log_probs, old_logp, ref_logp if beta != 0.0 else None, live)
    sampler = None
    if loss_type == "vespo" and vllm_is_ratio is not None:
        tokens = tokens._replace(old=log_probs.detach()) if old_logp is None else tokens
        sampler = sampler_log_probs(live, log_probs.detach() if old_logp is None else old_logp, vllm_is_ratio)
        vllm_is_ratio = None
    config = variant.config(_OP, per_token=not reduce, folded=sampler is not None)
    output = grpo_loss(
        log_probs,
        tokens.old,
        advantages,
        live,
        config,
        ref_log_probs=tokens.ref,
        sampler_log_probs=sampler,
        token_weights=vllm_is_ratio,
        num_items=variant.num_items(completion_ids, completion_mask, num_items_in_batch) if reduce else None,
    )
    if reduce:
        return output.loss, list(metrics(output, beta))
    return output.loss, _token_kl(tokens, config), _clipped(tokens, advantages, config)


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """`liger_kernel.transformers.grpo_loss.fused_selective_log_softmax`: log-probs of the last L tokens, no gradient.

    Args:
        logits: [B, L + 1, V] bf16, fp16, fp32 or fp64. The last position predicts nothing.
        input_ids: [B, K] int32 or int64 with K >= L, of which the last L count. Negative = masked.
        temperature: what the logits are divided by.
        mask: [B, K'] of any dtype with K' >= L, of which the last L count; non-zero = the token counts.

    Returns:
        [B, L] float32 (float64 for float64 logits), 0 where masked.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
    """
    op = "fused_selective_log_softmax"
    _checks.check_tensor(op, "logits", logits)
    _checks.check_tensor(op, "input_ids", input_ids)
    _checks.check_ndim(op, "logits", logits, "[B, L + 1, V]")
    first = input_ids.shape[-1] - (logits.shape[1] - 1)
    input_ids = input_ids[:, max(first, 0) :]
    _check_logits(op, logits, "input_ids", input_ids)
    if mask is not None:
        mask = mask[:, mask.shape[-1] - input_ids.shape[1] :]
    return _log_probs(logits, input_ids, temperature, mask, False)


def _check_logits(op: str, logits: Tensor, name: str, token_ids: Tensor) -> None:
    _checks.check_tensor(op, "logits", logits)
    _checks.check_tensor(op, name, token_ids)
    _checks.check_ndim(op, "logits", logits, "[B, L + 1, V]")
    if logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must have shape [B, L + 1, V], got {list(logits.shape)}")
    _checks.check_shape(op, name, token_ids, ("[B, L]", (logits.shape[0], logits.shape[1] - 1)))


def _log_probs(logits: Tensor, token_ids: Tensor, temperature: float, mask: Tensor | None, inplace: bool) -> Tensor:
    """[B, L]. The last position is masked rather than sliced off: autograd would copy the gradient of a slice."""
    token_ids = F.pad(token_ids, (0, 1), value=-1)
    if mask is not None:
        mask = F.pad(mask != 0, (0, 1))
    output = token_log_probs(logits, token_ids, temperature=temperature, mask=mask, inplace_backward=inplace)
    return output.log_probs[:, :-1]


@torch.no_grad()
def _token_kl(tokens: _Tokens, config: GRPOLossConfig) -> Tensor | None:
    """The KL of each token as it enters the loss: the token losses where all advantages are 0."""
    if tokens.ref is None:
        return None
    kl = GRPOLossConfig(
        reduction="none",
        ratio_level=config.ratio_level,
        kl_coef=1.0,
        kl_importance_weighted=config.kl_importance_weighted,
    )
    none = torch.zeros_like(tokens.log_probs)
    return grpo_loss(tokens.log_probs, tokens.old, none, tokens.live, kl, ref_log_probs=tokens.ref).loss


@torch.no_grad()
def _clipped(tokens: _Tokens, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """1.0 for a live token whose ratio is beyond a bound, on the side of its advantage's sign."""
    low, high = config.ratio_bounds
    log_ratio = torch.zeros_like(tokens.log_probs)
    if tokens.old is not None:
        log_ratio = torch.where(tokens.live, tokens.log_probs - tokens.old, 0)
    if config.ratio_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / tokens.live.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    clipped = torch.zeros_like(tokens.live)
    if low is not None:
        clipped = clipped | ((ratio < low) & (advantages < 0))
    if high is not None:
        clipped = clipped | ((ratio > high) & (advantages > 0))
    return (clipped & tokens.live).to(tokens.log_probs.dtype)
