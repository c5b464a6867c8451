"""The training example: its model and its samples are what they should be, and forty steps raise the rewards."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from examples.r1.errors import RunError
from examples.r1.policy import vocabulary
from examples.r1.policy.model import CharTransformer, ModelConfig
from examples.r1.policy.rollout import generate, roll_out
from examples.r1.policy.sequences import Sequences, make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.results import Record
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages.grpo import DiverseRL, LossInputs, ReasoningRL, RLStage
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from examples.r1.stages.sft import ColdStart
from grpo_kernels import FusedLMHead
from grpo_kernels.testing import assert_as_accurate
from python_tests.r1_stages import CPU, DIGITS, beginner, gradients, one_thread, tiny_run

__all__ = ["one_thread"]


class Step(NamedTuple):
    """The loss, and its gradients with respect to the hidden states and the head's weight."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


class Checked(NamedTuple):
    """One step's loss and gradients: the package's, and those of plain PyTorch in float64 and in float32."""

    actual: Step
    expected: Step
    eager: Step
    largest_ratio: float
    top_probability: float


def _by_hand(stage: RLStage, weight: Tensor, hidden: Tensor, inputs: LossInputs) -> Step:
    """GRPO's loss from logits, as the paper has it, in the dtype of the weight."""
    weight, hidden = (value.detach().requires_grad_() for value in (weight, hidden.to(weight.dtype)))
    mask = inputs.sequences.mask
    all_log_probs = torch.log_softmax(F.linear(hidden, weight) / stage.temperature, dim=-1)
    log_probs = all_log_probs.gather(-1, inputs.sequences.completions.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(log_probs - inputs.old_log_probs.to(weight.dtype))
    clipped = ratio.clamp(1 - stage.loss_config.clip_low, 1 + stage.loss_config.clip_low)
    advantages = inputs.advantages.to(weight.dtype).unsqueeze(1)
    gap = inputs.ref_log_probs.to(weight.dtype) - log_probs
    penalty = stage.settings.kl_coef * (torch.exp(gap) - gap - 1)
    per_token = (penalty - torch.minimum(ratio * advantages, clipped * advantages)) * mask
    loss = (per_token.sum(dim=1) / mask.sum(dim=1)).mean()
    return Step(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def _fused(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> Step:
    leaf = hidden.clone().requires_grad_()
    loss = stage.loss(head, leaf, inputs).loss
    return Step(loss.detach(), *torch.autograd.grad(loss, (leaf, head.weight)))


def _check_gradient(stage: RLStage, inputs: LossInputs) -> Checked:
    """The loss of samples from before an update, under the policy after it: the ratios differ from 1."""
    sequences, head = inputs.sequences, stage.model.head
    with torch.no_grad():
        hidden = stage.model.completion_hidden(sequences.prompts, sequences.completions)
        top = head(hidden).softmax(dim=-1).amax(dim=-1)[sequences.mask]
    ratios = torch.exp(sequence_log_probs(stage.model, sequences, stage.temperature) - inputs.old_log_probs)
    return Checked(
        _fused(stage, head, hidden, inputs),
        _by_hand(stage, head.weight.double(), hidden, inputs),
        _by_hand(stage, head.weight, hidden, inputs),
        float(ratios.max()),
        float(top.mean()),
    )


def _assert_is_the_definition(found: Checked) -> None:
    assert found.largest_ratio > 1.001
    # The loss is a sum that nearly cancels (advantages have mean zero): it gets PyTorch's usual tolerance.
    torch.testing.assert_close(found.actual.loss, found.expected.loss.float())
    for name in ("hidden", "weight"):
        actual, expected, eager = (getattr(step, name) for step in found[:3])
        assert float(expected.abs().max()) > 0.0
        assert_as_accurate(actual, expected, eager, name=name)
        with pytest.raises(AssertionError, match=f"{name}: error"):  # a fault of a thousandth of a percent
            assert_as_accurate(actual * (1 + 1e-5), expected, eager, name=name)


class Trained(NamedTuple):
    records: list[Record]
    checked: list[Checked]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A cold start, then forty steps of reasoning RL on 16 prompts, checked at three of them."""
    run = Run.prepare(Settings(threads=1, evaluation_prompts=16, prompts=16, dynamic_sampling=1, cold_start_steps=100))
    stage = ReasoningRL(beginner(run, (DIGITS,)), run)
    records, checked = [], []
    for index in range(40):
        inputs = stage.loss_inputs(stage.sample(index), index) if index in (0, 20, 39) else None
        records.append(stage.step(index))
        if inputs is not None:
            checked.append(_check_gradient(stage, inputs))
    return Trained(records, checked)


def _mean(records: list[Record], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


@pytest.mark.slow
def test_forty_steps_raise_the_rewards_of_the_samples(trained: Trained) -> None:
    first, last = trained.records[:5], trained.records[-5:]
    assert _mean(last, f"{DIGITS}/accuracy") >= _mean(first, f"{DIGITS}/accuracy") + 0.15
    assert _mean(last, "language") >= _mean(first, "language") + 0.1
    assert _mean(last, "reward") >= _mean(first, "reward") + 0.2
    assert _mean(last, "entropy") < _mean(first, "entropy")
    assert 0.0 < _mean(last, "kl") < 1.0


@pytest.mark.slow
def test_the_last_update_of_every_rollout_is_off_policy(trained: Trained) -> None:
    assert all(record["ratio_max"] > 1.001 for record in trained.records)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_gradients_while_it_learns_equal_the_definition_in_float64(trained: Trained, moment: int) -> None:
    _assert_is_the_definition(trained.checked[moment])
    if moment > 0:
        assert trained.checked[moment].top_probability > 0.9  # peaked: what random logits do not test


# the losses ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Run:
    steps = {"cold_start_steps": 60, "reasoning_rl_steps": 40, "diverse_rl_steps": 40}
    return tiny_run(width=32, prompts=8, sft_batch=32, sft_learning_rate=6e-3, **steps)


@pytest.fixture(scope="module")
def begun(run: Run) -> CharTransformer:
    """A policy that answers in form, sorts some digits, and is sure of most tokens."""
    return beginner(run, (DIGITS,))


@pytest.mark.parametrize("name", ["reasoning_rl", "diverse_rl"])
def test_gradients_equal_the_definition_in_float64(name: str, run: Run, begun: CharTransformer) -> None:
    """At the temperature of either stage; rewards are those of the stage."""
    model = copy.deepcopy(begun)
    stage = ReasoningRL(model, run) if name == "reasoning_rl" else DiverseRL(model, run, RewardModel(run.build_judge()))
    inputs = stage.loss_inputs(stage.sample(0), 0)
    assert float(inputs.advantages.abs().max()) > 0.5
    stage.update(inputs, 10)
    found = _check_gradient(stage, inputs)
    _assert_is_the_definition(found)
    assert found.top_probability > 0.6


def test_the_losses_from_hidden_states_are_those_from_logits(run: Run, begun: CharTransformer) -> None:
    """With the gradients of all parameters, under a policy that is not the one that sampled."""
    model = copy.deepcopy(begun)
    cold_start = ColdStart(model, run)
    batch = cold_start.data.select(slice(0, 16))

    def logits(sequences: Sequences) -> Tensor:
        return model.head(model.completion_hidden(sequences.prompts, sequences.completions))

    loss = cold_start.loss(batch)
    expected = F.cross_entropy(logits(batch)[batch.mask], batch.completions[batch.mask])
    torch.testing.assert_close((loss, gradients(loss, model)), (expected, gradients(expected, model)))

    stage = ReasoningRL(model, run)
    inputs = stage.loss_inputs(stage.sample(0), 0)
    stage.update(inputs, 10)
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
        (output.loss, gradients(output.loss, model)), (from_logits.loss, gradients(from_logits.loss, model))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_tempered_softmax(temperature: float) -> None:
    model = _small_model()
    prompts = torch.randint(2, vocabulary.SIZE, (2, 8))
    sequences = make_sequences(prompts, torch.randint(1, 4, (4, 6)))
    assert not bool(sequences.mask.all())
    with torch.no_grad():
        logits = model.head(model.completion_hidden(prompts, sequences.completions)) / temperature
    expected = logits.log_softmax(dim=-1).gather(-1, sequences.completions.unsqueeze(-1)).squeeze(-1)
    found = sequence_log_probs(model, sequences, temperature)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), expected.masked_fill(~sequences.mask, 0.0), rtol=1e-6, atol=1e-6)


# the model -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_model_the_temperature_and_the_generator(temperature: float) -> None:
    model = _small_model()
    prompts = torch.randint(2, vocabulary.SIZE, (1, 8))

    def sampled(seed: int) -> Tensor:
        options = {"group_size": 4000, "temperature": temperature, "generator": torch_rng(CPU, seed)}
        return generate(model, prompts, 1, **options)  # type: ignore[arg-type]

    first = sampled(1)
    assert torch.equal(first, sampled(1))
    assert not torch.equal(first, sampled(2))
    shares = torch.bincount(first.flatten(), minlength=vocabulary.SIZE).double() / 4000
    with torch.no_grad():
        expected = (model.head(model.completion_hidden(prompts, prompts[:, :1]))[0, 0] / temperature).softmax(dim=-1)
    deviation = (shares - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert float(deviation.abs().max()) < 5.0


def test_nothing_counts_after_the_end() -> None:
    end, pad = vocabulary.END, vocabulary.PAD
    completions = torch.tensor([[5, 6, end, pad], [end, pad, pad, pad], [5, 6, 7, 8]])
    mask = make_sequences(torch.zeros(3, 2, dtype=torch.long), completions).mask
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]


def test_parts_of_a_batch_keep_prompts_and_completions_together() -> None:
    prompts, completions = torch.arange(8).view(4, 2), torch.arange(2, 26).view(8, 3)
    sequences = make_sequences(prompts, completions)
    for part, groups in ((sequences.select(slice(1, 3)), [1, 2]), (sequences.select(torch.tensor([3, 0])), [3, 0])):
        assert torch.equal(part.prompts, prompts[groups])
        assert torch.equal(part.completions, torch.cat([completions[2 * g : 2 * g + 2] for g in groups]))
        assert part.mask.shape == part.completions.shape
        assert part.group_size == 2


def test_rollouts_say_what_was_written_and_what_the_rules_say_of_it(run: Run, begun: CharTransformer) -> None:
    problems = [problem for held_out in run.held_out.values() for problem in held_out[:4]]
    rollout = roll_out(begun, run, problems, group_size=3, generator=torch_rng(CPU, 1))
    assert rollout.group_size == 3
    assert rollout.problem_of_each == [problem for problem in problems for _ in range(3)]
    for text, row, mask in zip(rollout.texts, rollout.sequences.completions, rollout.sequences.mask, strict=True):
        assert text == vocabulary.decode(row.tolist())
        assert int(mask.sum()) == min(len(vocabulary.encode(text)) + 1, run.completion_length)
    means = rollout.means()
    digits = rollout.rulings[:12]
    assert means[f"{DIGITS}/format"] == pytest.approx(float(digits[:, 1].mean()))
    assert means[f"{DIGITS}/format"] > 0.0
    assert means.keys() == {f"{DIGITS}/{name}" for name in ("accuracy", "format", "language")} | {
        f"spell_backward/{name}" for name in ("accuracy", "format")
    }


@pytest.mark.parametrize("place", [0, 1, 5, None])
def test_padding_inside_a_completion_breaks_its_form(
    place: int | None, run: Run, begun: CharTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing keeps a policy from sampling the token, and the text does not show it."""
    problem = run.held_out[DIGITS][0]
    ids = [*vocabulary.encode(run.tasks[DIGITS].solve(problem)), vocabulary.END]
    if place is not None:
        ids.insert(place, vocabulary.PAD)
    monkeypatch.setattr("examples.r1.policy.rollout.generate", lambda *_, **__: torch.tensor([ids]))
    found = roll_out(begun, run, [problem])
    assert found.rulings[0].tolist() == ([1.0, 1.0, 1.0] if place is None else [0.0, 0.0, 0.0])


@pytest.mark.parametrize("part", ["head.weight", "mtp.layers.0.eh_proj.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverges_says_so_and_keeps_its_parameters(part: str, value: float) -> None:
    stage = ColdStart((run := tiny_run(mtp=1)).build_policy(), run)
    stage.step(0)
    before = {name: parameter.clone() for name, parameter in stage.model.named_parameters()}
    parameter = stage.model.get_parameter(part)
    with pytest.raises(RunError, match="cold_start, step 2: a gradient is NaN or infinite"):
        stage.descend(parameter.sum() * value, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in stage.model.named_parameters())
