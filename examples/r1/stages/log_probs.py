"""Log-probabilities of a batch under a model that is not trained on it now."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.r1.policy.model import CharTransformer
from examples.r1.policy.routes import Routes
from examples.r1.policy.sequences import Sequences


@torch.no_grad()
def sequence_log_probs(
    model: CharTransformer, sequences: Sequences, temperature: float, routes: Routes | None = None
) -> Tensor:
    """Per token [N * G, C], zero outside the completions."""
    hidden = model.completion_hidden(sequences.prompts, sequences.completions, routes)
    return model.head.token_log_probs(
        hidden, sequences.completions, temperature=temperature, mask=sequences.mask
    ).log_probs
