"""RouterReplay: recorded routes are taken again by every pass, checkpoints included; its data survives packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from grpo_kernels import RouterReplay, moe_router
from python_tests.moe_layers import E, H, layer_of

TOKENS, EXPERTS, K = 6, 8, 2
LAYERS = (3, 5)


def _logits(seed: int = 0, tokens: int = TOKENS, experts: int = EXPERTS) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def _recorded(tokens: int = TOKENS, experts: int = EXPERTS, layers: tuple[int, ...] = LAYERS) -> RouterReplay:
    replay = RouterReplay()
    for layer in layers:
        replay.route(layer, _logits(layer, tokens, experts), K)
    return replay


# passes ----------------------------------------------------------------------------------------------------------


def test_the_first_pass_routes_live_and_later_ones_take_its_experts() -> None:
    replay = RouterReplay()
    first = replay.route(3, _logits(), K)
    live = moe_router(_logits(), K)
    for recorded, expected in zip(first, live, strict=True):
        assert torch.equal(recorded, expected)
    again = replay.route(3, -_logits(), K)
    assert torch.equal(again.topk_ids, first.topk_ids)
    expected_weights = (-_logits()).gather(1, first.topk_ids.long()).softmax(dim=1)  # of the live logits
    torch.testing.assert_close(again.topk_weights, expected_weights)
    assert int(again.replay_mismatch) == TOKENS


@pytest.mark.parametrize(
    "options",
    [
        {"scoring_func": "softmax", "norm_topk_prob": False, "aux_loss_coef": 0.1, "z_loss_coef": 0.1},
        {"scoring_func": "topk_softmax", "e_score_correction_bias": torch.linspace(-1, 1, EXPERTS)},
        {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "seq_aux_loss_coef": 0.1},
        {"scoring_func": "sqrtsoftplus", "n_group": 2, "topk_group": 1, "group_score": "max"},
    ],
    ids=lambda options: options["scoring_func"],
)
def test_a_recording_pass_is_live_in_every_form_of_the_router(options: dict[str, Any]) -> None:
    logits = _logits()
    logits[0, 3], logits[1] = float("-inf"), 0.0
    for recorded, expected in zip(
        RouterReplay().route(3, logits, K, **options), moe_router(logits, K, **options), strict=True
    ):
        assert torch.equal(recorded, expected)


def test_mismatches_are_those_of_the_latest_pass() -> None:
    replay = _recorded()
    assert {layer: int(count) for layer, count in replay.mismatches().items()} == {3: 0, 5: 0}
    changed = _logits(3)
    changed[1] = -changed[1]
    for _ in range(2):  # a recomputation does not count twice
        replay.route(3, changed, K)
        assert {layer: int(count) for layer, count in replay.mismatches().items()} == {3: 1, 5: 0}


def test_gradients_reach_the_logits_of_the_replayed_experts() -> None:
    ids = RouterReplay.from_packed(torch.tensor([[[7, 1]], [[0, 2]]]), EXPERTS, [3])
    logits = _logits(tokens=2).double().requires_grad_()
    weights = ids.route(3, logits, K).topk_weights
    upstream = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), logits)
    plain = _logits(tokens=2).double().requires_grad_()
    chosen = plain.gather(1, torch.tensor([[7, 1], [0, 2]])).softmax(dim=1)
    (expected,) = torch.autograd.grad((chosen * upstream).sum(), plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)
    assert gradient.count_nonzero() == 4


def test_slots_without_a_route_are_live() -> None:
    packed = _recorded().pack()
    packed[2] = -1
    packed[4, 0, 1] = -1
    replay = RouterReplay.from_packed(packed, EXPERTS, LAYERS)
    other = _logits(9)
    ids = replay.route(3, other, K).topk_ids
    live = moe_router(other, K).topk_ids
    assert torch.equal(ids[2], live[2])
    assert ids[4, 0] == packed[4, 0, 0]
    best = [expert for expert in other[4].argsort(descending=True).tolist() if expert != int(ids[4, 0])]
    assert ids[4, 1] == best[0]
    assert torch.equal(ids[[0, 1, 3, 5]], packed[[0, 1, 3, 5], 0].to(torch.int32))


def test_masked_tokens_are_recorded_as_missing_and_may_be_live_later() -> None:
    mask = torch.tensor([True, False, True, True, True, True])
    replay = RouterReplay()
    replay.route(3, _logits(), K, token_mask=mask)
    assert replay.pack()[1].tolist() == [[-1, -1]]
    assert torch.equal(replay.route(3, _logits(), K).topk_ids, moe_router(_logits(), K).topk_ids)


class _Layer(torch.nn.Module):
    """A router with weights; from its second pass on the logits of the experts that it did not choose are raised.

    Weights are a softmax over the chosen logits, so with the same experts value and gradient stay the same.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.passes = layer, 0
        self.weight = torch.nn.Parameter(_logits(layer, EXPERTS, 4))
        self.value = torch.nn.Parameter(_logits(layer + 50, EXPERTS, 4))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, replay: RouterReplay | None, perturbed: bool) -> Tensor:
        logits = x @ self.weight.T
        self.passes += 1
        if perturbed and self.passes > 1:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, self.seen[0].long(), True)
            logits = logits + torch.where(chosen, 0.0, 100.0)
        router = moe_router(logits, K) if replay is None else replay.route(self.layer, logits, K)
        self.seen.append(router.topk_ids)
        ids = router.topk_ids.long()
        return x + (router.topk_weights.unsqueeze(2) * self.value[ids]).sum(dim=1)


def _through_two_layers(
    run: Callable[..., Any], replay: RouterReplay | None, perturbed: bool
) -> tuple[list[Tensor], list[_Layer]]:
    layers = [_Layer(layer) for layer in LAYERS]
    x = _logits(20, TOKENS, 4).requires_grad_()
    hidden = x
    for layer in layers:
        hidden = run(layer, hidden, replay, perturbed)
    loss = (hidden * _logits(21, TOKENS, 4)).sum()
    parameters = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in parameters if tensor.grad is not None)], layers


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_cannot_route_anew(use_reentrant: bool) -> None:
    def checkpointed(*arguments: Any) -> Any:
        return checkpoint(*arguments, use_reentrant=use_reentrant)

    expected, _ = _through_two_layers(lambda layer, *rest: layer(*rest), None, False)
    replay = RouterReplay()
    actual, layers = _through_two_layers(checkpointed, replay, True)
    assert len(actual) == len(expected) == 6
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)
    for layer in layers:
        assert layer.passes == 2
        assert torch.equal(layer.seen[0], layer.seen[1])
    assert [int(count) for count in replay.mismatches().values()] == [TOKENS, TOKENS]  # what live routing would do
    live, layers = _through_two_layers(checkpointed, None, True)
    assert not torch.equal(layers[0].seen[0], layers[0].seen[1])
    assert not all(torch.equal(value, wanted) for value, wanted in zip(live, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_given_routes_go_through_checkpoints(use_reentrant: bool) -> None:
    given = RouterReplay.from_packed(_recorded().pack(), EXPERTS, LAYERS)
    expected, _ = _through_two_layers(lambda layer, *rest: layer(*rest), given, False)
    actual, layers = _through_two_layers(
        lambda *arguments: checkpoint(*arguments, use_reentrant=use_reentrant), given, True
    )
    assert all(torch.equal(value, wanted) for value, wanted in zip(actual, expected, strict=True))
    assert all(torch.equal(layer.seen[1].to(torch.int8), given.ids(layer.layer)) for layer in layers)


def test_routes_of_a_rollout_in_inference_mode_can_be_trained_on() -> None:
    replay = RouterReplay()
    with torch.inference_mode():
        replay.route(3, _logits(), K)
    logits = _logits().requires_grad_()
    replay.route(3, logits, K).topk_weights[:, 0].sum().backward()
    assert float(logits.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_routers_of_ones_own_ask_and_tell() -> None:
    replay = RouterReplay(num_experts=EXPERTS)
    assert replay.ids(0) is None
    chosen = _logits().topk(K).indices
    replay.record(0, chosen)
    assert torch.equal(replay.ids(0), chosen)
    replay.record(0, -chosen, mismatch=torch.tensor(3))  # routes stay
    assert torch.equal(replay.ids(0), chosen)
    assert {layer: int(count) for layer, count in replay.mismatches().items()} == {0: 3}
    assert replay.pack().tolist() == chosen.unsqueeze(1).tolist()


def test_what_the_caller_does_to_its_ids_leaves_the_routes_alone() -> None:
    replay = RouterReplay(num_experts=EXPERTS)
    routed = replay.route(3, _logits(), K).topk_ids
    told = _logits().topk(K).indices
    replay.record(5, told)
    expected = torch.stack([routed, told], dim=1).to(torch.int8)
    routed.fill_(-1)
    told.zero_()
    assert torch.equal(replay.pack(), expected)
    packed = expected.clone()
    given = RouterReplay.from_packed(packed, EXPERTS, LAYERS)
    packed.zero_()
    assert torch.equal(given.pack(), expected)


@pytest.mark.parametrize("given", [False, True])
def test_layers_compiled_one_by_one_share_their_graphs(given: bool) -> None:
    """As many graphs for ten layers as for two: with and without a gradient of x, recording and replaying."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    layers = [layer_of(layer_id=layer) for layer in range(10)]
    compiled = [torch.compile(layer, backend=counter, fullgraph=True) for layer in layers]
    tokens = 0.1 * torch.randn(TOKENS, H)
    for _ in range(2):
        replay, same = RouterReplay(), RouterReplay()
        if given:
            packed = torch.rand(TOKENS, 10, E).argsort(dim=-1)[..., :K]
            replay, same = (RouterReplay.from_packed(packed, E, range(10)) for _ in range(2))
        for sign in (1.0, -1.0):
            eager = actual = sign * tokens
            for layer_id, (layer, function) in enumerate(zip(layers, compiled, strict=True)):
                eager = eager + layer(eager, replay=replay).hidden
                actual = actual + function(actual, replay=same.layer(layer_id)).hidden
            torch.testing.assert_close(actual, eager)
        assert torch.equal(same.pack(), replay.pack())
        assert same.mismatches() == replay.mismatches()
        same.check_used()
    assert counter.frame_count <= (2 if given else 4)


@pytest.mark.parametrize("given", [False, True])
def test_compiled_passes_equal_eager_ones(given: bool) -> None:
    def layers(logits: Tensor, replay: RouterReplay) -> list[Tensor]:
        return [replay.route(layer, logits * layer, K).topk_weights for layer in LAYERS]

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, TOKENS + 3):
        packed = _recorded(tokens).pack()
        eager_replay, compiled_replay = (
            RouterReplay.from_packed(packed, EXPERTS, LAYERS) if given else RouterReplay() for _ in range(2)
        )
        for sign in (1.0, -1.0):  # record, then replay
            logits = sign * _logits(1, tokens)
            expected = layers(logits, eager_replay)
            for actual, wanted in zip(compiled(logits, compiled_replay), expected, strict=True):
                torch.testing.assert_close(actual, wanted)
        assert torch.equal(compiled_replay.pack(), eager_replay.pack())
        assert compiled_replay.layer_ids == LAYERS
        compiled_replay.check_used()


# data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (2, torch.int8),
        (128, torch.int8),
        (129, torch.int16),
        (1024, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_packing_takes_the_smallest_integers(experts: int, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, experts - 1], [-1, -1], [experts // 2, 0]], dtype=torch.int32)
    replay = RouterReplay(num_experts=experts)
    for layer in LAYERS:
        replay.record(layer, ids.roll(layer, dims=0))
    packed = replay.pack()
    assert (packed.dtype, list(packed.shape)) == (dtype, [3, 2, 2])
    again = RouterReplay.from_packed(packed, experts, replay.layer_ids)
    assert again.layer_ids == LAYERS
    for layer in LAYERS:
        assert torch.equal(again.ids(layer).int(), ids.roll(layer, dims=0))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_last_token_of_an_engine_has_no_route(dtype: torch.dtype) -> None:
    wire = _recorded().pack()[:-1].to(dtype)
    replay = RouterReplay.from_packed(wire, EXPERTS, LAYERS, num_tokens=TOKENS)
    assert replay.num_tokens == TOKENS
    packed = replay.pack()
    assert packed.dtype == torch.int8
    assert torch.equal(packed[:-1].long(), wire.long())
    assert packed[-1].tolist() == [[-1, -1]] * 2  # not expert 0
    other = _logits(8)
    assert torch.equal(replay.route(3, other, K).topk_ids[-1], moe_router(other, K).topk_ids[-1])


def test_ids_above_255_survive_every_step() -> None:
    replay = _recorded(50, 384)
    packed = replay.pack()
    assert packed.dtype == torch.int16
    assert int(packed.max()) > 255
    again = RouterReplay.from_packed(packed, 384, LAYERS)
    for layer in LAYERS:
        assert torch.equal(again.route(layer, _logits(9, 50, 384), K).topk_ids, replay.ids(layer))


def test_parts_of_a_batch_put_together_are_the_batch() -> None:
    replay = _recorded()
    packed = replay.pack()
    parts = [replay[:2], replay[2:5], replay[torch.tensor([5])]]
    assert [part.num_tokens for part in parts] == [2, 3, 1]
    assert torch.equal(RouterReplay.cat(parts).pack(), packed)
    order = torch.tensor([4, 4, 0])
    assert torch.equal(replay[order].pack(), packed[order])
    given = RouterReplay.from_packed(packed, EXPERTS, LAYERS)
    assert torch.equal(RouterReplay.cat([given[:4], replay[4:]]).pack(), packed)
    assert torch.equal(given[1:3].route(5, _logits(9, 2), K).topk_ids, packed[1:3, 1].to(torch.int32))
    moved = given.to("meta")
    assert moved.ids(3).device.type == "meta"  # type: ignore[union-attr]
    assert moved.layer_ids == LAYERS


def test_no_tokens() -> None:
    replay = _recorded(0)
    assert list(replay.pack().shape) == [0, 2, K]
    again = RouterReplay.from_packed(replay.pack(), EXPERTS, LAYERS)
    assert list(again.route(3, _logits(0, 0), K).topk_ids.shape) == [0, K]
    assert (
        RouterReplay.from_packed(replay.pack(), EXPERTS, LAYERS, num_tokens=2).pack().tolist() == [[[-1] * 2] * 2] * 2
    )


def test_ids_that_no_expert_has_stay_invalid_where_nobody_looks() -> None:
    """On a GPU faults are not looked for: an id must not wrap round into that of an expert."""
    replay = RouterReplay(num_experts=100)
    replay.record(3, torch.tensor([[300, 1], [-7, 2], [255, 3]], dtype=torch.int32))
    assert replay.pack()[:, 0].tolist() == [[-2, 1], [-2, 2], [-2, 3]]


def test_it_says_what_it_holds() -> None:
    assert repr(RouterReplay()) == "RouterReplay(recording, num_experts=None, layer_ids=(), num_tokens=None)"
    given = RouterReplay.from_packed(_recorded().pack(), EXPERTS, LAYERS)
    assert repr(given) == "RouterReplay(given, num_experts=8, layer_ids=(3, 5), num_tokens=6)"
