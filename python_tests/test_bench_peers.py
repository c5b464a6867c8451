"""Adapters to packages that are not installed here, called through stand-ins with the signatures of the real ones.

Signatures: cut-cross-entropy 25.1.1, flash-linear-attention 0.6.0, torchao 0.18.0, DeepGEMM 2.6.1. A stand-in computes
what the real function promises, so that a wrong argument or layout gives a wrong result.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bench_linear_log_probs, docs_peers, fp8_peers, fp8_product_peers, fp8_products, fp8_wgrads
from bench import linear_peers as peers
from bench.moe_definitions import DEEPSEEK, tiny
from grpo_kernels import _extension

needs_kernels = pytest.mark.skipif(
    bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"
)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `import name` find a module with these attributes."""

    def add(name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return add


def _head() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"hidden": torch.randn(6, 5), "weight": torch.randn(11, 5), "token_ids": torch.randint(11, (6,))}


def _cross_entropy(inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(inputs["hidden"] @ inputs["weight"].T, inputs["token_ids"])


@pytest.mark.parametrize(("device", "implementation"), [("cuda", "cce"), ("cpu", "torch_compile")])
def test_cut_cross_entropy(install: Callable[..., None], device: str, implementation: str) -> None:
    def linear_cross_entropy(
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool = False,
        filter_eps: float | str | None = "high",
        impl: str = "cce",
    ) -> Tensor:
        assert impl == implementation
        return F.cross_entropy(e @ c.T, targets, ignore_index=ignore_index, reduction=reduction)

    install("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    run = peers.cut_cross_entropy(device)
    assert run is not None
    torch.testing.assert_close(run(_head())[0], _cross_entropy(_head()))


def test_flash_linear_attention(install: Callable[..., None]) -> None:
    class FusedLinearCrossEntropyLoss(torch.nn.Module):
        def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0, logit_scale: float = 1.0) -> None:
            super().__init__()

        def forward(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.cross_entropy(F.linear(x, weight, bias), target)

    install("fla")
    install("fla.modules", FusedLinearCrossEntropyLoss=FusedLinearCrossEntropyLoss)
    assert peers.fla_cross_entropy("cpu") is None
    run = peers.fla_cross_entropy("cuda")
    assert run is not None
    torch.testing.assert_close(run(_head())[0], _cross_entropy(_head()))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    """In the rows where it is there, in the list of those that are absent where it is not; never in both or neither."""
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    wanted = {"Liger", "cut-cross-entropy", "flash-linear-attention"}

    def both() -> tuple[set[str], set[str]]:
        case = bench_linear_log_probs.case(
            bench_linear_log_probs.CROSS_ENTROPY, "cpu", bench_linear_log_probs.SMOKE, torch.float32
        )
        return {provider.name for provider in case.providers}, set(case.absent)

    providers, absent = both()
    assert wanted <= absent
    assert not wanted & providers
    install("cut_cross_entropy", linear_cross_entropy=lambda e, c, targets, impl: _cross_entropy(_head()))
    providers, absent = both()
    assert "cut-cross-entropy" in providers - absent


def test_ours_is_no_peer() -> None:
    rows = {"ours, a call a depth": {"kind": "peer", "median_us": 1.0}, "TRL": {"kind": "peer", "median_us": 1.0}}
    page = docs_peers.text({"a.json": {"machine": {"device": "d"}, "cases": [{"op": "op", "rows": rows}]}})
    assert page.splitlines()[2:] == ["| TRL | `op` | d |"]


# --- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors lay on a GPU that has these products."""
    monkeypatch.setattr(fp8_product_peers, "_on_hopper", lambda device: True)


def _dequantised(data: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Codes times the scales of tiles of `rows` x 128."""
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(128, -1)
    return data.float() * spread[..., : data.shape[-2], : data.shape[-1]]


@pytest.fixture
def products() -> dict[str, Tensor]:
    """Rows, weights and their codes, each expert with 128 rows."""
    torch.manual_seed(2)
    product = fp8_products.Product(tiny(DEEPSEEK).fewer(2), down=False, backward=False, rows=128)
    return fp8_products._make(product, torch.float32, "cpu", "full")


@needs_kernels
def test_deep_gemm(install: Callable[..., None], hopper: None, products: dict[str, Tensor]) -> None:
    def m_grouped_fp8_gemm_nt_contiguous(
        a: tuple[Tensor, Tensor],
        b: tuple[Tensor, Tensor],
        d: Tensor,
        m_indices: Tensor,
        recipe: tuple[int, int, int] | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        assert m_indices.dtype == torch.int32
        assert (a[0].dtype, d.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
        rows, weights = _dequantised(*a, 1), _dequantised(*b, 128)
        for row, expert in enumerate(m_indices.tolist()):
            d[row] = weights[expert] @ rows[row]

    install("deep_gemm", m_grouped_fp8_gemm_nt_contiguous=m_grouped_fp8_gemm_nt_contiguous)
    run = fp8_product_peers.deep_gemm("cuda")
    assert run is not None
    (expected,) = fp8_products._eager(products)
    torch.testing.assert_close(run(products)[0].float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@needs_kernels
def test_deep_gemm_of_the_weights_gradient(install: Callable[..., None], hopper: None) -> None:
    def k_grouped_fp8_gemm_nt_contiguous(
        a: tuple[Tensor, Tensor],
        b: tuple[Tensor, Tensor],
        d: Tensor,
        ks: list[int],
        ks_tensor: Tensor,
        c: Tensor | None = None,
        recipe: tuple[int, int, int] = (1, 1, 128),
        compiled_dims: str = "mn",
    ) -> None:
        assert (ks_tensor.dtype, ks_tensor.tolist()) == (torch.int32, ks)
        assert c is d  # accumulates
        done = 0
        for expert, k in enumerate(ks):
            left, right = (
                _dequantised(
                    codes[done * width : (done + k) * width].view(width, k),
                    scale[done // 128 : (done + k) // 128].t(),
                    1,
                )
                for (codes, scale), width in ((a, d.shape[1]), (b, d.shape[2]))
            )
            d[expert] += left @ right.T
            done += k

    install("deep_gemm", k_grouped_fp8_gemm_nt_contiguous=k_grouped_fp8_gemm_nt_contiguous)
    torch.manual_seed(3)
    inputs = fp8_wgrads._make(tiny(DEEPSEEK).fewer(2), (16, 24), 128, torch.float32, "cpu", "full")
    run = fp8_product_peers.deep_gemm_wgrad("cuda")
    assert run is not None
    torch.testing.assert_close(run(inputs)[0], fp8_wgrads._eager(inputs)[0], rtol=1e-4, atol=1e-3)


@needs_kernels
def test_torchao_products(install: Callable[..., None], hopper: None, products: dict[str, Tensor]) -> None:
    def _to_fp8_blockwise_then_scaled_grouped_mm(
        A: Tensor, B_t: Tensor, offs: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> Tensor:
        assert offs is not None
        assert offs.dtype == torch.int32
        assert B_t.transpose(1, 2).is_contiguous()  # column-major for each expert
        parts = A.split(offs.diff(prepend=offs.new_zeros(1)).tolist())
        return torch.cat([part @ weight for part, weight in zip(parts, B_t, strict=True)])

    for name in ("torchao", "torchao.prototype", "torchao.prototype.moe_training"):
        install(name)
    package = "torchao.prototype.moe_training.blockwise_fp8"
    install(package)
    install(f"{package}.grouped_mm", **{f.__name__: f for f in (_to_fp8_blockwise_then_scaled_grouped_mm,)})
    run = fp8_product_peers.torchao("cuda")
    assert run is not None
    torch.testing.assert_close(run(products)[0], fp8_products._eager(products)[0])


def test_torchao_rows(install: Callable[..., None]) -> None:
    def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.unflatten(-1, (-1, 128)).abs().amax(-1) / 448
        return (x.unflatten(-1, (-1, 128)) / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale

    def triton_fp8_blockwise_act_quant_lhs(x: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
        assert block_size == 128
        return quantised(x)

    def triton_fp8_blockwise_act_quant_transposed_lhs(x: Tensor, block_size: int = 128) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous()
        assert x.shape[0] % block_size == 0
        return quantised(x.t().contiguous())

    for name in ("torchao", "torchao.prototype", "torchao.prototype.blockwise_fp8_training"):
        install(name)
    functions = (triton_fp8_blockwise_act_quant_lhs, triton_fp8_blockwise_act_quant_transposed_lhs)
    install(fp8_peers._TORCHAO, **{function.__name__: function for function in functions})
    x = torch.randn(128, 256)
    run = fp8_peers.torchao_rows("cuda", (128, 256), True)
    assert run is not None
    plain, scale, turned, turned_scale = run({"x": x})
    step = 0.07 * float(x.abs().max())  # three digits of a mantissa
    torch.testing.assert_close(_dequantised(plain, scale, 1), x, rtol=0.07, atol=step)
    torch.testing.assert_close(_dequantised(turned, turned_scale, 1), x.t(), rtol=0.07, atol=step)
    assert fp8_peers.torchao_rows("cuda", (128, 200), False) is None
