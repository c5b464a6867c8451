"""The kernels of token_log_probs on parts of a vocabulary, and the gradient of the log-sum-exp: what heads build on."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels.testing import accuracy_error, assert_as_accurate
from grpo_kernels.token_log_probs import ops, statistics

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUTS = (0, 100, 137, 137, 1000)  # parts of 1000 columns, one of them empty


class Transform(NamedTuple):
    """What the ops take between the token ids and the wanted outputs."""

    mask: Tensor | None = None
    temperatures: Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits, in their dtype, by plain PyTorch."""
        z = logits * self.logit_scale
        if self.softcap:
            z = torch.where(z.isfinite(), self.softcap * torch.tanh(z / self.softcap), z)
        return z / (self.temperature if self.temperatures is None else self.temperatures.to(z.dtype)[..., None])


TRANSFORMS = {
    "plain": Transform(),
    "scaled": Transform(temperature=2.0, logit_scale=-1.5),  # exact for what stands out: interpreted, nothing is fused
    "softcap": Transform(temperature=0.9, logit_scale=1.1, softcap=6.0),
}


class Upstream(NamedTuple):
    log_probs: Tensor
    entropy: Tensor | None
    log_sum_exp: Tensor | None


def upstream_of(rows: int, dtype: torch.dtype) -> Upstream:
    return Upstream(*torch.randn(3, rows, dtype=torch.float64).to(result_dtype(dtype)))


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(dtype: torch.dtype, rows: int = 24, vocab: int = 1000) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, vocab) * 2).to(dtype), torch.randint(vocab, (rows,))


def eager(logits: Tensor, ids: Tensor, transform: Transform, upstream: Upstream, dtype: torch.dtype) -> list[Tensor]:
    """log_probs, entropy, sum of squared probabilities and the gradient, by autograd in `dtype`."""
    leaf = logits.to(dtype).requires_grad_()
    z = transform.apply(leaf)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)
    chosen = log_p.gather(-1, ids[:, None])[:, 0]
    loss = (chosen * upstream.log_probs).sum() + (torch.logsumexp(z, -1) * upstream.log_sum_exp).sum()
    gradient = torch.autograd.grad(loss + (entropy * upstream.entropy).sum(), leaf)[0]
    return [chosen.detach(), entropy.detach(), p.detach().pow(2).sum(-1), gradient]


def forward(logits: Tensor, ids: Tensor, transform: Transform, backend: str) -> tuple[Tensor, ...]:
    return ops.token_log_probs(logits, ids, *transform, True, True, True, True, backend)


def in_parts(logits: Tensor, ids: Tensor, transform: Transform, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, sums of squares (in float64) and top-1 ids of the whole rows, from those of the parts."""
    found = []
    for begin, end in itertools.pairwise(CUTS):
        if begin == end:
            continue
        held = (ids >= begin) & (ids < end)
        _, _, squared, top1, values = forward(
            logits[:, begin:end], torch.where(held, ids - begin, 0), transform, backend
        )
        values[statistics.TARGET].masked_fill_(~held, statistics.ABSENT)
        values = values.double()
        squares = torch.where(values[1] > 0, squared * values[1] ** 2, 0.0)
        found.append((values, squares, torch.where(top1 >= 0, top1 + begin, -1)))
    return statistics.merge(*(torch.stack(part) for part in zip(*found, strict=True)))  # type: ignore[return-value]


def gradient_in_parts(
    logits: Tensor, ids: Tensor, transform: Transform, values: Tensor, upstream: Upstream, backend: str
) -> Tensor:
    parts = []
    for begin, end in itertools.pairwise(CUTS):
        if begin < end:
            held = (ids >= begin) & (ids < end)
            local = torch.where(held, ids - begin, end - begin)  # behind the part's last id: its target is elsewhere
            arguments = (logits[:, begin:end], local, *transform, values, *upstream)
            parts.append(ops.token_log_probs_backward(*arguments, None, backend))
    return torch.cat(parts, -1)


def check_parts(backend: str, dtype: torch.dtype, options: str) -> None:
    transform = TRANSFORMS[options]
    logits, ids = inputs(dtype)
    lowest = INF if transform.logit_scale < 0 else -INF
    logits[0, 100:137], ids[0] = lowest, 50  # one part holds nothing but probability zero
    logits[1, :700], ids[1] = lowest, 900  # all but one do
    logits[2, 700:], ids[2] = lowest, 3
    logits[3, 120] = 30.0 if transform.logit_scale > 0 else -30.0
    upstream = upstream_of(len(ids), dtype)
    values, squares, top1 = in_parts(logits, ids, transform, backend)
    live = torch.ones(len(ids), dtype=torch.bool)
    log_probs, entropy, squared, top1_ids = statistics.finish(values, squares, top1, live, True)
    rounded = values.to(result_dtype(dtype))
    gradient = gradient_in_parts(logits, ids, transform, rounded, upstream, backend)
    exact = eager(logits, ids, transform, upstream, torch.float64)
    plain = eager(logits, ids, transform, upstream, torch.float32)
    for name, actual, of, fp32 in zip(
        ("log_probs", "entropy", "sum_squared_probs"), (log_probs, entropy, squared), exact, plain, strict=False
    ):
        assert actual is not None
        assert_as_accurate(actual.to(result_dtype(dtype)), of, fp32, name=name)
    whole = forward(logits, ids, transform, backend)
    assert top1_ids is not None
    assert torch.equal(top1_ids, whole[3])
    assert gradient.isfinite().all()
    assert gradient[logits == lowest].count_nonzero() == 0
    check_gradient(backend, gradient, exact[3], plain[3])


def check_gradient(backend: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    if backend == "triton" and actual.dtype == torch.bfloat16:  # Triton's interpreter truncates
        assert accuracy_error(actual, exact) <= torch.finfo(actual.dtype).eps
    else:
        assert_as_accurate(actual, exact, plain, name="gradient")


def check_z_loss(backend: str, dtype: torch.dtype, options: str) -> None:
    """The gradients of a log-prob, an entropy and a log-sum-exp together, each with its own upstream gradient."""
    transform = TRANSFORMS[options]
    logits, ids = inputs(dtype)
    logits[0] = 0.0
    logits[0, ids[0]] = 20.0 if transform.logit_scale > 0 else -20.0  # certain
    upstream = upstream_of(len(ids), dtype)
    values = forward(logits, ids, transform, backend)[4]
    exact = eager(logits, ids, transform, upstream, torch.float64)[3]
    plain = eager(logits, ids, transform, upstream, torch.float32)[3]
    gradient = ops.token_log_probs_backward(logits, ids, *transform, values, *upstream, None, backend)
    check_gradient(backend, gradient, exact, plain)
    storage = logits.clone()
    ops.token_log_probs_backward_(storage, ids, *transform, values, *upstream, backend)
    assert torch.equal(storage, gradient)


def check_no_z_loss(backend: str, dtype: torch.dtype) -> None:
    """Without it the bits are those of an upstream gradient of zero; a row is left out where all three are zero."""
    transform, (logits, ids) = TRANSFORMS["softcap"], inputs(dtype)
    upstream = upstream_of(len(ids), dtype)
    values = forward(logits, ids, transform, backend)[4]

    def backward(given: Upstream) -> Tensor:
        return ops.token_log_probs_backward(logits, ids, *transform, values, *given, None, backend)

    zero = torch.zeros_like(upstream.log_probs)
    assert torch.equal(backward(upstream._replace(log_sum_exp=None)), backward(upstream._replace(log_sum_exp=zero)))
    only = Upstream(zero, None, zero.clone())
    only.log_sum_exp[3] = 2.0  # type: ignore[index]
    logits[5] = NAN
    gradient = backward(only)
    assert gradient[3].count_nonzero() > 0
    assert gradient[torch.arange(len(ids)) != 3].count_nonzero() == 0


def check_grad_dtype(backend: str, wanted: torch.dtype) -> None:
    transform, (logits, ids) = TRANSFORMS["scaled"], inputs(torch.float32)
    upstream = upstream_of(len(ids), torch.float32)
    arguments = (logits, ids, *transform, forward(logits, ids, transform, backend)[4], *upstream)
    wide = ops.token_log_probs_backward(*arguments, None, backend)
    narrow = ops.token_log_probs_backward(*arguments, wanted, backend)
    assert narrow.dtype == wanted
    assert narrow.is_contiguous()
    if backend == "triton" and wanted == torch.bfloat16:  # truncated by the interpreter
        assert accuracy_error(narrow, wide.double()) <= torch.finfo(wanted).eps
    else:
        assert torch.equal(narrow, wide.to(wanted))


def check_special_statistics(backend: str, dtype: torch.dtype, options: str) -> None:
    """The statistics of rows that a sum over parts may meet."""
    transform = TRANSFORMS[options]._replace(mask=torch.tensor([1, 1, 1, 0, 1, 1]) > 0)
    sign = -1.0 if transform.logit_scale < 0 else 1.0
    logits, ids = inputs(dtype, rows=6)
    logits[0], logits[1, 7], logits[2, 999], logits[3], logits[4] = -sign * INF, NAN, sign * INF, NAN, NAN
    ids[4], logits[5] = -100, -sign * INF
    logits[5, 40], ids[5] = 1.5, 40
    log_probs, entropy, squared, top1, values = forward(logits, ids, transform, backend)
    assert values[:, 0].tolist() == [-INF, 0.0, -INF, 0.0]
    assert values[:, 1:3].isnan().all()
    assert values[:, 3:5].T.tolist() == [[0.0, 1.0, 0.0, 0.0]] * 2
    only = float(transform.apply(logits[5:6, 40:41].to(result_dtype(dtype)))[0, 0])
    torch.testing.assert_close(values[:, 5].tolist(), [only, 1.0, only, 0.0], rtol=1e-6, atol=1e-6)
    for output in (log_probs, entropy, squared):
        assert output[:3].isnan().all()
    assert top1.tolist() == [-1, -1, -1, -1, -1, 40]
    ones = torch.ones(6, dtype=values.dtype)
    gradient = ops.token_log_probs_backward(logits, ids, *transform, values, ones, ones, ones, None, backend)
    assert gradient[:3].isnan().all()
    assert gradient[3:5].count_nonzero() == 0
    assert gradient[5].isfinite().all()


# --- the CPU kernels -------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("native_cpu")


@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_make_the_whole(dtype: torch.dtype, options: str) -> None:
    check_parts("native", dtype, options)


@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_log_sum_exp(dtype: torch.dtype, options: str) -> None:
    check_z_loss("native", dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_of_the_log_sum_exp(dtype: torch.dtype) -> None:
    check_no_z_loss("native", dtype)


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_dtype_of_the_gradient(wanted: torch.dtype) -> None:
    check_grad_dtype("native", wanted)


@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_special_rows(dtype: torch.dtype, options: str) -> None:
    check_special_statistics("native", dtype, options)


def test_an_id_of_another_part_has_no_indicator() -> None:
    logits, ids = inputs(torch.float32, rows=2)
    values = forward(logits, ids, Transform(), "native")[4]
    upstream = Upstream(torch.ones(2), None, None)
    outside = torch.tensor([1000, 2**40])
    gradient = ops.token_log_probs_backward(logits, outside, *Transform(), values, *upstream, None, "native")
    torch.testing.assert_close(gradient, -logits.softmax(-1))
