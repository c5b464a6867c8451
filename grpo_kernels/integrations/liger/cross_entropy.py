"""Liger's fused linear cross-entropy, by `linear_cross_entropy`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from grpo_kernels import _checks
from grpo_kernels.integrations.liger.variant import live_tokens
from grpo_kernels.linear_log_probs import linear_cross_entropy, linear_token_log_probs

_OP = "LigerFusedLinearCrossEntropyLoss"


@dataclasses.dataclass
class CrossEntropyOutput:
    """What the loss returns when more than the loss is asked for; the others are None where they were not.

    Args:
        loss: as without. The only differentiable one.
        z_loss: the part of the loss that lse_square_scale adds.
        token_accuracy: share of the tokens whose likeliest id is the target; with reduction "none" 1.0 or 0.0 of each.
        predicted_tokens: [N] int64, the likeliest id; -1 for ignored tokens.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss`: cross-entropy of a head's hidden states.

    Args:
        ce_weight: must be None: weights of classes are not served.
        ignore_index: target of tokens that do not count; negative targets never count.
        lse_square_scale: weight of the squared log-sum-exp (z-loss).
        label_smoothing: must be 0: not served.
        reduction: "mean" over the tokens that count, "sum", or "none".
        softcap: of the logits, or None.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput`. Each of them
            costs a further product of the head, once for all three.
        accum_dtype: without effect; gradients are always accumulated in float32.
        use_token_scaling: multiply each token's loss by the probability of its target, without gradient.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or is not served.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if ce_weight is not None:
            raise ValueError(
                f"{_OP}: ce_weight must be None: weights of classes are not served, got {type(ce_weight).__name__}"
            )
        if label_smoothing != 0.0:
            raise ValueError(f"{_OP}: label_smoothing must be 0: it is not served, got {label_smoothing}")
        _checks.check_choice(_OP, "reduction", reduction, ("mean", "sum", "none"))
        _checks.check_number(_OP, "lse_square_scale", lse_square_scale, minimum=0.0)
        if softcap is not None:
            _checks.check_number(_OP, "softcap", softcap, above=0.0)
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss.

        Args:
            lin_weight: [V, H].
            _input: [N, H] bf16, fp16, fp32 or fp64; any leading shape.
            target: [N] int32 or int64.
            bias: [V].

        Returns:
            0-d, or [N] with reduction "none": float32 (float64 for float64 inputs), differentiable in lin_weight,
            _input and bias; or a `CrossEntropyOutput`.

        Raises:
            TypeError, ValueError: of `linear_cross_entropy`.
        """
        live = live_tokens(target, target != self.ignore_index)
        log_probs, top1_ids = None, None
        extras = self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        if extras or self.use_token_scaling:
            wanted = ("top1_ids",) if self.return_token_accuracy or self.return_predicted_tokens else ()
            with torch.no_grad():
                rows = linear_token_log_probs(
                    _input, lin_weight, target, bias=bias, softcap=self.softcap, mask=live, outputs=wanted
                )
            log_probs, top1_ids = rows.log_probs, rows.top1_ids
        scale = log_probs.exp() if self.use_token_scaling and log_probs is not None else None
        loss = linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction if scale is None else "none",
            softcap=self.softcap,
            z_loss=self.lse_square_scale,
        )
        if scale is not None:
            loss = self._reduced(loss * scale, live)
        if not extras or log_probs is None:
            return loss
        z_loss, accuracy = None, None
        if self.return_z_loss:
            squares = self._log_sum_exp(lin_weight, _input, target, bias, live, log_probs).square()
            z_loss = self._reduced(self.lse_square_scale * squares * (1.0 if scale is None else scale), live)
        if self.return_token_accuracy:
            hits = torch.where(live, top1_ids == target, False).to(log_probs.dtype)
            accuracy = hits if self.reduction == "none" else hits.sum() / live.sum().clamp(min=1)
        return CrossEntropyOutput(loss, z_loss, accuracy, top1_ids if self.return_predicted_tokens else None)

    def _reduced(self, values: Tensor, live: Tensor) -> Tensor:
        if self.reduction == "none":
            return values
        return values.sum() / live.sum().clamp(min=1) if self.reduction == "mean" else values.sum()

    @torch.no_grad()
    def _log_sum_exp(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, live: Tensor, log_probs: Tensor
    ) -> Tensor:
        """Of each token that counts, 0 of the others: the target's logit, which costs N H, less its log-prob."""
        dtype = log_probs.dtype
        ids = torch.where(live, target, 0)
        logit = (hidden.to(dtype) * weight[ids].to(dtype)).sum(-1)
        if bias is not None:
            logit = logit + bias[ids].to(dtype)
        if self.softcap is not None:
            logit = self.softcap * torch.tanh(logit / self.softcap)
        return torch.where(live, logit - log_probs, 0)
