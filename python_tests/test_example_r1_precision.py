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

from examples.r1 import precision, vocabulary
from examples.r1.__main__ import parse_arguments
from examples.r1.grpo import GRPOStage
from examples.r1.model import CharTransformer, SharedPrefix
from examples.r1.pipeline import build_model
from examples.r1.precision import Comparison, Losses
from examples.r1.rollout import python_rng
from examples.r1.settings import RECIPES, Settings
from examples.r1.sft import SFTStage
from examples.r1.tasks import TASKS
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
        tasks=("digit_sorting",), threads=1, width=16, heads=2, sft_steps=8, sft_batch=8, prompts=4, group_size=4,
        evaluation_prompts=8, model="moe", experts=4,
    )  # fmt: skip
    return replace(tiny, **changes)  # type: ignore[arg-type]


def _cold_start(settings: Settings) -> SFTStage:
    task = TASKS["digit_sorting"]()
    return SFTStage(build_model(task, settings), task, task.held_out(settings.evaluation_prompts), settings)


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

    def falls(recipe: str) -> tuple[float, SFTStage]:
        stage = _cold_start(_settings(recipe=recipe, sft_steps=30))
        before = stage.validate()["validation_loss"]
        for index in range(stage.steps):
            stage.step(index)
        return before - stage.validate()["validation_loss"], stage

    fall, cold_start = falls(recipe)
    expected, _ = falls("bf16")
    assert expected > 1.0
    assert fall == pytest.approx(expected, rel=0.02)
    grpo = GRPOStage(cold_start.model, cold_start.task, [], _settings(recipe=recipe))
    inputs = grpo.loss_inputs(grpo.sample(0), 0)
    before = [layer.experts.down_proj.clone() for layer in cold_start.model.moe_layers]
    record = grpo.update(inputs._replace(advantages=torch.linspace(-1.0, 1.0, 16)), 0)
    assert record["ratio_max"] > 1.0
    for layer, old in zip(cold_start.model.moe_layers, before, strict=True):
        assert bool((layer.experts.down_proj != old).any())


# the validation loss ---------------------------------------------------------------------------------------------


def test_the_validation_loss_is_the_cross_entropy_of_held_out_demonstrations() -> None:
    stage = _cold_start(_settings())
    model, rng = stage.model, python_rng("digit_sorting", "validation")
    total, tokens = 0.0, 0
    for problem in stage.task.held_out(8):
        prompt = torch.tensor([vocabulary.encode(problem.prompt)])
        ids = [*vocabulary.encode(stage.task.demonstrate(problem, rng)), vocabulary.END]
        with torch.no_grad():
            hidden = _plain_hidden(model, torch.cat((prompt, torch.tensor([ids[:-1]])), dim=1))
            scores = model.head(hidden[0, prompt.shape[1] - 1 :]).double().log_softmax(dim=-1)
        total -= sum(float(scores[column, token]) for column, token in enumerate(ids))
        tokens += len(ids)
    assert stage.validate() == {"validation_loss": pytest.approx(total / tokens, rel=1e-6)}
    assert 3.0 < total / tokens < 6.0  # log 106 = 4.66: nothing is learnt yet


def _plain_hidden(model: CharTransformer, tokens: Tensor) -> Tensor:
    hidden: Tensor = model(tokens, SharedPrefix(1))
    return hidden


def test_validation_is_the_same_for_every_seed_and_not_in_the_training() -> None:
    first, second = (_cold_start(_settings(seed=seed)) for seed in (0, 1))
    for mine, theirs in zip(first.validation_data, second.validation_data, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(first.data.prompts, second.data.prompts)
    held_out = {tuple(row) for row in first.validation_data.prompts.tolist()}
    assert len(held_out) == 8
    assert held_out.isdisjoint(tuple(row) for row in first.data.prompts.tolist())


# the comparison --------------------------------------------------------------------------------------------------


def _comparison(recipe: str, *finals: float) -> Comparison:
    losses = [Losses([final + 0.1, final - 0.1]) for final in finals]
    return Comparison("digit_sorting", recipe, losses, [Losses([0.2, 0.4]), Losses([0.4, 0.6])])


@pytest.mark.parametrize(("finals", "holds"), [((0.3, 0.507), True), ((0.3, 0.509), False), ((0.3, 0.491), False)])
def test_one_percent_of_the_mean_in_either_direction(finals: tuple[float, float], holds: bool) -> None:
    found = _comparison("fp8_block128", *finals)
    assert found.ratio == pytest.approx(sum(finals) / 0.8)
    assert found.step_ratios == pytest.approx([(sum(finals) + 0.2) / 0.6, (sum(finals) - 0.2) / 1.0])
    assert found.holds is holds
    assert precision.judge([_comparison("bf16", 9.0, 9.0), found]).failed is not holds
    console = Console(record=True, width=160, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(precision.table([found], [3, 4]))
    text = console.export_text()
    assert "seed 4" in text
    assert f"{sum(finals) / 0.8:.4f}" in text
    assert f"{found.step_ratios[1]:.3f} - {found.step_ratios[0]:.3f}" in text


def test_the_final_loss_is_the_mean_of_the_last_quarter_of_the_steps() -> None:
    stage = _cold_start(_settings())
    losses = []
    for index in range(8):
        stage.step(index)
        losses.append(stage.validate()["validation_loss"])
    found = precision.cold_start(_settings(), Console(quiet=True))
    assert found == Losses(losses[6:])
    assert found.final == pytest.approx((losses[6] + losses[7]) / 2)
    assert losses[6] != losses[7]


def test_the_comparison_trains_every_recipe_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(settings: Settings, console: Console) -> Losses:
        calls.append((settings.tasks, settings.recipe, settings.seed, settings.model))
        loss = 0.4 if settings.recipe == "bf16" else 0.405
        return Losses([loss])

    monkeypatch.setattr(precision, "cold_start", noted)
    saved = tmp_path / "precision.json"
    words = ["precision", "--tasks", "digit_sorting", "--seeds", "0", "5", "--save", str(saved)]
    monkeypatch.setattr("sys.argv", words)
    assert precision.main() == 1
    recipes = ("bf16", "fp8_block128")
    assert calls == [(("digit_sorting",), recipe, seed, "moe") for recipe in recipes for seed in (0, 5)]
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
