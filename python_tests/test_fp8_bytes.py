"""The measured bytes of FP8: the record is what is measured now, and what it says follows from the formats."""

from __future__ import annotations

from typing import Any

import pytest

from bench import docs_fp8, fp8_bytes
from bench.moe_definitions import Model

pytestmark = pytest.mark.usefixtures("native_cpu")

RECORD = fp8_bytes.load()
MODELS = pytest.mark.parametrize("model", fp8_bytes.MODELS, ids=lambda model: model.name)


def rows(part: str, model: Model) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["recipe"], row.get("save", "")): row for row in RECORD[part] if row["model"] == model.name}


def scaled(width: int) -> int:
    """Codes and scales of a row."""
    return width + 4 * -(-width // 128)


@MODELS
def test_the_record_is_what_is_measured(model: Model) -> None:
    """Of FP8, and of ours in bf16 that stands beside it."""
    found = rows("activations", model)
    for setting in fp8_bytes.SETTINGS[1:]:
        for save in fp8_bytes.SAVES:
            assert found[setting.name, save] == fp8_bytes.activations(model, setting, save)
    assert rows("weights", model)["fp8", ""] == fp8_bytes.weights(model, fp8_bytes.SETTINGS[2])


@MODELS
def test_what_is_kept_follows_from_the_formats(model: Model) -> None:
    """Nothing but tokens, pre-activations, two maps and a weight for each slot."""
    found = rows("activations", model)
    for save in fp8_bytes.SAVES:
        eight = found["fp8", save]
        slots = model.top_k if save == "preact" else 0
        sizes = {"tokens": scaled(model.hidden), "preacts": slots * scaled(2 * model.width), "routes": 12 * model.top_k}
        assert {name: eight[name] for name in sizes} == sizes
        assert eight["bytes_per_token"] == sum(sizes.values())
        for recipe, size in (("fp32", 4), ("bf16", 2)):
            numbers = found[recipe, save]["numbers"]
            assert found[recipe, save]["bytes_per_token"] == size * numbers + sizes["routes"]
            rows_of_experts = model.top_k * (2 * model.hidden + 3 * model.width)  # in, h, A, out
            assert found[recipe, "all"]["bytes_per_token"] >= size * rows_of_experts


@MODELS
def test_a_copy_of_the_weights_has_a_byte_for_each_and_its_scales(model: Model) -> None:
    found = rows("weights", model)
    shapes = ((2 * model.width, model.hidden), (model.hidden, model.width))
    size = sum(n * k + 4 * -(-n // 128) * -(-k // 128) for n, k in shapes)
    numbers = sum(n * k for n, k in shapes)
    assert found["fp8", ""]["numbers"] == numbers
    assert found["fp8", ""]["copy"] == round(size / numbers, 5)
    assert found["fp8", ""]["both_copies"] == round(2 * size / numbers, 5)
    assert found["fp8", ""]["parameter"] == found["fp8", ""]["gradient"] == 4.0
    assert [found[name, ""]["gradient"] for name in ("fp32", "bf16")] == [4.0, 2.0]


def test_the_published_three_quarters() -> None:
    """75 % less than fp32 is what a copy of the weights and what is kept take, but for scales and maps."""
    text = docs_fp8.text(RECORD)
    assert "the copy of the weights for forwards takes 75.0 % less" in text
    for model in fp8_bytes.MODELS:
        found = rows("activations", model)
        for save in fp8_bytes.SAVES:
            share = found["fp8", save]["bytes_per_token"] / found["fp32", save]["bytes_per_token"]
            assert 0.25 < share < 0.27


def test_ranges_are_from_the_least_to_the_most() -> None:
    assert docs_fp8._range(["74.2 % less", "73.4 % less"]) == "73.4 to 74.2 % less"
    assert docs_fp8._range(["75.0 % less", "75.0 % less"]) == "75.0 % less"
