"""Advantage estimators for verl: equal to what verl 0.9.1 gave."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.verl import problems
from python_tests.verl.conftest import RECORDED

# verl computes in float64 here, but for the rewards of "gdpo" and all that follows from them, the deviation of a group
# of one, and the scale of "gpg".
_FLOAT32 = torch.finfo(torch.float32).eps
ERRORS = {"gdpo": 16 * _FLOAT32, "grpo": _FLOAT32, "gpg": _FLOAT32}


class Algorithm(dict[str, Any]):
    """As much of verl's AlgoConfig as an estimator reads."""


def gdpo_batch() -> dict[str, Any]:
    return {"non_tensor_batch": problems.reward_components(), "batch": {}}


def estimate(adapter: ModuleType, name: str, options: dict[str, Any], **arguments: Any) -> Tensor:
    given: dict[str, Any] = {
        "token_level_rewards": problems.token_level_rewards(),
        "response_mask": problems.response_mask(),
        "index": problems.uids(name),
        "config": Algorithm(options),
    }
    advantages, returns = adapter.ESTIMATORS[name](**{**given, **arguments})
    assert torch.equal(advantages, returns)
    return advantages


@pytest.mark.parametrize("case", problems.ESTIMATOR_CASES)
def test_equal_to_verl(adapter: ModuleType, case: str) -> None:
    name, options = problems.ESTIMATOR_CASES[case]
    extra = gdpo_batch() if name == "gdpo" else {}
    advantages = estimate(adapter, name, options, **extra)
    wanted = torch.tensor(RECORDED["advantages"][case], dtype=torch.float64)
    assert wanted.abs().max() > 0
    error = ERRORS.get(name, problems.VERL_RELATIVE_ERROR) * wanted.abs().max()
    assert (advantages - wanted).abs().max() <= error
    assert not advantages[~problems.response_mask()].any()


def test_ids_of_any_kind_and_masks_of_any_dtype(adapter: ModuleType) -> None:
    for name in adapter.ESTIMATORS:
        strings = problems.uids(name)
        numbers = torch.tensor([{"a": 7, "b": -3, "c": 0}[uid] for uid in strings])
        wanted = estimate(adapter, name, {})
        assert torch.equal(estimate(adapter, name, {}, index=numbers), wanted)
        assert torch.equal(estimate(adapter, name, {}, index=numbers.numpy()), wanted)
        assert torch.equal(estimate(adapter, name, {}, response_mask=problems.response_mask().long()), wanted)


def test_dr_grpo_is_grpo_without_deviation(adapter: ModuleType) -> None:
    wanted = estimate(adapter, "grpo", {"norm_adv_by_std_in_grpo": False})
    for normalize in (True, False):
        assert torch.equal(estimate(adapter, "dr_grpo", {"norm_adv_by_std_in_grpo": normalize}), wanted)
    explicit = estimate(adapter, "grpo", {"norm_adv_by_std_in_grpo": True}, norm_adv_by_std_in_grpo=False)
    assert torch.equal(explicit, wanted)


def test_rewards_are_left_alone_and_get_no_gradient(adapter: ModuleType) -> None:
    rewards = problems.token_level_rewards().requires_grad_()
    for name in adapter.ESTIMATORS:
        assert not estimate(adapter, name, {}, token_level_rewards=rewards).requires_grad
    assert torch.equal(rewards, problems.token_level_rewards())


def test_an_empty_batch(adapter: ModuleType) -> None:
    empty = torch.zeros(0, 4)
    for name in adapter.ESTIMATORS:
        assert estimate(adapter, name, {}, token_level_rewards=empty, response_mask=empty, index=()).shape == (0, 4)


def test_what_is_registered(adapter: ModuleType) -> None:
    from verl.trainer.ppo import core_algos

    registered = dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    assert registered.pop("gdpo") is not adapter.ESTIMATORS["gdpo"]  # until patch()
    assert registered == {f"grpo_kernels:{name}": estimator for name, estimator in adapter.ESTIMATORS.items()}
    adapter.register()
    assert core_algos.ADV_ESTIMATOR_REGISTRY["grpo_kernels:rloo"] is adapter.ESTIMATORS["rloo"]


def test_errors(adapter: ModuleType) -> None:
    with pytest.raises(ValueError, match="index must give every group two samples or more"):
        estimate(adapter, "grpo_passk", {}, index=problems.UIDS)
    keys = {"gdpo_reward_keys": ["right", "polite"]}
    with pytest.raises(ValueError, match=r"call grpo_kernels\.integrations\.verl\.patch\(\) and set"):
        estimate(adapter, "gdpo", keys)
    with pytest.raises(ValueError, match=r"must name components of the reward, got no \['polite'\]"):
        estimate(adapter, "gdpo", keys, **gdpo_batch())
    with pytest.raises(ValueError, match=r"must name components of the reward, got gdpo_reward_keys=\[\]"):
        estimate(adapter, "gdpo", {}, **gdpo_batch())
    with pytest.raises(NotImplementedError, match="norm_adv_by_std_in_grpo must be true"):
        estimate(adapter, "gdpo", {}, norm_adv_by_std_in_grpo=False)
