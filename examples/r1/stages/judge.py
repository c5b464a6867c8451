"""The generative reward model: a second small language model, whose probability of a response is its score."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.r1.parallel import SINGLE, Ranks
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.sequences import Sequences
from examples.r1.run import Run
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages.log_probs import sequence_log_probs


class RewardModel:
    """Scores responses by how likely a model that knows good answers finds them."""

    def __init__(self, model: CharTransformer, ranks: Ranks = SINGLE) -> None:
        self.model = model
        self.ranks = ranks

    @classmethod
    def trained(cls, run: Run, models: ModelFolder) -> RewardModel:
        """As its stage left it."""
        return cls(models.load("reward_model", run.build_judge()), run.ranks)

    def score(self, sequences: Sequences, group_size: int = 1) -> Tensor:
        """exp(mean log-prob of the response's tokens), END among them: [N * G] float32, in [0, 1].

        Each rank gives its own sequences, of groups of `group_size` in all, and gets the scores of all.
        """
        log_probs = sequence_log_probs(self.model, sequences, temperature=1.0)
        scores = torch.exp(log_probs.sum(dim=1) / sequences.mask.sum(dim=1).clamp(min=1))
        return self.ranks.gather_samples(scores, group_size)
