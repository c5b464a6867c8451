"""The training example's stages: what they start from, schedules, presets of the loss, records and evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from examples.r1 import choices
from examples.r1.pipeline import STAGES
from examples.r1.policy.model import CharTransformer
from examples.r1.policy.rollout import roll_out
from examples.r1.randomness import torch_rng
from examples.r1.run import Run
from examples.r1.samples import answers
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.stages.evaluation import evaluate
from examples.r1.stages.grpo import DiverseRL, LossInputs, ReasoningRL, RLStage, loss_config
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from examples.r1.stages.rejection import RejectionSampling
from examples.r1.stages.reward_model import RewardModelStage
from examples.r1.stages.sft import ColdStart, SFTStage
from examples.r1.stages.stage import Stage
from grpo_kernels.grpo_loss import presets
from python_tests.r1_stages import CPU, DIGITS, WORDS, beginner, one_thread, tiny_run

__all__ = ["one_thread"]


def _diverse(run: Run, model: CharTransformer | None = None) -> DiverseRL:
    return DiverseRL(model or run.build_policy(), run, RewardModel(run.build_judge()))


# presets of the loss ---------------------------------------------------------------------------------------------


def test_the_settings_name_all_presets_of_the_package() -> None:
    assert list(choices.PRESETS) == list(presets._PRESETS)


def test_settings_change_the_preset_only_where_they_say_so() -> None:
    for name in choices.PRESETS:
        own = grpo_kernels.GRPOLossConfig.preset(name, kl_coef=0.03)
        assert loss_config(tiny_run(preset=name, kl_coef=0.03).settings) == own
    clipped = loss_config(tiny_run(preset="dapo", clip=0.1).settings)
    assert (clipped.clip_low, clipped.clip_high, clipped.reduction) == (0.1, 0.1, "token_mean")


def _favoured(stage: RLStage, inputs: LossInputs, before: torch.Tensor) -> float:
    """How much more likely samples of high advantage have become than those of low advantage, nats a token."""
    gained = sequence_log_probs(stage.model, inputs.sequences, stage.temperature) - before
    return float((gained * inputs.advantages.unsqueeze(1)).sum() / inputs.sequences.mask.sum())


@pytest.mark.parametrize(("updates", "mtp"), [(1, 0), (2, 1)], ids=["one update", "two updates beside drafts"])
@pytest.mark.parametrize("preset", choices.PRESETS)
def test_every_preset_takes_a_step_towards_what_was_rewarded(preset: str, updates: int, mtp: int) -> None:
    run = tiny_run(preset=preset, updates_per_rollout=updates, mtp=mtp, diverse_rl_steps=40, diverse_learning_rate=5e-4)
    stage = _diverse(run)
    inputs = stage.loss_inputs(stage.sample(20), 20)
    assert float(inputs.advantages.abs().max()) > 0.5
    old = {name: value.clone() for name, value in stage.model.state_dict().items()}
    before = sequence_log_probs(stage.model, inputs.sequences, stage.temperature)
    record = stage.step(20)  # of the same samples
    assert math.isfinite(record["loss"])
    assert math.isfinite(record["grad_norm"])
    assert record["grad_norm"] > 0.0
    assert all(bool(value.isfinite().all()) for value in stage.model.state_dict().values())
    unchanged = {name for name, value in stage.model.state_dict().items() if torch.equal(value, old[name])}
    assert not unchanged
    assert _favoured(stage, inputs, before) > 1e-4


@pytest.mark.parametrize("preset", choices.PRESETS)
def test_the_loss_of_every_preset_is_divided_as_the_preset_says(preset: str) -> None:
    """The stage counts what the loss is divided by itself; for one process that changes nothing."""
    stage = _diverse(tiny_run(preset=preset))
    inputs = stage.loss_inputs(stage.sample(0), 0)
    with torch.no_grad():
        stage.model.head.weight.mul_(1.1)
        sequences = inputs.sequences
        hidden = stage.model.completion_hidden(sequences.prompts, sequences.completions)
        torch.manual_seed(1)  # clip_cov draws tokens
        output = stage.loss(stage.model.head, hidden, inputs)
        torch.manual_seed(1)
        expected = stage.model.head.grpo_loss(
            hidden,
            sequences.completions,
            inputs.old_log_probs,
            inputs.advantages,
            sequences.mask,
            stage.loss_config,
            ref_log_probs=inputs.ref_log_probs,
            temperature=stage.temperature,
        )
    assert float(expected.loss.abs()) > 1e-6
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-9)


# steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_rl", "diverse_rl"])
def test_the_first_update_is_on_policy_and_the_second_is_not(name: str) -> None:
    """At the stage's own temperature; the reference is the policy that the stage began with, and stays."""
    for updates in (1, 2):
        run = tiny_run(updates_per_rollout=updates, reasoning_learning_rate=1e-2, diverse_learning_rate=1e-2)
        stage = _diverse(run) if name == "diverse_rl" else ReasoningRL(run.build_policy(), run)
        assert stage.temperature == getattr(run.settings, name.replace("_rl", "_temperature"))
        inputs = stage.loss_inputs(stage.sample(0), 0)
        inputs = inputs._replace(advantages=torch.randn(len(inputs.advantages)))
        record = stage.update(inputs, 1)
        if updates == 1:
            assert record["ratio_max"] == pytest.approx(1.0, abs=1e-5)
            assert record["kl"] == pytest.approx(0.0, abs=1e-6)
        else:
            assert record["ratio_max"] > 1.01
            assert record["kl"] > 1e-5
            later = stage.loss_inputs(stage.sample(1), 1)
            expected = sequence_log_probs(run.build_policy(), later.sequences, stage.temperature)
            assert torch.equal(later.ref_log_probs, expected)
            assert float((later.old_log_probs - expected).abs().max()) > 1e-3
        for (key, value), own in zip(
            stage.reference.state_dict().items(), run.build_policy().state_dict().values(), strict=True
        ):
            assert torch.equal(value, own), key


@pytest.mark.parametrize(("prompts", "updates", "sizes"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (4, 3, [2, 2]), (4, 1, [4])])
def test_updates_share_the_prompts(
    prompts: int, updates: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = _diverse(tiny_run(prompts=prompts, updates_per_rollout=updates))
    seen: list[LossInputs] = []
    objective = stage._objective

    def watched(inputs: LossInputs, routes: Any) -> Any:
        seen.append(inputs)
        return objective(inputs, routes)

    monkeypatch.setattr(stage, "_objective", watched)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    stage.update(inputs, 0)
    assert [len(part.sequences.prompts) for part in seen] == sizes
    for field in ("old_log_probs", "ref_log_probs", "advantages"):
        assert torch.equal(torch.cat([getattr(part, field) for part in seen]), getattr(inputs, field))
    for field in ("prompts", "completions", "mask"):
        parts = [getattr(part.sequences, field) for part in seen]
        assert torch.equal(torch.cat(parts), getattr(inputs.sequences, field))


RL_KEYS = {
    "reward", "format", "loss", "kl", "entropy", "ratio_max", "clip_low_fraction", "clip_high_fraction",
    "clip_fraction", "grad_norm", "informative", "rounds", "tokens", "sampled_tokens",
    "sample_seconds", "train_seconds",
}  # fmt: skip


def test_records_of_a_step_have_the_figures_of_its_samples() -> None:
    run = tiny_run()
    digits = {f"{DIGITS}/{name}" for name in ("accuracy", "format", "language")}
    words = {f"{WORDS}/{name}" for name in ("accuracy", "format")}
    reasoning = ReasoningRL(run.build_policy(), run).step(0)
    assert reasoning.keys() == RL_KEYS | {"language"} | digits
    stage = _diverse(run)
    samples = stage.sample(0)
    record = stage.step(0)
    assert record.keys() == RL_KEYS | {"language", "judge"} | digits | words
    assert record["tokens"] == record["sampled_tokens"] == float(samples.rollout.sequences.mask.sum())
    assert record["judge"] == pytest.approx(float(samples.rewards[:, 3].nanmean()))
    assert record["reward"] == pytest.approx(
        float((samples.rewards * torch.tensor((1.0, 0.1, 0.2, 1.0))).nansum() / 16)
    )
    assert record["rounds"] == 1.0


def test_figures_of_a_step_are_of_all_groups_that_were_sampled() -> None:
    """Those that were chosen differ in what they earned; their means are not the policy's."""
    run = tiny_run(dynamic_sampling=3)
    stage = ReasoningRL(run.build_policy(), run)
    rounds: list[Tensor] = []
    tokens: list[float] = []
    sample_round = stage._sample_round

    def watched(index: int, round_: int) -> Any:
        rollout, table = sample_round(index, round_)
        rounds.append(table)
        tokens.append(float(rollout.sequences.mask.sum()))
        return rollout, table

    stage._sample_round = watched  # type: ignore[method-assign]
    record = stage.step(0)
    everything = torch.cat(rounds)
    assert len(rounds) == record["rounds"] == 3.0
    weighted = (everything * torch.tensor((1.0, 0.1, 0.2, 1.0))).nansum() / len(everything)
    assert record["reward"] == pytest.approx(float(weighted))
    assert record["format"] == pytest.approx(float(everything[:, 1].mean()))
    assert record["sampled_tokens"] == sum(tokens) > record["tokens"]


def test_learning_rates_rise_stay_and_fall() -> None:
    """Over ten steps, over the first half, and to a tenth of it at the end."""
    run = tiny_run(sft_learning_rate=1e-2, reasoning_learning_rate=4e-4, cold_start_steps=40, reasoning_rl_steps=80)
    cold_start = ColdStart(run.build_policy(), run)
    rates = [cold_start.learning_rate_at(index) / 1e-2 for index in range(40)]
    assert rates[:10] == pytest.approx([(index + 1) / 10 for index in range(10)])
    assert rates[10:20] == pytest.approx([1.0] * 10)
    assert rates[20:] == pytest.approx([1.0 - 0.9 * (index - 20) / 20 for index in range(20, 40)])
    cold_start.step(30)
    assert [group["lr"] for group in cold_start.optimizer.param_groups] == [cold_start.learning_rate_at(30)]
    reasoning = ReasoningRL(run.build_policy(), run)
    rates = [reasoning.learning_rate_at(index) / 4e-4 for index in range(80)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:41] == pytest.approx([1.0] * 32)
    assert rates[60] == pytest.approx(0.55)


@pytest.mark.parametrize("name", ["cold_start", "diverse_rl"])
def test_a_step_is_a_function_of_the_parameters_the_seed_and_its_index(name: str) -> None:
    """Whatever has drawn numbers before: the loss of clip_cov draws some, too."""
    run = tiny_run(preset="clip_cov")

    def stepped(index: int, before: int) -> tuple[dict[str, torch.Tensor], float]:
        stage = ColdStart(run.build_policy(), run) if name == "cold_start" else _diverse(run)
        torch.manual_seed(before)
        record = stage.step(index)
        return stage.model.state_dict(), record["loss"]

    (first, loss), (again, same), (_, other) = stepped(2, 5), stepped(2, 6), stepped(1, 5)
    assert loss == same != other
    assert all(torch.equal(value, again[key]) for key, value in first.items())


def test_the_cold_start_imitates_both_tasks() -> None:
    run = tiny_run(cold_start_steps=30, sft_batch=32, sft_learning_rate=6e-3)
    stage = ColdStart(run.build_policy(), run)
    assert len(stage.data.prompts) == sum(task.cold_examples for task in run.tasks.values())
    before = stage.validation_loss()
    records = [stage.step(index) for index in range(30)]
    assert records[0].keys() == {"loss", "grad_norm", "tokens", "seconds"}
    assert stage.validation_loss() < 0.8 * before


# evaluations -----------------------------------------------------------------------------------------------------

EVALUATION_KEYS = {
    f"{DIGITS}/accuracy", f"{DIGITS}/format", f"{DIGITS}/language", f"{DIGITS}/sampled_accuracy",
    f"{WORDS}/accuracy", f"{WORDS}/format", f"{WORDS}/sampled_accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def begun() -> tuple[Run, CharTransformer]:
    """A policy that spells some words backward."""
    run = tiny_run(width=32, sft_batch=32, sft_learning_rate=8e-3, cold_start_steps=80)
    return run, beginner(run, (WORDS,))


def test_evaluations_are_those_of_greedy_and_of_sampled_answers(begun: tuple[Run, CharTransformer]) -> None:
    run, model = begun
    record = evaluate(model, run)
    assert record.keys() == EVALUATION_KEYS
    assert record == evaluate(model, run)
    for name, problems in run.held_out.items():
        greedy = roll_out(model, run, problems)
        assert record[f"{name}/accuracy"] == float(greedy.rulings[:, 0].mean())
        assert record[f"{name}/format"] == float(greedy.rulings[:, 1].mean())
    both = [problem for problems in run.held_out.values() for problem in problems]
    sampled = roll_out(model, run, both, generator=torch_rng(CPU, "evaluation")).rulings[:, 0].view(2, -1).mean(dim=1)
    assert [record[f"{name}/sampled_accuracy"] for name in (DIGITS, WORDS)] == sampled.tolist()
    assert record[f"{WORDS}/format"] > record[f"{DIGITS}/format"]


def test_stages_that_imitate_also_have_a_validation_loss() -> None:
    run = tiny_run()
    judge = RewardModel(run.build_judge())
    imitating: list[SFTStage] = [
        ColdStart(run.build_policy(), run),
        RejectionSampling(run.build_policy(), run, run.build_policy(), judge),
    ]
    for stage in imitating:
        record = stage.evaluate()
        assert record.keys() == EVALUATION_KEYS | {"validation_loss"}
        assert record["validation_loss"] == pytest.approx(float(stage.loss(stage.validation_data).detach()))
    diverse = _diverse(run)
    assert diverse.evaluate().keys() == EVALUATION_KEYS | {f"{WORDS}/judge"}
    problems = [problem for held_out in run.held_out.values() for problem in held_out]
    sampled = roll_out(diverse.model, run, problems, generator=torch_rng(CPU, "evaluation"))
    score = diverse.judge.score(sampled.sequences)[len(run.held_out[DIGITS]) :].mean()  # type: ignore[union-attr]
    assert diverse.evaluate()[f"{WORDS}/judge"] == pytest.approx(float(score))
    assert ReasoningRL(run.build_policy(), run).evaluate().keys() == EVALUATION_KEYS


def test_readers_see_answers_to_the_same_held_out_prompts(begun: tuple[Run, CharTransformer]) -> None:
    run, model = begun
    stage = ReasoningRL(model, run)
    rows = answers(stage)
    problems = run.held_out[DIGITS][:4] + run.held_out[WORDS][:4]
    assert [(row["task"], row["prompt"]) for row in rows] == [(problem.task, problem.prompt) for problem in problems]
    assert {row["stage"] for row in rows} == {"reasoning_rl"}
    greedy = roll_out(model, run, problems)
    assert [row["completion"] for row in rows] == greedy.texts
    assert [row["correct"] for row in rows] == [bool(right) for right in greedy.rulings[:, 0]]
    assert answers(RewardModelStage(run.build_judge(), run)) == []


# what stages start from ------------------------------------------------------------------------------------------


def _same(one: CharTransformer, other: CharTransformer) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_stages_start_from_the_models_that_the_recipe_names(tmp_path: Path) -> None:
    """Rejection sampling asks the reasoning policy, but trains the base model anew."""
    run = tiny_run(output=tmp_path)
    folder = ModelFolder(run.settings)
    models = {}
    for index, name in enumerate(STAGES):
        source = tiny_run(seed=index + 1)
        models[name] = source.build_judge() if name == "reward_model" else source.build_policy()
        folder.save(name, models[name])
    assert tuple(STAGES) == tuple(choices.STAGES)
    stages: dict[str, Any] = {name: stage.start(run, folder) for name, stage in STAGES.items()}
    assert all(isinstance(stage, Stage) and stage.name == name for name, stage in stages.items())
    assert _same(stages["cold_start"].model, run.build_policy())
    assert _same(stages["reasoning_rl"].model, models["cold_start"])
    assert _same(stages["reasoning_rl"].reference, models["cold_start"])
    assert _same(stages["reward_model"].model, run.build_judge())
    rejection = stages["rejection_sampling"]
    assert _same(rejection.model, run.build_policy())
    assert _same(rejection.policy, models["reasoning_rl"])
    assert _same(rejection.judge.model, models["reward_model"])
    diverse = stages["diverse_rl"]
    assert _same(diverse.model, models["rejection_sampling"])
    assert _same(diverse.reference, models["rejection_sampling"])
    assert _same(diverse.judge.model, models["reward_model"])
