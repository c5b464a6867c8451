"""The mixture-of-experts model of the training example: routes of the rollout in every pass, balance, and learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.policy import vocabulary
from examples.r1.policy.model import CharTransformer, ModelConfig
from examples.r1.policy.rollout import generate
from examples.r1.policy.routes import Recorder, Routes
from examples.r1.policy.sequences import make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.run import Run
from examples.r1.settings import Settings
from examples.r1.stages.grpo import DiverseRL, ReasoningRL
from examples.r1.stages.judge import RewardModel
from examples.r1.stages.log_probs import sequence_log_probs
from examples.r1.stages.sft import ColdStart
from grpo_kernels import RouterReplay
from python_tests.r1_stages import CPU, DIGITS, beginner, one_thread, tiny_run

__all__ = ["one_thread"]

EXPERTS, K, LAYERS = 4, 2, 2
PROMPT, COMPLETION = 8, 6


def _model() -> CharTransformer:
    torch.manual_seed(0)
    config = ModelConfig(max_length=20, width=16, layers=LAYERS, heads=2, experts=EXPERTS, balance_coef=0.01)
    return CharTransformer(config).double()


def _prompts() -> Tensor:
    prompts = torch.randint(2, vocabulary.SIZE, (3, PROMPT), generator=torch.Generator().manual_seed(1))
    prompts[1, :3] = vocabulary.PAD
    return prompts


def _sampled(model: CharTransformer) -> tuple[Tensor, Routes]:
    """Completions [6, C], two a prompt, and the routes of sampling them."""
    recorder = Recorder(EXPERTS)
    completions = generate(model, _prompts(), COMPLETION, group_size=2, generator=torch_rng(CPU, 2), recorder=recorder)
    return completions.clone(), recorder.routes(len(completions), COMPLETION)


def _ids(routes: Routes) -> list[Tensor]:
    """Experts of every layer, of the prompts and then of the completions."""
    return [router.topk_ids for _, router in routes.reports]


def test_training_takes_the_routes_of_sampling() -> None:
    model = _model()
    completions, routes = _sampled(model)
    assert routes.prompts is not None
    assert routes.completions is not None
    assert (routes.prompts.num_tokens, routes.completions.num_tokens) == (3 * PROMPT, 6 * (COMPLETION - 1))
    live, replayed = Routes(), routes.again()
    hidden = model.completion_hidden(_prompts(), completions, live)
    torch.testing.assert_close(model.completion_hidden(_prompts(), completions, replayed), hidden, rtol=0, atol=1e-12)
    for mine, theirs in zip(_ids(replayed), _ids(live), strict=True):
        assert torch.equal(mine, theirs)  # in float64 sampling and training choose alike
    assert replayed.metrics(K)["route_mismatch"] == 0.0
    wanted = [
        replay.ids(layer).to(torch.int32)  # type: ignore[union-attr]
        for replay in (routes.prompts, routes.completions)
        for layer in range(LAYERS)
    ]
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.weight.neg_()
    moved, changed = routes.again(), Routes()
    model.completion_hidden(_prompts(), completions, moved)
    model.completion_hidden(_prompts(), completions, changed)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(_ids(moved), wanted, strict=True))
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(_ids(changed), wanted, strict=True))
    assert 0.3 < moved.metrics(K)["route_mismatch"] <= 1.0


def test_padding_is_routed_nowhere() -> None:
    model = _model()
    completions, routes = _sampled(model)
    reports = routes.again()
    model.completion_hidden(_prompts(), completions, reports)
    padding = [(_prompts() == vocabulary.PAD).flatten()] * LAYERS
    padding += [(completions[:, :-1] == vocabulary.PAD).flatten()] * LAYERS
    for ids, pad in zip(_ids(reports), padding, strict=True):
        assert torch.equal((ids == -1).all(dim=1), pad)
        assert torch.equal((ids == -1).any(dim=1), pad)
    live = sum(int((~pad).sum()) for pad in padding[::LAYERS])
    assert reports.loads().sum(dim=1).tolist() == [K * live] * LAYERS


@pytest.mark.parametrize("columns", [0, 2])
def test_columns_after_the_last_end_have_no_route(columns: int) -> None:
    recorder = Recorder(EXPERTS)
    for tokens in (3 * PROMPT, *[6] * columns):
        replay = recorder.next_pass()
        for layer in range(LAYERS):
            replay.record(layer, torch.tensor([[1, 3]]).expand(tokens, K))
    completions = recorder.routes(6, COMPLETION).completions
    assert completions is not None
    rows = completions.pack().view(6, COMPLETION - 1, LAYERS, K)
    assert (rows[:, :columns] == torch.tensor([1, 3])).all()
    assert (rows[:, columns:] == -1).all()


def test_parts_of_a_batch_take_their_own_routes() -> None:
    model = _model()
    completions, routes = _sampled(model)
    whole = model.completion_hidden(_prompts(), completions, routes.again())
    for start, end in ((0, 2), (2, 3)):
        part = routes.select(slice(start, end), prompts=3)
        hidden = model.completion_hidden(_prompts()[start:end], completions[2 * start : 2 * end], part)
        torch.testing.assert_close(hidden, whole[2 * start : 2 * end], rtol=1e-12, atol=1e-12)
        assert part.metrics(K)["route_mismatch"] == 0.0
    assert Routes().select(slice(0, 1), prompts=3).prompts is None


def test_loads_and_losses_of_the_passes() -> None:
    model = _model()
    completions, _ = _sampled(model)
    routes = Routes()
    model.completion_hidden(_prompts(), completions, routes)
    assert len(routes.reports) == 2 * LAYERS
    loads = routes.loads().double()
    losses = [router.seq_aux_loss for _, router in routes.reports]
    torch.testing.assert_close(routes.balance_loss(), sum(losses[1:], losses[0]) / 2)
    assert all(0.005 < loss.item() < 0.04 for loss in losses)  # 0.01 if all is even
    expected = max(float(row.max() / row.mean()) for row in loads)
    assert routes.metrics(K) == {"expert_load": pytest.approx(expected), "route_mismatch": 0.0}
    assert routes.reports == []


def test_the_balance_loss_is_a_mean_over_sequences() -> None:
    """Prompts and completions are sequences of their own: each row's experts are balanced by themselves."""
    model = _model()
    completions, _ = _sampled(model)
    whole = Routes()
    model.completion_hidden(_prompts(), completions, whole)
    alone = []
    for row in range(6):
        routes = Routes()
        model.completion_hidden(_prompts()[row // 2, None], completions[row, None], routes)
        alone.append(routes.balance_loss())
    torch.testing.assert_close(whole.balance_loss(), torch.stack(alone).mean())


# stages ----------------------------------------------------------------------------------------------------------


def _run(**changes: Any) -> Run:
    return tiny_run(**{"model": "moe", "experts": EXPERTS, **changes})


def _biases(model: CharTransformer) -> list[Tensor]:
    return [layer.e_score_correction_bias.clone() for layer in model.moe_layers]  # type: ignore[union-attr]


def _reverse(model: CharTransformer) -> None:
    """From now on live routing goes elsewhere."""
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.weight.neg_()


def test_biases_move_where_demonstrations_are_imitated_and_then_stay() -> None:
    run = _run()
    model = run.build_policy()
    assert not any(bias.any() for bias in _biases(model))
    record = ColdStart(model, run).step(0)
    assert record.keys() == {"loss", "balance_loss", "expert_load", "grad_norm", "tokens", "seconds"}
    for bias in _biases(model):
        assert bias.any()
        assert torch.equal(bias, 1e-3 * bias.sign())
    before = _biases(model)
    stage = DiverseRL(model, run, RewardModel(run.build_judge()))
    stage.step(0)
    assert all(torch.equal(bias, old) for bias, old in zip(_biases(model), before, strict=True))
    assert all(torch.equal(bias, old) for bias, old in zip(_biases(stage.reference), before, strict=True))


def test_the_balance_loss_and_the_biases_even_out_the_loads() -> None:
    def late_load(**changes: float) -> float:
        run = _run(seed=1, cold_start_steps=40, sft_batch=16, **changes)
        stage = ColdStart(run.build_policy(), run)
        return sum([stage.step(index)["expert_load"] for index in range(stage.steps)][-10:]) / 10

    skewed = late_load(balance_coef=0.0, bias_update_rate=0.0)
    assert late_load(balance_coef=1.0, bias_update_rate=0.0) < skewed - 0.1
    assert late_load(balance_coef=0.0, bias_update_rate=1e-2) < skewed - 0.1


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("source", ["rollout", "old", "off"])
def test_whose_routes_are_replayed(source: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an untrained policy writes is right: two rounds give as many groups to choose among, and do."""
    run = _run(replay=source, dynamic_sampling=rounds)
    model = run.build_policy()
    stage = ReasoningRL(model, run)
    _reverse(stage.reference)
    samples = stage.sample(0)
    assert samples.rounds == rounds
    assert (samples.rollout.routes is not None) == (source == "rollout")
    seen: list[list[Tensor]] = []
    passes = CharTransformer.completion_hidden

    def watched(model: CharTransformer, prompts: Tensor, completions: Tensor, routes: Routes | None = None) -> Tensor:
        routes = routes or Routes()
        hidden = passes(model, prompts, completions, routes)
        seen.append(_ids(routes))
        return hidden

    monkeypatch.setattr(CharTransformer, "completion_hidden", watched)
    inputs = stage.loss_inputs(samples, 0)
    assert (inputs.routes is not None) == (source != "off")
    _reverse(model)
    stage.update(inputs, 0)
    old, ref, first, second = seen
    for index, wanted in enumerate(old):
        parts = torch.cat([first[index], second[index]])  # two updates, each on half the prompts
        assert torch.equal(ref[index], wanted) == (source != "off")
        assert torch.equal(parts, wanted) == (source != "off")


def test_replay_makes_the_ratio_of_the_first_update_one() -> None:
    """Old log-probs along the routes of the rollout equal the training pass's, although live routes have changed."""
    run = _run(updates_per_rollout=1)
    stage = ReasoningRL(run.build_policy(), run)
    record = stage.update(stage.loss_inputs(stage.sample(0), 0), 0)
    assert record["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert record["route_mismatch"] < 0.02  # sampling and training differ by rounding


def test_log_probs_of_other_routes_are_other_log_probs() -> None:
    """What replay is for: the same tokens and weights, but other experts."""
    model = _model()
    completions, routes = _sampled(model)
    sequences = make_sequences(_prompts(), completions)
    same = sequence_log_probs(model, sequences, 1.0, routes)
    torch.testing.assert_close(sequence_log_probs(model, sequences, 1.0), same, rtol=0, atol=1e-6)
    assert routes.completions is not None
    packed = routes.completions.pack()
    rotated = torch.where(packed < 0, packed, (packed + 1) % EXPERTS)
    other = Routes(routes.prompts, RouterReplay.from_packed(rotated, EXPERTS, range(LAYERS)))
    assert float((sequence_log_probs(model, sequences, 1.0, other) - same).abs().max()) > 1e-2


def test_a_dense_model_has_no_routes() -> None:
    run = _run(model="dense")
    model = run.build_policy()
    assert model.moe_layers == []
    stage = ReasoningRL(model, run)
    samples = stage.sample(0)
    assert samples.rollout.routes is None
    assert stage.loss_inputs(samples, 0).routes is None
    assert not {"expert_load", "route_mismatch", "rollout_mismatch"} & stage.step(0).keys()


@pytest.mark.parametrize("replay", ["rollout", "off"])
def test_a_step_says_how_routes_differ(replay: str) -> None:
    run = _run(replay=replay)
    record = ReasoningRL(run.build_policy(), run).step(0)
    assert record["expert_load"] >= 1.0
    assert 0.0 <= record["route_mismatch"] <= 1.0
    assert ("rollout_mismatch" in record) == (replay == "rollout")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_moe_model_learns() -> None:
    """Fifty steps of digit sorting after a short cold start: greedy .82 -> .91, sampled .34 -> .69 with seed 0."""
    run = Run.prepare(
        Settings(threads=1, model="moe", evaluation_prompts=128, cold_start_steps=80, reasoning_rl_steps=80, prompts=16)
    )
    stage = ReasoningRL(beginner(run, (DIGITS,)), run)
    before = stage.evaluate()
    records = [stage.step(index) for index in range(50)]
    after = stage.evaluate()
    assert after[f"{DIGITS}/accuracy"] >= 0.85
    assert after[f"{DIGITS}/accuracy"] >= before[f"{DIGITS}/accuracy"] + 0.03
    assert after[f"{DIGITS}/sampled_accuracy"] >= before[f"{DIGITS}/sampled_accuracy"] + 0.2
    assert max(record["expert_load"] for record in records) < 4.0  # E / K: all tokens at the same two experts
    assert max(record["rollout_mismatch"] for record in records) < 0.01  # rounding
    assert max(record["route_mismatch"] for record in records) > 0.001  # what replay keeps out of the ratios
