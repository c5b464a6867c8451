"""The MoE module: its definition in float64, replay through checkpoints, names, dtypes, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grpo_kernels import MoE, MoEOutput, RouterOutput, RouterReplay, moe_experts, moe_router
from grpo_kernels.moe_experts.router_logits import router_logits
from grpo_kernels.testing import assert_as_accurate
from python_tests.moe_layers import DEEPSEEK, KINDS, E, H, I, K, layer_of, normal

X = normal(3, 5, H)
UPSTREAM = normal(3, 5, H, seed=1)


# the definition --------------------------------------------------------------------------------------------------


def _activation(moe: MoE, rows: Tensor) -> Tensor:
    if moe.experts.options["activation"] == "swiglu":
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def _weights(moe: MoE, logits: Tensor, ids: Tensor) -> Tensor:
    scoring = moe.gate.options["scoring_func"]
    if scoring == "topk_softmax":
        return logits.gather(1, ids).softmax(dim=1)
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(dim=1)
    weights = scores.gather(1, ids)
    if moe.gate.options["norm_topk_prob"]:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * moe.gate.options["routed_scaling_factor"]


def _best_of_groups(keys: Tensor, groups: int, winners: int) -> Tensor:
    if groups > 1:
        members = keys.view(keys.shape[0], groups, -1)
        best = members.topk(2, dim=2).values.sum(dim=2).topk(winners, dim=1).indices
        lost = torch.ones(keys.shape[0], groups, dtype=torch.bool).scatter_(1, best, False)
        keys = members.masked_fill(lost.unsqueeze(2), float("-inf")).flatten(1)
    return keys.topk(K, dim=1).indices


def _definition(moe: MoE, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert; `ids` [T, K] are the experts, or those that the scores say."""
    rows = x.reshape(-1, H)
    logits = rows @ moe.gate.weight.T + (0.0 if moe.gate.bias is None else moe.gate.bias)
    if ids is None:
        correction = 0.0 if moe.e_score_correction_bias is None else moe.e_score_correction_bias
        scores = logits.sigmoid() if moe.gate.options["scoring_func"] == "sigmoid" else logits
        ids = _best_of_groups(scores + correction, moe.gate.options["n_group"], moe.gate.options["topk_group"])
    weights = _weights(moe, logits, ids.clamp(min=0))
    experts, shared = moe.experts, moe.shared_experts
    outputs = []
    for token in range(rows.shape[0]):
        total = torch.zeros_like(rows[token])
        for slot in range(K):
            expert = int(ids[token, slot])
            if expert < 0:
                continue
            up_bias = 0.0 if experts.gate_up_proj_bias is None else experts.gate_up_proj_bias[expert]
            down_bias = 0.0 if experts.down_proj_bias is None else experts.down_proj_bias[expert]
            hidden = _activation(moe, experts.gate_up_proj[expert] @ rows[token] + up_bias)
            total = total + weights[token, slot] * (experts.down_proj[expert] @ hidden + down_bias)
        if shared is not None:
            gate, up = shared.gate_proj.weight @ rows[token], shared.up_proj.weight @ rows[token]
            total = total + shared.down_proj.weight @ (F.silu(gate) * up)
        outputs.append(total)
    return torch.stack(outputs).reshape(x.shape)


Forward = Callable[[MoE, Tensor], Tensor]


def _results(moe: MoE, x: Tensor, forward: Forward, upstream: Tensor = UPSTREAM) -> dict[str, Tensor]:
    """The output, and the gradients of the tokens and of every parameter."""
    x = x.detach().clone().requires_grad_()
    hidden = forward(moe, x)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    gradients = torch.autograd.grad((hidden * upstream.to(hidden.dtype)).sum(), (x, *parameters))
    return dict(zip(("hidden", "x", *names), (hidden.detach(), *gradients), strict=True))


def _ours(moe: MoE, x: Tensor) -> Tensor:
    hidden: Tensor = moe(x).hidden
    return hidden


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", ["preact", "input"])
def test_value_and_gradients_are_those_of_the_definition(kind: str, save: str) -> None:
    moe = layer_of(save=save, **KINDS[kind])
    exact = _results(copy.deepcopy(moe).double(), X.double(), _definition)
    eager = _results(moe, X, _definition)
    for name, actual in _results(moe, X, _ours).items():
        assert_as_accurate(actual, exact[name], eager[name])
    for name, actual in _results(copy.deepcopy(moe).double(), X.double(), _ours).items():
        torch.testing.assert_close(actual, exact[name], rtol=1e-10, atol=1e-12)


def test_bfloat16_layers_route_in_float32() -> None:
    moe = layer_of(**DEEPSEEK).to(torch.bfloat16)
    x = X.bfloat16()
    output = moe(x)
    assert output.hidden.dtype == torch.bfloat16
    assert output.router.topk_weights.dtype == torch.float32
    wide = copy.deepcopy(moe).double()
    ids = output.router.topk_ids.long()
    logits = x.double().reshape(-1, H) @ wide.gate.weight.T
    expected = _best_of_groups(logits.sigmoid() + wide.e_score_correction_bias, 4, 2)
    assert torch.equal(ids.sort(dim=1).values, expected.sort(dim=1).values)
    torch.testing.assert_close(output.router.topk_weights.double(), _weights(wide, logits, ids), rtol=1e-6, atol=1e-7)
    routed = moe_experts(x.reshape(-1, H), moe.experts.gate_up_proj, moe.experts.down_proj, output.router)
    assert torch.equal(output.hidden, routed.view_as(x) + moe.shared_experts(x))  # type: ignore[misc]
    output.hidden.sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in moe.parameters())  # type: ignore[union-attr]


def test_logits_of_the_router_under_autocast_and_in_bfloat16() -> None:
    weight, bias, x = normal(E, H, seed=3), normal(E, seed=4), normal(7, H, seed=5)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight, bias)
    assert logits.dtype == torch.float32
    assert_as_accurate(logits, exact, F.linear(x, weight, bias))
    narrow = [tensor.bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    upstream = normal(7, E, seed=6)
    actual = torch.autograd.grad((router_logits(*narrow) * upstream).sum(), narrow)
    expected = torch.autograd.grad((F.linear(*wide) * upstream.double()).sum(), wide)
    plain = [tensor.detach().float().requires_grad_() for tensor in narrow]
    eager = torch.autograd.grad((F.linear(*plain) * upstream).sum(), plain)
    for gradient, wanted, simple in zip(actual, expected, eager, strict=True):
        assert_as_accurate(gradient, wanted, simple)
    double = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(router_logits, double)


def test_the_backward_keeps_the_tokens_as_they_came() -> None:
    saved: list[Tensor] = []
    x, weight = normal(50, H).bfloat16().requires_grad_(), nn.Parameter(normal(E, H))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        router_logits(x, weight)
    assert [(tensor.dtype, list(tensor.shape)) for tensor in saved] == [
        (torch.bfloat16, [50, H]),
        (torch.float32, [E, H]),
    ]


# masks, losses, shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deepseek", "gpt-oss"])
def test_masked_tokens_do_not_take_part_whatever_they_hold(kind: str) -> None:
    moe = layer_of(**KINDS[kind], aux_loss_coef=0.1, z_loss_coef=0.1)
    mask = torch.ones(3, 5)
    mask[0, 1] = mask[2, 4] = 0
    dirty = X.clone()
    dirty[0, 1], dirty[2, 4] = float("nan"), float("inf")
    live = X[mask.bool()]

    def masked(layer: MoE, x: Tensor) -> Tensor:
        hidden, router = layer(x, token_mask=mask)
        assert int(router.tokens_per_expert.sum()) == K * int(mask.sum())
        return hidden + router.aux_loss + router.z_loss

    def alone(layer: MoE, x: Tensor) -> Tensor:
        hidden, router = layer(x)
        return hidden + router.aux_loss + router.z_loss

    upstream = UPSTREAM * mask.unsqueeze(2)
    actual = _results(moe, dirty, masked, upstream)
    expected = _results(moe, live, alone, upstream[mask.bool()])
    assert torch.equal(moe(dirty, token_mask=mask.bool()).hidden[mask == 0], torch.zeros(2, H))
    torch.testing.assert_close(actual["hidden"][mask.bool()], expected["hidden"])
    torch.testing.assert_close(actual["x"][mask.bool()], expected["x"])
    assert not actual["x"][mask == 0].any()
    for name, _ in moe.named_parameters():
        torch.testing.assert_close(actual[name], expected[name])


def test_rows_of_a_batch_are_sequences() -> None:
    moe = layer_of(seq_aux_loss_coef=0.5)
    loss = moe(X).router.seq_aux_loss
    rows = [moe(row).router.seq_aux_loss for row in X]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    packed = moe(X.reshape(-1, H), cu_seqlens=torch.tensor([0, 5, 10, 15])).router.seq_aux_loss
    assert torch.equal(loss, packed)
    assert not torch.equal(loss, moe(X.reshape(-1, H)).router.seq_aux_loss)  # one sequence
    moe.gate.options["seq_aux_loss_coef"] = torch.tensor(1.0)
    torch.testing.assert_close(moe(X).router.seq_aux_loss, 2 * loss)


@pytest.mark.parametrize("shape", [(H,), (1, H), (0, H), (2, 0, H), (2, 1, 3, H)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    moe = layer_of(**DEEPSEEK, seq_aux_loss_coef=0.1)
    x = normal(*shape, seed=2).requires_grad_()
    output = moe(x)
    assert isinstance(output, MoEOutput)
    assert output.hidden.shape == x.shape
    if x.numel():
        torch.testing.assert_close(output.hidden, _definition(moe, x))
    output.hidden.sum().backward()
    assert x.grad is not None
    for parameter in moe.parameters():
        assert parameter.grad is not None
        assert x.numel() or not parameter.grad.any()


# replay ----------------------------------------------------------------------------------------------------------


class _Shifted(nn.Module):
    """Raises the router's logits of the experts that the first pass did not choose, from the second pass on."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe, self.first = moe, True
        self.routers: list[RouterOutput] = []  # by a hook: a recomputation may stop before the layer's end
        moe.gate.register_forward_hook(lambda _, arguments, output: self.routers.append(output))

    def forward(self, x: Tensor, replay: RouterReplay | None) -> Tensor:
        gate = self.moe.gate
        if not self.first and gate.e_score_correction_bias is not None:
            with torch.no_grad():  # the bias decides about the choice and nothing else
                gate.e_score_correction_bias.neg_().add_(torch.linspace(-3, 3, E))
        self.first = False
        hidden: Tensor = self.moe(x, replay=replay).hidden
        return hidden


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_layer_takes_the_recorded_experts(use_reentrant: bool) -> None:
    def run(layer: nn.Module, x: Tensor, replay: RouterReplay | None) -> Tensor:
        hidden: Tensor = checkpoint(layer, x, replay, use_reentrant=use_reentrant)
        return hidden

    expected = _results(layer_of(**DEEPSEEK), X, _ours)
    shifted, replay = _Shifted(layer_of(**DEEPSEEK)), RouterReplay()
    actual = _results(shifted.moe, X, lambda _, x: run(shifted, x, replay)) if not use_reentrant else None
    if actual is None:  # torch.autograd.grad does not go through reentrant checkpoints
        x = X.clone().requires_grad_()
        (run(shifted, x, replay) * UPSTREAM).sum().backward()
        actual = {name: parameter.grad for name, parameter in shifted.moe.named_parameters()} | {"x": x.grad}
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name
    first, second = shifted.routers
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert torch.equal(
        first.tokens_per_expert, second.tokens_per_expert
    )  # an output: nothing adds up behind the scenes
    assert int(replay.mismatches()[3]) > 0


def test_the_same_routes_in_rollout_old_reference_and_training_passes() -> None:
    policy = layer_of(**DEEPSEEK)
    reference, trained = copy.deepcopy(policy), copy.deepcopy(policy)
    with torch.no_grad():
        for model in (reference, trained):
            model.gate.weight.add_(normal(E, H, seed=7))
    replay = RouterReplay()
    with torch.inference_mode():
        rollout = policy(X, replay=replay)
    packed = replay.pack()
    assert packed.dtype == torch.int8
    assert torch.equal(packed[:, 0].int(), rollout.router.topk_ids)
    for model in (policy, reference, trained):
        given = RouterReplay.from_packed(packed, E, [3])
        output = model(X, replay=given)
        assert torch.equal(output.router.topk_ids, rollout.router.topk_ids)
        ids = rollout.router.topk_ids.long()
        torch.testing.assert_close(output.hidden, _definition(model, X, ids))
        assert (int(output.router.replay_mismatch) > 0) == (model is not policy)
        given.check_used()
    live = trained(X).router.topk_ids
    assert not torch.equal(live, rollout.router.topk_ids)


# compilation -----------------------------------------------------------------------------------------------------


def test_the_compiled_layer_equals_the_eager_one() -> None:
    moe = layer_of(**DEEPSEEK, aux_loss_coef=0.1)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    mask = torch.arange(15).view(3, 5) % 4 != 1
    replay, same = RouterReplay(), RouterReplay()
    expected = _results(moe, X, lambda layer, x: layer(x, token_mask=mask, replay=replay).hidden)
    actual = _results(moe, X, lambda _, x: compiled(x, token_mask=mask, replay=same).hidden)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(same.pack(), replay.pack())


# expert parallelism ----------------------------------------------------------------------------------------------


class _Sent:
    def __init__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        self.x, self.topk_weights, self.topk_ids, self.handle = x, topk_weights, topk_ids, None


class OneOfTwo:
    """Stands in for the first or second of two ranks that hold the same tokens; the sum of both is the layer."""

    num_experts = E

    def __init__(self, rank: int) -> None:
        self.local_range = (rank * E // 2, (rank + 1) * E // 2)

    def dispatch(self, x: Tensor, router: Any) -> _Sent:
        return _Sent(x, router.topk_weights, router.topk_ids)

    def combine(self, y: Tensor, handle: None) -> Tensor:
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_and_runs_its_own_experts(kind: str) -> None:
    options = {**KINDS[kind], "shared_intermediate_size": 0}
    whole = layer_of(**options)
    total = torch.zeros_like(X)
    for rank in range(2):
        part = MoE(H, I, E, K, **options, expert_parallel=OneOfTwo(rank))  # type: ignore[arg-type]
        start, end = part.experts.expert_range  # type: ignore[misc]
        state = whole.state_dict()
        part.load_state_dict(
            {name: value[start:end] if name.startswith("experts.") else value for name, value in state.items()}
        )
        assert part.experts.gate_up_proj.shape[0] == E // 2
        assert f"experts {start} to {end} here" in repr(part)
        total += part(X).hidden.detach()
    torch.testing.assert_close(total, whole(X).hidden.detach())


def test_routes_are_those_of_the_op() -> None:
    moe = layer_of(**DEEPSEEK)
    expected = moe_router(
        router_logits(X.reshape(-1, H), moe.gate.weight),
        K,
        scoring_func="sigmoid",
        e_score_correction_bias=moe.e_score_correction_bias,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    for actual, wanted in zip(moe(X).router, expected, strict=True):
        assert torch.equal(actual, wanted)
