"""Advantage estimators under verl's signature, computed by `group_advantages`: ``grpo_kernels:<name>``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.group_advantages import group_advantages

_EPSILON = 1e-6
_WHITEN_EPSILON = 1e-8  # verl's masked_whiten
_NORMALIZE = "norm_adv_by_std_in_grpo"

Estimator = Callable[..., tuple[Tensor, Tensor]]


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Hashable] | Tensor,
    epsilon: float = _EPSILON,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "grpo" (`norm_adv_by_std_in_grpo`: of the config, where verl's trainer passes no more)."""
    normalize = norm_adv_by_std_in_grpo
    if normalize is None:
        normalize = _option(config, _NORMALIZE, True)
    options = {"normalize_by": "group" if normalize else "none", "eps": epsilon}
    return _estimate(token_level_rewards, response_mask, index, **options)


def dr_grpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's "grpo" without the division by the group's deviation, whatever the config says (Dr. GRPO)."""
    return _estimate(token_level_rewards, response_mask, index, normalize_by="none")


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Hashable] | Tensor,
    epsilon: float = _EPSILON,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "grpo_passk" (arXiv 2503.19595).

    Raises:
        ValueError: a group has one sample.
    """
    sizes = Counter(group_numbers(index))
    if sizes and min(sizes.values()) < 2:
        raise ValueError("grpo_kernels:grpo_passk: index must give every group two samples or more, got a group of one")
    normalize_by = "group" if _option(config, _NORMALIZE, True) else "none"
    options = {"baseline": "second_best", "normalize_by": normalize_by, "eps": epsilon}
    return _estimate(token_level_rewards, response_mask, index, **options)


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's "rloo" (arXiv 2402.14740): a group of one keeps its reward."""
    return _estimate(token_level_rewards, response_mask, index, baseline="leave_one_out", normalize_by="none")


def rloo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's "rloo_vectorized": as "rloo", but a group of one gets 0."""
    options = {"baseline": "leave_one_out", "normalize_by": "none", "singleton": "zero"}
    return _estimate(token_level_rewards, response_mask, index, **options)


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's "opo" (arXiv 2505.23585)."""
    return _estimate(token_level_rewards, response_mask, index, baseline="length_weighted", normalize_by="none")


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """verl's "reinforce_plus_plus_baseline" (arXiv 2501.03262)."""
    options = {"normalize_by": "batch_tokens", "eps": _WHITEN_EPSILON}
    return _estimate(token_level_rewards, response_mask, index, **options)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Hashable] | Tensor,
    f_norm: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "gpg" (arXiv 2504.02546): B / (number of rewards that are not 0) times the centred reward."""
    scores = token_level_rewards.detach().sum(dim=-1)
    scale = scores.shape[0] / (torch.count_nonzero(scores).clamp(min=1).to(torch.float64) * f_norm)
    advantages, _ = _estimate(token_level_rewards, response_mask, index, normalize_by="none")
    advantages = advantages * scale
    return advantages, advantages


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Hashable] | Tensor,
    epsilon: float = _EPSILON,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    batch: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's "gdpo" (arXiv 2601.05242): every component of the reward by itself in its group, the sum whitened.

    Raises:
        ValueError: ``gdpo_reward_keys`` names components that did not come. verl 0.9 passes them only to the estimator
            of the name "gdpo", which is this one after `patch`.
        NotImplementedError: without ``norm_adv_by_std_in_grpo``.
    """
    if norm_adv_by_std_in_grpo is False:
        raise NotImplementedError("grpo_kernels:gdpo: norm_adv_by_std_in_grpo must be true, got False")
    keys = list(_option(config, "gdpo_reward_keys", None) or ())
    weights = _option(config, "gdpo_reward_weights", None)
    rewards = token_level_rewards.detach().sum(dim=-1)
    if non_tensor_batch is not None and batch is not None and config is not None:
        missing = [key for key in keys if key not in non_tensor_batch]
        if missing or not keys:
            wrong = f"no {missing}" if missing else f"gdpo_reward_keys={keys}"
            raise ValueError(
                f"grpo_kernels:gdpo: algorithm.gdpo_reward_keys must name components of the reward, got {wrong}"
            )
        columns = [torch.as_tensor(list(non_tensor_batch[key]), dtype=torch.float32) for key in keys]
        rewards = torch.stack(columns, dim=1).to(rewards.device)
    elif keys:
        raise ValueError(
            "grpo_kernels:gdpo: verl passes the components of the reward to the estimator 'gdpo' alone: "
            "call grpo_kernels.integrations.verl.patch() and set algorithm.adv_estimator=gdpo"
        )
    options: dict[str, Any] = {"aggregation": "normalize_then_sum", "normalize_by": "batch_tokens"}
    if weights is not None and rewards.ndim == 2:
        options["reward_weights"] = torch.tensor(list(weights), dtype=rewards.dtype, device=rewards.device)
    return _spread(rewards, response_mask, index, eps=epsilon, batch_eps=_WHITEN_EPSILON, **options)


ESTIMATORS: dict[str, Estimator] = {
    function.__name__: function
    for function in (grpo, dr_grpo, grpo_passk, rloo, rloo_vectorized, opo, reinforce_plus_plus_baseline, gpg, gdpo)
}
"""What is registered, each as ``grpo_kernels:<name>``."""


def group_numbers(index: Iterable[Hashable] | Tensor) -> list[int]:
    """Group ids of any kind (verl's are strings) as 0, 1, ... in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    ids = index.reshape(-1).tolist() if isinstance(index, Tensor) else index
    return [numbers.setdefault(name, len(numbers)) for name in ids]


def _option(config: Any, name: str, default: Any) -> Any:
    return default if config is None else config.get(name, default)


def _estimate(
    token_level_rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    return _spread(token_level_rewards.detach().sum(dim=-1), response_mask, index, **options)


def _spread(
    rewards: Tensor, response_mask: Tensor, index: Iterable[Hashable] | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Each sample's advantage on its live tokens; verl wants it twice, as advantages and as returns."""
    ids = torch.tensor(group_numbers(index), dtype=torch.int64, device=rewards.device)
    lengths = response_mask.sum(dim=-1)
    output = group_advantages(rewards, group_ids=ids, lengths=lengths, **{"singleton": "raw", **options})
    advantages = output.advantages.unsqueeze(-1) * response_mask
    return advantages, advantages
