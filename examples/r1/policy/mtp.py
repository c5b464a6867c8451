"""Multi-token prediction in training: hidden states of every depth, and losses over all of them in one pass.

Column t of depth k stands for the same place as column t of the model, and predicts completion token t + k. It embeds
token t + k - 1, so even the first column, the prompt's last token, differs from sample to sample; the prompt's tokens
before it are read once for a group. Those of them whose token of a deeper depth would be a sample's own have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.r1.parallel import Ranks
from examples.r1.policy.model import CharTransformer, SharedPrefix
from examples.r1.policy.routes import Routes
from examples.r1.results import Record
from grpo_kernels import MTPLossOutput, MultiTokenPrediction


def layers_of(model: CharTransformer) -> MultiTokenPrediction:
    """The model's layers of multi-token prediction. Raises ValueError if it has none."""
    if model.mtp is None:
        raise ValueError("the model has no layers of multi-token prediction: mtp must be at least 1")
    return model.mtp


def read_prompts(model: CharTransformer, prompts: Tensor, hidden: Tensor, group_size: int) -> SharedPrefix:
    """What completions attend to in the layers: all but the last token of prompts [N, P] with their hidden states."""
    prefix = SharedPrefix(group_size)
    options = {"cache": prefix}
    layers_of(model)(hidden[:, :-1], prompts[:, 1:], model.token_embedding, shift=0, block_options=options)
    prefix.advance(prompts.shape[1] - 1)
    return prefix


def hidden_of_depths(
    model: CharTransformer, prompts: Tensor, completions: Tensor, routes: Routes | None = None
) -> tuple[Tensor, ...]:
    """For the head, D + 1 times [N * G, C, width]: what `completion_hidden` gives, and then depths 1 to D."""
    prompt_hidden, hidden = model.prompt_and_completion_hidden(prompts, completions, routes)
    prefix = read_prompts(model, prompts, prompt_hidden, len(completions) // len(prompts))
    options = {"cache": prefix}
    deeper = layers_of(model)(hidden, completions, model.token_embedding, shift=0, block_options=options)
    return (hidden, *deeper)


def record_of(output: MTPLossOutput, num_items: Tensor, ranks: Ranks) -> Record:
    """Losses of the depths behind the first, and how often their most likely token was the sample's.

    Means over the rows of all ranks that predict a token, where the loss was divided by `num_items`.
    """
    counts = output.valid_counts.double()
    sums = torch.stack((output.depth_losses * num_items, output.acceptance * counts, counts))
    losses, hits, rows = ranks.sum_(sums).tolist()
    record: Record = {}
    for depth in range(1, len(rows)):
        record[f"mtp_loss_{depth}"] = losses[depth] / max(rows[depth], 1.0)
        record[f"mtp_accuracy_{depth}"] = hits[depth] / max(rows[depth], 1.0)
    return record
