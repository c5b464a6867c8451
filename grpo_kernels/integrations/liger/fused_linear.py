"""Liger's GRPO loss from hidden states, by `linear_grpo_loss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grpo_kernels.integrations.liger.variant import Variant, live_tokens, metrics, sampler_log_probs
from grpo_kernels.linear_log_probs import linear_grpo_loss, linear_token_log_probs

_OP = "LigerFusedLinearGRPOLoss"


class LigerFusedLinearGRPOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`: the GRPO loss of a head's hidden states, without logits.

    Args:
        beta: weight of the k3 KL to the reference policy.
        compiled, chunk_size: without effect; there is nothing to compile, and chunks follow from the memory's size.
        use_ref_model: False ignores every reference: the KL and its gradient are 0.
        epsilon_low, epsilon_high: clip distances. For "cispo" epsilon_high is the absolute bound of the ratio, and
            epsilon_low is not used.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: denominator of "dr_grpo", which needs it.
        importance_sampling_level: "token", or "sequence" (GSPO), which "cispo", "sapo" and "vespo" refuse.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        temperature: what the logits are divided by.
        delta: upper bound of the ratio in the unclipped branch. Not used by "cispo", "sapo" and "vespo".
        use_bias_correction_kl: multiply the KL by the ratio, with its gradient.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or contradicts another.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._variant(beta).config(_OP)

    def _variant(self, beta: float) -> Variant:
        """The options as they are now: callers set attributes."""
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(f"{_OP}: max_completion_length must be given with loss_type='dr_grpo', got None")
        return Variant(
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            beta=beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            max_completion_length=self.max_completion_length,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor | None,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics.

        Args:
            _input: [B, T, H] bf16, fp16, fp32 or fp64. Hidden states that predict selected_token_ids.
            lin_weight: [V, H].
            selected_token_ids: [B, T] int32 or int64. Negative = masked.
            attention_mask: [B, T] of any dtype, non-zero = the token counts; None for all. Masked tokens may hold
                anything.
            advantages: [B], or [B, T].
            bias: [V].
            ref_per_token_logps: [B, T]. Instead of it ref_input and ref_weight may give them.
            old_per_token_logps: [B, T]; None: on-policy.
            ref_input: [B, T, H'], with ref_weight [V, H'] and ref_bias [V]: the reference policy. No gradient.
            vllm_is_ratio: [B, T], [B, 1] or [B]. Multiplies the policy term; "vespo" takes it into its own weight.
            num_items_in_batch: number or tensor of one element: the live tokens of all processes and micro-batches of
                a step. Used by "dapo", "cispo" and "vespo", which divide by it / processes. Without it they divide by
                the mean of the processes' counts, which is a collective where torch.distributed is initialised.

        Returns:
            (loss, (kl, clip_ratio)), 0-d float32 (float64 for float64 inputs, metrics float32); the KL only where
            beta is not 0. The loss is differentiable in _input, lin_weight and bias.

        Raises:
            TypeError, ValueError: of the constructor, for attributes set since; no reference where beta and
                use_ref_model want one; and those of `linear_grpo_loss`.
        """
        ref = None
        if self.use_ref_model and self.beta != 0.0:
            ref = ref_per_token_logps
            if ref is None and ref_input is not None and ref_weight is not None:
                ref = self._log_probs(ref_input, ref_weight, ref_bias, selected_token_ids, attention_mask)
            if ref is None:
                raise ValueError(
                    f"{_OP}: ref_per_token_logps, or ref_input and ref_weight, must be given with use_ref_model=True "
                    f"and beta={self.beta}, got None"
                )
        # Without a reference the policy stands in for it: KL and gradient are 0, which a coefficient of 0 gives too.
        variant = self._variant(0.0 if ref is None else self.beta)
        old, weights, sampler = old_per_token_logps, vllm_is_ratio, None
        if self.loss_type == "vespo" and vllm_is_ratio is not None:
            if old is None:
                old = self._log_probs(_input, lin_weight, bias, selected_token_ids, attention_mask)
            live = live_tokens(selected_token_ids, attention_mask)
            weights, sampler = None, sampler_log_probs(live, old, vllm_is_ratio)
        output = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            old,
            advantages,
            attention_mask,
            variant.config(_OP, folded=sampler is not None),
            ref_log_probs=ref,
            sampler_log_probs=sampler,
            token_weights=weights,
            num_items=variant.num_items(selected_token_ids, attention_mask, num_items_in_batch),
            bias=bias,
            temperature=self.temperature,
        )
        return output.loss, metrics(output, self.beta)

    @torch.no_grad()
    def _log_probs(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        output = linear_token_log_probs(hidden, weight, token_ids, bias=bias, temperature=self.temperature, mask=mask)
        return output.log_probs
