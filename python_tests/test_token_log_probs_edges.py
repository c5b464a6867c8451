"""token_log_probs: masked rows, infinities, bad values, ids out of range, ties, shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_kernels
from grpo_kernels import token_log_probs
from python_tests.test_token_log_probs import BACKENDS, DTYPES, EVERY_OUTPUT, inputs, run, run_eager

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_exactly_zero(backend: str, dtype: torch.dtype) -> None:
    logits, ids = inputs(5000, dtype, rows=6)
    clean, mask = logits.clone(), torch.tensor([1, 0, 1, 0, 1, 1])
    logits[1], logits[3, 7], logits[4, :] = NAN, INF, NAN
    ids[1], ids[3], ids[4] = 5000, 2**40, -100
    clean_ids = torch.where(torch.tensor([0, 1, 0, 1, 1, 0]) > 0, -1, ids)
    temperature = torch.tensor([1.0, NAN, 1.0, 0.0, INF, 1.0])
    with grpo_kernels.backend(backend):
        upstream = (torch.tensor([1.0, NAN, 1, INF, 1, 1]), torch.ones(6))
        leaf = logits.clone().requires_grad_()
        out = token_log_probs(leaf, ids, mask=mask, temperature=temperature, outputs=EVERY_OUTPUT)
        gradient = torch.autograd.grad((out.log_probs, out.entropy), leaf, upstream)[0]
        other, clean_gradient = run(clean, clean_ids, (torch.ones(6), torch.ones(6)))
    dead = [1, 3, 4]
    assert [t[dead].tolist() for t in out] == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [-1, -1, -1]]
    assert gradient[dead].count_nonzero() == 0
    for a, b in zip(out, other, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_minus_inf_is_probability_zero(backend: str, softcap: float | None) -> None:
    logits, ids = inputs(6000, torch.float32, rows=4)
    logits[0, :5000] = -INF  # the whole first blocks of the row
    logits[1, ::2] = -INF
    logits[2, 3] = -INF
    ids = torch.tensor([5500, 1, 3, 0])  # row 2: the chosen token is impossible
    kept = [logits[row].isfinite() for row in range(4)]
    with grpo_kernels.backend(backend):
        out, gradient = run(logits, ids, (torch.ones(4), torch.ones(4)), softcap=softcap)
        for row in (0, 1):
            short = logits[row][kept[row]][None]
            index = int(kept[row][: ids[row]].sum())
            one, one_gradient = run(short, torch.tensor([index]), (torch.ones(1), torch.ones(1)), softcap=softcap)
            torch.testing.assert_close(out.log_probs[row], one.log_probs[0])
            torch.testing.assert_close(out.entropy[row], one.entropy[0])
            torch.testing.assert_close(gradient[row][kept[row]], one_gradient[0])
            assert gradient[row][~kept[row]].count_nonzero() == 0
    assert out.log_probs[2] == -INF
    assert out.entropy[2].isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("where", [0, 2999])
@pytest.mark.parametrize("value", [NAN, INF, "all_minus_inf"])
def test_bad_values_stay_in_their_row(backend: str, softcap: float | None, value: Any, where: int) -> None:
    logits, ids = inputs(3000, torch.float32, rows=3)
    with grpo_kernels.backend(backend):
        clean, clean_gradient = run(logits, ids, (torch.ones(3), torch.ones(3)), softcap=softcap)
        if value == "all_minus_inf":
            logits[1] = -INF
        else:
            logits[1, where] = value
        out, gradient = run(logits, ids, (torch.ones(3), torch.ones(3)), softcap=softcap)
    for name in ("log_probs", "entropy", "sum_squared_probs"):
        assert getattr(out, name)[1].isnan(), name
    assert out.top1_ids[1] == -1
    assert gradient[1].isnan().all()
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(out, clean, strict=True))
        assert torch.equal(gradient[row], clean_gradient[row])


@pytest.mark.usefixtures("native_cpu")
def test_nan_row_has_nan_gradient_and_no_upstream_means_zero() -> None:
    logits, ids = inputs(100, torch.float32, rows=3)
    logits[1, 5], logits[2, 5] = NAN, NAN
    with grpo_kernels.backend("native"):
        gradient = run(logits, ids, (torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3)))[1]
    assert gradient[1].isnan().all()
    assert gradient[2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_out_of_range_raise_on_the_cpu(backend: str, ids_dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 11)
    ids = torch.tensor([[0, 10, -1], [5, 11, 2**31 - 1]], dtype=ids_dtype)
    with grpo_kernels.backend(backend):
        with pytest.raises(ValueError, match=r"token_log_probs: token_ids\[1, 1\] must be < V = 11, .* got 11"):
            token_log_probs(logits, ids)
        token_log_probs(logits, ids, mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))


def test_the_definition_makes_rows_with_ids_out_of_range_nan() -> None:
    """Where looking at the ids would be a synchronisation, and under torch.compile, such a row is NaN."""
    from grpo_kernels.token_log_probs import reference

    leaf = torch.randn(3, 5, requires_grad=True)
    results = reference.token_log_probs(leaf, torch.tensor([1, 5, 2]), None, 1.0, 1.0, 0.0, (True, True, True))
    gradient = torch.autograd.grad(results[0].sum() + results[1].sum(), leaf)[0]
    for value in (*results[:3], gradient.sum(-1)):
        assert value.isnan().tolist() == [False, True, False]
    assert (results[3] == -1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_give_the_lowest_id(backend: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [4000, 4999]] = 2.0
    logits[2, [10, 4500]] = 1.0
    with grpo_kernels.backend(backend):
        out = token_log_probs(logits, torch.zeros(3, dtype=torch.int64), outputs=("top1_ids",))
    assert out.top1_ids.tolist() == [0, 4000, 10]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 5), (2, 3, 4, 5)])
def test_any_leading_shape(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    ids = torch.randint(5, shape[:-1])
    with grpo_kernels.backend(backend):
        out, gradient = run(logits, ids, (torch.ones(shape[:-1]), torch.ones(shape[:-1])))
    assert all(t.shape == ids.shape for t in out)
    expected = run_eager(logits, ids, (torch.ones(shape[:-1]), torch.ones(shape[:-1])), torch.float64)
    torch.testing.assert_close(out.log_probs, expected[0])
    torch.testing.assert_close(gradient, expected[3])
