"""Samples of grpo_loss: a batch with every input, the variants that the tests run through, calls that must raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.grpo_loss import GRPOLossConfig, grpo_loss
from python_tests.samples import BadCall, Call

INPUTS = ("log_probs", "old_log_probs", "advantages", "mask")
OPTIONAL = ("ref_log_probs", "sampler_log_probs", "token_weights", "entropy")

# Options of each variant; "_" in front of a name marks an input of the call rather than a field of the config.
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_asymmetric": {"clip_low": 0.1, "clip_high": 0.28},
    "ppo_no_lower_bound": {"clip_low": 10.0},
    "ppo_delta": {"delta": 1.5},
    "ppo_delta_inside": {"delta": 1.05},
    "ppo_dual_clip": {"dual_clip": 1.4},
    "ppo_on_policy": {"_old_log_probs": None},
    "ppo_token_advantages": {"_token_advantages": True},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "gspo_token_advantages": {"ratio_level": "sequence", "_token_advantages": True},
    "cispo_cap": {"surrogate": "cispo", "ratio_cap": 1.2},
    "cispo_bounds": {"surrogate": "cispo", "clip_low": 0.1},
    "cispo_sequence": {"surrogate": "cispo", "ratio_level": "sequence", "clip_low": 0.02},
    "sapo": {"surrogate": "sapo"},
    "sapo_sequence": {"surrogate": "sapo", "ratio_level": "sequence", "sapo_temperature_neg": 2.0},
    "vespo": {"surrogate": "vespo"},
    "vespo_truncate": {"surrogate": "vespo", "sampler_correction": "token_truncate", "sampler_cap": 1.1},
    "vespo_mask": {"surrogate": "vespo", "sampler_correction": "token_mask", "sampler_floor": 0.9},
    "reinforce": {"surrogate": "reinforce"},
    "gspo_token": {"ratio_level": "sequence_token", "clip_low": 0.05, "clip_high": 0.1},
    "gmpo": {"surrogate": "gmpo", "clip_low": 0.15, "clip_high": 0.2},
    "gmpo_token_advantages": {"surrogate": "gmpo", "_token_advantages": True, "_token_weights": True, "kl_coef": 0.3},
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.03, "clip_high": 0.05, "ratio_cap": 1.3},
    "dppo_tv_sequence": {
        "surrogate": "dppo_tv",
        "clip_low": 0.05,
        "ratio_level": "sequence",
        "_token_advantages": True,
    },
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.004, "clip_high": 0.01},
    "dro": {"surrogate": "dro", "dro_beta": 0.7},
    "dro_weights": {"surrogate": "dro", "_token_weights": True, "off_policy_threshold": 0.02},
    "clip_cov": {"surrogate": "clip_cov", "clip_cov_ratio": 1.0, "clip_cov_low": 0.05, "clip_cov_high": 0.6},
    "clip_cov_sequence": {
        "surrogate": "clip_cov",
        "ratio_level": "sequence",
        "clip_low": 0.02,
        "clip_cov_ratio": 1.0,
        "clip_cov_low": 0.0,
        "_token_weights": True,
    },
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_ratio": 0.3, "kl_cov_coef": 0.4},
    "kl_cov_sequence": {
        "surrogate": "kl_cov",
        "kl_cov_ratio": 0.4,
        "ratio_level": "sequence",
        "_token_advantages": True,
        "_token_weights": True,
    },
    "log_ratio_clamped": {"log_ratio_min": -0.25, "log_ratio_max": 0.3, "clip_low": 0.5},
    "log_ratio_clamped_sequence": {
        "ratio_level": "sequence",
        "log_ratio_min": -0.05,
        "log_ratio_max": 0.02,
        "kl_coef": 0.3,
        "kl_importance_weighted": True,
    },
    "log_ratio_clamped_sequence_token": {"ratio_level": "sequence_token", "log_ratio_max": 0.02},
    "entropy_through_loss": {"entropy_coef": 0.2, "entropy_reduction": "loss", "top_entropy_quantile": 0.61},
    "skip_empty": {"skip_empty_sequences": True, "entropy_coef": 0.2, "entropy_reduction": "loss"},
    "kl_k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "kl_k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "kl_k3": {"kl_coef": 0.3},
    "kl_abs": {"kl_coef": 0.3, "kl_estimator": "abs"},
    "kl_k3_straight_through": {"kl_coef": 0.3, "kl_estimator": "k3+"},
    "kl_clamped": {"kl_coef": 0.3, "kl_log_ratio_clamp": 0.4, "kl_value_clamp": 0.05},
    "kl_weighted": {"kl_coef": 0.3, "kl_importance_weighted": True},
    "kl_weighted_straight_through": {"kl_coef": 0.3, "kl_importance_weighted": True, "kl_estimator": "k1+"},
    "kl_weighted_sequence": {"kl_coef": 0.3, "kl_importance_weighted": True, "ratio_level": "sequence"},
    "kl_weighted_reinforce": {
        "kl_coef": 0.3,
        "kl_importance_weighted": True,
        "ratio_level": "sequence",
        "surrogate": "reinforce",
    },
    "token_truncate": {"sampler_correction": "token_truncate", "sampler_cap": 1.2, "sampler_floor": 0.9},
    "token_mask": {"sampler_correction": "token_mask", "sampler_cap": 1.2},
    "sequence_truncate": {"sampler_correction": "sequence_truncate", "sampler_cap": None, "sampler_floor": 1.0},
    "sequence_mask": {"sampler_correction": "sequence_mask", "sampler_cap": 1.5, "sampler_floor": 0.5},
    "off_policy": {"off_policy_threshold": 0.02, "_sampler_log_probs": None},
    "off_policy_sampler": {"off_policy_threshold": 0.02, "_token_advantages": True},
    "entropy_mask": {"top_entropy_quantile": 0.37},
    "entropy_bonus": {"entropy_coef": 0.2},
    "weights": {"_token_weights": True},
    "weights_per_sequence": {"_token_weights": "sequence"},
    "everything": {
        "ratio_level": "sequence",
        "kl_coef": 0.3,
        "kl_importance_weighted": True,
        "kl_estimator": "k2",
        "sampler_correction": "sequence_truncate",
        "off_policy_threshold": 0.05,
        "top_entropy_quantile": 0.61,
        "entropy_coef": 0.2,
        "_token_weights": True,
        "_token_advantages": True,
    },
}
LENGTHS = (9, 4, 1, 0, 7)


def config_of(variant: str, reduction: str) -> GRPOLossConfig:
    fields = {name: value for name, value in VARIANTS[variant].items() if not name.startswith("_")}
    if reduction == "none":
        fields.pop("entropy_reduction", None)
    if not reduction.startswith("sequence_mean"):
        fields.pop("skip_empty_sequences", None)
    return GRPOLossConfig(reduction=reduction, **fields)


def batch(variant: str = "ppo", *, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor | None]:
    """All inputs of a variant, [B, T] float64 with values that float32 holds.

    The rows are ragged and have holes; one has a single token, one none, one an advantage of zero.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths, default=0))

    def normal(scale: float, size: tuple[int, ...] = shape) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).double()

    log_probs = (-3 * torch.rand(shape, generator=generator)).double()
    old = (log_probs + normal(0.3)).float().double()
    mask = torch.arange(shape[1]) < torch.tensor(lengths).reshape(-1, 1)
    mask &= (torch.rand(shape, generator=generator) > 0.15) | (torch.tensor(lengths).reshape(-1, 1) == 1)
    options = VARIANTS[variant]
    advantages = normal(1.0, shape if options.get("_token_advantages") else shape[:1])
    advantages[1:2] = 0
    weights = torch.rand((shape[0], 1) if options.get("_token_weights") == "sequence" else shape, generator=generator)
    inputs: dict[str, Tensor | None] = {
        "log_probs": log_probs,
        "old_log_probs": old,
        "advantages": advantages,
        "mask": mask,
        "ref_log_probs": (log_probs + normal(0.4)).float().double(),
        "sampler_log_probs": (old + normal(0.15)).float().double(),
        "token_weights": (weights + 0.5).double() if options.get("_token_weights") else None,
        "entropy": (torch.rand(shape, generator=generator) * 2).double(),
    }
    inputs.update({name[1:]: None for name, value in options.items() if value is None and name.startswith("_")})
    return inputs


def pack(inputs: dict[str, Tensor | None], *, lead: int = 2, tail: int = 3) -> tuple[dict[str, Tensor | None], Tensor]:
    """The batch in packed form: its rows end to end as they are, between tokens that belong to no sequence."""
    shape = inputs["log_probs"].shape
    packed: dict[str, Tensor | None] = {}
    for name, value in inputs.items():
        if value is None or tuple(value.shape) != tuple(shape):
            packed[name] = value
            continue
        filler = float("nan") if value.is_floating_point() else True
        packed[name] = torch.cat([value.new_full((lead,), filler), value.reshape(-1), value.new_full((tail,), filler)])
    return packed, lead + torch.arange(shape[0] + 1) * shape[1]


def call(inputs: dict[str, Tensor | None], config: GRPOLossConfig, **options: Any) -> Any:
    """grpo_loss on a batch."""
    if options.get("cu_seqlens") is not None and config.reduction == "sequence_mean_token_sum_norm":
        options.setdefault("max_length", max(LENGTHS))
    return grpo_loss(*(inputs[name] for name in INPUTS), config, **{name: inputs[name] for name in OPTIONAL}, **options)


# --- contract suite --------------------------------------------------------------------------------------------------


def _op_arguments(
    variant: str, reduction: str, *, dtype: torch.dtype = torch.float32, upstream: bool = False, packed: bool = False
) -> tuple[Any, ...]:
    inputs, cu_seqlens = batch(variant), None
    if packed:
        inputs, cu_seqlens = pack(inputs)
    values = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    advantages = values["advantages"]
    options, parameters = config_of(variant, reduction).pack()
    return (
        values["log_probs"],
        values["old_log_probs"],
        advantages[:, None] if advantages.shape[0] == len(LENGTHS) and advantages.ndim == 1 else advantages,
        values["mask"],
        values["ref_log_probs"],
        values["sampler_log_probs"],
        values["token_weights"],
        values["entropy"],
        torch.tensor(0.7, dtype=dtype),
        (values["log_probs"] > -1.0).to(dtype) if config_of(variant, reduction).selects_tokens else None,
        cu_seqlens,
        torch.linspace(0.5, 1.5, values["log_probs"].numel(), dtype=dtype).view(values["log_probs"].shape)
        if upstream
        else None,
        torch.tensor(0.3, dtype=dtype),
        0.0,
        None,
        0.2,
        None,
        0.0,
        max(LENGTHS),
        options,
        parameters,
        True,
        True,
    )


def _empty_op_arguments(packed: bool) -> tuple[Any, ...]:
    full = _op_arguments("ppo", "token_mean", packed=packed)
    like = torch.empty((0,) if packed else (0, 9))
    per_token = tuple(None if value is None else value.new_empty(like.shape) for value in full[3:8])
    cu_seqlens = torch.zeros(1, dtype=torch.int32) if packed else None
    return (like, like, torch.empty(0, 1), *per_token, full[8], None, cu_seqlens, *full[11:])


OPS = {
    "grpo_loss": [
        _op_arguments("ppo", "token_mean"),
        _op_arguments("everything", "sequence_mean_token_mean", dtype=torch.float64),
        _op_arguments("everything", "sequence_mean_token_sum_norm", packed=True),
        _op_arguments("vespo_truncate", "sequence_mean_token_sum"),
        _op_arguments("everything", "none"),
        _op_arguments("everything", "none", upstream=True),
        _op_arguments("ppo_on_policy", "none", upstream=True, packed=True),
        _op_arguments("gmpo_token_advantages", "token_sum", dtype=torch.float64),
        _op_arguments("kl_cov", "none", upstream=True),
        _op_arguments("clip_cov_sequence", "sequence_mean_token_mean", packed=True),
        _empty_op_arguments(packed=False),
        _empty_op_arguments(packed=True),
    ]
}


def _public_call(name: str, variant: str, reduction: str, *, packed: bool = False) -> Call:
    config = config_of(variant, reduction)
    names = (*INPUTS, *OPTIONAL)

    def make(device: str) -> tuple[Any, ...]:
        inputs, cu_seqlens = batch(variant), None
        if packed:
            inputs, cu_seqlens = pack(inputs)
        tensors = [inputs[key] if inputs[key] is None else inputs[key].to(device) for key in names]
        floats = [t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]
        return (*floats, None if cu_seqlens is None else cu_seqlens.to(device))

    def function(*arguments: Any) -> Any:
        return grpo_kernels.grpo_loss(
            *arguments[:4],
            config,
            **dict(zip(OPTIONAL, arguments[4:8], strict=True)),
            cu_seqlens=arguments[8],
            max_length=9 if reduction == "sequence_mean_token_sum_norm" else None,
        )

    return Call(name, function, make, differentiable=(0, 7) if VARIANTS[variant].get("entropy_coef") else (0,))


CALLS = [
    _public_call("on_policy", "ppo_on_policy", "token_mean"),
    _public_call("everything_packed", "everything", "sequence_mean_token_sum_norm", packed=True),
    _public_call("everything_per_token", "everything", "none"),
    _public_call("vespo", "vespo_truncate", "sequence_mean_token_sum"),
    _public_call("gmpo", "gmpo_token_advantages", "token_sum", packed=True),
    _public_call("kl_cov", "kl_cov", "token_mean"),
]

X = torch.zeros(2, 3)
A = torch.ones(2)
PACKED = torch.zeros(6)
CU = torch.tensor([0, 2, 6])


def _bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
    positional = {"log_probs": X, "old_log_probs": X, "advantages": A, "mask": None, "config": GRPOLossConfig()}
    positional.update({key: arguments.pop(key) for key in list(arguments) if key in positional})
    return BadCall(
        f"grpo_loss_{name}", lambda: grpo_loss(*positional.values(), **arguments), error, ("grpo_loss: ", *says)
    )


NORM = GRPOLossConfig(reduction="sequence_mean_token_sum_norm")
BAD_CALLS = [
    _bad("list", TypeError, "log_probs must be a torch.Tensor, got list", log_probs=[0.0]),
    _bad("integer", TypeError, "log_probs must have dtype float32", "int64", log_probs=X.long()),
    _bad("ndim", ValueError, "log_probs must have shape [B, T], got [6]", log_probs=PACKED),
    _bad("packed_ndim", ValueError, "log_probs must have shape [N], got [2, 3]", cu_seqlens=CU),
    _bad("old", ValueError, "old_log_probs must have shape [B, T] = [2, 3], got [2, 2]", old_log_probs=X[:, :2]),
    _bad("old_dtype", TypeError, "old_log_probs must have dtype float32", "int64", old_log_probs=X.long()),
    _bad("old_device", ValueError, "old_log_probs must be on cpu like log_probs", old_log_probs=X.to("meta")),
    _bad(
        "advantages",
        ValueError,
        "advantages must have shape [B] = [2] or [B, T] = [2, 3], got [2, 1]",
        advantages=A[:, None],
    ),
    _bad("no_advantages", TypeError, "advantages must be a torch.Tensor, got NoneType", advantages=None),
    _bad("mask", ValueError, "mask must have shape [B, T] = [2, 3], got [3]", mask=X[0]),
    _bad("mask_list", TypeError, "mask must be a torch.Tensor, got list", mask=[1]),
    _bad("config", TypeError, "config must be a GRPOLossConfig, got dict", config={}),
    _bad("ref", ValueError, "ref_log_probs must have shape", "[2]", ref_log_probs=A),
    _bad("no_ref", ValueError, "ref_log_probs must be given when kl_coef is set", kl_coef=0.1),
    _bad("no_ref_tensor", ValueError, "ref_log_probs must be given when kl_coef", kl_coef=torch.tensor(0.0)),
    _bad("no_ref_config", ValueError, "ref_log_probs must be given", config=GRPOLossConfig(kl_coef=0.1)),
    _bad("no_entropy", ValueError, "entropy must be given when entropy_coef is set", entropy_coef=0.1),
    _bad(
        "no_entropy_mask",
        ValueError,
        "entropy must be given when top_entropy_quantile is set",
        config=GRPOLossConfig(top_entropy_quantile=0.5),
    ),
    _bad(
        "no_sampler",
        ValueError,
        "sampler_log_probs must be given when sampler_correction is set",
        config=GRPOLossConfig(sampler_correction="token_mask"),
    ),
    _bad("weights", ValueError, "token_weights must have shape [B] = [2] or [B, 1]", token_weights=A[:1]),
    _bad("entropy", ValueError, "entropy must have shape [B, T] = [2, 3]", entropy=A),
    _bad("kl_coef", TypeError, "kl_coef must be a number, got str", kl_coef="0.1", ref_log_probs=X),
    _bad("kl_coef_nan", ValueError, "kl_coef must be finite, got nan", kl_coef=float("nan"), ref_log_probs=X),
    _bad("kl_coef_shape", ValueError, "kl_coef must be a number or a 0-d tensor", kl_coef=A, ref_log_probs=X),
    _bad("num_items", ValueError, "num_items must be finite and >= 0, got -1", num_items=-1),
    _bad("num_items_type", TypeError, "num_items must be a number, got list", num_items=[1]),
    _bad(
        "num_items_none",
        ValueError,
        "num_items must be None with reduction='none'",
        config=GRPOLossConfig(reduction="none"),
        num_items=1,
    ),
    _bad(
        "num_items_sum",
        ValueError,
        "num_items must be None with reduction='token_sum'",
        config=GRPOLossConfig(reduction="token_sum"),
        num_items=1,
    ),
    _bad("max_length", ValueError, "max_length must be None with reduction='token_mean'", max_length=5),
    _bad("max_length_zero", ValueError, "max_length must be >= 1, got 0", config=NORM, max_length=0),
    _bad("max_length_float", TypeError, "max_length must be an int, got float", config=NORM, max_length=5.0),
    _bad(
        "max_length_packed",
        ValueError,
        "max_length must be given with cu_seqlens",
        log_probs=PACKED,
        old_log_probs=PACKED,
        cu_seqlens=CU,
        config=NORM,
    ),
    _bad(
        "cu_list", TypeError, "cu_seqlens must be a torch.Tensor", log_probs=PACKED, old_log_probs=None, cu_seqlens=[0]
    ),
    _bad("cu_dtype", TypeError, "cu_seqlens must have dtype int64, int32", log_probs=PACKED, cu_seqlens=CU.float()),
    _bad("cu_shape", ValueError, "cu_seqlens must have shape [B + 1], got [0]", log_probs=PACKED, cu_seqlens=CU[:0]),
    _bad(
        "packed_advantages",
        ValueError,
        "advantages must have shape [B] = [2] or [N] = [6], got [3]",
        log_probs=PACKED,
        old_log_probs=PACKED,
        advantages=PACKED[:3],
        cu_seqlens=CU,
    ),
]
