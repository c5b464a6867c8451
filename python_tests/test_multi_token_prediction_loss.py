"""mtp_linear_cross_entropy: every layout and option against a loop over depths and documents in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import MTPLossOutput, linear_cross_entropy, mtp_linear_cross_entropy
from grpo_kernels.linear_log_probs import chunks
from grpo_kernels.multi_token_prediction import api, loss
from grpo_kernels.testing import assert_as_accurate, poisoned_allocations
from python_tests.mtp_problems import (
    EVERY,
    LAYOUTS,
    LORA_SCALE,
    VOCAB,
    Layout,
    Leaves,
    assert_close,
    definition,
    predictions,
    problem,
    run,
    tokens,
)

pytestmark = pytest.mark.usefixtures("native_cpu")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"z_loss": 0.03, "normalizer": "tokens"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.6, "z_loss": 0.1, "temperature": 0.7},
    "ignored": {"ignore_index": 5, "logit_scale": -1.3, "num_items": 11},
    "shift_0": {"shift": 0, "num_items": torch.tensor(30.0), "temperature": torch.tensor(1.4)},
    "shift_3": {"shift": 3, "normalizer": "tokens"},
    "detached": {"detach_head": True, "z_loss": 0.02},
}
WEIGHTS = [0.5, -0.2, 1.5, 0.0]


@pytest.fixture(params=["one_pass", "within", "two_passes", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In chunks of five rows; or in one, whose logits lie where the weight's gradient will."""
    if request.param == "one_pass":
        monkeypatch.setattr(chunks, "fits", lambda *_: False)
        monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 5)
    if request.param == "two_passes":
        monkeypatch.setattr(loss, "may_form_gradients", lambda options: False)
    with grpo_kernels.backend("reference" if request.param == "reference" else "native"):
        yield request.param


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, depths: int, way: str) -> None:
    layout = LAYOUTS[name]
    leaves, ids = problem(layout, depths), tokens(layout)
    actual = run(leaves, ids, **layout.options)
    assert_close(actual, definition(leaves, ids, layout, torch.float64))
    assert actual[0].entropy is None
    assert actual[0].metrics is None


@pytest.mark.parametrize("depths", [1, 2, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, depths: int, way: str) -> None:
    for name in ("packed", "left_padding"):
        layout = LAYOUTS[name]
        leaves, ids = problem(layout, depths), tokens(layout)
        options = {"mask": torch.rand(layout.leading) < 0.8, "depth_weights": WEIGHTS[:depths], **OPTIONS[option]}
        actual = run(leaves, ids.int(), **options, **layout.options)
        assert_close(actual, definition(leaves, ids, layout, torch.float64, **options))


def test_numbers_and_tensors_of_every_kind(way: str) -> None:
    """Temperatures of tokens, weights in a tensor, a mask of numbers, hidden states one by one, other strides."""
    layout = LAYOUTS["packed_batch"]
    leaves, ids = problem(layout, 3), tokens(layout)
    temperatures = torch.rand(layout.leading) + 0.5
    options = {"mask": (torch.rand(layout.leading) < 0.8).double(), "depth_weights": torch.tensor(WEIGHTS[:3])}
    expected = definition(leaves, ids, layout, torch.float64, temperature=temperatures, **options)
    assert_close(run(leaves, ids, temperature=temperatures, **options, **layout.options), expected)
    turned = {name: _turned(value) for name, value in (*layout.options.items(), *options.items())}
    inputs = [_turned(leaf).requires_grad_() for leaf in leaves["hiddens"]]
    output = mtp_linear_cross_entropy(
        inputs, leaves["weight"], _turned(ids), bias=leaves["bias"], temperature=_turned(temperatures),
        lora=grpo_kernels.LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE), **turned,
    )  # fmt: skip
    found = torch.autograd.grad(output.loss * -1.7, inputs)
    assert_close((output, {"hiddens": torch.stack(found)}), expected)


def _turned(value: Tensor) -> Tensor:
    """The same values with the last two axes in another order in memory."""
    return value.mT.contiguous().mT if value.ndim > 1 else value


@pytest.mark.parametrize("trained", [("hiddens",), ("weight",), ("bias",), ("a", "b"), ("hiddens", "b"), ()])
@pytest.mark.parametrize("detach_head", [False, True])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[str, ...], detach_head: bool, way: str) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 3), tokens(layout)
    expected = definition(leaves, ids, layout, torch.float64, detach_head=detach_head)
    if trained:
        assert_close(run(leaves, ids, trained=trained, detach_head=detach_head), expected)
    else:
        with torch.no_grad():
            lora = grpo_kernels.LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE)
            output = mtp_linear_cross_entropy(leaves["hiddens"], leaves["weight"], ids, bias=leaves["bias"], lora=lora)
        assert_close((output, {}), expected)


@pytest.mark.parametrize("option", ["plain", "softcap", "detached"])
def test_as_accurate_as_float32_allows(option: str, way: str) -> None:
    layout, results = LAYOUTS["packed"], []
    for _ in range(24):
        leaves, ids = problem(layout, 3, scale=0.5), tokens(layout)
        narrow = {name: leaf.float() for name, leaf in leaves.items()}
        eager, exact = (
            definition(leaves, ids, layout, dtype, **OPTIONS[option]) for dtype in (torch.float32, torch.float64)
        )
        results.append((run(narrow, ids, **OPTIONS[option], **layout.options), exact, eager))
    judge(results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layout = LAYOUTS["packed"]
    for scale in (0.3, 3.0):
        leaves = {name: leaf.to(dtype) for name, leaf in problem(layout, 3, scale=scale).items()}
        ids = tokens(layout)
        with poisoned_allocations():
            actual = run(leaves, ids, z_loss=0.01, **layout.options)
        assert {gradient.dtype for gradient in actual[1].values()} == {dtype}
        assert {actual[0].loss.dtype, actual[0].log_probs.dtype, actual[0].agreement.dtype} == {torch.float32}
        eager, exact = (definition(leaves, ids, layout, wide, z_loss=0.01) for wide in (torch.float32, torch.float64))
        judge([(actual, exact, eager)])


def judge(results: list[tuple[tuple[MTPLossOutput, Leaves], ...]]) -> None:
    """Actual, in float64, in eager float32."""
    for name in ("loss", "depth_losses", "log_probs", *EVERY):
        actual, exact, eager = (
            torch.cat([(grads[name] if name in EVERY else getattr(output, name)).flatten() for output, grads in column])
            for column in zip(*results, strict=True)
        )
        assert_as_accurate(actual, exact, eager, name=name)


# --- against PyTorch and our own ops ---------------------------------------------------------------------------------


def test_equals_a_cross_entropy_for_every_depth(way: str) -> None:
    """What users write: labels shifted inside each document, one F.cross_entropy for each depth."""
    layout = LAYOUTS["packed"]
    leaves, ids = problem(layout, 3, names=("hiddens", "weight")), tokens(layout)
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    total = torch.zeros((), dtype=torch.float64)
    for depth, weight in enumerate((1.0, 0.15, 0.15)):
        labels = torch.full_like(ids, -100)
        for start, end in zip((2, 7, 7, 8), (7, 7, 8, 17), strict=True):
            labels[start : max(end - depth - 1, start)] = ids[min(start + depth + 1, end) : end]
        labels[17 : 21 - depth - 1] = ids[17 + depth + 1 : 21]
        labels[labels < 0] = -100
        total = total + weight * F.cross_entropy(F.linear(theirs["hiddens"][depth], theirs["weight"]), labels)
    expected = torch.autograd.grad(total * -1.7, list(theirs.values()))
    output, grads = run(leaves, ids, trained=("hiddens", "weight"), **layout.options)
    torch.testing.assert_close(output.loss.detach(), total.detach())
    for name, gradient in zip(theirs, expected, strict=True):
        torch.testing.assert_close(grads[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_depth_0_alone_is_linear_cross_entropy(dtype: torch.dtype) -> None:
    """Bit for bit the gradients; the loss but for the order of its sum."""
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 1, names=("hiddens", "weight", "bias")), tokens(layout)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    output, grads = run(leaves, ids, trained=tuple(leaves), shift=0, z_loss=0.1, upstream=1.0)
    ours = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    loss = linear_cross_entropy(ours["hiddens"][0], ours["weight"], ids, bias=ours["bias"], z_loss=0.1)
    torch.testing.assert_close(output.loss, loss)
    for name, gradient in zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True):
        assert torch.equal(grads[name], gradient), name


# --- what is known of every depth ------------------------------------------------------------------------------------


def test_acceptance_and_agreement() -> None:
    """A model that is right about everything, whose first draft is right in even rows, its second says 0."""
    layout = Layout((2, 40), [list(range(40)), list(range(40, 80))], {})
    ids = torch.randint(1, VOCAB, layout.leading)
    weight = torch.eye(VOCAB)
    hiddens = torch.zeros(3, 2, 40, VOCAB)
    hiddens[0, :, :-1] = 9.0 * F.one_hot(ids[:, 1:], VOCAB)
    draft = torch.where(torch.arange(38) % 2 == 0, ids[:, 2:], 0)
    hiddens[1, :, :-2] = 9.0 * F.one_hot(draft, VOCAB)
    hiddens[2, ..., 0] = 1.0
    output = mtp_linear_cross_entropy(hiddens, weight, ids)
    assert output.valid_counts.tolist() == [78, 76, 74]
    for shares in (output.acceptance, output.agreement):
        torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 0.0]))
    hiddens[0] = 0.0  # token 0 is likeliest everywhere: the lowest id among equals
    output = mtp_linear_cross_entropy(hiddens, weight, ids)
    torch.testing.assert_close(output.acceptance, torch.tensor([0.0, 0.5, 0.0]))
    torch.testing.assert_close(output.agreement, torch.tensor([1.0, 0.5, 1.0]))


def test_a_broken_row_is_accepted_by_nobody(way: str) -> None:
    layout = LAYOUTS["one"]
    leaves, ids = problem(layout, 2), torch.arange(9)
    leaves["hiddens"][0, 2] = leaves["hiddens"][1, 1] = math.nan
    output, grads = run(leaves, ids)
    assert output.log_probs.isnan().nonzero().tolist() == [[2]]
    assert output.depth_losses.isnan().all()
    assert output.agreement[0] == (output.valid_counts[0] - 1) / output.valid_counts[0]
    assert grads["hiddens"][0].isnan().any(1).nonzero().tolist() == [[2]]


# --- rows that predict nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_that_predict_nothing_may_hold_anything(poison: float, way: str) -> None:
    for name in ("packed", "left_padding"):
        layout = LAYOUTS[name]
        leaves, ids = problem(layout, 3), tokens(layout)
        dirty, dead = leaves["hiddens"].flatten(1, -2).clone(), torch.ones(3, ids.numel(), dtype=torch.bool)
        for depth in range(3):
            dead[depth, [row for row, _ in predictions(layout, ids, depth, 1, ids >= 0)]] = False
        dirty[dead] = poison
        for detach_head in (False, True):
            options = {"z_loss": 0.1, "detach_head": detach_head}
            actual = run({**leaves, "hiddens": dirty.view_as(leaves["hiddens"])}, ids, **options, **layout.options)
            assert_close(actual, definition(leaves, ids, layout, torch.float64, **options))
            assert not actual[1]["hiddens"].flatten(1, -2)[dead].any()


@pytest.mark.parametrize("normalizer", ["valid", "tokens"])
def test_nothing_counts(normalizer: str, way: str) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 2), tokens(layout)
    leaves["hiddens"].fill_(math.nan)
    for options in ({"mask": torch.zeros(layout.leading)}, {"shift": 7}, {"positions": torch.full(layout.leading, -1)}):
        output, grads = run(leaves, ids, z_loss=0.1, normalizer=normalizer, **options)
        for value in (output.loss, *output[1:6], *grads.values()):
            assert not value.any()
            assert not value.isnan().any()


@pytest.mark.parametrize("temperature", [0.0, math.nan, math.inf])
def test_rows_that_predict_nothing_may_have_any_temperature(temperature: float, way: str) -> None:
    """The last row has no token; its temperature reaches no gradient."""
    layout = LAYOUTS["one"]
    leaves, ids = problem(layout, 1), tokens(layout)
    options = {"z_loss": 0.1, "shift": 1}
    temperatures = torch.linspace(0.7, 1.5, 9).double()
    expected = definition(leaves, ids, layout, torch.float64, temperature=temperatures, **options)
    temperatures = temperatures.clone()
    temperatures[-1] = temperature
    assert_close(run(leaves, ids, temperature=temperatures, **options), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_that_no_tensor_holds(dtype: torch.dtype, way: str) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 2), tokens(layout).clamp(min=0).to(dtype)
    counts = run(leaves, ids)[0].valid_counts
    for ignore_index in (2**32, 2**32 + 5, 2**63, -(2**70)):
        assert torch.equal(run(leaves, ids, ignore_index=ignore_index)[0].valid_counts, counts)
    assert not run(leaves, ids, shift=2**70)[0].valid_counts.any()


def test_states_of_no_width_are_refused_by_their_name() -> None:
    with pytest.raises(ValueError, match=r"hiddens must have shape \[..., H\] with H >= 1, got \[2, 3, 0\]"):
        mtp_linear_cross_entropy(torch.zeros(2, 3, 0), torch.zeros(5, 0), torch.zeros(3, dtype=torch.int64))


def test_a_token_outside_the_vocabulary_raises_where_it_is_predicted(way: str) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 2), tokens(layout)
    ids[1, 3] = VOCAB
    with pytest.raises(ValueError, match=rf"token_ids\[1, 3\] must be < V = {VOCAB}, or negative in a masked row, got"):
        run(leaves, ids)
    run(leaves, ids, ignore_index=VOCAB)
    ids[1] = torch.arange(7)
    ids[1, 0] = VOCAB  # the first of a document is predicted by none
    run(leaves, ids)


def test_huge_logits(way: str) -> None:
    layout = LAYOUTS["packed"]
    leaves, ids = problem(layout, 2, scale=3e3), tokens(layout)
    assert_close(run(leaves, ids, **layout.options), definition(leaves, ids, layout, torch.float64))


# --- faults that must show -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["leak", "roll", "depth_0_first", "count"])
def test_planted_faults_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label of the next document, a rolled label, documents as depth 0 sees them, wrong counts."""
    targets_of = api._targets

    def wrong(token_ids: Tensor, placed: Any, mask: Any, depths: int, shift: int, *others: Any) -> Any:
        if fault == "leak":
            return targets_of(token_ids, api.Documents(None, 0), mask, depths, shift, *others)
        targets, counts = targets_of(token_ids, placed, mask, depths, shift, *others)
        ids = token_ids.reshape(-1)
        if fault == "roll":
            rolled = torch.stack([ids.roll(-depth - shift) for depth in range(depths)])
            return rolled, (rolled >= 0).sum(1)
        if fault == "depth_0_first":
            ahead = torch.stack([torch.where(targets[0] >= 0, ids.roll(-depth - shift), -1) for depth in range(depths)])
            return ahead, (ahead >= 0).sum(1)
        return targets, counts + 1

    monkeypatch.setattr(api, "_targets", wrong)
    layout = LAYOUTS["positions"]
    leaves, ids = problem(layout, 3), tokens(layout)
    with pytest.raises(AssertionError):
        assert_close(run(leaves, ids, **layout.options), definition(leaves, ids, layout, torch.float64))


def test_a_leaked_label_costs_up_to_log_v() -> None:
    """Documents that are certain of themselves, and know nothing of the next."""
    ids = torch.arange(20).repeat(2) % VOCAB
    hiddens = torch.zeros(1, 40, VOCAB)
    following = (torch.arange(40) % 20 < 19).nonzero()[:, 0]
    hiddens[0, following] = 50.0 * F.one_hot(ids[following + 1], VOCAB)
    for options, expected in ({"positions": torch.arange(40) % 20}, 0.0), ({}, math.log(VOCAB) / 39):
        loss = mtp_linear_cross_entropy(hiddens, torch.eye(VOCAB), ids, **options).loss
        torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)
