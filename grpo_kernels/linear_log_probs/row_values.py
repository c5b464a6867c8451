"""What the one-pass losses know of rows: what the row kernels take, what they give, and the derivatives of the loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """What the row kernels take beside the logits."""

    token_ids: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float

    def at(self, rows: slice | Tensor) -> Targets:
        """Those of some of the rows."""
        temperatures = self.temperatures
        if temperatures is not None and temperatures.ndim > 0:
            temperatures = temperatures[rows]
        mask = None if self.mask is None else self.mask[rows]
        return self._replace(token_ids=self.token_ids[rows], mask=mask, temperatures=temperatures)


class Values(NamedTuple):
    """Per row, [N]; 0 where masked. While a chunk is in work, those of later chunks are not yet written."""

    log_probs: Tensor
    entropy: Tensor
    log_sum_exp: Tensor


class Slopes(NamedTuple):
    """Derivatives of the loss by the values of some rows; None is 0."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None

    def at(self, rows: slice | Tensor) -> Slopes:
        """Those of some of the rows."""
        entropy, log_sum_exp = (None if slope is None else slope[rows] for slope in self[1:])
        return Slopes(self.log_probs[rows], entropy, log_sum_exp)
