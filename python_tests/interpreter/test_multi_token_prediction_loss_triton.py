"""The loss of multi-token prediction on the Triton row kernels, in the interpreter: the form that a GPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_kernels
from grpo_kernels.linear_log_probs import chunks
from python_tests.mtp_problems import LAYOUTS, definition, predictions, problem, run, tokens
from python_tests.test_multi_token_prediction_loss import judge
from python_tests.test_multi_token_prediction_loss_policy import terms

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("native_cpu"),  # the policy's loss has no Triton kernel
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that hold rows of the policy and rows of cross-entropy."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 14)


@pytest.mark.parametrize(
    ("name", "variant", "passes"),
    [("packed", None, 1), ("packed", "kl_k3", 1), ("batch", "gspo", 1), ("left_padding", "entropy_bonus", 1)],
)  # fmt: skip
def test_loss(name: str, variant: str | None, passes: int) -> None:
    layout, results = LAYOUTS[name], []
    for seed in range(3):
        leaves, ids = problem(layout, 2, scale=0.5), tokens(layout)
        options: dict[str, Any] = {"z_loss": 0.1, "shift": 1, "detach_head": seed == 1}
        if variant is not None:
            options |= {"policy": terms(variant, leaves, ids, layout), "shift": 0}
        with grpo_kernels.backend("triton"):
            actual = run({name: leaf.float() for name, leaf in leaves.items()}, ids, **options, **layout.options)
        eager, exact = (definition(leaves, ids, layout, dtype, **options) for dtype in (torch.float32, torch.float64))
        results.append((actual, exact, eager))
        for share in ("valid_counts", "acceptance", "agreement"):
            torch.testing.assert_close(getattr(actual[0], share), getattr(eager[0], share))
    assert variant is None or results[0][0][0].metrics.passes == passes
    judge(results)


def test_rows_that_predict_nothing_may_hold_anything() -> None:
    layout = LAYOUTS["left_padding"]
    leaves, ids = {name: leaf.float() for name, leaf in problem(layout, 2).items()}, tokens(layout)
    dead = torch.ones(2, ids.numel(), dtype=torch.bool)
    for depth in range(2):
        dead[depth, [row for row, _ in predictions(layout, ids, depth, 1, ids >= 0)]] = False
    dirty = leaves["hiddens"].flatten(1, -2).masked_fill(dead[..., None], float("nan")).view_as(leaves["hiddens"])
    with grpo_kernels.backend("triton"):
        expected = run(leaves, ids, **layout.options)
        actual = run({**leaves, "hiddens": dirty}, ids, **layout.options)
    assert torch.equal(actual[0].loss, expected[0].loss)
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, expected[1][name])
    assert not actual[1]["hiddens"].flatten(1, -2)[dead].any()
