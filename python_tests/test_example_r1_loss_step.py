"""What the training example measures of its last policy: the loss step, checked for every preset, and drafts' speed."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.choices import PRESETS
from examples.r1.measuring import draft_speed, loss_step
from examples.r1.policy import draft, rollout
from examples.r1.stages.grpo import DiverseRL, LossInputs, ReasoningRL, RLStage
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from python_tests.r1_stages import DIGITS, WORDS, one_thread, tiny_run

__all__ = ["one_thread"]


def _case(**options: Any) -> tuple[RLStage, Tensor, LossInputs]:
    """Samples of a fresh policy with advantages that are drawn, under the policy as it is after a large step."""
    run = tiny_run(**options)
    stage = ReasoningRL(run.build_policy(), run)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    inputs = inputs._replace(advantages=torch.randn_like(inputs.advantages))
    with torch.no_grad():
        stage.model.head.weight += 0.1 * torch.randn_like(stage.model.head.weight)
        hidden = stage.model.completion_hidden(inputs.sequences.prompts, inputs.sequences.completions)
    return stage, hidden, inputs


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_eager_step_is_the_definition(clip: float | None) -> None:
    stage, hidden, inputs = _case(clip=clip)
    arguments = loss_step.in_float64(stage.model.head, hidden, inputs)
    found, expected = (step(stage, *arguments) for step in (loss_step.eager_step, loss_step.reference_step))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-10, atol=1e-14)
    metrics = stage.loss(stage.model.head, hidden, inputs).metrics.to_dict()
    assert min(metrics["clip_low_fraction"], metrics["clip_high_fraction"]) > 0.01


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_step_of_every_preset_is_its_definition(preset: str) -> None:
    stage, hidden, inputs = _case(preset=preset)
    loss_step.assert_same(stage, stage.model.head, hidden, inputs)
    head, leaf = stage.model.head, hidden.clone().requires_grad_()
    expected = loss_step.reference_step(stage, *loss_step.in_float64(head, hidden, inputs))
    plain = loss_step.reference_step(stage, head, leaf, inputs)
    for name in ("grad_hidden", "grad_weight"):
        assert float(getattr(expected, name).abs().max()) > 0.0
        faulty = plain._replace(**{name: getattr(plain, name) * (1 + 1e-5)})
        with pytest.raises(AssertionError, match=f"{name}: the error"):
            loss_step.assert_close(faulty, expected, plain)


@pytest.mark.parametrize("options", [{}, {"model": "moe", "mtp": 1}], ids=["dense", "moe, drafts"])
def test_the_comparison_measures_this_package_and_eager(options: dict[str, Any]) -> None:
    """No sample of a fresh policy earns anything: the comparison has to draw advantages."""
    run = tiny_run(**options)
    stage = ReasoningRL(run.build_policy(), run)
    assert not bool(stage.loss_inputs(stage.sample(0), 0).advantages.any())
    found = loss_step.compare(stage, 0, repeats=2)
    rows = run.settings.prompts * run.settings.group_size
    vocabulary = stage.model.head.out_features
    assert found[:4] == (rows, run.completion_length, run.settings.width, vocabulary)
    assert found.eager_seconds is not None
    assert found.eager_peak_bytes is not None
    assert min(found.seconds, found.eager_seconds) > 0.0
    assert found.eager_peak_bytes > 2 * (4 * rows * run.completion_length * vocabulary)
    assert 0 < found.peak_bytes < found.eager_peak_bytes
    assert found.note == ""


def test_the_comparison_with_a_real_vocabulary_takes_other_tokens_and_another_head() -> None:
    run = tiny_run()
    stage = ReasoningRL(run.build_policy(), run)
    found = loss_step.compare_at(stage, 0, 5000, samples=8, repeats=1)
    assert found[:4] == (8, run.completion_length, run.settings.width, 5000)
    assert found.eager_seconds is not None
    assert found.eager_peak_bytes is not None
    logits_bytes = 4 * 8 * run.completion_length * 5000
    assert found.eager_peak_bytes > 2 * logits_bytes > 2 * found.peak_bytes > 0
    assert min(found.seconds, found.eager_seconds) > 0.0


def test_without_an_eager_step_the_package_is_measured_alone() -> None:
    run = tiny_run(preset="gspo")
    stage = ReasoningRL(run.build_policy(), run)
    found = loss_step.compare(stage, 0, repeats=1)
    assert (found.eager_seconds, found.eager_peak_bytes) == (None, None)
    assert found.note == "no eager step for the preset 'gspo'"
    assert min(found.seconds, found.peak_bytes) > 0


def test_the_comparison_is_off_policy_where_no_loss_has_a_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    """On policy KL-Cov's penalty takes the sign of a rounding error: its gradient is a matter of chance."""
    run = tiny_run(preset="kl_cov")
    stage = ReasoningRL(run.build_policy(), run)
    seen: list[LossInputs] = []
    monkeypatch.setattr(loss_step, "assert_same", lambda _stage, _head, _hidden, inputs: seen.append(inputs))
    loss_step.compare(stage, 0, repeats=1)
    sequences, old = seen[0].sequences, seen[0].old_log_probs
    moved = (old - sequence_log_probs(stage.model, sequences, stage.temperature)).abs()
    assert 0.02 < float(moved[sequences.mask].median()) < 0.2
    assert not bool(old[~sequences.mask].any())


def test_a_wrong_loss_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    stage = ReasoningRL(run.build_policy(), run)
    right = loss_step.fused_step
    monkeypatch.setattr(loss_step, "reference_step", lambda *arguments: right(*arguments))
    monkeypatch.setattr(loss_step, "fused_step", lambda *arguments: right(*arguments)._replace(loss=torch.tensor(7.0)))
    with pytest.raises(AssertionError, match="not close"):
        loss_step.compare(stage, 0, repeats=1)


def test_the_speed_of_drafts_is_that_of_a_steps_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(mtp=1, diverse_temperature=0.6)
    stage = DiverseRL(run.build_policy(), run, RewardModel(run.build_judge()))
    seen: list[tuple[str, Tensor, float, Tensor]] = []

    def recording(name: str, generate: Any) -> Any:
        def run_it(model: Any, prompts: Tensor, length: int, *, temperature: float, **options: Any) -> Any:
            found = generate(model, prompts, length, temperature=temperature, **options)
            completions = found.completions if name == "drafts" else found
            seen.append((name, prompts, temperature, completions.clone()))
            return found

        return run_it

    seconds = count(start=0, step=2)
    monkeypatch.setattr(draft, "generate", recording("drafts", draft.generate))
    monkeypatch.setattr(rollout, "generate", recording("plain", rollout.generate))
    monkeypatch.setattr(draft_speed, "perf_counter", lambda: next(seconds))
    speed = draft_speed.compare(stage, 3, repeats=1)
    assert [name for name, *_ in seen] == ["drafts", "plain"]
    prompts = run.encode_prompts(stage.problems(3, 0))
    assert {problem.task for problem in stage.problems(3, 0)} == {DIGITS, WORDS}
    for (_, given, temperature, completions), rate in zip(seen, speed, strict=True):
        assert torch.equal(given, prompts)
        assert temperature == 0.6
        assert completions.shape == (run.settings.prompts * run.settings.group_size, run.completion_length)
        ends = completions == 1
        tokens = int(((ends.cumsum(dim=1) - ends.long()) == 0).sum())
        assert rate == tokens / 2
