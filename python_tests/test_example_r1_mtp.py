"""Multi-token prediction in the training example: what learns from what, counts of drafts, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from examples.r1.policy.draft import DraftCounts
from examples.r1.policy.mtp import hidden_of_depths
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages.grpo import DiverseRL, ReasoningRL, RLStage, Samples
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.sft import ColdStart
from python_tests.r1_stages import DIGITS, beginner, gradients, one_thread, tiny_run

__all__ = ["one_thread"]


def _run(**changes: Any) -> Run:
    return tiny_run(**{"mtp": 2, **changes})


def test_the_cold_start_minimises_the_cross_entropy_of_all_depths() -> None:
    run = _run()
    stage = ColdStart(run.build_policy(), run)
    batch = stage.data.select(slice(0, 8))
    loss, record = stage._objective(batch)
    hiddens = hidden_of_depths(stage.model, batch.prompts, batch.completions)
    losses, shares = [], []
    for depth, hidden in enumerate(hiddens):
        mask = batch.mask[:, depth:]
        logits = stage.model.head(hidden[:, : mask.shape[1]])
        losses.append(F.cross_entropy(logits[mask], batch.completions[:, depth:][mask]))
        shares.append(mask.sum() / batch.mask.sum())  # every depth's sum is divided by all tokens, as DeepSeek-V3's
    assert 0.5 < float(shares[2]) < float(shares[1]) < 1.0
    expected = losses[0] + 0.15 * shares[1] * losses[1] + 0.15 * shares[2] * losses[2]
    torch.testing.assert_close((loss, gradients(loss, stage.model)), (expected, gradients(expected, stage.model)))
    assert record["loss"] == pytest.approx(losses[0].item())
    assert record["mtp_loss_2"] == pytest.approx(losses[2].item())
    assert stage.evaluate()["validation_loss"] == pytest.approx(stage.loss(stage.validation_data).item())


def _stages(name: str = "reasoning_rl", **changes: Any) -> tuple[RLStage, RLStage]:
    """With drafts, and a stage of the same policy without."""
    stages: list[RLStage] = []
    for mtp in (2, 0):
        run = _run(mtp=mtp, **changes)
        judge = RewardModel(run.build_judge())
        model = run.build_policy()
        stages.append(ReasoningRL(model, run) if name == "reasoning_rl" else DiverseRL(model, run, judge))
    drafting, plain = (stage.model.state_dict() for stage in stages)
    assert all(name.startswith("mtp.") for name in drafting.keys() - plain.keys())
    for name, value in plain.items():
        assert torch.equal(drafting[name], value), name
    return stages[0], stages[1]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_policy_steps_as_if_there_were_no_drafts(model: str) -> None:
    """Its gradient is that of the GRPO loss alone, and so is its norm; the layers that draft learn beside it."""
    stage, plain = _stages(model=model, max_grad_norm=0.01, updates_per_rollout=1)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    inputs = stage.loss_inputs(stage.sample(0), 0)
    inputs = inputs._replace(advantages=torch.randn(len(inputs.advantages)))
    again = None if inputs.routes is None else inputs.routes.again()
    record, expected = stage.update(inputs, 0), plain.update(inputs._replace(routes=again), 0)
    assert record.keys() - expected.keys() == {f"mtp_{name}_{k}" for name in ("loss", "accuracy") for k in (1, 2)}
    for name in expected:
        assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(stage.model.state_dict()[name], value, msg=name)
    assert stage.reference.mtp is None
    for name in stage.model.state_dict().keys() - plain.model.state_dict().keys():
        assert not torch.equal(stage.model.state_dict()[name], before[name]), name


@pytest.mark.parametrize("name", ["reasoning_rl", "diverse_rl"])
def test_the_first_update_of_a_rollout_is_on_policy(name: str) -> None:
    """With the log-probs that came with the samples, at the stage's temperature."""
    stage, _ = _stages(name, updates_per_rollout=1)
    samples = stage.sample(0)
    inputs = stage.loss_inputs(samples, 0)
    assert inputs.old_log_probs is samples.rollout.log_probs
    assert stage.update(inputs, 0)["ratio_max"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("replay", ["rollout", "old", "off"])
def test_the_moe_model_drafts_and_replays(replay: str) -> None:
    stage, _ = _stages(model="moe", replay=replay)
    assert all(not hasattr(module, "gate") for module in stage.model.mtp.modules())  # type: ignore[union-attr]
    stage.model.double()
    stage.reference.double()
    samples = stage.sample(0)
    assert (samples.rollout.routes is not None) == (replay == "rollout")
    record = stage.step(0)
    _assert_counts(samples, record)
    assert ("rollout_mismatch" in record) == (replay != "off")
    assert record.get("rollout_mismatch", 0.0) == 0.0  # drafts that were rejected leave no route


def _assert_counts(samples: Samples, record: Record) -> None:
    """A pass gives a token behind the drafts that stood, unless one of them was END; the record says the same."""
    count = len(samples.rollout.texts)
    tokens, passes, looked_at, accepted = samples.rollout.drafts  # type: ignore[misc]
    assert tokens == int(samples.rollout.sequences.mask.sum()) == record["tokens"]
    assert 0 <= passes + sum(accepted) - tokens <= count
    assert count < passes
    assert passes - count >= looked_at[0] >= accepted[0] >= looked_at[1] >= accepted[1]
    assert record["tokens_per_pass"] == tokens / passes
    assert record["acceptance_1"] == accepted[0] / looked_at[0]


def test_depths_that_were_never_looked_at_have_no_acceptance() -> None:
    """That is not the same as nothing accepted."""
    counts = DraftCounts(6, 4, [3, 0], [0, 0])
    assert counts.record() == {"tokens_per_pass": 1.5, "acceptance_1": 0.0}
    assert counts.plus(DraftCounts(2, 1, [1, 1], [1, 1])) == DraftCounts(8, 5, [4, 1], [1, 1])


def test_evaluations_say_what_drafts_are_worth() -> None:
    run = _run()
    record = ColdStart(run.build_policy(), run).evaluate()
    assert record["tokens_per_pass"] >= 1.0
    assert 0.0 <= record["acceptance_1"] <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_drafts_learns() -> None:
    """Fifty steps of digit sorting after a short cold start, seed 0: greedy .77 -> .88, sampled .23 -> .62.

    Of the drafts .76 were accepted before, .81 after.
    """
    run = Run.prepare(
        Settings(threads=1, mtp=1, evaluation_prompts=128, cold_start_steps=80, reasoning_rl_steps=80, prompts=16)
    )
    stage = ReasoningRL(beginner(run, (DIGITS,)), run)
    before = stage.evaluate()
    records = [stage.step(index) for index in range(50)]
    after = stage.evaluate()
    assert after[f"{DIGITS}/accuracy"] >= before[f"{DIGITS}/accuracy"] + 0.05
    assert after[f"{DIGITS}/sampled_accuracy"] >= before[f"{DIGITS}/sampled_accuracy"] + 0.2
    assert after["acceptance_1"] >= max(before["acceptance_1"], 0.75)  # it keeps up with the policy
    assert after["tokens_per_pass"] >= 1.65
    assert sum(record["mtp_loss_1"] for record in records[-10:]) < 0.8 * sum(r["mtp_loss_1"] for r in records[:10])
