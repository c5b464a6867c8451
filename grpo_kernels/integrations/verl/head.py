"""verl's `linear_cross_entropy`, computed by `linear_token_log_probs`."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch.distributed as dist
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.distributed import VocabShard
from grpo_kernels.linear_log_probs import linear_token_log_probs
from grpo_kernels.token_log_probs import TokenLogProbsOutput

_OP = "verl.linear_cross_entropy"
# verl's smallest temperature of a sample; the padding of its batches may have 0.
_SMALLEST_TEMPERATURE = 1e-8
_ENTROPY = ("entropy",)


class SumPiSquared:
    """What `linear_cross_entropy` computed within `collect_sum_pi_squared`: as long as labels, or None before."""

    value: Tensor | None = None


_collecting = threading.local()


def collected_sum_pi_squared() -> SumPiSquared | None:
    """That of the `collect_sum_pi_squared` around this call, if there is one."""
    current: SumPiSquared | None = getattr(_collecting, "current", None)
    return current


@contextmanager
def collect_sum_pi_squared() -> Iterator[SumPiSquared]:
    """Within it `linear_cross_entropy` computes the sum of squared probs, too, and leaves it here.

    For engines that get two tensors from a model's forward and want a third.
    """
    outer, collected = collected_sum_pi_squared(), SumPiSquared()
    _collecting.current = collected
    try:
        yield collected
    finally:
        _collecting.current = outer


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor | float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels and entropy of the policy, from hidden states: the signature of verl's own function.

    Args:
        hidden: [..., H] bf16, fp16, fp32 or fp64; any H. Last hidden states, with as many rows as labels. Megatron's
            [S, 1, H] goes with labels [1, S].
        weight: [V, H]. With a process group the rows of this rank: V / world of them, in the order of the ranks.
        labels: [...] int32 or int64, ids of the whole vocabulary. Negative = the row is masked.
        temperature: number, 0-d tensor, one for each sample [labels.shape[0]], or one for each token [labels.shape] or
            flat. Not differentiated. Values of a tensor below 1e-8 count as 1e-8.
        reduction: "none", or "sum" or "mean" of the log-probs. The entropy is never reduced.
        dist_process_group: ranks that hold the vocabulary together.

    Returns:
        (log_probs, entropy), float32 (float64 for float64 inputs), of the shape of labels. Both are differentiable.
        verl's function returns them flat.

    Raises:
        TypeError, ValueError: as `linear_token_log_probs`; also for rows, temperatures or a reduction that do not fit.

    Numerics:
        Those of `linear_token_log_probs`. With a process group the gradient of the hidden states is this rank's part,
        as verl's is: the layer in front of the head sums it (Megatron with sequence parallelism).

    Source:
        verl 0.9.1, verl.utils.kernel.linear_cross_entropy.
    """
    current = collected_sum_pi_squared()
    wanted = _ENTROPY if current is None else (*_ENTROPY, "sum_squared_probs")
    output = _rows(hidden, weight, labels, temperature, reduction, dist_process_group, wanted)
    if current is not None:
        current.value = cast("Tensor", output.sum_squared_probs).reshape(labels.shape)
    return _reduced(output.log_probs, labels, reduction), cast("Tensor", output.entropy).view(labels.shape)


def linear_cross_entropy_with_sum_pi_squared(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor | float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` and the sum over the vocabulary of the squared probs, in the same pass.

    Returns:
        (log_probs, entropy, sum_pi_squared). The last has the shape of labels and no gradient: what verl's
        `calculate_sum_pi_squared` asks for (optimal token baseline).
    """
    with collect_sum_pi_squared() as collected:
        log_probs, entropy = linear_cross_entropy(hidden, weight, labels, temperature, reduction, dist_process_group)
    return log_probs, entropy, cast("Tensor", collected.value)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    reduction: str,
    group: dist.ProcessGroup | None,
    wanted: tuple[str, ...],
) -> TokenLogProbsOutput:
    """Everything flat: [N, H] and [N]."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        _checks.check_tensor(_OP, name, tensor)
    if not isinstance(reduction, str):
        raise TypeError(f"{_OP}: reduction must be a string, got {type(reduction).__name__}")
    _checks.check_choice(_OP, "reduction", reduction.lower(), ("none", "sum", "mean"))
    _check_rows(hidden, labels)
    shard = None
    if group is not None:
        size = weight.shape[0]
        start = dist.get_rank(group) * size
        shard = VocabShard(start, start + size, group, reduce_hidden_grad=False)
    if isinstance(temperature, Tensor):
        temperature = _flat_temperature(temperature, labels)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return linear_token_log_probs(
        flat, weight, labels.reshape(-1), temperature=temperature, outputs=wanted, vocab_shard=shard
    )


def _check_rows(hidden: Tensor, labels: Tensor) -> None:
    """The rows of both are in one order: equal leading shapes, or no more than one axis that is longer than 1."""
    leading = hidden.shape[:-1]
    if leading == labels.shape:
        return
    lines = [[size for size in shape if size != 1] for shape in (leading, labels.shape)]
    if hidden.ndim == 0 or lines[0] != lines[1] or len(lines[0]) > 1:
        raise ValueError(
            f"{_OP}: labels must have the leading shape of hidden {list(hidden.shape)}, got {list(labels.shape)}"
        )


def _flat_temperature(temperature: Tensor, labels: Tensor) -> Tensor:
    """0-d, or one for each row."""
    temperature = temperature.detach().clamp(min=_SMALLEST_TEMPERATURE)
    if temperature.numel() == 1:
        return temperature.reshape(())
    if temperature.numel() == labels.numel():
        return temperature.reshape(-1)
    samples = labels.shape[0] if labels.ndim else 1
    if temperature.shape[0] == temperature.numel() == samples:
        return temperature.reshape(-1, 1).expand(-1, math.prod(labels.shape[1:])).reshape(-1)
    raise ValueError(
        f"{_OP}: temperature must be a number, one for each sample [{samples}] or for each token "
        f"{list(labels.shape)}, got {list(temperature.shape)}"
    )


def _reduced(log_probs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    if reduction.lower() == "sum":
        return log_probs.sum()
    return log_probs.mean() if reduction.lower() == "mean" else log_probs.view(labels.shape)
