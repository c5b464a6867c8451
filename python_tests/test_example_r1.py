"""The training example: its parts do what they say, it learns in forty steps, and a resumed run repeats to the bit."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import grpo_kernels
from examples.r1 import check, demo, loss_step, vocabulary
from examples.r1.__main__ import parse_arguments
from examples.r1.checkpoint import CheckpointMismatch, Progress
from examples.r1.grpo import GRPOStage, LossInputs
from examples.r1.log_probs import sequence_log_probs
from examples.r1.loss_step import LossStepResult
from examples.r1.model import CharTransformer, ModelConfig
from examples.r1.pipeline import TaskResult, build_model
from examples.r1.rollout import Sequences, generate, make_sequences, roll_out, torch_rng
from examples.r1.settings import Settings
from examples.r1.sft import SFTStage
from examples.r1.stage import Record
from examples.r1.tasks import TASKS

CPU = torch.device("cpu")


class Checked(NamedTuple):
    """One step's loss and gradients, and how peaked the policy was."""

    actual: LossStepResult
    expected: LossStepResult
    eager: LossStepResult
    largest_ratio: float
    top_probability: float


class Trained(NamedTuple):
    records: list[Record]
    checked: list[Checked]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share out; other tests get their threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _check_gradient(stage: GRPOStage, inputs: LossInputs) -> Checked:
    """The loss of samples from before an update, under the policy after it: the ratios differ from 1."""
    head = stage.model.head
    with torch.no_grad():
        hidden = stage.model.completion_hidden(inputs.sequences.prompts, inputs.sequences.completions)
    log_probs = sequence_log_probs(stage.model, inputs.sequences, 1.0)
    with grpo_kernels.backend("reference"):
        expected = loss_step.fused_step(stage, *loss_step.in_float64(head, hidden, inputs))
    ratios = torch.exp(log_probs - inputs.old_log_probs)
    top = head(hidden).detach().softmax(dim=-1).amax(dim=-1)[inputs.sequences.mask]
    return Checked(
        loss_step.fused_step(stage, head, hidden.clone().requires_grad_(), inputs),
        expected,
        loss_step.eager_step(stage, head, hidden.clone().requires_grad_(), inputs),
        float(ratios.max()),
        float(top.mean()),
    )


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Digit sorting: a cold start, then forty GRPO steps of 16 prompts, checked at three of them."""
    settings = Settings(sft_steps=100, grpo_steps=40, prompts=16)
    task = TASKS["digit_sorting"]()
    held_out = task.held_out(16)
    model = build_model(task, settings)
    cold_start = SFTStage(model, task, held_out, settings)
    for index in range(cold_start.steps):
        cold_start.step(index)
    stage = GRPOStage(model, task, held_out, settings)
    records, checked = [], []
    for index in range(stage.steps):
        samples = stage.loss_inputs(stage.sample(index), index) if index in (0, 20, 39) else None
        records.append(stage.step(index))
        if samples is not None:
            checked.append(_check_gradient(stage, samples))
    return Trained(records, checked)


def _mean(records: list[Record], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def test_forty_grpo_steps_raise_the_rewards_of_the_samples(trained: Trained) -> None:
    first, last = trained.records[:5], trained.records[-5:]
    assert _mean(last, "accuracy") >= _mean(first, "accuracy") + 0.15
    assert _mean(last, "language") >= _mean(first, "language") + 0.1
    assert _mean(last, "reward") >= _mean(first, "reward") + 0.2
    assert _mean(last, "entropy") < _mean(first, "entropy")
    assert 0.0 < _mean(last, "kl") < 1.0


def test_the_first_update_of_a_rollout_is_on_policy_and_the_second_is_not(trained: Trained) -> None:
    assert all(record["ratio_max"] > 1.001 for record in trained.records)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_gradients_on_the_trained_model_equal_the_definition_in_float64(trained: Trained, moment: int) -> None:
    result = trained.checked[moment]
    assert result.largest_ratio > 1.001
    if moment > 0:
        assert result.top_probability > 0.9  # peaked: what random logits do not test
    assert all(float(gradient.abs().max()) > 0.0 for gradient in result.expected[1:])
    loss_step.assert_close(result.actual, result.expected, result.eager)
    for name in ("grad_hidden", "grad_weight"):  # a fault of a thousandth of a percent
        faulty = result.actual._replace(**{name: getattr(result.actual, name) * (1 + 1e-5)})
        with pytest.raises(AssertionError, match=f"{name}: the error"):
            loss_step.assert_close(faulty, result.expected, result.eager)


def test_eager_loss_step_is_the_definition() -> None:
    task = TASKS["digit_sorting"]()
    settings = Settings(prompts=4)
    stage = GRPOStage(build_model(task, settings), task, task.held_out(4), settings)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    inputs = inputs._replace(advantages=torch.randn(len(inputs.advantages)))
    hidden = torch.randn(*inputs.sequences.completions.shape, settings.width)
    arguments = loss_step.in_float64(stage.model.head, hidden, inputs)
    actual = loss_step.eager_step(stage, *arguments)
    with grpo_kernels.backend("reference"):
        expected = loss_step.fused_step(stage, *arguments)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-10, atol=1e-14)


def _gradients(loss: torch.Tensor, model: CharTransformer) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_losses_from_hidden_states_are_those_from_logits() -> None:
    task, settings = TASKS["digit_sorting"](), Settings(prompts=8)
    model = build_model(task, settings)
    cold_start = SFTStage(model, task, task.held_out(4), settings)
    for index in range(20):
        cold_start.step(index)
    batch = Sequences(*(tensor[:16] for tensor in cold_start.data))

    def logits(sequences: Sequences) -> torch.Tensor:
        return model.head(model.completion_hidden(sequences.prompts, sequences.completions))

    loss = cold_start.loss(batch)
    expected = F.cross_entropy(logits(batch)[batch.mask], batch.completions[batch.mask])
    torch.testing.assert_close((loss, _gradients(loss, model)), (expected, _gradients(expected, model)))

    stage = GRPOStage(model, task, task.held_out(4), settings)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    stage.update(inputs, 0)  # away from the policy that sampled
    sequences = inputs.sequences
    output = stage.loss(model.head, model.completion_hidden(sequences.prompts, sequences.completions), inputs)
    policy = grpo_kernels.token_log_probs(
        logits(sequences), sequences.completions, mask=sequences.mask, outputs=("entropy",)
    )
    from_logits = grpo_kernels.grpo_loss(
        policy.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        sequences.mask,
        stage.loss_config,
        ref_log_probs=inputs.ref_log_probs,
        entropy=policy.entropy.detach(),
    )
    assert output.metrics.to_dict()["head_passes"] == 1
    torch.testing.assert_close(output.metrics.values, from_logits.metrics.values)
    torch.testing.assert_close(output.log_probs, policy.log_probs.detach())
    torch.testing.assert_close(
        (output.loss, _gradients(output.loss, model)), (from_logits.loss, _gradients(from_logits.loss, model))
    )


# the model -----------------------------------------------------------------------------------------------------


def _small_model() -> CharTransformer:
    return CharTransformer(ModelConfig(max_length=20, width=16, layers=2, heads=2)).double()


def test_groups_that_share_their_prompt_see_what_each_would_see_alone() -> None:
    model = _small_model()
    prompts = torch.randint(2, vocabulary.SIZE, (3, 8))
    completions = torch.randint(2, vocabulary.SIZE, (6, 5))
    together = model.completion_hidden(prompts, completions)
    alone = torch.cat([model.completion_hidden(prompts[i // 2, None], completions[i, None]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    changed = completions.clone()
    changed[:, 3] = 2
    with torch.no_grad():
        late = model.completion_hidden(prompts, changed)
    torch.testing.assert_close(late[:, :4], together[:, :4], rtol=1e-12, atol=1e-12)  # no look at the future
    assert float((late[:, 4] - together[:, 4]).detach().abs().max()) > 1e-6


def test_greedy_samples_from_the_cache_are_the_most_likely_tokens_of_the_training_pass() -> None:
    model = _small_model()
    with torch.no_grad():
        model.head.weight[vocabulary.PAD] = 0.0
        model.head.weight[vocabulary.END] = 0.0
    prompts = torch.randint(2, vocabulary.SIZE, (4, 8))
    completions = generate(model, prompts, 6)
    logits = model.head(model.completion_hidden(prompts, completions.clone()))
    mask = make_sequences(prompts, completions.clone()).mask
    assert torch.equal(logits.argmax(dim=-1)[mask], completions[mask])


def test_samples_follow_the_model_and_the_generator() -> None:
    model = _small_model()
    prompts = torch.randint(2, vocabulary.SIZE, (1, 8))
    first = generate(model, prompts, 1, group_size=4000, generator=torch_rng(CPU, 1))
    again = generate(model, prompts, 1, group_size=4000, generator=torch_rng(CPU, 1))
    assert torch.equal(first, again)
    shares = torch.bincount(first.flatten(), minlength=vocabulary.SIZE).double() / 4000
    with torch.no_grad():
        expected = model.head(model.completion_hidden(prompts, prompts[:, :1]))[0, 0].softmax(dim=-1)
    deviation = (shares - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert float(deviation.abs().max()) < 5.0


def test_nothing_counts_after_the_end() -> None:
    end, pad = vocabulary.END, vocabulary.PAD
    completions = torch.tensor([[5, 6, end, pad], [end, pad, pad, pad], [5, 6, 7, 8]])
    mask = make_sequences(torch.zeros(3, 2, dtype=torch.long), completions).mask
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]


# runs ------------------------------------------------------------------------------------------------------------


def _tiny(output: Path) -> Settings:
    return Settings(
        output=output,
        tasks=("digit_sorting",),
        threads=1,
        width=16,
        heads=2,
        sft_steps=4,
        sft_batch=8,
        grpo_steps=5,
        prompts=4,
        group_size=4,
        evaluate_every=2,
        evaluation_prompts=8,
        save_every=2,
    )


def _without_times(records: list[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    (whole,) = demo.run(_tiny(tmp_path / "whole"), console)
    step = GRPOStage.step

    def interrupted(stage: GRPOStage, index: int) -> Record:
        if index == 3:
            raise KeyboardInterrupt
        return step(stage, index)

    settings = _tiny(tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(GRPOStage, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run(settings, console)
    with pytest.raises(CheckpointMismatch, match=r"was made with kl_coef = 0.01 \(now 0.5\)"):
        demo.run(replace(settings, resume=True, kl_coef=0.5), console)
    (resumed,) = demo.run(replace(settings, resume=True), console)
    assert resumed.progress.evaluations == whole.progress.evaluations
    for stage, records in whole.progress.records.items():
        assert _without_times(resumed.progress.records[stage]) == _without_times(records)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    folder = settings.output / "checkpoints" / "digit_sorting"
    assert sorted(path.name for path in folder.iterdir()) == ["grpo-000005.safetensors", "state.json"]


def test_a_run_reports_what_it_measured(tmp_path: Path) -> None:
    settings = _tiny(tmp_path)
    console = Console(record=True, width=120, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    (result,) = demo.run(settings, console)
    text = console.export_text()
    assert "digit_sorting grpo 5/5  reward" in text
    assert "greedy accuracy, grpo" in text
    assert "validation loss, sft" in text
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    summary = written["tasks"]["digit_sorting"]
    assert summary["stages"]["grpo"]["steps"] == 5
    assert summary["stages"]["sft"]["after"]["validation_loss"] < summary["stages"]["sft"]["before"]["validation_loss"]
    assert "validation_loss" not in summary["stages"]["grpo"]["after"]
    assert [entry["step"] for entry in written["curves"]["digit_sorting"]["evaluations"]["grpo"]] == [0, 2, 4, 5]
    measured = summary["loss_step"]
    shape = [measured[name] for name in ("rows", "columns", "width", "vocabulary")]
    assert shape == [16, 32, settings.width, vocabulary.SIZE]
    logits_bytes = 16 * 32 * vocabulary.SIZE * 4
    assert measured["eager_peak_bytes"] > 2 * logits_bytes
    assert measured["peak_bytes"] < measured["eager_peak_bytes"]
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    held_out = TASKS["digit_sorting"]().held_out(8)
    assert roll_out(result.model, TASKS["digit_sorting"](), held_out).means()["accuracy"] == pytest.approx(
        summary["stages"]["grpo"]["after"]["accuracy"]
    )


def _result(task: str, before: float, after: float) -> TaskResult:
    """A result whose greedy and sampled accuracy went from `before` to `after` in the GRPO stage."""
    evaluations = [{"step": float(i), "accuracy": a, "sampled_accuracy": a} for i, a in enumerate((before, after))]
    progress = Progress("grpo", 1, {"grpo": []}, {"grpo": evaluations})
    return TaskResult(task, 0, progress, loss_step.LossStepComparison(1, 1, 1, 1, 1.0, 1.0, 1, 1), _small_model())


@pytest.mark.parametrize(
    ("judge", "task", "before", "after", "holds"),
    [
        (check.judge, "digit_sorting", 0.7, 0.9, True),
        (check.judge, "digit_sorting", 0.2, 0.89, False),
        (check.judge, "spell_backward", 0.25, 0.46, True),
        (check.judge, "spell_backward", 0.8, 0.99, False),
        (check.judge_control, "digit_sorting", 0.4, 0.44, True),
        (check.judge_control, "digit_sorting", 0.4, 0.46, False),
    ],
)
def test_check_fails_where_it_should(
    judge: Callable[[TaskResult, str, check.Verdicts], None], task: str, before: float, after: float, holds: bool
) -> None:
    verdicts = check.Verdicts()
    judge(_result(task, before, after), "seed 0", verdicts)
    assert verdicts.failed is not holds
    console = Console(record=True, width=120, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    verdicts.print(console, "check")
    assert f"{before:.3f} -> {after:.3f}" in console.export_text()


def _check_that_seeds_are_small(settings: Settings, console: Console) -> check.Verdicts:
    verdicts = check.Verdicts()
    console.print(f"seed {settings.seed}")
    verdicts.add(f"seed {settings.seed}", "seed < 2", str(settings.seed), settings.seed < 2)
    return verdicts


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("last", [1, 2])
def test_checks_run_in_order_or_at_once(jobs: int, last: int) -> None:
    text = io.StringIO()
    checks = [(_check_that_seeds_are_small, Settings(seed=seed)) for seed in (0, last)]
    verdicts = check.run_checks(checks, jobs, Console(file=text, width=120))
    assert text.getvalue() == f"seed 0\nseed {last}\n"
    assert verdicts.failed is (last == 2)


def test_command_line() -> None:
    assert parse_arguments([]) == Settings()
    settings = parse_arguments(["--tasks", "spell_backward", "--steps", "7", "--seed", "3", "--learning-rate", "1e-4"])
    assert settings == Settings(tasks=("spell_backward",), grpo_steps=7, seed=3, grpo_learning_rate=1e-4)
