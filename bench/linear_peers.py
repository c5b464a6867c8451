"""Other people's linear heads, where they are installed: functions of the inputs of bench_linear_log_probs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Inputs
from .linear_definitions import CLIP, KL_COEF, Values

Peer = Callable[[Inputs], Values]

_TRL_SLICE = 8192  # columns of the vocabulary at a time
_TORCH_CHUNKS = 8


def _attribute(module: str, name: str) -> Any:
    """What the module calls so; None where it is not installed, does not load, or has no such name."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None


def trl_log_probs(entropy: bool) -> Peer | None:
    """TRL's slices of the vocabulary; older versions have the function elsewhere, and no bias."""
    function = _attribute("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    if function is not None:
        wanted = ("entropy",) if entropy else ()

        def run(inputs: Inputs) -> Values:
            found = function.apply(
                inputs["hidden"], inputs["weight"], None, inputs["token_ids"], 1.0, _TRL_SLICE, None, 1.0, wanted
            )
            return tuple(found[: 1 + entropy])

        return run
    older = _attribute("trl.trainer.utils", "_ChunkedLogProbFunction")
    if older is None or entropy:  # it returns an entropy, and drops its gradient
        return None
    return lambda inputs: (older.apply(inputs["hidden"], inputs["weight"], inputs["token_ids"], 1.0, _TRL_SLICE)[0],)


def trl_selective(entropy: bool) -> Peer | None:
    """TRL's log-probs of all logits at once."""
    function = _attribute("trl.trainer.utils", "selective_log_softmax")
    if function is None or entropy:
        return None
    return lambda inputs: (function(F.linear(inputs["hidden"], inputs["weight"]), inputs["token_ids"]),)


def torch_cross_entropy(chunks: int) -> Peer | None:
    """PyTorch's own, in this many chunks of rows; 0: as it chooses."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        return None

    def run(inputs: Inputs) -> Values:
        chosen = options()
        if chunks:
            rows = -(-inputs["token_ids"].numel() // chunks)
            chosen = options(chunking_method=None, batch_chunk_size=rows, acc_policy="accurate")
        return (function(inputs["hidden"], inputs["weight"], inputs["token_ids"], options=chosen),)

    return run


def torch_cross_entropies() -> dict[str, Peer | None]:
    return {
        "F.linear_cross_entropy": torch_cross_entropy(0),
        f"F.linear_cross_entropy, {_TORCH_CHUNKS} chunks": torch_cross_entropy(_TORCH_CHUNKS),
    }


def liger_cross_entropy(device: str) -> Peer | None:
    """Liger's Triton kernels, with weight gradients accumulated in float32."""
    loss = _attribute("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    if loss is None or device != "cuda":
        return None
    return lambda inputs: (loss(accum_dtype=torch.float32)(inputs["weight"], inputs["hidden"], inputs["token_ids"]),)


def cut_cross_entropy(device: str) -> Peer | None:
    """Apple's Triton kernels, which skip gradients that bf16 would not show; on a CPU what it compiles instead."""
    function = _attribute("cut_cross_entropy", "linear_cross_entropy")
    if function is None:
        return None
    chosen = {} if device == "cuda" else {"impl": "torch_compile"}
    return lambda inputs: (function(inputs["hidden"], inputs["weight"], inputs["token_ids"], **chosen),)


def fla_cross_entropy(device: str) -> Peer | None:
    """flash-linear-attention's Triton kernels, in chunks of rows."""
    loss = _attribute("fla.modules", "FusedLinearCrossEntropyLoss")
    if loss is None or device != "cuda":
        return None
    return lambda inputs: (loss()(inputs["hidden"], inputs["token_ids"], inputs["weight"]),)


def cross_entropies(device: str) -> dict[str, Peer | None]:
    """Every other head with a cross-entropy behind it."""
    return {
        **torch_cross_entropies(),
        "Liger": liger_cross_entropy(device),
        "cut-cross-entropy": cut_cross_entropy(device),
        "flash-linear-attention": fla_cross_entropy(device),
    }


def liger_grpo_loss() -> Peer | None:
    """Liger's chunks of sequences, compiled as its default has it."""
    loss = _attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if loss is None:
        return None
    made = loss(beta=KL_COEF, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo")

    def run(inputs: Inputs) -> Values:
        result: Tensor = made(
            inputs["hidden"],
            inputs["weight"],
            inputs["token_ids"],
            inputs["mask"],
            inputs["advantages"].squeeze(-1),
            ref_per_token_logps=inputs["ref_log_probs"],
            old_per_token_logps=inputs["old_log_probs"],
        )[0]
        return (result,)

    return run
