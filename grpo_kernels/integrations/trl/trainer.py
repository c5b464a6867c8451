"""TRL's GRPOTrainer with its whole loss in the kernels: from hidden states to the loss and its gradients."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput, grpo_loss
from grpo_kernels.integrations.trl.forward import HeadFunction, add_head_function, logit_transform
from grpo_kernels.integrations.trl.metrics import Kind, logged, statistics
from grpo_kernels.integrations.trl.support import check_trainer, check_trl
from grpo_kernels.linear_log_probs import linear_grpo_loss, linear_token_log_probs

check_trl(GRPOTrainer)

_OF_ALL_TOKENS = ("cispo", "dapo", "vespo")
"""Losses that TRL divides by the tokens of all processes and micro-batches."""


@functools.lru_cache(maxsize=8)
def _config(**options: Any) -> GRPOLossConfig:
    return GRPOLossConfig.trl(**options)


class FusedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer`, whose loss and gradients `linear_grpo_loss` computes: no logits, one pass over the head.

    Arguments are those of `trl.GRPOTrainer`. Losses, gradients and logged metrics are, too, up to rounding: for every
    `loss_type`, level, KL, clip, entropy and sampler option that the constructor does not refuse. Log-probs of the old
    and the reference policy come from the same kernels. The metrics stay on the device until TRL logs them.

    Raises:
        ValueError: an option or the model is not served exactly; the message names it and what to do instead.

    Source:
        TRL 1.16.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_trainer(self)
        self._loss_config()  # values that no loss takes raise here
        self._head = logit_transform(self.model.config)._asdict()
        self._unread: dict[str, list[tuple[Kind, Tensor]]] = {"train": [], "eval": []}
        policy = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        add_head_function(policy)
        if self.ref_model is not None:
            add_head_function(self.accelerator.unwrap_model(self.ref_model))

    def _loss_config(self) -> GRPOLossConfig:
        args = self.args
        options = {
            "loss_type": self.loss_type,
            "beta": self.beta,
            "epsilon": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "importance_sampling_level": self.importance_sampling_level,
            "off_policy_mask_threshold": self.off_policy_mask_threshold,
            "top_entropy_quantile": self.top_entropy_quantile,
            "entropy_coef": self.entropy_coef,
            "max_completion_length": self.max_completion_length,
        }
        for name in ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
                     "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):  # fmt: skip
            options[name] = getattr(args, name)
        if self._corrects_sampler and self.loss_type == "vespo":  # elsewhere TRL's ratio is a weight of the tokens
            options["use_vllm"] = True
            for name in ("mode", "clip_min", "clip_max"):
                name = f"vllm_importance_sampling_{name}"
                options[name] = getattr(self, name)
        return _config(**options)

    @property
    def _corrects_sampler(self) -> bool:
        return bool(self.use_vllm and self.vllm_importance_sampling_correction)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probs, and entropies where asked for, of the last `logits_to_keep` tokens: [B, T] float."""

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return linear_token_log_probs(
                hidden[:, -logits_to_keep - 1 : -1], weight, ids[:, -logits_to_keep:], bias=bias,
                mask=attention[:, -logits_to_keep:], temperature=self.temperature,
                outputs=("entropy",) if compute_entropy else (), **self._head,
            )  # fmt: skip

        parts = []
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            ids, attention = input_ids[start : start + size], attention_mask[start : start + size]
            parts.append(self._run(model, ids, attention, score))
        log_probs = torch.cat([part.log_probs for part in parts])
        return log_probs, torch.cat([part.entropy for part in parts]) if compute_entropy else None, None

    def _run(self, model: Any, input_ids: Tensor, attention_mask: Tensor, function: HeadFunction) -> Any:
        with self.accelerator.autocast():
            return model(input_ids=input_ids, attention_mask=attention_mask, head_function=function)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        token_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], token_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], completion_mask], dim=1)
        options = self._loss_options(inputs)
        length = token_ids.shape[1]

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLossOutput:
            return linear_grpo_loss(
                hidden[:, -length - 1 : -1], weight, token_ids, bias=bias, temperature=self.temperature, **self._head,
                **options,
            )  # fmt: skip

        output: GRPOLossOutput = self._run(model, input_ids, attention_mask, loss)
        self._record(inputs, output, options)
        return output.loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulation(self) -> int:
        """By how many micro-batches a mean is divided; those of an evaluation are not accumulated."""
        return int(self.current_gradient_accumulation_steps) if self._mode == "train" else 1

    def _loss_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that `linear_grpo_loss` and `grpo_loss` share."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        sampler, weights = None, None
        if self._corrects_sampler and self.loss_type != "vespo":
            weights = inputs["importance_sampling_ratio"]
        if self.off_policy_mask_threshold is not None or (self._corrects_sampler and self.loss_type == "vespo"):
            sampler = inputs.get("sampling_per_token_logps")
        return {
            "old_log_probs": inputs.get("old_per_token_logps"),
            "advantages": inputs["advantages"],
            "mask": mask,
            "config": self._loss_config(),
            "ref_log_probs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "sampler_log_probs": sampler,
            "token_weights": weights,
            "entropy_coef": self.entropy_coef / self._accumulation,
            "num_items": self._num_items(inputs, mask),
        }

    def _num_items(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """What the sum over tokens or sequences is divided by."""
        if self.loss_type in _OF_ALL_TOKENS:
            items: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self._mode == "train":  # they are those of a generation, which lasts several windows of accumulation
                items = items * self._accumulation / self.args.steps_per_generation
            return items
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * self._accumulation
        return float(len(mask) * self._accumulation)

    @torch.no_grad()
    def _record(self, inputs: dict[str, Any], output: GRPOLossOutput, options: dict[str, Any]) -> None:
        """Keeps what TRL logs of the loss. One collective, and nothing is read on the host."""
        per_sequence = self.importance_sampling_level == "sequence" and inputs["advantages"].ndim == 1
        kind = Kind(self.loss_type, per_sequence, self.beta != 0.0, self._entropy_bonus_enabled)
        log_probs, entropy = cast("Tensor", output.log_probs), output.entropy
        unregularized = None
        if kind.with_bonus:
            unregularized = grpo_loss(log_probs, entropy=entropy, **{**options, "entropy_coef": 0.0}).loss
            if self.loss_type not in _OF_ALL_TOKENS:
                unregularized = unregularized * self._accumulation
            if self._mode == "train" and self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        phi = self._phi(inputs, log_probs, options) if self.loss_type == "vespo" else None
        values = statistics(output.metrics, len(log_probs), phi, unregularized)
        self._unread[self._mode].append((kind, self.accelerator.gather(values)))

    def _phi(self, inputs: dict[str, Any], log_probs: Tensor, options: dict[str, Any]) -> Tensor:
        """[2]: sum and number of the weights of VESPO, of sequences or, with advantages of tokens, of tokens."""
        old, advantages, mask = options["old_log_probs"], options["advantages"], options["mask"]
        per_token = advantages.ndim == 2
        phi = self.get_gamma_weights(
            advantages if per_token else advantages[:, None],
            torch.zeros_like(log_probs) if old is None else log_probs - old,
            mask,
            inputs.get("importance_sampling_ratio"),
            *(getattr(self.args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")),
        )
        if per_token:
            return torch.stack([(phi * mask).sum(), mask.sum()])
        return torch.stack([phi.sum(), phi.new_full((), len(phi))])

    def _read_statistics(self) -> None:
        """Puts what `_record` kept where TRL logs from. The one place where the host waits for the device."""
        for mode, unread in self._unread.items():
            if unread:
                rows = torch.stack([values for _, values in unread]).tolist()
                for (kind, _), ranks in zip(unread, rows, strict=True):
                    for name, value in logged(ranks, kind).items():
                        self._metrics[mode][name].append(value)
                unread.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_statistics()
        super().log(logs, start_time)
