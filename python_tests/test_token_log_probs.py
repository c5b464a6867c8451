"""token_log_probs: the definition against autograd, the CPU kernels against float64, properties, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels
from grpo_kernels import token_log_probs
from grpo_kernels.testing import accuracy_error, assert_as_accurate

EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABS = [1, 2, 31, 1000, 32000, 32003, 129280, 151936]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per_row": {"temperature": "per_row"},
    "scaled": {"logit_scale": -1.3, "temperature": 1.7},
    "softcap": {"softcap": 6.0, "logit_scale": 1.1, "temperature": 0.9},
}
BACKENDS = ["native", "reference"]
needs_native = pytest.mark.usefixtures("native_cpu")
INF, NAN = float("inf"), float("nan")


def eager(
    logits: Tensor, ids: Tensor, *, temperature: Any = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What plain PyTorch users write: log_softmax, gather, sums over p. Written apart from the definition."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    chosen = log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    return chosen, -(p * log_p).sum(-1), p.pow(2).sum(-1)


def inputs(vocab: int, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor]:
    rows = rows or max(2, min(256, 65536 // vocab))
    return (torch.randn(rows, vocab) * 2).to(dtype), torch.randint(vocab, (rows,))


def resolve_options(name: str, rows: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if options.get("temperature") == "per_row":
        options["temperature"] = torch.rand(rows) + 0.5
    return options


def run(logits: Tensor, ids: Tensor, upstream: tuple[Tensor, Tensor], **options: Any) -> tuple[Any, Tensor]:
    """Every output, and the gradient of (upstream[0] * log_probs + upstream[1] * entropy).sum()."""
    leaf = logits.detach().clone().requires_grad_()
    out = token_log_probs(leaf, ids, outputs=EVERY_OUTPUT, **options)
    loss = (out.log_probs * upstream[0]).sum() + (out.entropy * upstream[1]).sum()
    return out, torch.autograd.grad(loss, leaf)[0]


def run_eager(
    logits: Tensor, ids: Tensor, upstream: tuple[Tensor, Tensor], dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    leaf = logits.detach().to(dtype).requires_grad_()
    values = eager(leaf, ids, **options)
    loss = (values[0] * upstream[0]).sum() + (values[1] * upstream[1]).sum()
    return [*(v.detach() for v in values), torch.autograd.grad(loss, leaf)[0]]


def upstreams(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows), torch.randn(rows)


def check_against_float64(logits: Tensor, ids: Tensor, **options: Any) -> None:
    upstream = upstreams(logits.shape[0])
    expected = run_eager(logits, ids, upstream, torch.float64, **options)
    plain = run_eager(logits, ids, upstream, torch.float32, **options)
    out, gradient = run(logits, ids, upstream, **options)
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in out] == [result, result, result, torch.int64]
    assert gradient.dtype == logits.dtype
    if (
        logits.shape[-1] == 1
    ):  # certain: every value is exact; 1 - p is a few roundings, and eager's zeros set no budget
        assert [t.unique().tolist() for t in out] == [[0.0], [0.0], [1.0], [0]]
        assert gradient.double().abs().max() <= 8 * torch.finfo(result).eps * max(u.abs().max() for u in upstream)
        return
    for name, actual, exact, fp32 in zip(
        ("log_probs", "entropy", "sum_squared_probs", "gradient"), (*out[:3], gradient), expected, plain, strict=True
    ):
        assert_as_accurate(actual, exact, fp32, name=name)
    z = logits.double() * options.get("logit_scale", 1.0)
    assert torch.equal(out.top1_ids, z.argmax(-1)) or options.get("softcap") is not None


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1000])
def test_definition_in_float64(vocab: int, options: str) -> None:
    logits, ids = inputs(vocab, torch.float64, rows=7)
    with grpo_kernels.backend("reference"):
        check_against_float64(logits, ids, **resolve_options(options, 7))


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_native_against_float64(vocab: int, dtype: torch.dtype, options: str) -> None:
    logits, ids = inputs(vocab, dtype)
    with grpo_kernels.backend("native"):
        check_against_float64(logits, ids, **resolve_options(options, logits.shape[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [30.0, 0.01])
def test_peaked_and_flat_rows(dtype: torch.dtype, scale: float) -> None:
    """A certain token has entropy near 0, where sums that cancel would fail; a flat row has entropy near log V."""
    logits, ids = (torch.randn(64, 5000) * scale).to(dtype), torch.randint(5000, (64,))
    check_against_float64(logits, ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(backend: str, options: str) -> None:
    logits = (torch.randn(3, 7, dtype=torch.float64) * 2).requires_grad_()
    ids = torch.tensor([6, -100, 2])
    options_of_rows = resolve_options(options, 3)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with grpo_kernels.backend(backend):
            out = token_log_probs(x, ids, outputs=("entropy",), **options_of_rows)
        return out.log_probs, out.entropy

    assert torch.autograd.gradcheck(function, logits)


def test_each_output_has_its_own_upstream_gradient() -> None:
    logits, ids = inputs(100, torch.float64, rows=4)
    for upstream in ((torch.ones(4), torch.zeros(4)), (torch.zeros(4), torch.ones(4))):
        expected = run_eager(logits, ids, upstream, torch.float64)[3]
        torch.testing.assert_close(run(logits, ids, upstream)[1], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_number_tensor_and_per_row_temperature_agree(ids_dtype: torch.dtype) -> None:
    logits, ids = inputs(300, torch.float32, rows=6)
    forms = [0.5, torch.tensor(0.5), torch.full((6,), 0.5), torch.full((6,), 0.5, dtype=torch.float64)]
    results = [run(logits, ids.to(ids_dtype), upstreams_fixed(6), temperature=t) for t in forms]
    for out, gradient in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, results[0][0], strict=True))
        assert torch.equal(gradient, results[0][1])


def upstreams_fixed(rows: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 2, rows), torch.linspace(1, -0.5, rows)


def test_only_what_was_asked_for_is_returned() -> None:
    logits, ids = inputs(10, torch.float32, rows=3)
    out = token_log_probs(logits, ids)
    assert out.entropy is None
    assert out.sum_squared_probs is None
    assert out.top1_ids is None
    leaf = logits.clone().requires_grad_()
    out = token_log_probs(leaf, ids, outputs=EVERY_OUTPUT)
    assert [t.requires_grad for t in out] == [True, True, False, False]
    with torch.no_grad():
        assert not token_log_probs(leaf, ids).log_probs.requires_grad


# --- the accuracy budget bites ---------------------------------------------------------------------------------------


def _planted(fault: str, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, entropy and gradient of plain fp32 PyTorch with one fault."""
    x = logits.float().requires_grad_()
    used = x[:, :-1] if fault == "dropped_column" else x.bfloat16().float() if fault == "rounded_logits" else x
    log_p = torch.log_softmax(used, -1)
    chosen = log_p.gather(-1, ids[:, None])[:, 0]
    p = log_p.exp().detach() if fault == "missing_entropy_term" else log_p.exp()
    entropy = -(p * log_p).sum(-1)
    gradient = torch.autograd.grad(chosen.sum() + entropy.sum(), x)[0]
    return chosen.detach(), entropy.detach(), gradient


@pytest.mark.parametrize(
    ("fault", "caught"),
    [("dropped_column", "values"), ("rounded_logits", "values"), ("missing_entropy_term", "gradient")],
)
def test_planted_faults_break_the_budget(fault: str, caught: str) -> None:
    logits, ids = inputs(1000, torch.float32, rows=32)
    upstream = (torch.ones(32), torch.ones(32))
    expected = run_eager(logits, ids.clamp(max=998), upstream, torch.float64)
    plain = run_eager(logits, ids.clamp(max=998), upstream, torch.float32)
    faulty = _planted(fault, logits, ids.clamp(max=998))
    checks = {"values": [(0, 0), (1, 1)], "gradient": [(2, 3)]}[caught]
    for index, of in checks:
        with pytest.raises(AssertionError, match="exceeds the budget"):
            assert_as_accurate(faulty[index], expected[of], plain[of])


# --- determinism -----------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [31, 32003])
def test_a_rows_bits_depend_on_that_row_alone(dtype: torch.dtype, vocab: int) -> None:
    """Neither the number of rows, nor neighbours, position, address, threads nor chunks change a bit."""
    logits, ids = inputs(vocab, dtype, rows=9)
    whole, gradient = run(logits, ids, upstreams_fixed(9), softcap=9.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in (0, 5, 8):
            shifted = torch.empty(vocab + 3, dtype=dtype)[3:].copy_(logits[row])[None]
            upstream = tuple(u[row : row + 1] for u in upstreams_fixed(9))
            leaf = shifted.detach().requires_grad_()
            out = token_log_probs(leaf, ids[row : row + 1], outputs=EVERY_OUTPUT, softcap=9.0)
            one = torch.autograd.grad((out.log_probs, out.entropy), leaf, upstream)[0]
            assert all(torch.equal(a[0], b[row]) for a, b in zip(out, whole, strict=True))
            assert torch.equal(one[0], gradient[row])
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """The value and gradient tests once more, in a process that is told to use less than the processor has."""
    environment = dict(os.environ, GRPO_KERNELS_ISA=isa, GK_ISA_RUN="1", OMP_WAIT_POLICY="passive")
    if environment.get("GK_ISA_CHILD"):
        pytest.skip("this is the inner run")
    names = "native_against_float64 and (31 or 1000 or 32003) or minus_inf or masked or bits_depend or bad_values"
    names += " or parts_make or log_sum_exp or special_rows"
    files = [__file__, __file__.replace(".py", "_parts.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", names],
        env=dict(environment, GK_ISA_CHILD="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


# --- properties ------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.floats(-60, 60), min_size=5, max_size=5), min_size=1, max_size=4)


@given(ROWS, st.floats(-100, 100), st.integers(0, 4), st.sampled_from(BACKENDS))
def test_shifting_a_row_changes_nothing(rows: list[list[float]], shift: float, chosen: int, backend: str) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    ids = torch.full((len(rows),), chosen)
    with grpo_kernels.backend(backend):
        a = token_log_probs(logits, ids, outputs=EVERY_OUTPUT)
        b = token_log_probs(logits + shift, ids, outputs=EVERY_OUTPUT)
    for left, right in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@given(ROWS, st.sampled_from(BACKENDS), st.sampled_from([torch.float32, torch.float64]))
def test_probabilities(rows: list[list[float]], backend: str, dtype: torch.dtype) -> None:
    """exp(log_prob) over all tokens sums to one; the statistics are those of it; gradients sum to zero."""
    logits = torch.tensor(rows, dtype=dtype)
    count, vocab = logits.shape
    wide = logits[:, None].expand(count, vocab, vocab).contiguous()
    ids = torch.arange(vocab).expand(count, vocab)
    with grpo_kernels.backend(backend):
        out, gradient = run(wide, ids, (torch.ones(count, vocab), torch.ones(count, vocab)))
    p = out.log_probs.double().exp()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(p.sum(-1), torch.ones(count, dtype=torch.float64), rtol=0, atol=tolerance)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(out.entropy.double()[:, 0], entropy, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.sum_squared_probs.double()[:, 0], p.pow(2).sum(-1), rtol=tolerance, atol=tolerance)
    assert (out.entropy >= 0).all()
    assert ((out.sum_squared_probs <= 1 + 1e-6) & (out.sum_squared_probs >= 1 / vocab - 1e-6)).all()
    assert gradient.double().sum(-1).abs().max() < 100 * tolerance


@given(st.integers(1, 5000), st.integers(0, 2**31))
def test_any_vocabulary_size(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab, generator=generator)
    ids = torch.randint(vocab, (2,), generator=generator)
    out, gradient = run(logits, ids, (torch.ones(2), torch.ones(2)))
    expected = run_eager(logits, ids, (torch.ones(2), torch.ones(2)), torch.float64)
    assert accuracy_error(out.log_probs, expected[0]) < 1e-6
    torch.testing.assert_close(gradient.double(), expected[3], rtol=1e-5, atol=1e-6)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_lengths_and_temperatures_make_two_graphs(backend: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
        return token_log_probs(x, ids, temperature=temperature, outputs=("entropy",)).log_probs

    with grpo_kernels.backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend=count)
        for n in range(10):
            x, ids = torch.randn(2, 5 + n, 33), torch.randint(33, (2, 5 + n))
            temperature = 0.5 + 0.1 * n
            torch.testing.assert_close(compiled(x, ids, temperature), step(x, ids, temperature))
    assert graphs <= 2
