"""Public functions over groups of responses: `group_advantages`, `informative_groups`, `best_of_group`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._collectives import all_gather, check_group
from grpo_kernels._dispatch import resolve
from grpo_kernels.group_advantages import ops, reference

_BASELINES = ("mean", "leave_one_out", "length_weighted", "second_best", "none")


class GroupAdvantagesOutput(NamedTuple):
    """Results of `group_advantages`, each [B], float32 (float64 for float64 rewards).

    Attributes:
        advantages: The group-relative advantage of every sample.
        mean: Mean total reward of the sample's group; 0 where nothing was scored.
        std: Standard deviation of the total reward in the sample's group; 0 for fewer than `correction` + 1 scored
            samples.
    """

    advantages: Tensor
    mean: Tensor
    std: Tensor


class BestOfGroupOutput(NamedTuple):
    """Results of `best_of_group`, each [B].

    Attributes:
        selected: bool. The sample is valid and among the k best of its group.
        rank: int32. 0 for the best valid sample of its group; -1 for a sample that is not valid.
    """

    selected: Tensor
    rank: Tensor


def _check_groups(
    op: str, values: Tensor, values_name: str, group_size: int | None, group_ids: Tensor | None, ranks: int = 1
) -> int:
    """Checks the grouping arguments, of a batch spread over `ranks`; returns the group size, 1 where ids tell."""
    if (group_size is None) == (group_ids is None):
        given = "both" if group_ids is not None else "neither"
        raise ValueError(f"{op}: exactly one of group_size and group_ids must be given, got {given}")
    if group_ids is not None:
        _checks.check_tensor(op, "group_ids", group_ids)
        _checks.check_dtype(op, "group_ids", group_ids, _checks.INTEGER)
        _checks.check_shape(op, "group_ids", group_ids, ("[B]", [values.shape[0]]))
        _checks.check_same_device(op, "group_ids", group_ids, values_name, values)
        return 1
    _checks.check_integer(op, "group_size", group_size, minimum=1)
    size = int(group_size or 1)
    batch = values.shape[0] * ranks
    if batch % size:
        raise ValueError(f"{op}: {values_name} must hold whole groups of group_size = {group_size}, got B = {batch}")
    return size


def _check_values(op: str, name: str, values: Tensor, *shapes: str) -> None:
    _checks.check_tensor(op, name, values)
    _checks.check_dtype(op, name, values)
    _checks.check_ndim(op, name, values, *shapes)


def _check_flags(op: str, name: str, flags: Tensor | None, values_name: str, values: Tensor) -> Tensor | None:
    """A mask as bool, or None."""
    if flags is None:
        return None
    _checks.check_tensor(op, name, flags)
    _checks.check_shape(op, name, flags, ("[B]", [values.shape[0]]))
    _checks.check_same_device(op, name, flags, values_name, values)
    return flags if flags.dtype == torch.bool else flags != 0


@_checks.remembered
def _check_normalization(
    baseline: str,
    normalize_by: str,
    aggregation: str,
    singleton: str,
    eps: float,
    batch_eps: float | None,
    correction: int,
) -> None:
    """Checks the options of `group_advantages`."""
    op = "group_advantages"
    _checks.check_choice(op, "baseline", baseline, _BASELINES)
    _checks.check_choice(op, "normalize_by", normalize_by, ("group", "batch", "batch_tokens", "none"))
    _checks.check_choice(op, "aggregation", aggregation, ("sum_then_normalize", "normalize_then_sum"))
    _checks.check_choice(op, "singleton", singleton, ("zero", "raw"))
    _checks.check_number(op, "eps", eps, minimum=0.0)
    _checks.check_integer(op, "correction", correction, minimum=0)
    if aggregation == "normalize_then_sum" and normalize_by not in ("group", "batch_tokens"):
        raise ValueError(
            f'{op}: aggregation="normalize_then_sum" needs normalize_by="group" or "batch_tokens", got {normalize_by!r}'
        )
    if batch_eps is None:
        return
    _checks.check_number(op, "batch_eps", batch_eps, minimum=0.0)
    if aggregation == "sum_then_normalize" and normalize_by in ("group", "none"):
        raise ValueError(
            f"{op}: batch_eps must be None where nothing is normalised over the batch, got {batch_eps} with "
            f"normalize_by={normalize_by!r}"
        )


def _check_lengths(lengths: Tensor | None, rewards: Tensor, baseline: str, normalize_by: str) -> Tensor | None:
    """Checks the lengths of `group_advantages`; returns None where no option needs them."""
    op = "group_advantages"
    needed = baseline == "length_weighted" or normalize_by == "batch_tokens"
    if lengths is None:
        if needed:
            option = 'baseline="length_weighted"' if baseline == "length_weighted" else 'normalize_by="batch_tokens"'
            raise ValueError(f"{op}: lengths must be given with {option}, got None")
        return None
    _checks.check_tensor(op, "lengths", lengths)
    _checks.check_dtype(op, "lengths", lengths, (*_checks.INTEGER, *_checks.FLOATING))
    _checks.check_shape(op, "lengths", lengths, ("[B]", [rewards.shape[0]]))
    _checks.check_same_device(op, "lengths", lengths, "rewards", rewards)
    return lengths.detach() if needed else None


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    reward_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    baseline: str = "mean",
    normalize_by: str = "group",
    aggregation: str = "sum_then_normalize",
    singleton: str = "zero",
    eps: float = 1e-4,
    batch_eps: float | None = None,
    correction: int = 1,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> GroupAdvantagesOutput:
    """Group-relative advantages: every reward compared with those of the responses to the same prompt.

    A_i = (r_i - mean_g) / (std_g + eps), with r_i = sum_k w_k r_ik over the reward functions that scored the sample.

    Args:
        rewards: [B] or [B, R] float. Rewards of R reward functions. NaN means not scored: it is left out of every
            statistic, and a sample that no function scored gets advantage 0.
        group_size: Every `group_size` neighbours are one group. B must be a multiple (over all ranks, with
            `process_group`).
        group_ids: [B] int. Instead: samples with equal ids are one group, in any order and number.
        reward_weights: [R] float. Weights w_k; 1 each by default.
        lengths: [B] int or float. Live tokens of each response, for "length_weighted" and "batch_tokens"; the other
            options leave it alone.
        baseline: What is subtracted: "mean"; "leave_one_out", the mean of the others; "length_weighted" (OPO),
            sum len r / sum len; "none". "second_best" (pass@k): the group's best sample gets r_max - r_second, the
            others 0; of tied best ones, all 0.
        normalize_by: "group" or "batch" (standard deviation of the total reward over the group or all samples), "none"
            (Dr. GRPO), or "batch_tokens" (REINFORCE++): (x - mean) / sqrt(var + eps), with mean and variance of the
            baselined rewards x over all live tokens of the batch.
        aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO): every function's rewards are normalised in
            their group, the weighted sum is normalised over the batch: over its samples with normalize_by="group",
            over its tokens with "batch_tokens".
        singleton: What a group with one scored sample gets: "zero", or "raw" (verl: mean 0, deviation 1, so
            A = r / (1 + eps)).
        eps: Added to the standard deviation, outside the root; to the variance of "batch_tokens". TRL uses 1e-4, verl
            1e-6.
        batch_eps: `eps` of the normalisation over the batch, where there is one; eps by default. verl uses 1e-8.
        correction: Subtracted from the count in the variance, of tokens with "batch_tokens": 1 is the unbiased estimate
            (TRL, verl), 0 the population's.
        process_group: Groups may straddle its ranks. Samples are taken in the order of the ranks; every rank passes the
            same B.

    Returns:
        `GroupAdvantagesOutput(advantages, mean, std)`, each [B], of this rank's samples. No gradient flows to the
        rewards.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device, range or option.

    Numerics:
        float64 inside, two passes about the group's first reward, in a fixed order: equal rewards give exactly 0,
        whatever eps. An infinite reward makes its group NaN and no other (the batch, where its deviation divides). A
        length of 0 counts nothing, whatever the reward; a group without tokens has no length-weighted mean and gets 0.
        A negative or infinite length, or NaN, makes what it is part of NaN. Deterministic; no host synchronisation; one
        launch on CUDA for equal groups.

    Source:
        DeepSeekMath (arXiv 2402.03300) section 4.1; leave-one-out: RLOO (2402.14740); Dr. GRPO (2503.20783); OPO
        (2505.23585); pass@k (2503.19595); REINFORCE++ (2501.03262); GDPO (2601.05242).
    """
    op = "group_advantages"
    _check_values(op, "rewards", rewards, "[B]", "[B, R]")
    _check_normalization(baseline, normalize_by, aggregation, singleton, eps, batch_eps, correction)
    if rewards.ndim == 2 and rewards.shape[1] == 0:
        raise ValueError(f"{op}: rewards must have at least one reward function, got {list(rewards.shape)}")
    if reward_weights is not None:
        functions = rewards.shape[1] if rewards.ndim == 2 else 1
        _checks.check_tensor(op, "reward_weights", reward_weights)
        _checks.check_dtype(op, "reward_weights", reward_weights)
        _checks.check_shape(op, "reward_weights", reward_weights, ("[R]", [functions]))
        _checks.check_same_device(op, "reward_weights", reward_weights, "rewards", rewards)
        reward_weights = reward_weights.detach()
    lengths = _check_lengths(lengths, rewards, baseline, normalize_by)

    rewards = rewards.detach() if rewards.requires_grad else rewards
    batch = rewards.shape[0]
    if process_group is not None:
        check_group(op, "process_group", process_group)
    ranks = 1 if process_group is None else torch.distributed.get_world_size(process_group)
    size = _check_groups(op, rewards, "rewards", group_size, group_ids, ranks)
    if process_group is not None:
        rewards = all_gather(rewards, process_group)
        group_ids = None if group_ids is None else all_gather(group_ids, process_group)
        lengths = None if lengths is None else all_gather(lengths, process_group)
    batch_eps = eps if batch_eps is None else batch_eps
    options = (size, baseline, normalize_by, aggregation, singleton, float(eps), float(batch_eps), correction)
    arguments = (rewards, group_ids, reward_weights, lengths, *options)
    backend = resolve(op, rewards)
    if backend == "reference":
        results = reference.group_advantages(*arguments)
    else:
        results = ops.group_advantages(*arguments, backend)
    if process_group is not None:
        first = torch.distributed.get_rank(process_group) * batch
        own = slice(first, first + batch)
        return GroupAdvantagesOutput(*(result[own] for result in results))
    return GroupAdvantagesOutput(*results)


def informative_groups(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    tolerance: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Samples whose group can teach something: its live rewards differ (DAPO's dynamic sampling).

    Args:
        rewards: [B] float. NaN means not scored.
        group_size: Every `group_size` neighbours are one group.
        group_ids: [B] int. Instead: samples with equal ids are one group.
        tolerance: A group with max - min <= tolerance is not informative; nor is a group of one.
        mask: [B] bool, or numbers of which non-zero counts. Samples that count; all by default.

    Returns:
        [B] bool, equal for all members of a group, masked ones included.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Numerics:
        Rewards are compared in float64. No gradient, no host synchronisation.

    Source:
        DAPO (arXiv 2503.14476) section 3.2.
    """
    op = "informative_groups"
    _check_values(op, "rewards", rewards, "[B]")
    _checks.check_number(op, "tolerance", tolerance, minimum=0.0)
    flags = _check_flags(op, "mask", mask, "rewards", rewards)
    size = _check_groups(op, rewards, "rewards", group_size, group_ids)
    arguments = (rewards.detach(), group_ids, flags, size, float(tolerance))
    backend = resolve(op, rewards)
    if backend == "reference":
        return reference.informative_groups(*arguments)
    result: Tensor = ops.informative_groups(*arguments, backend)
    return result


def best_of_group(
    scores: Tensor,
    k: int,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> BestOfGroupOutput:
    """The k best valid samples of every group (rejection sampling).

    Args:
        scores: [B] float. Higher is better; a NaN score is not valid.
        k: How many to select; fewer where a group has fewer valid samples.
        group_size: Every `group_size` neighbours are one group.
        group_ids: [B] int. Instead: samples with equal ids are one group.
        valid: [B] bool, or numbers of which non-zero counts. Samples that may be selected; all by default.

    Returns:
        `BestOfGroupOutput(selected, rank)`, each [B]. Equal scores are ranked by their position, the earlier first.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Numerics:
        Scores are compared in float64; +inf and -inf are ordinary scores. No gradient, no host synchronisation.

    Source:
        DeepSeek-R1 (arXiv 2501.12948) section 2.3.3.
    """
    op = "best_of_group"
    _check_values(op, "scores", scores, "[B]")
    _checks.check_integer(op, "k", k, minimum=1)
    flags = _check_flags(op, "valid", valid, "scores", scores)
    size = _check_groups(op, scores, "scores", group_size, group_ids)
    arguments = (scores.detach(), group_ids, flags, size)
    backend = resolve(op, scores)
    rank = reference.group_rank(*arguments) if backend == "reference" else ops.group_rank(*arguments, backend)
    return BestOfGroupOutput((rank >= 0) & (rank < k), rank)
