"""The options that Liger's two GRPO losses share, as a `GRPOLossConfig` and arguments of the loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._token_ids import live_rows
from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput
from grpo_kernels.grpo_loss.metrics import NAMES
from grpo_kernels.grpo_loss.presets import TRL_REDUCTIONS

_OWN_SURROGATE = ("cispo", "sapo", "vespo")
_GLOBAL_MEAN = ("dapo", "cispo", "vespo")
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-8, math.exp(20.0)  # what VESPO clamps a sampler weight to


@dataclasses.dataclass(frozen=True)
class Variant:
    """Liger's options by Liger's names. Those that the loss type does not use are ignored, as Liger ignores them.

    Raises:
        TypeError, ValueError: of `config`: an option has a wrong type or value, or contradicts another.
    """

    loss_type: str
    importance_sampling_level: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    use_bias_correction_kl: bool
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    max_completion_length: int | None

    def config(self, op: str, *, per_token: bool = False, folded: bool = False) -> GRPOLossConfig:
        """The loss, or its token losses.

        Args:
            op: the public name, for messages.
            per_token: token losses, without a reduction.
            folded: VESPO's weight takes a sampler's log-probs in.
        """
        _checks.check_choice(op, "loss_type", self.loss_type, TRL_REDUCTIONS)
        _checks.check_choice(op, "importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        if self.importance_sampling_level == "sequence" and self.loss_type in _OWN_SURROGATE:
            raise ValueError(
                f"{op}: importance_sampling_level must be 'token' with loss_type={self.loss_type!r}, got 'sequence'"
            )
        _checks.check_number(op, "epsilon_high", self.epsilon_high, minimum=0.0)
        fields: dict[str, Any] = {
            "reduction": "none" if per_token else TRL_REDUCTIONS[self.loss_type],
            "ratio_level": self.importance_sampling_level,
            "kl_coef": self.beta,
            "kl_importance_weighted": self.use_bias_correction_kl,
        }
        if self.loss_type == "dr_grpo" and not per_token:
            fields["max_length"] = self.max_completion_length
        if folded:
            fields.update(
                sampler_correction="token_truncate", sampler_floor=_SMALLEST_WEIGHT, sampler_cap=_LARGEST_WEIGHT
            )
        return GRPOLossConfig(**fields, **self._surrogate())

    def _surrogate(self) -> dict[str, Any]:
        if self.loss_type not in _OWN_SURROGATE:
            return {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high, "delta": self.delta}
        if self.loss_type == "cispo":
            return {"surrogate": "cispo", "ratio_cap": self.epsilon_high}
        own = {name: value for name, value in vars(self).items() if name.startswith(self.loss_type)}
        return {"surrogate": self.loss_type, **own}

    def num_items(
        self, token_ids: Tensor, mask: Tensor | None, num_items_in_batch: Tensor | float | None
    ) -> Tensor | float | None:
        """What a sum over tokens is divided by in place of this call's own count; None for that count.

        With several processes and no number given it is the mean of their counts, by one all-reduce.
        """
        if self.loss_type not in _GLOBAL_MEAN:
            return None
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is None:
            if world == 1:
                return None
            num_items_in_batch = live_tokens(token_ids, mask).sum()
            dist.all_reduce(num_items_in_batch)
        if not isinstance(num_items_in_batch, Tensor):
            return max(num_items_in_batch / world, 1.0)
        exact = num_items_in_batch.detach().to(token_ids.device, torch.float64)
        return (exact.reshape(()) / world).clamp(min=1.0)


def live_tokens(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens count, as the loss sees it."""
    return live_rows(token_ids, None if mask is None else mask != 0)


def sampler_log_probs(live: Tensor, old_log_probs: Tensor, ratio: Tensor) -> Tensor:
    """[B, L]: log-probs of the sampler whose importance weights are `ratio`, [B, L], [B, 1] or [B].

    A weight of the sequence goes to its first live token, so that the sum over the sequence has it once.
    """
    log_ratio = ratio.detach().to(old_log_probs.dtype).log().clamp(min=math.log(_SMALLEST_WEIGHT), max=20.0)
    if log_ratio.ndim == 1 or log_ratio.shape[1] == 1:
        first = live & (live.cumsum(-1) == 1)
        log_ratio = torch.where(first, log_ratio.reshape(-1, 1), 0)
    return old_log_probs - log_ratio


def metrics(output: GRPOLossOutput, beta: float) -> tuple[Tensor, ...]:
    """Means over live tokens, 0-d and on the device: the KL where beta is not 0, and the share of clipped tokens."""
    values = output.metrics.values
    tokens = values[NAMES.index("tokens")].clamp(min=1.0)
    clip_ratio = (values[NAMES.index("clip_low")] + values[NAMES.index("clip_high")]) / tokens
    return (values[NAMES.index("kl")] / tokens, clip_ratio) if beta != 0.0 else (clip_ratio,)
