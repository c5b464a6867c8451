"""Log-probabilities of a batch under a model: forward pass and `grpo_kernels.token_log_probs`."""

from __future__ import annotations

from collections.abc import Sequence

from examples.r1.model import CharTransformer
from examples.r1.rollout import Sequences
from grpo_kernels import TokenLogProbsOutput, token_log_probs


def sequence_log_probs(
    model: CharTransformer, sequences: Sequences, temperature: float = 1.0, outputs: Sequence[str] = ()
) -> TokenLogProbsOutput:
    """Per-token results [N * G, C], zero outside the completions.

    The backward writes the gradient over the logits, which nothing else reads: the head keeps its input.
    """
    return token_log_probs(
        model.completion_logits(sequences.prompts, sequences.completions),
        sequences.completions,
        temperature=temperature,
        mask=sequences.mask,
        outputs=tuple(outputs),
        inplace_backward=True,
    )
