"""What the modules of multi-token prediction refuse, and that they say what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grpo_kernels import MultiTokenPrediction
from grpo_kernels.multi_token_prediction.module import MTPLayer
from python_tests.mtp_models import H, V


def _replaced(change: Callable[[MTPLayer], Any]) -> MultiTokenPrediction:
    mtp = MultiTokenPrediction(H, [nn.Identity()])
    change(mtp.layers[0])  # type: ignore[arg-type]
    return mtp


def _forward_of_its_own(layer: MTPLayer) -> None:
    layer.eh_proj.forward = lambda x: x  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            lambda layer: setattr(layer, "eh_proj", nn.Linear(2 * H, H)),
            TypeError,
            "without bias or adapters, got Linear",
        ),
        (lambda layer: setattr(layer, "eh_proj", nn.Identity()), TypeError, "without bias or adapters, got Identity"),
        (
            lambda layer: parametrize.register_parametrization(layer.eh_proj, "weight", nn.Identity()),
            TypeError,
            "without bias or adapters, got ParametrizedLinear",
        ),
        (_forward_of_its_own, TypeError, "without bias or adapters"),
        (lambda layer: layer.eh_proj.register_forward_hook(lambda *_: None), ValueError, "eh_proj has forward hooks"),
        (lambda layer: layer.eh_proj.register_forward_pre_hook(lambda *_: None), ValueError, "has forward hooks"),
        (lambda layer: layer.eh_proj.register_full_backward_hook(lambda *_: None), ValueError, "has backward hooks"),
        (lambda layer: layer.eh_proj.register_full_backward_pre_hook(lambda *_: None), ValueError, "has backward"),
        (
            lambda layer: setattr(layer, "eh_proj", nn.Linear(H, H // 2, bias=False)),
            ValueError,
            r"eh_proj.weight must have shape \[H, 2H\] = \[8, 16\], got \[4, 8\]",
        ),
        (lambda layer: setattr(layer, "order", "emb_First"), ValueError, "order must be one of 'emb_first'"),
        (lambda layer: layer.eh_proj.weight.untyped_storage().resize_(0), ValueError, "memory of eh_proj.weight"),
    ],
    ids=[
        "bias",
        "other",
        "parametrized",
        "forward",
        "hook",
        "pre_hook",
        "backward_hook",
        "backward_pre_hook",
        "shape",
        "order",
        "freed",
    ],
)
def test_a_replaced_projection_is_not_ignored(
    change: Callable[[MTPLayer], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        _replaced(change)(torch.randn(4, H), torch.arange(4), lambda t: torch.randn(*t.shape, H))


HIDDEN, IDS = torch.randn(4, H), torch.arange(4)
BLOCKS = [nn.Identity()]
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: MultiTokenPrediction(0, BLOCKS), ValueError, "hidden_size must be >= 1, got 0"),
    (lambda: MultiTokenPrediction(8.0, BLOCKS), TypeError, "hidden_size must be an int, got float"),  # type: ignore[arg-type]
    (lambda: MultiTokenPrediction(H, []), ValueError, "blocks must hold at least one nn.Module, got none"),
    (lambda: MultiTokenPrediction(H, nn.Identity()), TypeError, "one nn.Module for each depth, got Identity"),  # type: ignore[arg-type]
    (lambda: MultiTokenPrediction(H, 3), TypeError, "one nn.Module for each depth, got int"),  # type: ignore[arg-type]
    (lambda: MultiTokenPrediction(H, [abs]), TypeError, r"blocks\[0\] must be an nn.Module, got builtin_"),  # type: ignore[list-item]
    (lambda: MultiTokenPrediction(H, BLOCKS, order="both"), ValueError, "'hidden_first', got 'both'"),
    (lambda: MultiTokenPrediction(H, BLOCKS, detach="all"), ValueError, "'trunk', 'frozen', got 'all'"),
    (lambda: MultiTokenPrediction(H, BLOCKS, eps=-1.0), ValueError, "eps must be finite and >= 1e-24, got -1.0"),
    (lambda: MultiTokenPrediction(H, BLOCKS, eps=0), ValueError, "eps must be finite and >= 1e-24, got 0"),
    (lambda: MultiTokenPrediction(H, BLOCKS, eps=1e-50), ValueError, "eps must be finite and >= 1e-24, got 1e-50"),
    (lambda: MultiTokenPrediction(H, BLOCKS, final_norm=abs), TypeError, "final_norm must be an nn.Module"),  # type: ignore[arg-type]
    (lambda: MTPLayer(H, BLOCKS[0], order="both"), ValueError, "MTPLayer: order must be one of"),
]  # fmt: skip
WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ({"hidden": IDS}, TypeError, "hidden must have dtype float32, bfloat16, float16, float64, got int64"),
    ({"hidden": HIDDEN[0]}, ValueError, r"hidden must have shape \[N, H\] or \[B, T, H\], got \[8\]"),
    ({"hidden": HIDDEN[:, 1:]}, ValueError, r"hidden must have shape \[..., H\] with H = 8, got \[4, 7\]"),
    ({"token_ids": IDS[1:]}, ValueError, r"token_ids must have shape that of hidden without H = \[4\], got \[3\]"),
    ({"token_ids": IDS.float()}, TypeError, "token_ids must have dtype int64, int32, got float32"),
    ({"token_ids": IDS.to("meta")}, ValueError, "token_ids must be on cpu like hidden, got meta"),
    ({"embedding": torch.randn(V, H)}, TypeError, "embedding must be callable, ids -> embeddings, got Tensor"),
    ({"embedding": lambda t: t}, ValueError, r"embedding returns must have shape .* = \[1, 4, 8\], got \[1, 4\]"),
    ({"embedding": lambda t: torch.ones(*t.shape, H, dtype=torch.int64)}, TypeError, "returns must have dtype float32"),
    ({"embedding": lambda t: None}, TypeError, "what embedding returns must be a torch.Tensor, got NoneType"),
    ({"positions": IDS[1:]}, ValueError, r"positions must have shape \[N\] = \[4\], got \[3\]"),
    ({"positions": IDS, "cu_seqlens": IDS}, ValueError, "positions and cu_seqlens exclude each other, got both"),
    ({"shift": -1}, ValueError, "shift must be >= 0, got -1"),
    ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
    ({"block_options": ["mask"]}, TypeError, "block_options must be a mapping of names, got list"),
]


@pytest.mark.parametrize(("make", "error", "says"), WRONG, ids=range(len(WRONG)))
def test_wrong_options(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(("changed", "error", "says"), WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_wrong_calls(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {"hidden": HIDDEN, "token_ids": IDS, "embedding": nn.Embedding(V, H), **changed}
    with pytest.raises(error, match=f"MultiTokenPrediction: .*{says}"):
        MultiTokenPrediction(H, BLOCKS)(**arguments)


class _Returns(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)


@pytest.mark.parametrize(
    ("result", "error", "says"),
    [
        (lambda x: None, TypeError, "a torch.Tensor, got NoneType"),
        (lambda x: [x], TypeError, "a torch.Tensor, got list"),
        (lambda x: {"hidden": x}, TypeError, "a torch.Tensor, got dict"),
        (lambda x: 3, TypeError, "a torch.Tensor, got int"),
        (lambda x: (None, x), TypeError, "a torch.Tensor, got NoneType"),
        (lambda x: (), TypeError, "a torch.Tensor, got tuple"),
        (lambda x: x[:1], ValueError, r"shape \[..., H\] = \[4, 8\], got \[1, 8\]"),
        (lambda x: x.long(), TypeError, "dtype float32, bfloat16, float16, float64, got int64"),
    ],
    ids=["none", "list", "dict", "int", "none_first", "empty", "shape", "dtype"],
)
def test_blocks_that_return_something_else(result: Callable[[Tensor], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"MTPLayer: what block returns must (be|have) {says}"):
        MultiTokenPrediction(H, [_Returns(result)])(HIDDEN, IDS, nn.Embedding(V, H))


def test_a_detach_that_is_none_of_the_three_is_noticed() -> None:
    mtp = MultiTokenPrediction(H, BLOCKS)
    mtp.detach = "Trunk"
    with pytest.raises(ValueError, match="detach must be one of 'none', 'trunk', 'frozen', got 'Trunk'"):
        mtp(HIDDEN, IDS, nn.Embedding(V, H))


def test_a_freed_projection_is_named_before_the_norms_run() -> None:
    """Outside of a unit of FSDP2 the norms' parameters are away, too."""

    def away(*_: Any) -> None:
        raise RuntimeError("the norm failed")

    layer = MTPLayer(H, nn.Identity())
    layer.enorm.register_forward_pre_hook(away)
    layer.hnorm.register_forward_pre_hook(away)
    layer.eh_proj.weight.untyped_storage().resize_(0)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"memory of eh_proj\.weight"):
        layer(HIDDEN, HIDDEN)
