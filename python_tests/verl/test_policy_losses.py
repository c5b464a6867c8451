"""Policy losses for verl's actor: equal to what verl 0.9.1 gave, value, gradient and metrics."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss
from grpo_kernels.grpo_loss import presets
from python_tests.verl import problems
from python_tests.verl.conftest import RECORDED

# Metrics are float32 sums and shares of them.
METRIC_ERROR = 4 * torch.finfo(torch.float32).eps
ALONE = problems.LossCase("vanilla", "token-mean")


def call(adapter: ModuleType, name: str, config: dict[str, Any], inputs: problems.LossInputs, weighted: bool) -> Any:
    old, log_prob, advantages, mask, weights = inputs
    return adapter.POLICY_LOSSES[name](
        old_log_prob=old,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=config["loss_agg_mode"],
        config=config,
        rollout_is_weights=weights if weighted else None,
    )


def run(adapter: ModuleType, case: problems.LossCase, inputs: problems.LossInputs | None = None) -> Any:
    """Loss, gradient, metrics."""
    inputs = problems.loss_inputs() if inputs is None else inputs
    inputs = inputs._replace(log_prob=inputs.log_prob.clone().requires_grad_())
    loss, metrics = call(adapter, case.mode, problems.actor_options(case), inputs, case.weighted)
    (gradient,) = torch.autograd.grad(loss, inputs.log_prob)
    return loss.detach(), gradient, metrics


def assert_within(actual: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max().item()
    assert (actual - wanted).abs().max().item() <= problems.VERL_RELATIVE_ERROR * scale


@pytest.mark.parametrize("case", problems.LOSS_CASES, ids=lambda case: case.name)
def test_equal_to_verl(adapter: ModuleType, case: problems.LossCase) -> None:
    wanted = RECORDED["losses"][case.name]
    loss, gradient, metrics = run(adapter, case)
    assert loss.dtype == torch.float64
    wanted_gradient = torch.tensor(wanted["gradient"], dtype=torch.float64)
    assert wanted_gradient.abs().max() > 0
    # The terms of a loss have both signs; their sizes are those of the gradient.
    size = max(abs(wanted["loss"]), wanted_gradient.abs().sum().item())
    assert abs(loss.item() - wanted["loss"]) <= problems.VERL_RELATIVE_ERROR * size
    assert_within(gradient, wanted_gradient)
    assert metrics.keys() == wanted["metrics"].keys()
    for name, value in wanted["metrics"].items():
        assert isinstance(metrics[name], float)
        assert metrics[name] == pytest.approx(value, rel=METRIC_ERROR, abs=METRIC_ERROR)


@pytest.mark.parametrize("mode", problems.MODES)
def test_what_is_masked_does_not_matter(adapter: ModuleType, mode: str) -> None:
    case = problems.LossCase(mode, "seq-mean-token-mean", weighted=True)
    inputs = problems.loss_inputs()
    masked = ~inputs.response_mask
    poisoned = inputs._replace(
        **{
            name: getattr(inputs, name).masked_fill(masked, value)
            for name, value in (
                ("old_log_prob", float("-inf")),
                ("log_prob", float("nan")),
                ("advantages", float("nan")),
                ("rollout_is_weights", float("inf")),
            )
        }
    )
    loss, gradient, metrics = run(adapter, case, inputs)
    other_loss, other_gradient, other_metrics = run(adapter, case, poisoned)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient, other_gradient)
    assert metrics == other_metrics
    assert not gradient[masked].any()


def test_every_preset_is_there(adapter: ModuleType) -> None:
    assert set(presets._PRESETS) <= set(adapter.POLICY_LOSSES)
    from verl.trainer.ppo import core_algos

    registered = {f"grpo_kernels:{name}": loss for name, loss in adapter.POLICY_LOSSES.items()}
    assert registered == core_algos.POLICY_LOSS_REGISTRY


PRESET_FIELDS = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "luspo": {"ratio_level": "sequence"},
    "gspo_token": {"ratio_level": "sequence_token"},
    "vespo": {"surrogate": "vespo"},
    "reinforce": {"surrogate": "reinforce"},
    "gmpo": {"surrogate": "gmpo"},
}


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", PRESET_FIELDS)
def test_a_preset_takes_clip_range_and_reduction_from_the_actor(
    adapter: ModuleType, name: str, aggregation: str
) -> None:
    case = problems.LossCase(name, aggregation, weighted=name != "gmpo", global_batch={"loss_scale_factor": 9})
    loss, gradient, _ = run(adapter, case)
    fields: dict[str, Any] = dict(PRESET_FIELDS[name])
    if name not in ("vespo", "reinforce"):
        fields.update(clip_low=0.25, clip_high=0.3)
    fields.update(reduction="token_mean")
    if aggregation != "token-mean":
        fields.update(reduction="sequence_mean_token_sum_norm", max_length=9, skip_empty_sequences=True)
    old, log_prob, advantages, mask, weights = problems.loss_inputs()
    log_prob.requires_grad_()
    options = {"token_weights": weights if case.weighted else None}
    wanted = grpo_loss(log_prob, old, advantages, mask, GRPOLossConfig(**fields), **options).loss
    assert torch.equal(loss, wanted.detach())
    assert torch.equal(gradient, torch.autograd.grad(wanted, log_prob)[0])


def test_micro_batches_of_ranks_add_up_to_the_batch(adapter: ModuleType) -> None:
    """Every loss that takes global counts: the mean over ranks of the sums over micro-batches is the whole batch's."""
    whole = problems.loss_inputs()
    counts = {"batch_num_tokens": int(whole.response_mask.sum()), "global_batch_size": problems.BATCH - 1}
    for mode in ("vanilla", "gmpo", "gspo", "sapo"):
        for aggregation in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            total, gradient, _ = run(adapter, problems.LossCase(mode, aggregation, True), whole)
            parts = []
            for rank in range(2):
                for rows in (slice(3 * rank, 3 * rank + 1), slice(3 * rank + 1, 3 * rank + 3)):
                    part = problems.LossInputs(*(tensor[rows] for tensor in whole))
                    case = problems.LossCase(mode, aggregation, True, {"dp_size": 2, **counts})
                    parts.append(run(adapter, case, part))
            loss = torch.stack([part[0] for part in parts]).sum() / 2
            torch.testing.assert_close(loss, total, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, gradient, rtol=1e-13, atol=1e-15)


def test_verl_adds_to_the_loss_in_place(adapter: ModuleType) -> None:
    inputs = problems.loss_inputs()
    log_prob = inputs.log_prob.requires_grad_()
    loss, _ = call(adapter, "vanilla", problems.actor_options(ALONE), inputs, False)
    (plain,) = torch.autograd.grad(loss, log_prob, retain_graph=True)
    loss -= 0.5 * log_prob.square().sum()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert torch.equal(gradient, plain - log_prob.detach())


def test_metrics_take_one_transfer(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu"):
        own = getattr(torch.Tensor, name)

        def counted(self: Tensor, *args: Any, _own: Any = own, _name: str = name) -> Any:
            reads.append(_name)
            return _own(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    inputs = problems.loss_inputs()
    for mode in problems.MODES:
        reads.clear()
        call(adapter, mode, problems.actor_options(problems.LossCase(mode, "token-mean")), inputs, True)
        assert reads == ([] if mode == "gpg" else ["tolist"])


@pytest.mark.parametrize("empty", [(0, 4), (3, 0), "masked"])
def test_nothing_to_learn_from(adapter: ModuleType, empty: Any) -> None:
    inputs = problems.loss_inputs()
    if empty == "masked":
        inputs = inputs._replace(response_mask=torch.zeros_like(inputs.response_mask))
    else:
        inputs = problems.LossInputs(*(torch.zeros(empty, dtype=tensor.dtype) for tensor in inputs))
    for mode in problems.MODES:
        loss, gradient, metrics = run(adapter, problems.LossCase(mode, "seq-mean-token-mean"), inputs)
        assert loss == 0
        assert not gradient.any()
        assert not any(metrics.values())


def test_errors(adapter: ModuleType) -> None:
    inputs = problems.loss_inputs()
    with pytest.raises(ValueError, match="config must be verl's ActorConfig, got None"):
        adapter.POLICY_LOSSES["vanilla"](*inputs[:4])
    options = problems.actor_options(ALONE._replace(global_batch={"dp_size": 2}))
    with pytest.raises(ValueError, match="must have batch_num_tokens with dp_size = 2"):
        call(adapter, "vanilla", options, inputs, False)
    options["loss_agg_mode"] = "seq-mean-token-sum"
    with pytest.raises(ValueError, match="must have global_batch_size with dp_size = 2"):
        call(adapter, "vanilla", options, inputs, False)
    options["loss_agg_mode"] = "median"
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        call(adapter, "vanilla", options, inputs, False)
    options = problems.actor_options(ALONE)
    options["policy_loss"]["dro_beta"] = None
    with pytest.raises(ValueError, match="dro_beta"):
        call(adapter, "dro", options, inputs, False)
    policy_losses = __import__("grpo_kernels.integrations.verl.policy_losses", fromlist=["_"])
    with pytest.raises(ValueError, match=r"name must be one of 'vanilla', .*, got 'bypass_mode'"):
        policy_losses.make_policy_loss("bypass_mode")
