"""The training example: its parts do what they say, it learns in forty steps, and a resumed run repeats to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

import grpo_kernels
from examples.r1 import check, demo, loss_step, rewards, vocabulary
from examples.r1.__main__ import parse_arguments
from examples.r1.checkpoint import CheckpointMismatch, Progress
from examples.r1.grpo import GRPOStage, LossInputs, shuffle_in_groups
from examples.r1.model import CharTransformer, ModelConfig
from examples.r1.pipeline import TaskResult, build_model
from examples.r1.rollout import encode_prompts, generate, make_sequences, roll_out, torch_rng
from examples.r1.settings import Settings
from examples.r1.sft import SFTStage
from examples.r1.stage import Record
from examples.r1.tasks import TASKS, Problem

CPU = torch.device("cpu")


class Checked(NamedTuple):
    """Gradients of one step's loss with respect to the logits, and how peaked the policy was."""

    actual: tuple[torch.Tensor, torch.Tensor]
    expected: tuple[torch.Tensor, torch.Tensor]
    eager: tuple[torch.Tensor, torch.Tensor]
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
    with torch.no_grad():
        logits = stage.model.completion_logits(inputs.sequences.prompts, inputs.sequences.completions)
        log_probs = grpo_kernels.token_log_probs(
            logits, inputs.sequences.completions, mask=inputs.sequences.mask, outputs=("sum_squared_probs",)
        )
    double = LossInputs(inputs.sequences, *(tensor.double() for tensor in inputs[1:]))
    with grpo_kernels.backend("reference"):
        expected = loss_step.fused_step(stage, logits.double().requires_grad_(), double)
    ratios = torch.exp(log_probs.log_probs - inputs.old_log_probs)
    top = logits.softmax(dim=-1).amax(dim=-1)[inputs.sequences.mask]
    return Checked(
        loss_step.fused_step(stage, logits.clone().requires_grad_(), inputs),
        expected,
        loss_step.eager_step(stage, logits.clone().requires_grad_(), inputs),
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
    assert float(result.expected[1].abs().max()) > 0.0
    loss_step.assert_close(result.actual, result.expected, result.eager)
    with pytest.raises(AssertionError, match="the gradient's error"):  # a fault of a thousandth of a percent
        loss_step.assert_close((result.actual[0], result.actual[1] * (1 + 1e-5)), result.expected, result.eager)


def test_eager_loss_step_is_the_definition() -> None:
    task = TASKS["digit_sorting"]()
    settings = Settings(prompts=4)
    stage = GRPOStage(build_model(task, settings), task, task.held_out(4), settings)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    double = LossInputs(inputs.sequences, *(tensor.double() for tensor in inputs[1:]))
    logits = torch.randn(*inputs.sequences.completions.shape, vocabulary.SIZE, dtype=torch.float64)
    double = double._replace(advantages=torch.randn(len(logits), dtype=torch.float64))
    loss, gradient = loss_step.eager_step(stage, logits.clone().requires_grad_(), double)
    with grpo_kernels.backend("reference"):
        expected_loss, expected = loss_step.fused_step(stage, logits.clone().requires_grad_(), double)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


# the model -----------------------------------------------------------------------------------------------------


def _small_model() -> CharTransformer:
    return CharTransformer(ModelConfig(max_length=20, width=16, layers=2, heads=2)).double()


def test_groups_that_share_their_prompt_see_what_each_would_see_alone() -> None:
    model = _small_model()
    prompts = torch.randint(2, vocabulary.SIZE, (3, 8))
    completions = torch.randint(2, vocabulary.SIZE, (6, 5))
    together = model.completion_logits(prompts, completions)
    alone = torch.cat([model.completion_logits(prompts[i // 2, None], completions[i, None]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    changed = completions.clone()
    changed[:, 3] = 2
    with torch.no_grad():
        late = model.completion_logits(prompts, changed)
    torch.testing.assert_close(late[:, :4], together[:, :4], rtol=1e-12, atol=1e-12)  # no look at the future
    assert float((late[:, 4] - together[:, 4]).detach().abs().max()) > 1e-6


def test_greedy_samples_from_the_cache_are_the_most_likely_tokens_of_the_training_pass() -> None:
    model = _small_model()
    with torch.no_grad():
        model.head.weight[vocabulary.PAD] = 0.0
        model.head.weight[vocabulary.END] = 0.0
    prompts = torch.randint(2, vocabulary.SIZE, (4, 8))
    completions = generate(model, prompts, 6)
    logits = model.completion_logits(prompts, completions.clone())
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
        expected = model.completion_logits(prompts, prompts[:, :1])[0, 0].softmax(dim=-1)
    deviation = (shares - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert float(deviation.abs().max()) < 5.0


def test_nothing_counts_after_the_end() -> None:
    end, pad = vocabulary.END, vocabulary.PAD
    completions = torch.tensor([[5, 6, end, pad], [end, pad, pad, pad], [5, 6, 7, 8]])
    mask = make_sequences(torch.zeros(3, 2, dtype=torch.long), completions).mask
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]


# tasks and rewards ---------------------------------------------------------------------------------------------


def _sorting_problem() -> Problem:
    return Problem("S314159>", {"answer": "113459"})


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("<t>1,1,3,4,5,9</t><a>113459</a>", True, (1.0, 1.0, 1.0)),
        ("<t>1,1,3,4,5,9</t><a>113495</a>", True, (0.0, 1.0, 1.0)),
        ("<t>1α1β3,4,5,9</t><a>113459</a>", True, (1.0, 1.0, 9 / 11)),
        ("<t></t><a>113459</a>", True, (1.0, 1.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>", False, (0.0, 0.0, 0.0)),
        ("<t>1,1,3,4,5,9</t><a>113459</a>1", True, (0.0, 0.0, 0.0)),
        ("113459", True, (0.0, 0.0, 0.0)),
    ],
)
def test_rewards_of_digit_sorting(completion: str, finished: bool, expected: tuple[float, float, float]) -> None:
    assert rewards.score(TASKS["digit_sorting"](), _sorting_problem(), completion, finished) == expected


def test_spelling_is_scored_by_the_verifier_of_reasoning_gym() -> None:
    task = TASKS["spell_backward"]()
    problem = task.draw(Random(0), held_out=False)
    word = problem.entry["metadata"]["word"]
    assert problem.prompt == f"Spell this word backward (example: sun -> nus): {word}"
    right = word[::-1]
    wrong = right[:-1] + ("x" if right[-1].lower() != "x" else "y")
    assert rewards.score(task, problem, f"<t>{','.join(right)}</t><a>{right}</a>", True) == (1.0, 1.0, 1.0)
    accuracy, form, language = rewards.score(task, problem, f"<t>{'γ'.join(right)}</t><a>{wrong}</a>", True)
    assert accuracy == pytest.approx((len(word) - 1) / len(word))
    assert form == 1.0
    assert language == pytest.approx(len(word) / (2 * len(word) - 1))


@pytest.mark.parametrize("name", TASKS)
def test_problems_fit_and_training_never_sees_held_out_prompts(name: str) -> None:
    task = TASKS[name]()
    held_out = task.held_out(300)
    prompts = frozenset(problem.prompt for problem in held_out)
    assert len(prompts) == 300
    assert [problem.prompt for problem in task.held_out(300)] == [problem.prompt for problem in held_out]
    rng = Random(1)
    shares = []
    for problem in islice(task.training(rng, prompts), 1000):
        assert problem.prompt not in prompts
        demonstration = task.demonstrate(problem, rng)
        assert len(vocabulary.encode(demonstration)) + 1 <= task.completion_length
        assert len(problem.prompt) <= task.prompt_length
        accuracy, form, _ = rewards.score(task, problem, demonstration, True)
        assert form == 1.0
        shares.append(accuracy == 1.0)
    right = (1 - task.misread_share) * (1 - task.wrong_share)
    assert right - 0.06 < sum(shares) / len(shares) < right + 0.1  # an exchange of equal items does no harm


def test_texts_survive_the_vocabulary_and_unknown_characters_are_refused() -> None:
    text = "Spell this word backward (example: sun -> nus): Zürich".replace("ü", "γ")
    assert vocabulary.decode([vocabulary.PAD, *vocabulary.encode(text), vocabulary.END, 7]) == text
    with pytest.raises(ValueError, match="'ü' is not in the vocabulary"):
        vocabulary.encode("Zürich")
    with pytest.raises(ValueError, match="4 tokens does not fit in 3"):
        vocabulary.pad_left([1, 2, 3, 4], 3)


def test_shuffled_rewards_stay_in_their_group() -> None:
    scores = torch.arange(48.0).view(16, 3)
    shuffled = shuffle_in_groups(scores, 8, 5)
    for group in (slice(0, 8), slice(8, 16)):
        assert torch.equal(shuffled[group].sort(dim=0).values, scores[group])
        assert torch.equal(shuffled[group][:, 1] - shuffled[group][:, 0], torch.ones(8))  # rows move as a whole
    assert not torch.equal(shuffled, scores)
    assert not torch.equal(shuffled, shuffle_in_groups(scores, 8, 6))


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
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    summary = written["tasks"]["digit_sorting"]
    assert summary["stages"]["grpo"]["steps"] == 5
    assert [entry["step"] for entry in written["curves"]["digit_sorting"]["evaluations"]["grpo"]] == [0, 2, 4, 5]
    measured = summary["loss_step"]
    assert (measured["rows"], measured["columns"], measured["vocabulary"]) == (16, 32, vocabulary.SIZE)
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
    return TaskResult(task, 0, progress, loss_step.LossStepComparison(1, 1, 1, 1.0, 1.0, 1, 1), _small_model())


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
    verdicts.print(console)
    assert f"{before:.3f} -> {after:.3f}" in console.export_text()


def test_command_line() -> None:
    assert parse_arguments([]) == Settings()
    settings = parse_arguments(["--tasks", "spell_backward", "--steps", "7", "--seed", "3", "--learning-rate", "1e-4"])
    assert settings == Settings(tasks=("spell_backward",), grpo_steps=7, seed=3, grpo_learning_rate=1e-4)


def test_prompts_end_at_the_same_column() -> None:
    task = TASKS["digit_sorting"]()
    prompts = encode_prompts(task, [Problem("S12>", {}), _sorting_problem()], CPU)
    assert prompts.shape == (2, 8)
    assert vocabulary.decode(prompts[0].tolist()) == "S12>"
    assert int(prompts[0, -1]) == int(prompts[1, -1]) == vocabulary.encode(">")[0]
