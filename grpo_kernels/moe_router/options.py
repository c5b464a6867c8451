"""The options of the router that are fixed for a model, in the order of the registered ops' schemas."""

from __future__ import annotations

from typing import NamedTuple

SCORING_FUNCS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
MAX_EXPERTS = 1024
MAX_TOP_K = 32


class RouterOptions(NamedTuple):
    """What `api.moe_router` was asked for, checked; the three losses as whether they are computed."""

    top_k: int
    scoring_func: str
    n_group: int
    topk_group: int
    group_score: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    z_loss: bool
    aux_loss: bool
    seq_aux_loss: bool

    @property
    def over_chosen(self) -> bool:
        """The weights are a softmax over the chosen logits alone."""
        return self.scoring_func == "topk_softmax" or (self.scoring_func == "softmax" and self.norm_topk_prob)
