"""The training example with experts in bfloat16 and FP8: where the recipe reaches, and what it costs in loss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from examples.r1.checking import precision
from examples.r1.checking.precision import Comparison
from examples.r1.choices import RECIPES
from examples.r1.command_line import parse_arguments
from examples.r1.policy import vocabulary
from examples.r1.policy.model import CharTransformer, SharedPrefix
from examples.r1.randomness import python_rng
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages.grpo import ReasoningRL
from examples.r1.stages.sft import ColdStart
from grpo_kernels.moe_experts.parts import MoEExperts

FP8 = ("fp8_block128", "fp8_block128_wgrad")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share out; other tests get their threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _settings(**changes: object) -> Settings:
    tiny = Settings(
        threads=1, width=16, heads=2, cold_start_steps=8, sft_batch=8, prompts=4, group_size=4, evaluation_prompts=8,
        model="moe", experts=4,
    )  # fmt: skip
    return replace(tiny, **changes)  # type: ignore[arg-type]


def _cold_start(settings: Settings) -> ColdStart:
    run = Run.prepare(settings)
    return ColdStart(run.build_policy(), run)


# the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_is_the_experts_alone(recipe: str) -> None:
    stage = _cold_start(_settings(recipe=recipe))
    seen: list[tuple[torch.dtype, object, object]] = []

    def watch(experts: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(experts, MoEExperts)
        seen.append((output.dtype, experts.options["recipe"], experts.options.get("fp8_wgrad")))

    for layer in stage.model.moe_layers:
        layer.experts.register_forward_hook(watch)
    hidden = stage.model(torch.full((1, 4), 5), SharedPrefix(1))
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    op_recipe = "fp8_block128" if recipe in FP8 else "bf16"
    assert seen == [(dtype, op_recipe, recipe == "fp8_block128_wgrad")] * 2
    assert hidden.dtype == torch.float32
    hidden.sum().backward()
    for name, parameter in stage.model.named_parameters():
        assert parameter.dtype == torch.float32
        if "experts" in name:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.any())


def test_other_models_have_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"recipe 'bf16' is for experts: model must be 'moe', got 'dense'"):
        Settings(recipe="bf16")
    with pytest.raises(ValueError, match=r"recipe must be one of fp32, bf16, .*, got 'fp8'"):
        Settings(model="moe", recipe="fp8")
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe", "fp8_block128"])
    assert "recipe 'fp8_block128' is for experts: model must be 'moe', got 'dense'" in capsys.readouterr().err
    assert parse_arguments(["--recipe", "fp8_block128", "--model", "moe"]).recipe == "fp8_block128"
    assert parse_arguments([]).recipe == "fp32"


@pytest.mark.parametrize("recipe", FP8)
def test_an_fp8_model_trains(recipe: str) -> None:
    """The loss falls as bfloat16's does; GRPO samples from the same experts and moves them."""

    def falls(recipe: str) -> tuple[float, ColdStart]:
        stage = _cold_start(_settings(recipe=recipe, cold_start_steps=30))
        before = stage.validation_loss()
        for index in range(stage.steps):
            stage.step(index)
        return before - stage.validation_loss(), stage

    fall, cold_start = falls(recipe)
    expected, _ = falls("bf16")
    assert expected > 1.0
    assert fall == pytest.approx(expected, rel=0.02)
    grpo = ReasoningRL(cold_start.model, cold_start.run)
    inputs = grpo.loss_inputs(grpo.sample(0), 0)
    before = [layer.experts.down_proj.clone() for layer in cold_start.model.moe_layers]
    record = grpo.update(inputs._replace(advantages=torch.linspace(-1.0, 1.0, 16)), 0)
    assert record["ratio_max"] > 1.0
    for layer, old in zip(cold_start.model.moe_layers, before, strict=True):
        assert bool((layer.experts.down_proj != old).any())


# the validation loss ---------------------------------------------------------------------------------------------


def test_the_validation_loss_is_the_cross_entropy_of_held_out_demonstrations() -> None:
    stage = _cold_start(_settings())
    model, run, rng = stage.model, stage.run, python_rng("validation")
    total, tokens = 0.0, 0
    for problem in (problem for problems in run.held_out.values() for problem in problems):
        prompt = run.encode_prompts([problem])
        ids = [*vocabulary.encode(run.tasks[problem.task].demonstrate(problem, rng)), vocabulary.END]
        with torch.no_grad():
            hidden = _plain_hidden(model, torch.cat((prompt, torch.tensor([ids[:-1]])), dim=1))
            scores = model.head(hidden[0, prompt.shape[1] - 1 :]).double().log_softmax(dim=-1)
        total -= sum(float(scores[column, token]) for column, token in enumerate(ids))
        tokens += len(ids)
    assert stage.validation_loss() == pytest.approx(total / tokens, rel=1e-6)
    assert stage.evaluate()["validation_loss"] == stage.validation_loss()
    assert 3.0 < total / tokens < 6.0  # log 52 = 3.95: nothing is learnt yet


def _plain_hidden(model: CharTransformer, tokens: Tensor) -> Tensor:
    hidden: Tensor = model(tokens, SharedPrefix(1))
    return hidden


def test_validation_is_the_same_for_every_seed_and_not_in_the_training() -> None:
    first, second = (_cold_start(_settings(seed=seed)) for seed in (0, 1))
    for mine, theirs in zip(first.validation_data, second.validation_data, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(first.data.prompts, second.data.prompts)
    held_out = {tuple(row) for row in first.validation_data.prompts.tolist()}
    assert len(held_out) == 2 * 8
    assert held_out.isdisjoint(tuple(row) for row in first.data.prompts.tolist())


# the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("losses", "holds"), [((0.3, 0.507), True), ((0.3, 0.509), False), ((0.3, 0.491), False)])
def test_one_percent_of_the_mean_in_either_direction(losses: tuple[float, float], holds: bool) -> None:
    found = Comparison("fp8_block128", list(losses), [0.3, 0.5])
    assert found.ratio == pytest.approx(sum(losses) / 0.8)
    assert found.seed_ratios == pytest.approx([1.0, losses[1] / 0.5])
    assert found.holds is holds
    assert precision.judge([Comparison("bf16", [9.0, 9.0], [0.3, 0.5]), found]).failed is not holds
    console = Console(record=True, width=160, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(precision.table([found], [3, 4]))
    text = console.export_text()
    assert "seed 4" in text
    assert f"{sum(losses) / 0.8:.4f}" in text


def test_the_loss_is_that_of_the_end_of_the_stage() -> None:
    stage = _cold_start(_settings())
    losses = []
    for index in range(8):
        stage.step(index)
        losses.append(stage.validation_loss())
    assert precision.cold_start(_settings(), Console(quiet=True)) == losses[-1]
    assert losses[-1] != losses[-2]


def test_the_comparison_trains_every_recipe_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(settings: Settings, console: Console) -> float:
        calls.append((settings.recipe, settings.seed, settings.model))
        return 0.4 if settings.recipe == "bf16" else 0.405

    monkeypatch.setattr(precision, "cold_start", noted)
    saved = tmp_path / "precision.json"
    words = ["precision", "--seeds", "0", "5", "--save", str(saved)]
    monkeypatch.setattr("sys.argv", words)
    assert precision.main() == 1
    recipes = ("bf16", "fp8_block128")
    assert calls == [(recipe, seed, "moe") for recipe in recipes for seed in (0, 5)]
    written = json.loads(saved.read_text(encoding="utf-8"))
    assert written["seeds"] == [0, 5]
    assert written["machine"]["torch"] == torch.__version__
    assert [row["holds"] for row in written["results"]] == [True, False]
    assert written["results"][1]["mean_over_bf16"] == pytest.approx(1.0125)
    monkeypatch.setattr("sys.argv", [*words, "--recipes", "bf16"])
    assert precision.main() == 0
    monkeypatch.setattr("sys.argv", [*words, "--recipes", "fp8_block128"])
    with pytest.raises(SystemExit):
        precision.main()
