"""RouterReplay: what it refuses, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import RouterReplay
from python_tests.test_router_replay import EXPERTS, LAYERS, K, _logits, _recorded


def _given() -> RouterReplay:
    return RouterReplay.from_packed(_recorded().pack(), EXPERTS, LAYERS)


def _packed(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([[row] for row in rows], dtype=dtype)


def _of(*rows: list[int], experts: int = EXPERTS) -> RouterReplay:
    return RouterReplay.from_packed(_packed(*rows), experts, [3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: _given().route(4, _logits(), K),
            ValueError,
            r"layer 4 has no routes, only layers 3, 5 have.*multi-tok",
        ),
        (lambda: _given().ids(4), ValueError, "layer 4 has no routes"),
        (lambda: _given().record(4, torch.zeros(6, 2).int()), ValueError, "layer 4 has no routes"),
        (lambda: _given().route(3, _logits(0, 5), K), ValueError, "6 tokens with 2 experts, the pass has 5 and 2: one"),
        (lambda: _given().route(3, _logits(), 3), ValueError, "6 tokens with 2 experts, the pass has 6 and 3"),
        (
            lambda: _recorded().route(7, _logits(0, 5), K),
            ValueError,
            "layer 7 routes 5 tokens, the layers before it routed 6",
        ),
        (lambda: _given().to("meta").route(3, _logits(), K), ValueError, "are on meta, the pass is on cpu: use .to"),
        (lambda: _given().route(3, _logits(), K, replay_ids=None), TypeError, "replay_ids is no option of route"),
        (lambda: RouterReplay().route("3", _logits(), K), TypeError, "layer_id must be an int, got str"),
        (lambda: RouterReplay().record(0, torch.zeros(2, 2)), TypeError, "topk_ids must have dtype int16, int32"),
        (lambda: RouterReplay().record(0, torch.zeros(2).int()), ValueError, r"topk_ids must have shape \[T, K\]"),
        (lambda: RouterReplay(0), ValueError, "num_experts must be >= 1, got 0"),
        (lambda: RouterReplay().pack(), ValueError, "no layer has recorded any"),
        (lambda: _given()[torch.tensor([True] * 6)], TypeError, "an index must have dtype int64, int32, got bool"),
        (lambda: _given()[3], TypeError, "by a slice or an integer tensor, got int"),
        (lambda: _given()[torch.tensor(0)], ValueError, r"an index must have shape \[n\], got \[\]"),
        (lambda: _given()[torch.tensor([[0, 1]])], ValueError, r"an index must have shape \[n\], got \[1, 2\]"),
        (lambda: _given().layer(4), ValueError, "layer 4 has no routes"),
        (lambda: RouterReplay().layer(-1), ValueError, "layer_id must be >= 0, got -1"),
        (lambda: RouterReplay.cat([]), ValueError, "at least one part"),
        (
            lambda: RouterReplay.cat([_given(), 3]),
            TypeError,
            "RouterReplay: cat needs parts that are RouterReplay, got int",
        ),
        (lambda: RouterReplay().route(0, [[1.0]], K), TypeError, "moe_router: logits must be a torch.Tensor, got list"),
        (lambda: RouterReplay.cat([_given(), _recorded(layers=(3, 4))]), ValueError, "layers 3, 5 and layers 3, 4"),
        (
            lambda: RouterReplay.cat([_of([0, 1]), _of([0, 1, 2])]),
            ValueError,
            "parts of the same K, layer 3 has 2 and 3",
        ),
        (
            lambda: RouterReplay.cat([_of([0, 1]), _of([0, 1]).to("meta")]),
            ValueError,
            "parts of the same device, layer 3 has cpu and meta",
        ),
        (
            lambda: RouterReplay.cat([_of([0, 1]), _of([0, 1], experts=16)]),
            ValueError,
            r"parts of one number of experts, got \[8, 16\]",
        ),
        (
            lambda: RouterReplay.from_packed(_packed([0, 8]), 8, [3]),
            ValueError,
            r"outside \[0, 8\) at token 0, layer 3",
        ),
        (
            lambda: RouterReplay.from_packed(_packed([1, 2], [-2, 1]), 8, [3]),
            ValueError,
            r"token 1, layer 3: \[-2, 1\]",
        ),
        (lambda: RouterReplay.from_packed(_packed([0, 0]), 8, [3]), ValueError, r"twice at.*\[0, 0\].*-1, not 0"),
        (
            lambda: RouterReplay.from_packed(_packed([0, 255], dtype=torch.uint8), 255, [3]),
            ValueError,
            r"outside \[0, 255\)",
        ),
        (
            lambda: RouterReplay.from_packed(_packed([0, 1], dtype=torch.uint8), 257, [3]),
            ValueError,
            "uint8 cannot hold the ids of 257 experts",
        ),
        (lambda: RouterReplay.from_packed(torch.zeros(1, 1, 1), 8, [3]), TypeError, "packed must have dtype"),
        (lambda: RouterReplay.from_packed(torch.zeros(1, 1).int(), 8, [3]), ValueError, r"\[len, layers, K\]"),
        (lambda: RouterReplay.from_packed(_packed([0, 1]), 8, LAYERS), ValueError, "with 2 layers as layer_ids has"),
        (lambda: RouterReplay.from_packed(_packed([0, 1]), 8, [-1]), ValueError, "layer_id must be >= 0, got -1"),
        (
            lambda: RouterReplay.from_packed(torch.zeros(1, 2, 1).int(), 8, [3, 3]),
            ValueError,
            r"layer_ids must differ, got \[3, 3\]",
        ),
        (
            lambda: RouterReplay.from_packed(_packed([0, 1], [0, 1]), 8, [3], num_tokens=1),
            ValueError,
            "packed holds 2 tokens, more than num_tokens = 1",
        ),
    ],
)
def test_faults_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_pack_needs_equal_layers_and_the_number_of_experts() -> None:
    replay = RouterReplay()
    replay.record(0, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="pack needs the number of experts"):
        replay.pack()
    replay.record(1, torch.tensor([[0]]), num_experts=4)
    with pytest.raises(ValueError, match=r"the layers have \[1, 2\]"):
        replay.pack()


def test_layers_compiled_with_other_tokens_are_noticed_by_pack() -> None:
    replay = RouterReplay()
    compiled = torch.compile(lambda logits, layer: layer.route(logits, K).topk_ids, backend="eager", fullgraph=True)
    compiled(_logits(), replay.layer(0))
    compiled(_logits(tokens=5), replay.layer(1))
    with pytest.raises(ValueError, match=r"pack needs one number of tokens, the layers have \[5, 6\]"):
        replay.pack()


def test_routes_that_nobody_asks_for_are_noticed() -> None:
    """A fused router that ignores the replay, or layers that are numbered otherwise."""
    replay = _given()
    with pytest.raises(ValueError, match="no pass asked for the routes of layers 3, 5"):
        replay.check_used()
    replay.route(3, _logits(), K)
    with pytest.raises(ValueError, match="of layer 5"):
        replay.check_used()
    replay.route(5, _logits(), K)
    replay.check_used()
