"""moe_router: the CUDA kernels, emulated, against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing import assert_as_accurate
from python_tests.emulator import ORDERS, emulated
from python_tests.emulator.checks import assert_same_in_every_order

INF, NAN = float("inf"), float("nan")
CHUNK = 16  # tokens that a block takes, up to 256 experts
LOSSES = {"z_loss_coef": 0.25, "aux_loss_coef": 0.5, "seq_aux_loss_coef": 2.0}

# E, K, groups and how many of them win: lanes with 1 to 32 experts, full and not; groups within, of and across lanes.
SHAPES = [
    (1, 1, 1, 1),
    (8, 2, 4, 2),
    (33, 5, 11, 4),
    (64, 8, 8, 4),
    (100, 6, 50, 7),
    (160, 6, 8, 3),
    (256, 8, 8, 4),
    (384, 9, 8, 2),
    (512, 10, 16, 5),
    (1000, 22, 100, 30),
    (1024, 32, 32, 9),
]
GATES: dict[str, dict[str, Any]] = {
    "mixtral": {"scoring_func": "softmax"},
    "olmoe": {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 0.5},
    "gpt_oss": {"scoring_func": "topk_softmax", "bias": True},
    "deepseek_v2": {"scoring_func": "softmax", "norm_topk_prob": False, "groups": True, "group_score": "max"},
    "deepseek_v3": {"scoring_func": "sigmoid", "bias": True, "groups": True, "routed_scaling_factor": 2.5},
    "kimi": {"scoring_func": "sigmoid", "bias": True, "norm_topk_prob": False},
    "deepseek_v4": {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    "sqrtsoftplus_groups": {"scoring_func": "sqrtsoftplus", "groups": True, "norm_topk_prob": False},
}


def bounds_of(tokens: int, kind: str) -> Tensor | None:
    """Ends of sequences: some empty, some shorter than a chunk, some longer."""
    if kind == "one":
        return None
    if kind == "many":
        return torch.arange(tokens + 1)
    cuts = [0, 0, tokens // 7, tokens // 3, tokens // 3, tokens - tokens // 5, tokens]
    return torch.tensor(cuts, dtype=torch.int32)


def inputs_of(gate: str, shape: tuple[int, ...], tokens: int, kind: str = "ragged", seed: int = 0) -> dict[str, Any]:
    """Everything that a call takes: a sixth of the tokens is masked, and half of the slots are replayed."""
    experts, top_k, n_group, topk_group = shape
    generator = torch.Generator().manual_seed(seed)
    options = dict(GATES[gate])
    logits = torch.randn(tokens, experts, generator=generator) * 2.0
    logits[torch.rand(tokens, experts, generator=generator) < 0.02] = -INF
    found: dict[str, Any] = {"logits": logits, "top_k": top_k, **LOSSES, "cu_seqlens": bounds_of(tokens, kind)}
    if options.pop("bias", False):
        found["e_score_correction_bias"] = torch.randn(experts, generator=generator) * 0.3
    if options.pop("groups", False):
        found |= {"n_group": n_group, "topk_group": topk_group}
    found["token_mask"] = torch.rand(tokens, generator=generator) > 1 / 6
    replay = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :top_k]
    found["replay_ids"] = torch.where(torch.rand(tokens, top_k, generator=generator) < 0.5, -1, replay)
    return {**found, **options}


def run(inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs, and the gradient of a fixed weighting of those that have one."""
    logits = inputs["logits"].detach().requires_grad_()
    out = grpo_kernels.moe_router(**{**inputs, "logits": logits})
    total = out.z_loss * 1.5 + out.aux_loss * 0.75 - out.seq_aux_loss * 0.5
    upstream = torch.linspace(-1.0, 2.0, out.topk_weights.numel()).view(out.topk_weights.shape)
    total = total + (out.topk_weights * upstream.to(out.topk_weights.dtype)).sum()
    (grad,) = torch.autograd.grad(total, logits)
    return [out.topk_ids, out.tokens_per_expert, out.replay_mismatch, out.topk_weights, *out[3:6], grad]


NAMES = ("ids", "tokens_per_expert", "mismatch", "weights", "z_loss", "aux_loss", "seq_aux_loss", "gradient")


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {**inputs, "logits": inputs["logits"].to(dtype)}


def check(batches: Sequence[dict[str, Any]], first_order: int = 0) -> None:
    """Each batch in another order; judged together: one number's error would be luck."""
    actual, expected, eager = [], [], []
    for order, inputs in enumerate(batches):
        with emulated((first_order + order) % len(ORDERS)):
            actual.append(run(inputs))
        with grpo_kernels.backend("reference"):
            expected.append(run(cast(inputs, torch.float64)))
            eager.append(run(cast(inputs, torch.float32)))
    for index, name in enumerate(NAMES):
        a, wanted, plain = (torch.cat([r[index].reshape(-1) for r in results]) for results in (actual, expected, eager))
        if a.is_floating_point():
            assert_as_accurate(a, wanted, plain, name=name)
        else:
            assert torch.equal(a, wanted), name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_every_gate(shape: tuple[int, ...], gate: str) -> None:
    sizes = (5, 9, 2) if shape[0] > 256 else (11, 21, 40)
    kinds = ("ragged", "one", "many")
    check([inputs_of(gate, shape, n, kind, seed) for seed, (n, kind) in enumerate(zip(sizes, kinds, strict=True))])


@pytest.mark.parametrize("kind", ["one", "ragged", "many"])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_tokens_around_a_chunk(tokens: int, kind: str) -> None:
    check([inputs_of("mixtral", (12, 2, 1, 1), tokens, kind, order) for order in ORDERS])


@pytest.mark.parametrize("loss", ["none", *LOSSES])
@pytest.mark.parametrize("gate", ["mixtral", "olmoe", "deepseek_v3", "deepseek_v4"])
def test_each_loss_alone(gate: str, loss: str) -> None:
    alone = {name: 0.5 if name == loss else 0.0 for name in LOSSES}
    check([{**inputs_of(gate, (64, 8, 8, 4), 37, kind, seed), **alone} for seed, kind in enumerate(("one", "ragged"))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("experts", [6, 64, 100, 256, 384, 1024])
def test_forms_of_the_inputs(experts: int, dtype: torch.dtype) -> None:
    """Aligned rows and others, rows apart, and ids, masks and bounds of every width: the same bits."""
    inputs = inputs_of("deepseek_v3", (experts, 3, 2, 1), 3, "ragged", experts)
    inputs = cast(inputs, dtype)
    wide = torch.full((3, experts + 3), NAN, dtype=dtype)
    wide[:, 1:-2] = inputs["logits"]
    check([inputs], 2)
    with emulated(3):
        expected = run(inputs)
        others = [{"replay_ids": inputs["replay_ids"].to(t)} for t in (torch.int32, torch.int16, torch.int8)]
        others += [{"cu_seqlens": inputs["cu_seqlens"].long(), "token_mask": inputs["token_mask"] * 3}]
        for change in others if experts == 64 else [{}]:
            for name, a, b in zip(NAMES, run({**inputs, **change}), expected, strict=True):
                assert torch.equal(a, b), (name, change)
        leaf = wide.requires_grad_()
        out = grpo_kernels.moe_router(**{**inputs, "logits": leaf[:, 1:-2]})
        assert torch.equal(out.topk_weights, expected[3])
        assert torch.equal(out.topk_ids, expected[0])


def test_every_route_may_be_replayed_as_bytes() -> None:
    replay = torch.arange(40, dtype=torch.uint8).view(20, 2)
    with emulated(2):
        out = grpo_kernels.moe_router(torch.zeros(20, 40), 2, replay_ids=replay)
    assert torch.equal(out.topk_ids, replay.int())
    assert out.replay_mismatch == 19  # all but the token whose live experts are 0 and 1


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("experts", [8, 256])
def test_logits_that_are_no_numbers(experts: int, gate: str) -> None:
    """NaN, infinities, rows of nothing but -inf, ties of zeros of both signs: such rows are NaN, and no other."""
    inputs = inputs_of(gate, (experts, 4, 4, 2), 11, "one", 5)
    inputs |= {"token_mask": torch.arange(11) != 8, "replay_ids": None}
    z = inputs["logits"]
    z[0, 3], z[1, 5], z[2, :4], z[4], z[5], z[5, 0] = NAN, INF, NAN, 0.0, -INF, 1.0
    z[4, ::2], z[6, -1], z[8], z[9] = -0.0, NAN, NAN, -INF
    check([{**inputs, **dict.fromkeys(LOSSES, 0.0)}], 1)
    check([inputs], 3)


@pytest.mark.parametrize("gate", GATES)
def test_equal_logits_go_to_the_lower_ids(gate: str) -> None:
    inputs = {**inputs_of(gate, (100, 6, 50, 7), 6, "one"), "replay_ids": None, "token_mask": None}
    inputs["logits"] = torch.tensor([0.0, 1.0, -1.0]).repeat(2)[:, None] * (torch.arange(100) % 3)
    check([inputs], 1)


@pytest.mark.parametrize("tokens", [0, 19])
@pytest.mark.parametrize("gate", ["mixtral", "deepseek_v3"])
def test_no_token_is_live(gate: str, tokens: int) -> None:
    for order, kind in enumerate(("one", "many") if tokens == 0 else ("one", "ragged", "many")):
        inputs = inputs_of(gate, (8, 2, 4, 2), tokens, kind)
        inputs |= {"token_mask": torch.zeros(tokens, dtype=torch.bool), "logits": inputs["logits"] * NAN}
        with emulated(order):
            ids, per_expert, mismatch, weights, *losses, grad = run(inputs)
        assert (ids == -1).all()
        assert not any(value.any() for value in (per_expert, mismatch, weights, *losses, grad))


def test_faulty_replay() -> None:
    """The CPU raises; a GPU cannot look: the slots are filled as if they were -1, and the weights are NaN."""
    z = torch.arange(8.0).repeat(6, 1).requires_grad_()
    replay = torch.tensor([[3, 3, -1], [8, 1, 2], [-2, 7, 6], [0, 1, 2], [7, -1, 7], [-1, -1, -1]])
    with emulated(2):
        out = grpo_kernels.moe_router(z, 3, replay_ids=replay, z_loss_coef=1.0)
        (grad,) = torch.autograd.grad(out.topk_weights.sum(), z)
    assert out.topk_ids.tolist() == [[3, 7, 6], [7, 1, 2], [5, 7, 6], [0, 1, 2], [7, 6, 5], [7, 6, 5]]
    faulty = torch.tensor([True, True, True, False, True, False])
    assert torch.equal(out.topk_weights.isnan(), faulty[:, None].expand(6, 3))
    assert torch.equal(grad.isnan(), faulty[:, None].expand(6, 8))
    assert out.z_loss.isnan()
    assert out.replay_mismatch == 3
    assert out.tokens_per_expert.tolist() == [1, 2, 2, 1, 0, 3, 4, 5]


def test_bounds_that_make_no_sense_stay_inside() -> None:
    """The CPU raises; a GPU cannot look. Routes and counts are right, nothing outside is touched: the sanitized build
    runs this, too."""
    inputs = inputs_of("mixtral", (12, 2, 1, 1), 40, "one")
    for bounds in ([0, 40, 3, 40], [-5, 3, 50], [9, -9, 2**40], [50, 60], [7], [40, 0, 39, 1, 38], [0, 5]):
        with emulated(2):
            expected = run({**inputs, "seq_aux_loss_coef": 0.0})
            actual = run({**inputs, "cu_seqlens": torch.tensor(bounds)})
        for name, a, wanted in list(zip(NAMES, actual, expected, strict=True))[:5]:
            assert torch.equal(a, wanted), (name, bounds)


@pytest.mark.parametrize(("gate", "shape"), [("mixtral", (12, 2, 1, 1)), ("deepseek_v3", (64, 8, 8, 4))])
def test_every_order_gives_the_same_bits(gate: str, shape: tuple[int, ...]) -> None:
    inputs = inputs_of(gate, shape, 2 * CHUNK + 5, "ragged")
    assert_same_in_every_order(lambda: run(inputs), range(10))
