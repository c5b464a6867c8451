"""grpo_loss: the CUDA kernels, emulated, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from python_tests.emulator import emulated
from python_tests.emulator.checks import assert_same_in_every_order
from python_tests.samples.grpo_loss import LENGTHS, VARIANTS, batch, call, config_of, pack
from python_tests.test_grpo_loss import Inputs, assert_equal, assert_results_as_accurate, cast, run

SEGMENT = 1024  # tokens that a block takes
GROUP = 64  # records that one block merges
Sample = tuple[Inputs, dict[str, Any]]


def sample(variant: str, lengths: tuple[int, ...], seed: int, reduction: str) -> Sample:
    """Odd seeds are packed, with int32 or int64 bounds."""
    inputs, options = batch(variant, lengths=lengths, seed=seed), {}
    if seed % 2:
        inputs, cu_seqlens = pack(inputs, lead=seed, tail=3)
        options["cu_seqlens"] = cu_seqlens.int() if seed % 4 == 1 else cu_seqlens
        if reduction == "sequence_mean_token_sum_norm":
            options["max_length"] = max(lengths)
    return inputs, options


def check(variant: str, reduction: str, lengths: tuple[tuple[int, ...], ...], first_order: int = 0) -> None:
    """One batch per entry of `lengths`, each in another order; judged together: one number's error would be luck."""
    config = config_of(variant, reduction)
    results: dict[str, list[list[Tensor]]] = {"actual": [], "expected": [], "eager": []}
    for seed, rows in enumerate(lengths):
        inputs, options = sample(variant, rows, seed, reduction)
        with emulated(first_order + seed):
            results["actual"].append(run(cast(inputs, torch.float32), config, **options))
        with grpo_kernels.backend("reference"):
            results["expected"].append(run(inputs, config, **options))
            results["eager"].append(run(cast(inputs, torch.float32), config, **options))
    assert_results_as_accurate(**results)


# Every variant with two reductions in turn; with all six where there is time.
CASES = [
    pytest.param(variant, reduction, marks=[] if (i + j) % len(REDUCTIONS) in (0, 2) else pytest.mark.slow)
    for i, variant in enumerate(VARIANTS)
    for j, reduction in enumerate(REDUCTIONS)
]


@pytest.mark.parametrize(("variant", "reduction"), CASES)
def test_every_variant(variant: str, reduction: str) -> None:
    check(variant, reduction, (LENGTHS, (33, 31, 1, 0), (2, 9), (300, 5)))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_mean", "none"])
@pytest.mark.parametrize("variant", ["ppo", "everything", "vespo_mask", "off_policy_sampler"])
def test_rows_around_a_segment(variant: str, reduction: str) -> None:
    lengths = ((SEGMENT, 3), (SEGMENT + 1, 1, SEGMENT - 1), (2 * SEGMENT + 5, 2 * SEGMENT), (0, SEGMENT - 1))
    check(variant, reduction, lengths, first_order=1)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_mean", "none"])
@pytest.mark.parametrize("variant", ["ppo", "everything"])
def test_rows_around_a_group_of_records(variant: str, reduction: str) -> None:
    rows = (GROUP, GROUP - 3, GROUP + 1, 2 * GROUP)  # packed, there are two more segments than rows
    check(variant, reduction, tuple((7, 0, *[3] * (n - 2)) for n in rows), first_order=2)


@pytest.mark.parametrize("variant", ["ppo", "everything", "sapo", "vespo"])
def test_nothing_is_live(variant: str) -> None:
    inputs = cast(batch(variant), torch.float32)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    for order, reduction in enumerate(REDUCTIONS):
        with emulated(order):
            loss, gradient, entropy_gradient, metrics = run(inputs, config_of(variant, reduction))
        assert not loss.any()
        assert not gradient.any()
        assert not entropy_gradient.any()
        assert {k: v for k, v in grpo_kernels.GRPOMetrics(metrics).to_dict().items() if v} == {"masked_fraction": 1.0}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches(shape: tuple[int, int], packed: bool) -> None:
    per_token = (0,) if packed else shape
    inputs: Inputs = dict.fromkeys(("log_probs", "old_log_probs", "ref_log_probs", "entropy"), torch.zeros(per_token))
    inputs |= {"sampler_log_probs": torch.zeros(per_token), "token_weights": torch.zeros(shape[0]), "mask": None}
    inputs["advantages"] = torch.zeros(shape[0])
    options = {"cu_seqlens": torch.zeros(shape[0] + 1, dtype=torch.int32)} if packed else {}
    for order, reduction in enumerate(REDUCTIONS):
        with emulated(order):
            loss, gradient, entropy_gradient, _ = run(inputs, config_of("everything", reduction), **options)
        assert loss.shape == (per_token if reduction == "none" else ())
        assert not loss.any()
        assert gradient.shape == entropy_gradient.shape == per_token


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_tokens_may_hold_anything(reduction: str) -> None:
    clean, config = cast(batch("everything", lengths=(40, 7, 0)), torch.float32), config_of("everything", reduction)
    mask = clean["mask"]
    for garbage in (float("nan"), float("inf")):
        dirty = {
            name: torch.where(mask, value, garbage) if value is not None and value.shape == mask.shape else value
            for name, value in clean.items()
            if name != "mask"
        }
        with emulated(2):
            assert_equal(run({**dirty, "mask": mask}, config), run(clean, config))


@pytest.mark.parametrize("variant", ["ppo", "everything", "gspo"])
def test_forms_of_the_inputs(variant: str) -> None:
    """Masks of every width, none, views, and numbers on the device give the same bits."""
    inputs, config = cast(batch(variant, lengths=(40, 33, 7)), torch.float32), config_of(variant, "token_mean")
    mask, numbers = inputs["mask"], {"kl_coef": 0.125, "entropy_coef": 0.25, "num_items": 50.0}
    with emulated(3):
        expected = run(inputs, config, **numbers)
        for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
            assert_equal(run({**inputs, "mask": mask.to(dtype) * 2}, config, **numbers), expected)
        on_device = {name: torch.tensor(value) for name, value in numbers.items()}
        assert_equal(run(inputs, config, **on_device), expected)
        views = {
            name: torch.cat([value, value], 1)[:, : value.shape[1]] if value is not None and value.ndim == 2 else value
            for name, value in inputs.items()
        }
        assert_equal(run(views, config, **numbers), expected)
        everything = run({**inputs, "mask": torch.ones_like(mask)}, config, **numbers)
        assert_equal(run({**inputs, "mask": None}, config, **numbers), everything)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_sum", "none"])
def test_a_second_backward_with_another_upstream(reduction: str) -> None:
    inputs = cast(batch("everything", lengths=(40, 7, 0)), torch.float32)
    with emulated(4):
        lp = inputs["log_probs"].requires_grad_()
        loss = call(inputs, config_of("everything", reduction)).loss
        upstream = torch.linspace(-2.0, 2.0, loss.numel()).view(loss.shape)
        first = torch.autograd.grad(loss, lp, upstream, retain_graph=True)[0]
        again = torch.autograd.grad(loss, lp, upstream, retain_graph=True)[0]
        twice = torch.autograd.grad(loss, lp, 2 * upstream)[0]
    assert torch.equal(again, first)
    assert torch.equal(twice, 2 * first)


def test_bounds_of_packed_rows_that_make_no_sense_stay_inside() -> None:
    """The CPU raises; a GPU cannot look. Nothing outside the tensors is touched: the sanitized build runs this, too."""
    x = torch.linspace(-2.0, -1.0, 6)
    for bounds in ([0, 4, 2], [-1, 2, 6], [0, 2, 7], [9, -9, 2**40]):
        for reduction in ("token_mean", "sequence_mean_token_mean", "none"):
            leaf = x.clone().requires_grad_()
            with emulated(2):
                loss = grpo_kernels.grpo_loss(
                    leaf,
                    x - 0.1,
                    torch.ones(2),
                    None,
                    GRPOLossConfig(reduction=reduction),
                    cu_seqlens=torch.tensor(bounds),
                ).loss
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert gradient.shape == x.shape


@pytest.mark.parametrize("packed", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("lengths", "orders"),
    [(LENGTHS, range(32)), ((SEGMENT + 20, 5, 0), range(8)), ((3, 1, 0, 2) * 19, range(5))],
    ids=["short", "long", "many"],
)
@pytest.mark.parametrize("variant", ["ppo", "everything"])
def test_every_order_gives_the_same_bits(
    variant: str, lengths: tuple[int, ...], orders: Sequence[int], packed: int
) -> None:
    inputs, options = sample(variant, lengths, packed, "sequence_mean_token_mean")
    inputs, config = cast(inputs, torch.float32), config_of(variant, "sequence_mean_token_mean")
    assert_same_in_every_order(lambda: run(inputs, config, **options), orders)
