"""Samples of multi-token prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors, PolicyTerms
from python_tests.samples import BadCall, Call
from python_tests.samples._linear_head import ADVANTAGES, BIAS, HIDDEN, OLD, VOCAB, WEIGHT, WIDTH, A, B
from python_tests.samples.token_log_probs import IDS, MASK, TEMPERATURES

TOKENS = torch.where(IDS < 0, IDS, IDS.clamp(min=12))  # none that the bias rules out
HIDDENS = torch.stack([HIDDEN, HIDDEN.flip(1), HIDDEN.sin()]) * 0.4
POSITIONS = torch.tensor([[-1, 0, 1], [0, 1, 2]])
CU_SEQLENS = torch.tensor([0, 4, 4, 6], dtype=torch.int32)

# --- registered ops: flat, without the backend ------------------------------------------------------------------------

FLAT_IDS, FLAT_MASK, FLAT_POSITIONS = TOKENS.flatten(), MASK.flatten(), POSITIONS.flatten()
OPS = {
    "mtp_targets": [
        (FLAT_IDS, None, None, 3, 1, 0, -100),
        (FLAT_IDS.int(), FLAT_POSITIONS, FLAT_MASK, 2, 0, 3, 25),
        (FLAT_IDS, FLAT_POSITIONS.int(), None, 1, 9, 0, -1),
        (FLAT_IDS[:0], None, FLAT_MASK[:0], 4, 1, 0, -100),
    ],
}

# --- public calls ----------------------------------------------------------------------------------------------------


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


def _policy(name: str, config: GRPOLossConfig, *, packed: bool = False, **options: Any) -> Call:
    """Two sequences of three tokens; packed one of four, an empty one and one of two."""

    def function(x: Tensor, w: Tensor, i: Tensor, old: Tensor, advantages: Tensor, m: Tensor) -> Any:
        if packed:
            x, i, old, m = x.flatten(1, 2), i.flatten(), old.flatten(), m.flatten()
            advantages = torch.cat([advantages, advantages[:1]])
        policy = PolicyTerms(old, advantages, config, ref_log_probs=old.sin() - 3.0)
        return grpo_kernels.mtp_linear_cross_entropy(
            x, w, i, shift=0, mask=m, policy=policy, cu_seqlens=CU_SEQLENS.to(x.device) if packed else None, **options
        )

    return Call(name, function, _make(HIDDENS, WEIGHT, TOKENS, OLD, ADVANTAGES, MASK), (0, 1), autocast=(0, 1))


CALLS = [
    Call(
        "mtp_loss",
        lambda x, w, i: grpo_kernels.mtp_linear_cross_entropy(x, w, i),
        _make(HIDDENS, WEIGHT, TOKENS),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "mtp_loss_everything",
        lambda x, w, i, bias, m, t, a, b, p: grpo_kernels.mtp_linear_cross_entropy(
            x, w, i, positions=p, shift=0, mask=m, ignore_index=25, depth_weights=(1.0, 0.5, -0.25),
            normalizer="tokens", bias=bias, temperature=t, logit_scale=1.3, softcap=5.0, z_loss=0.1,
            lora=LoRAFactors(a, b, 0.5),
        ),
        _make(HIDDENS, WEIGHT, TOKENS, BIAS, MASK, TEMPERATURES, A, B, POSITIONS),
        (0, 1, 3, 6, 7),
        autocast=(0, 1, 3, 6, 7),
    ),
    Call(
        "mtp_loss_apart",
        lambda x, y, w, i, c: grpo_kernels.mtp_linear_cross_entropy(
            [x, y], w, i, cu_seqlens=c, detach_head=True, num_items=4, temperature=0.7
        ),
        _make(HIDDENS[0].flatten(0, 1), HIDDENS[1].flatten(0, 1), WEIGHT, TOKENS.flatten(), CU_SEQLENS),
        (0, 1, 2),
        autocast=(0, 1, 2),
    ),
    Call(
        "mtp_loss_bf16",
        lambda x, w, i: grpo_kernels.mtp_linear_cross_entropy(x.transpose(1, 2), w, i.T, z_loss=0.1),
        _make(HIDDENS.bfloat16(), WEIGHT.bfloat16(), TOKENS.int()),
        (0, 1),
        autocast=(0, 1),
        rounds=torch.bfloat16,
    ),
    Call(
        "mtp_loss_nothing_counts",
        lambda x, w, i: grpo_kernels.mtp_linear_cross_entropy(x * float("nan"), w, i, shift=3),
        _make(HIDDENS, WEIGHT, TOKENS),
        (1,),
        autocast=(0, 1),
    ),
    Call(
        "mtp_loss_empty",
        lambda x, w, i: grpo_kernels.mtp_linear_cross_entropy(x, w, i),
        _make(HIDDENS[:, :0], WEIGHT, TOKENS[:0]),
        (0, 1),
        autocast=(0, 1),
    ),
    _policy("mtp_policy", GRPOLossConfig(kl_coef=0.3, entropy_coef=0.1), z_loss=0.1),
    _policy("mtp_policy_packed", GRPOLossConfig.preset("gspo", kl_coef=0.3), packed=True, detach_head=True),
]  # fmt: skip

# --- calls that must raise -------------------------------------------------------------------------------------------

_OP = "mtp_linear_cross_entropy: "
_TERMS = PolicyTerms(OLD, ADVANTAGES)
_PACKED = {"hiddens": HIDDENS.flatten(1, 2), "token_ids": TOKENS.flatten()}


def _bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
    def call() -> Any:
        given = {"hiddens": HIDDENS, "weight": WEIGHT, "token_ids": TOKENS, **arguments}
        return grpo_kernels.mtp_linear_cross_entropy(**given)

    return BadCall(f"mtp_{name}", call, error, (_OP, *says))


BAD_CALLS = [
    _bad("hiddens_number", TypeError, "hiddens must be a tensor, or a sequence of one tensor for each", hiddens=1.0),
    _bad("hiddens_none", TypeError, "hiddens must be a tensor, or a sequence of one", "got list", hiddens=[]),
    _bad("hiddens_of_numbers", TypeError, "hiddens[0] must be a torch.Tensor, got float", hiddens=[1.0]),
    _bad(
        "hiddens_shapes", ValueError, "hiddens[1] must have shape of hiddens[0] = [2, 3, 9], got [2, 2, 9]",
        hiddens=[HIDDEN, HIDDEN[:, 1:]],
    ),
    _bad("hiddens_dtypes", TypeError, "hiddens[1] must have dtype float32", hiddens=[HIDDEN, HIDDEN.double()]),
    _bad("hiddens_flat", ValueError, "hiddens must have shape [D + 1, N, H] or [D + 1, B, T, H], got [3, 9]",
         hiddens=HIDDENS[:, 0, 0]),
    _bad("hiddens_parts_flat", ValueError, "hiddens[0] must have shape [N, H] or [B, T, H]", hiddens=[HIDDEN[0, 0]]),
    _bad("hiddens_without_depths", ValueError, "hiddens must hold at least depth 0, got [0, 2, 3, 9]",
         hiddens=HIDDENS[:0]),
    _bad("hiddens_dtype", TypeError, "hiddens must have dtype float32", "got int64", hiddens=HIDDENS.long()),
    _bad("weight_shape", ValueError, f"weight must have shape [V, H] = [V, {WIDTH}]", weight=WEIGHT.T),
    _bad("bias_shape", ValueError, f"bias must have shape [V] = [{VOCAB}]", bias=BIAS[1:]),
    _bad("token_ids_shape", ValueError, "token_ids must have shape [...] = [2, 3], got [6]", token_ids=FLAT_IDS),
    _bad("token_ids_dtype", TypeError, "token_ids must have dtype int64, int32, got float32", token_ids=TOKENS.float()),
    _bad("token_ids_outside", ValueError, f"token_ids[0, 1] must be < V = {VOCAB}, or negative", "got 37",
         token_ids=TOKENS.new_full((2, 3), VOCAB)),
    _bad("mask_shape", ValueError, "mask must have shape [...] = [2, 3], got [2, 1]", mask=MASK[:, :1]),
    _bad("positions_shape", ValueError, "positions must have shape [B, T] = [2, 3], got [6]",
         positions=POSITIONS.flatten()),
    _bad("positions_dtype", TypeError, "positions must have dtype int64, int32, got float32",
         positions=POSITIONS.float()),
    _bad("positions_list", TypeError, "positions must be a torch.Tensor, got list", positions=[0, 1]),
    _bad("positions_and_cu_seqlens", ValueError, "positions and cu_seqlens exclude each other, got both",
         positions=POSITIONS, cu_seqlens=CU_SEQLENS),
    _bad("cu_seqlens_padded", ValueError, "cu_seqlens is for packed token_ids [N], got [2, 3]", cu_seqlens=CU_SEQLENS),
    _bad("cu_seqlens_empty", ValueError, "cu_seqlens must have shape [B + 1], got [0]", cu_seqlens=CU_SEQLENS[:0],
         **_PACKED),
    _bad("cu_seqlens_dtype", TypeError, "cu_seqlens must have dtype", cu_seqlens=CU_SEQLENS.float(), **_PACKED),
    _bad("shift_negative", ValueError, "shift must be >= 0, got -1", shift=-1),
    _bad("shift_float", TypeError, "shift must be an int, got float", shift=1.0),
    _bad("ignore_index", TypeError, "ignore_index must be an int, got float", ignore_index=1.5),
    _bad("depth_weights_count", ValueError, "depth_weights must hold D + 1 = 3 numbers, got 2",
         depth_weights=(1.0, 0.3)),
    _bad("depth_weights_number", TypeError, "depth_weights must be a tensor or a sequence of numbers, got float",
         depth_weights=0.3),
    _bad("depth_weights_nan", ValueError, "depth_weights[1] must be finite, got nan",
         depth_weights=(1.0, float("nan"), 0.0)),
    _bad("depth_weights_shape", ValueError, "depth_weights must have shape [D + 1] = [3], got [2]",
         depth_weights=torch.ones(2)),
    _bad("normalizer", ValueError, "normalizer must be one of 'valid', 'tokens', got 'mean'", normalizer="mean"),
    _bad("num_items_negative", ValueError, "num_items must be finite and >= 0, got -1", num_items=-1),
    _bad("num_items_shape", ValueError, "num_items must be a number or a 0-d tensor", num_items=torch.ones(3)),
    _bad("num_items_string", TypeError, "num_items must be a number, got str", num_items="4"),
    _bad("temperature", ValueError, "temperature must be finite and > 0, got 0", temperature=0),
    _bad("temperature_shape", ValueError, "temperature must have shape [...] = [2, 3], got [3, 2, 3]",
         temperature=HIDDENS[..., 0]),
    _bad("z_loss", ValueError, "z_loss must be finite and >= 0, got -0.1", z_loss=-0.1),
    _bad("detach_head", TypeError, "detach_head must be a bool, got int", detach_head=1),
    _bad("policy_tuple", TypeError, "policy must be a PolicyTerms, got tuple", policy=(OLD, ADVANTAGES), shift=0),
    _bad("policy_shift", ValueError, "shift must be 0 with a policy", "got 1", policy=_TERMS),
    _bad("policy_packed", ValueError, "cu_seqlens must be given with a policy and hiddens [D + 1, N, H], got None",
         policy=_TERMS, shift=0, **_PACKED),
    _bad("policy_unreduced", ValueError, "policy.config must reduce the loss to one number, got reduction='none'",
         policy=_TERMS._replace(config=GRPOLossConfig(reduction="none")), shift=0),
    _bad("policy_config", TypeError, "config must be a GRPOLossConfig, got dict",
         policy=_TERMS._replace(config={}), shift=0),
    _bad("policy_old_log_probs", ValueError, "old_log_probs must have shape [B, T] = [2, 3], got [2, 2]",
         policy=_TERMS._replace(old_log_probs=OLD[:, 1:]), shift=0),
    _bad("policy_advantages", ValueError, "advantages must have shape [B] = [2] or [B, T] = [2, 3], got [3]",
         policy=_TERMS._replace(advantages=OLD[0]), shift=0),
    _bad("policy_without_reference", ValueError, "ref_log_probs must be given when kl_coef is set, got None",
         policy=_TERMS._replace(kl_coef=0.1), shift=0),
]  # fmt: skip
