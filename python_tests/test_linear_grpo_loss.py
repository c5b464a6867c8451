"""linear_grpo_loss: one pass and two passes over the head against logits, log_softmax and the loss in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig
from grpo_kernels.linear_log_probs import chunks
from python_tests.linear_grpo_problems import (
    EVERY,
    Problem,
    assert_close,
    cast,
    definition,
    judge,
    problem,
    run,
    two_passes,
)
from python_tests.samples.grpo_loss import VARIANTS, config_of

pytestmark = pytest.mark.usefixtures("native_cpu")

PRESETS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "gspo_token", "gmpo", "dro")
SCALARS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm")
WITHOUT_ITEMS = ("none", "token_sum")
NAN = math.nan


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside sequences."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 5)


# --- against the definition in float64 -------------------------------------------------------------------------------


def expected_passes(variant: str, reduction: str, packed: bool) -> int:
    """Written apart from the op: what must see more than a token's own log-prob."""
    fields = VARIANTS[variant]
    if reduction == "none" or "top_entropy_quantile" in fields or fields.get("surrogate") in ("clip_cov", "kl_cov"):
        return 2
    whole = "off_policy_threshold" in fields or "ratio_level" in fields
    return 2 if packed and (whole or fields.get("surrogate") in ("vespo", "gmpo")) else 1


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, packed: bool) -> None:
    for index, reduction in enumerate((*SCALARS, *WITHOUT_ITEMS)):
        p, options = problem(variant, packed=packed, seed=index)
        config = config_of(variant, reduction)
        if reduction == "sequence_mean_token_sum_norm" and packed:
            options["max_length"] = 9
        if index % 2 and reduction not in WITHOUT_ITEMS:
            options["num_items"] = torch.tensor(3.0) if index == 1 else 7
        expected = definition(p, config, torch.float64, **options)
        actual = run(p, config, **options)
        assert actual[0].metrics.passes == expected_passes(variant, reduction, packed)
        assert_close(actual, expected)
        with two_passes():
            again = run(p, config, **options)
        assert again[0].metrics.passes == 2
        assert_close(again, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_accurate_as_float32_allows(preset: str) -> None:
    config = GRPOLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.05)
    results: dict[str, list[tuple[Any, dict[str, Tensor]]]] = {"actual": [], "expected": [], "eager": []}
    for seed in range(12):
        p, options = problem(seed=seed, packed=seed % 4 == 2 and preset != "dr_grpo")
        p = cast(cast(p, torch.float32), torch.float64)
        results["expected"].append(definition(p, config, torch.float64, **options))
        results["eager"].append(definition(cast(p, torch.float32), config, torch.float32, **options))
        results["actual"].append(run(cast(p, torch.float32), config, **options))
    judge(**results)


@pytest.mark.parametrize("variant", ["ppo", "gspo", "everything"])
def test_bfloat16(variant: str) -> None:
    """Log-probs as from float32; gradients are rounded to bfloat16 once, twice with an upstream that is no power of
    two."""
    config = config_of(variant, "sequence_mean_token_mean")
    p, _ = problem(variant)
    p = cast(p, torch.float32, half=torch.bfloat16)
    wide = cast(p, torch.float64)
    actual = run(p, config)
    assert actual[0].loss.dtype == actual[0].log_probs.dtype == torch.float32
    assert {gradient.dtype for gradient in actual[1].values()} == {torch.bfloat16}
    judge(
        [actual], [definition(wide, config, torch.float64)], [definition(cast(p, torch.float32), config, torch.float32)]
    )


# --- options, and what the loss may not depend on --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": "per_row"}, {"logit_scale": -1.3, "temperature": torch.tensor(1.4)},
     {"softcap": 2.0, "logit_scale": 0.6}],
    ids=["temperature", "per_row", "scale", "softcap"],
)  # fmt: skip
def test_options_of_the_head(options: dict[str, Any]) -> None:
    for variant in ("entropy_bonus", "gspo"):
        p, _ = problem(variant)
        if options.get("temperature") == "per_row":
            options = {"temperature": torch.rand(p["ids"].shape).double() + 0.5}
        config = config_of(variant, "token_mean")
        actual = run(p, config, **options)
        assert actual[0].metrics.passes == 1
        assert_close(actual, definition(p, config, torch.float64, **options))


@pytest.mark.parametrize("absent", [("bias",), ("a", "b"), ("bias", "a", "b")], ids=["bias", "lora", "both"])
def test_a_head_without(absent: tuple[str, ...]) -> None:
    p, _ = problem()
    p = {**p, **dict.fromkeys(absent)}
    config = config_of("kl_k3", "token_mean")
    trained = tuple(name for name in EVERY if name not in absent)
    assert_close(run(p, config, trained=trained), definition(p, config, torch.float64))


def test_device_coefficients_equal_numbers() -> None:
    p, _ = problem("kl_k3")
    expected = run(p, GRPOLossConfig(), kl_coef=0.3, entropy_coef=0.2, num_items=11.0)
    numbers = {"kl_coef": 0.3, "entropy_coef": 0.2, "num_items": 11.0}
    actual = run(p, GRPOLossConfig(), **{name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})
    assert_close(actual, expected)


@pytest.mark.parametrize("variant", ["ppo", "gspo", "everything", "sequence_mask"])
def test_masked_rows_may_hold_anything(variant: str) -> None:
    for packed in (False, True):
        p, options = problem(variant, packed=packed)
        p["ids"][p["mask"].nonzero()[:2].unbind(1)] = -100  # a negative id masks as well
        dead = ~(p["mask"] & (p["ids"] >= 0))
        config = config_of(variant, "sequence_mean_token_mean")
        dirty: Problem = dict(p)
        for name, value in p.items():
            if value is not None and value.is_floating_point() and value.shape[: dead.ndim] == dead.shape:
                spoiled = value.clone()
                spoiled[dead] = NAN
                dirty[name] = spoiled
        dirty["ids"] = p["ids"].masked_fill(~p["mask"], 10**6)
        actual, clean = run(dirty, config, **options), run(p, config, **options)
        assert_close(actual, definition(p, config, torch.float64, **options))
        for gradient, other in zip(actual[1].values(), clean[1].values(), strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=0)
        assert not actual[1]["hidden"][dead].any()
        assert not actual[0].log_probs[dead].any()


@pytest.mark.parametrize("size", [2, 3, 7, 13, 1000])
def test_chunks_may_end_anywhere(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: size)
    for variant in ("ppo", "gspo"):
        for mask in (False, True):
            p, _ = problem(variant)
            p["mask"] = p["mask"] if mask else None
            config = config_of(variant, "sequence_mean_token_mean")
            assert_close(run(p, config), definition(p, config, torch.float64))


def test_a_sequence_longer_than_any_chunk_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "most_rows", lambda vocab, device_type: 8)
    for variant, passes in (("gspo", 2), ("vespo", 2), ("off_policy", 2), ("ppo", 1), ("sequence_mask", 1)):
        p, _ = problem(variant)
        config = config_of(variant, "token_mean")
        actual = run(p, config)
        assert actual[0].metrics.passes == passes
        assert actual[0].metrics.to_dict()["head_passes"] == passes
        assert_close(actual, definition(p, config, torch.float64))


def test_on_policy_with_a_correction_of_sequences() -> None:
    p, options = problem("sequence_truncate", packed=True)
    config = config_of("sequence_truncate", "token_mean")
    p["old_log_probs"] = None
    actual = run(p, config, **options)
    assert actual[0].metrics.passes == 2
    assert_close(actual, definition(p, config, torch.float64, **options))


def test_rows_without_a_derivative_take_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p, _ = problem()
    p["advantages"][:] = 0
    p["advantages"][0] = 1.0
    config = config_of("ppo_on_policy", "token_mean")
    p["old_log_probs"] = None
    rows: list[int] = []
    add = chunks.Sums.add
    monkeypatch.setattr(chunks.Sums, "add", lambda self, r, x, *rest: (rows.append(len(x)), add(self, r, x, *rest))[1])
    assert_close(run(p, config), definition(p, config, torch.float64))
    assert sum(rows) == p["mask"][0].sum()


def test_empty_and_all_masked() -> None:
    p, _ = problem("everything")
    p["mask"] = torch.zeros_like(p["mask"])
    empty = {
        name: value[:0] if value is not None and value.shape[:1] == p["mask"].shape[:1] else value
        for name, value in p.items()
    }
    for case in (p, empty):
        for variant in ("ppo", "everything"):
            output, gradients = run(case, config_of(variant, "sequence_mean_token_mean"))
            assert output.loss == 0
            assert not any(gradient.any() for gradient in gradients.values())
            assert output.log_probs.shape == case["mask"].shape
