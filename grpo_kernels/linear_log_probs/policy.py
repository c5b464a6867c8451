"""The loss of a policy, and what it takes beside the log-probs that a head will give it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels._token_ids import live_rows
from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput, GRPOMetrics
from grpo_kernels.grpo_loss.api import evaluate
from grpo_kernels.grpo_loss.batch_statistics import with_batch_statistics
from grpo_kernels.grpo_loss.inputs import Subject, check_cu_seqlens, loss_inputs
from grpo_kernels.grpo_loss.rows import LossInputs, Rows, rows_of
from grpo_kernels.linear_log_probs import chunks
from grpo_kernels.linear_log_probs.token_terms import TokenTerms, passes, token_terms


def check_layout(op: str, name: str, hidden: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of sequences."""
    _checks.check_tensor(op, name, hidden)
    if cu_seqlens is None:
        _checks.check_ndim(op, name, hidden, "[B, T, H]")
        return hidden.shape[0]
    _checks.check_ndim(op, name, hidden, "[N, H]")
    return check_cu_seqlens(op, cu_seqlens, name, hidden)


class Policy(NamedTuple):
    """A loss after the checks of its arguments."""

    config: GRPOLossConfig
    inputs: LossInputs  # log_probs and entropy are stand-ins
    rows: Rows
    backend: str

    @classmethod
    def of(
        cls,
        op: str,
        like: Tensor,
        name: str,
        batch: int,
        token_ids: Tensor,
        dtype: torch.dtype,
        backend: str,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        config: GRPOLossConfig,
        *,
        cu_seqlens: Tensor | None,
        **others: Any,
    ) -> Policy:
        """Checks the arguments of `grpo_loss` on tokens [B, T], or [N] with cu_seqlens, which has been checked.

        `like`, which messages call `name`, gives the device; `dtype` is that of the log-probs, `backend` that of the
        head.
        """
        stand_in = torch.zeros((), dtype=dtype, device=like.device).expand(token_ids.shape)
        inputs = loss_inputs(
            Subject(op, stand_in, name), config, batch, old_log_probs, advantages, mask, entropy=stand_in,
            cu_seqlens=cu_seqlens, **others,
        )  # fmt: skip
        live = live_rows(token_ids, None if inputs.mask is None else inputs.mask != 0)
        rows = rows_of(stand_in, live, cu_seqlens)
        loss_backend = _dispatch.resolve_part("grpo_loss", stand_in, backend)
        return cls(config, inputs._replace(mask=rows.live), rows, loss_backend)

    def takes_one_pass(self, vocab: int) -> bool:
        """Whether its derivatives are known with the log-probs of a chunk of rows, for a head of so many columns."""
        count = passes(
            self.config,
            length=self.rows.live.shape[-1],
            longest=chunks.most_rows(vocab, self.rows.live.device.type),
            packed=self.inputs.cu_seqlens is not None,
            on_policy=self.inputs.old_log_probs is None,
        )
        return self.backend == "native" and count == 1

    def terms(self) -> TokenTerms:
        """What the tokens of a chunk need of it."""
        return token_terms(self.config, self.inputs, self.rows)

    def output(self, log_probs: Tensor, entropy: Tensor, count: int) -> GRPOLossOutput:
        """The loss of these log-probs, which took `count` passes over the head, and what goes with it."""
        log_probs, entropy = (value.view(self.rows.live.shape) for value in (log_probs, entropy))
        coef = self.inputs.entropy_coef
        bonus = entropy if isinstance(coef, Tensor) or coef != 0.0 else entropy.detach()
        inputs = with_batch_statistics(self.inputs._replace(log_probs=log_probs, entropy=bonus), self.config)
        loss, values = evaluate(inputs, self.config, self.backend)
        return GRPOLossOutput(loss, GRPOMetrics(values, count), log_probs.detach(), entropy.detach())
