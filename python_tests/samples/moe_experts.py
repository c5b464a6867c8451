"""Samples of moe_experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.fp8_quantize.reference import fp8_quantize
from python_tests.samples import BadCall, Call

TOKENS, HIDDEN, WIDTH, EXPERTS, SLOTS = 6, 10, 7, 3, 2
GENERATOR = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


X = _normal(TOKENS, HIDDEN)
GATE_UP, DOWN = _normal(EXPERTS, 2 * WIDTH, HIDDEN) * 0.5, _normal(EXPERTS, HIDDEN, WIDTH) * 0.5
GATE_UP_BIAS, DOWN_BIAS = _normal(EXPERTS, 2 * WIDTH), _normal(EXPERTS, HIDDEN)
WEIGHTS = torch.rand(TOKENS, SLOTS, generator=GENERATOR)
IDS = torch.tensor([[0, 2], [2, 0], [-1, -1], [2, 0], [0, -1], [2, 2]])  # nobody goes to expert 1

# --- registered ops --------------------------------------------------------------------------------------------------

INV_MAP = torch.tensor([3, 0, -1, 7, -1], dtype=torch.int32)
PREACT, GRAD = _normal(5, 2 * WIDTH), _normal(5, WIDTH)
PREACT[2], GRAD[4] = float("nan"), float("nan")  # padding
SWIGLU, CLAMPED = (False, 1.0, 1.0, False), (True, 1.7, 0.8, True)
EVERYTHING = (True, True, True)
ALL_SIX = (True,) * 6
EPS = (1e-12, 1e-30)


def _kept(preact: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations in tiles of 1 x 128, in codes and scales."""
    return fp8_quantize(preact, False, True, True, False, 1e-12)[:2]


def _alone(place: int) -> tuple[bool, ...]:
    return tuple(index == place for index in range(6))


WIDE_PREACT, WIDE_GRAD = _normal(5, 260), _normal(5, 130)  # tiles of [R, 2I] that hold gates and ups
WIDE_PREACT[2], WIDE_GRAD[2] = float("nan"), float("nan")
ONE_PREACT, ONE_GRAD = PREACT[:, :2].contiguous(), GRAD[:, :1].contiguous()
TALL_MAP = torch.arange(131, dtype=torch.int32).where(torch.arange(131) % 5 != 0, -1)
TALL_PREACT, TALL_GRAD = (_normal(131, width).where(TALL_MAP[:, None] >= 0, float("nan")) for width in (14, 7))
TALL_WEIGHTS = torch.rand(70, SLOTS, generator=GENERATOR)
OPS = {
    "moe_glu": [
        (PREACT, INV_MAP, None, *SWIGLU),
        (PREACT.bfloat16(), INV_MAP, WEIGHTS, *CLAMPED),
        (PREACT.double(), INV_MAP, WEIGHTS.double(), *CLAMPED),
        (PREACT[:0], INV_MAP[:0], WEIGHTS, *SWIGLU),
    ],
    "moe_glu_backward": [
        (PREACT, GRAD, INV_MAP, WEIGHTS, None, *SWIGLU, *EVERYTHING),
        (PREACT.half(), GRAD.half(), INV_MAP, WEIGHTS, GRAD[:, 0], *CLAMPED, *EVERYTHING),
        (PREACT.bfloat16(), GRAD.bfloat16(), INV_MAP, WEIGHTS, None, *SWIGLU, True, False, False),
        (PREACT, GRAD, INV_MAP, WEIGHTS, None, *CLAMPED, False, True, True),
        (PREACT[:0], GRAD[:0], INV_MAP[:0], WEIGHTS, None, *SWIGLU, *EVERYTHING),
    ],
    "moe_glu_quantize": [
        (PREACT, INV_MAP, *SWIGLU, True, 1e-12),
        (PREACT.half(), INV_MAP, *CLAMPED, False, 0.5),
        (WIDE_PREACT.bfloat16(), INV_MAP, *SWIGLU, True, 1e-12),
        (ONE_PREACT, INV_MAP, *CLAMPED, True, 1e-12),
        (PREACT[:0], INV_MAP[:0], *SWIGLU, True, 1e-12),
    ],
    "moe_glu_backward_quantize": [
        (*_kept(WIDE_PREACT), WIDE_GRAD, INV_MAP, WEIGHTS, None, *SWIGLU, *ALL_SIX, *EPS, torch.float32),
        (*_kept(TALL_PREACT), TALL_GRAD.half(), TALL_MAP, TALL_WEIGHTS, None, *CLAMPED, *ALL_SIX, *EPS, torch.float16),
        (*_kept(ONE_PREACT), ONE_GRAD, INV_MAP, WEIGHTS, GRAD[:, 0], *CLAMPED, *ALL_SIX, *EPS, torch.bfloat16),
        *(
            (*_kept(PREACT), GRAD.bfloat16(), INV_MAP, WEIGHTS, None, *SWIGLU, *_alone(i), *EPS, torch.bfloat16)
            for i in range(6)
        ),
        (*_kept(PREACT), None, INV_MAP, WEIGHTS, None, *SWIGLU, *_alone(3)[:4], True, False, *EPS, torch.bfloat16),
        (*_kept(PREACT[:0]), GRAD[:0], INV_MAP[:0], WEIGHTS, None, *SWIGLU, *ALL_SIX, *EPS, torch.bfloat16),
    ],
}

# --- public calls ----------------------------------------------------------------------------------------------------


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


def _gpt_oss(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor, w: Tensor, i: Tensor) -> Tensor:
    return grpo_kernels.moe_experts(
        x, up, down, (w, i), gate_up_bias=up_bias, down_bias=down_bias, activation="clamped_swiglu", swiglu_limit=0.8,
        interleaved=True, save="input", alignment=4,
    )  # fmt: skip


def _fp8_gpt_oss(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor, w: Tensor, i: Tensor
) -> Tensor:  # fmt: skip
    return grpo_kernels.moe_experts(
        x, up, down, (w, i), gate_up_bias=up_bias, down_bias=down_bias, activation="clamped_swiglu", swiglu_limit=0.8,
        interleaved=True, recipe="fp8_block128", fp8_wgrad=True, save="input",
    )  # fmt: skip


# FP8 reads parameters as they are, autocast or not: numbers that a cast leaves as they are.
_EXACT = [tensor.bfloat16().float() for tensor in (X, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS)]

CALLS = [
    Call(
        "fp8",
        lambda x, up, down, w, i: grpo_kernels.moe_experts(x, up, down, (w, i), recipe="fp8_block128"),
        _make(*_EXACT[:3], WEIGHTS, IDS),
        (0, 1, 2, 3),
        autocast=(0, 1, 2),
        in_stages=True,
    ),
    Call(
        "fp8_gpt_oss",
        _fp8_gpt_oss,
        _make(*_EXACT, WEIGHTS, IDS.int()),
        (0, 1, 2, 3, 4, 5),
        autocast=(0, 1, 2, 3, 4),
        in_stages=True,
    ),
    Call(
        "swiglu",
        lambda x, up, down, w, i: grpo_kernels.moe_experts(x, up, down, (w, i)),
        _make(X, GATE_UP, DOWN, WEIGHTS, IDS),
        (0, 1, 2, 3),
        autocast=(0, 1, 2),
    ),
    Call(
        "gpt_oss",
        _gpt_oss,
        _make(X, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS, WEIGHTS, IDS.int()),
        (0, 1, 2, 3, 4, 5),
        autocast=(0, 1, 2, 3, 4),
    ),
    Call(
        "bf16_of_a_rank",
        lambda x, up, down, w, i: grpo_kernels.moe_experts(
            x, up.transpose(1, 2), down[1:], (w, i), expert_range=(1, 3), num_experts=3
        ),
        _make(X.bfloat16(), GATE_UP[1:].transpose(1, 2).contiguous().bfloat16(), DOWN.bfloat16(), WEIGHTS, IDS),
        (0, 1, 2, 3),
        autocast=(0, 1, 2),
        rounds=torch.bfloat16,
    ),
    Call(
        "empty",
        lambda x, up, down, w, i: grpo_kernels.moe_experts(x, up, down, (w, i)),
        _make(X[:0], GATE_UP, DOWN, WEIGHTS[:0], IDS[:0]),
        (0, 1, 2, 3),
        autocast=(0, 1, 2),
    ),
]


def _bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
    right: dict[str, Any] = {"x": X, "gate_up": GATE_UP, "down": DOWN, "router_output": (WEIGHTS, IDS)}

    def call() -> Any:
        return grpo_kernels.moe_experts(**{**right, **arguments})

    return BadCall(f"moe_experts_{name}", call, error, ("moe_experts: ", *says))


def _freed() -> Tensor:
    parameter = GATE_UP.clone()
    parameter.untyped_storage().resize_(0)
    return parameter


_TRAINED = GATE_UP.clone().requires_grad_()
BAD_CALLS = [
    _bad("x_list", TypeError, "x must be a torch.Tensor, got list", x=[1.0]),
    _bad("x_dtype", TypeError, "x must have dtype float32", "got int64", x=X.long()),
    _bad("x_shape", ValueError, "x must have shape [T, H], got [1, 6, 10]", x=X[None]),
    _bad("gate_up_none", TypeError, "gate_up must be a torch.Tensor, got NoneType", gate_up=None),
    _bad("gate_up_ndim", ValueError, "gate_up must have shape [E, 2I, H], got [14, 10]", gate_up=GATE_UP[0]),
    _bad("gate_up_turned", ValueError, "[E, 2I, 10]", "got [3, 10, 14]", gate_up=GATE_UP.transpose(1, 2)),
    _bad("gate_up_odd", ValueError, "[E, 2I, H]", "got [3, 13, 10]", gate_up=GATE_UP[:, 1:]),
    _bad("gate_up_device", ValueError, "gate_up must be on cpu like x, got meta", gate_up=GATE_UP.to("meta")),
    _bad("gate_up_freed", ValueError, "the memory of gate_up [3, 14, 10] is freed", gate_up=_freed()),
    _bad("down_shape", ValueError, "down must have shape [E, H, I] = [3, 10, 7], got [3, 7, 10]", down=DOWN.mT),
    _bad("bias_shape", ValueError, "gate_up_bias must have shape [E, 2I] = [3, 14]", gate_up_bias=DOWN_BIAS),
    _bad("bias_dtype", TypeError, "down_bias must have dtype", down_bias=DOWN_BIAS.int()),
    _bad("router_list", TypeError, "router_output must be what moe_router returned", router_output=[WEIGHTS, IDS]),
    _bad("ids_dtype", TypeError, "topk_ids must have dtype int64, int32", router_output=(WEIGHTS, IDS.char())),
    _bad("ids_shape", ValueError, "topk_ids must have shape [T, K] = [6, K]", router_output=(WEIGHTS, IDS[1:])),
    _bad("weights_shape", ValueError, "topk_weights must have shape [T, K] = [6, 2]", router_output=(WEIGHTS[1:], IDS)),
    _bad(
        "id_range", ValueError, "topk_ids must be < num_experts = 3, got 5 at [0, 0]", router_output=(WEIGHTS, IDS + 5)
    ),
    _bad("activation", ValueError, "activation must be one of 'swiglu', 'clamped_swiglu'", activation="gelu"),
    _bad("alpha", ValueError, "swiglu_alpha must be finite and > 0, got 0", swiglu_alpha=0),
    _bad("limit", TypeError, "swiglu_limit must be a number, got str", swiglu_limit="7"),
    _bad("interleaved", TypeError, "interleaved must be a bool, got int", interleaved=1),
    _bad("recipe", ValueError, "recipe must be one of 'bf16', 'fp8_block128', got 'fp8'", recipe="fp8"),
    _bad("recipe_float64", TypeError, "'fp8_block128' takes", "got float64", recipe="fp8_block128", x=X.double()),
    _bad("fp8_wgrad", TypeError, "fp8_wgrad must be a bool, got int", recipe="fp8_block128", fp8_wgrad=1),
    _bad("fp8_wgrad_alone", ValueError, "fp8_wgrad is for recipe 'fp8_block128', got recipe 'bf16'", fp8_wgrad=True),
    _bad(
        "fp8_alignment",
        ValueError,
        "alignment must be a multiple of 128 for fp8_wgrad, got 64",
        recipe="fp8_block128",
        fp8_wgrad=True,
        alignment=64,
    ),
    _bad("save", ValueError, "save must be one of 'preact', 'input', got 'all'", save="all"),
    _bad("alignment", ValueError, "alignment must be >= 1, got 0", alignment=0),
    _bad("rows", ValueError, "T * K and R must be < 2^31, got 12 and ", alignment=2**30),
    _bad(
        "many",
        ValueError,
        "num_experts must be <= 1024, got 1100",
        gate_up=GATE_UP.new_zeros(1100, 14, 10),
        down=GATE_UP.new_zeros(1100, 10, 7),
    ),
    _bad("range_type", TypeError, "expert_range must be a pair", expert_range=4),
    _bad("range_alone", ValueError, "expert_range needs num_experts", expert_range=(0, 3)),
    _bad("range_size", ValueError, "(start, start + 3) within num_experts = 8", expert_range=(0, 5), num_experts=8),
    _bad("range_end", ValueError, "within num_experts = 8, got (6, 9)", expert_range=(6, 9), num_experts=8),
    _bad("count", ValueError, "num_experts must be E = 3 without an expert_range", num_experts=8),
    _bad("accumulators", TypeError, "weight_grad_accumulators must be a pair", weight_grad_accumulators=GATE_UP),
    _bad(
        "accumulator_shape",
        ValueError,
        "weight_grad_accumulators[1] must have shape [E, H, I] = [3, 10, 7]",
        down=DOWN.clone().requires_grad_(),
        weight_grad_accumulators=(None, GATE_UP),
    ),
    _bad(
        "accumulator_frozen",
        ValueError,
        "weight_grad_accumulators[0] is for the gradient of gate_up, which does not require one",
        weight_grad_accumulators=(GATE_UP.clone(), None),
    ),
    _bad(
        "accumulator_dtype",
        TypeError,
        "weight_grad_accumulators[0] must have dtype float32, got bfloat16",
        gate_up=_TRAINED,
        weight_grad_accumulators=(GATE_UP.bfloat16(), None),
    ),
]
