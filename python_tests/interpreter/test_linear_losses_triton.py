"""The one-pass losses on the Triton row kernels, in the interpreter: the form that a GPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_kernels
from grpo_kernels.linear_log_probs import chunks
from python_tests.linear_grpo_problems import cast, definition, judge, problem, run
from python_tests.samples.grpo_loss import config_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("native_cpu"),  # the loss has no Triton kernel
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 20)


@pytest.mark.parametrize(
    ("variant", "packed", "passes"),
    [("kl_k3", False, 1), ("gspo", False, 1), ("sequence_mask", True, 1), ("entropy_bonus", True, 1),
     ("everything", False, 2)],
)  # fmt: skip
def test_linear_grpo_loss(variant: str, packed: bool, passes: int) -> None:
    results: dict[str, list[Any]] = {"actual": [], "expected": [], "eager": []}
    config = config_of(variant, "sequence_mean_token_mean")
    for seed in range(3):
        p, options = problem(variant, packed=packed, seed=seed)
        p = cast(p, torch.float32)
        with grpo_kernels.backend("triton"):
            results["actual"].append(run(p, config, **options))
        results["expected"].append(definition(cast(p, torch.float64), config, torch.float64, **options))
        results["eager"].append(definition(p, config, torch.float32, **options))
    assert results["actual"][0][0].metrics.passes == passes
    judge(**results)


def test_masked_rows_hold_anything() -> None:
    p = cast(problem("kl_k3")[0], torch.float32)
    dirty = {**p, "hidden": p["hidden"].masked_fill(~p["mask"][..., None], float("nan"))}
    config = config_of("kl_k3", "token_mean")
    with grpo_kernels.backend("triton"):
        (actual, found), (expected, clean) = run(dirty, config), run(p, config)
    assert torch.equal(actual.loss, expected.loss)
    for name, gradient in found.items():
        assert torch.equal(gradient, clean[name])
