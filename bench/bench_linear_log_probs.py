"""The linear ops, forward and backward, against eager PyTorch, which has all logits at once, and against other people's
heads without logits.

Rates count 6 N H V operations for everybody, the products of a head that keeps its logits; who computes them twice does
8 N H V. "the bare GEMMs" are these products alone, of the full size and in the dtype of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import grpo_kernels

from . import linear_definitions as definitions
from . import linear_peers as peers
from . import machine
from .case import Case, Inputs, Provider, compiled
from .linear_definitions import OfLogits, Values
from .linear_peers import Peer
from .target import Rows, Target, figure, ratio

Shape = tuple[int, int, int]  # rows, hidden width, vocabulary

_CPU_SHAPES: tuple[Shape, ...] = ((1024, 1024, 32000), (512, 896, 151936), (4096, 512, 32000))
_SLOW_BF16_SHAPES: tuple[Shape, ...] = ((1024, 32, 16384),)
_GPU_SHAPES: tuple[Shape, ...] = ((8192, 4096, 128256), (16384, 2048, 151936), (4096, 7168, 129280))
_QUICK = ((_CPU_SHAPES[0], torch.float32), (_GPU_SHAPES[0], torch.bfloat16))
SMOKE: Shape = (48, 16, 97)
_SEQUENCES = 8

_CONFIG = grpo_kernels.GRPOLossConfig.preset(
    "bnpo", kl_coef=definitions.KL_COEF, clip_low=definitions.CLIP, clip_high=definitions.CLIP
)


@dataclass(frozen=True)
class Op:
    """One of the three ops.

    Attributes:
        variant: what distinguishes cases of one op, or "".
        ours: the op.
        definition: the same as a function of logits.
        products: matrix products of N H V multiply-adds that ours takes.
        sequences: whether tokens are [B, T] rather than [N].
        others: peers by name; None stands for what is not installed.
    """

    name: str
    variant: str
    ours: Peer
    definition: OfLogits
    products: int
    sequences: bool
    others: Callable[[str], Mapping[str, Peer | None]]


def _ours_log_probs(outputs: tuple[str, ...], inputs: Inputs) -> Values:
    result = grpo_kernels.linear_token_log_probs(
        inputs["hidden"], inputs["weight"], inputs["token_ids"], outputs=outputs
    )
    return (result.log_probs,) if result.entropy is None else (result.log_probs, result.entropy)


def _ours_cross_entropy(inputs: Inputs) -> Values:
    return (grpo_kernels.linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["token_ids"]),)


def _ours_grpo_loss(inputs: Inputs) -> Values:
    result = grpo_kernels.linear_grpo_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["token_ids"],
        inputs["old_log_probs"],
        inputs["advantages"].squeeze(-1),
        inputs["mask"],
        _CONFIG,
        ref_log_probs=inputs["ref_log_probs"],
    )
    return (result.loss,)


def _log_prob_peers(entropy: bool, device: str) -> dict[str, Peer | None]:
    found = {"TRL": peers.trl_log_probs(entropy)}
    return found if entropy else {**found, "TRL, all logits": peers.trl_selective(entropy)}


_LOG_PROBS = Op(
    "linear_token_log_probs", "", partial(_ours_log_probs, ()), definitions.log_probs, 4, False,
    partial(_log_prob_peers, False),
)  # fmt: skip
_ENTROPY = Op(
    "linear_token_log_probs", " + entropy", partial(_ours_log_probs, ("entropy",)),
    definitions.log_probs_and_entropy, 4, False, partial(_log_prob_peers, True),
)  # fmt: skip
CROSS_ENTROPY = Op(
    "linear_cross_entropy", "", _ours_cross_entropy, definitions.cross_entropy, 3, False,
    peers.cross_entropies,
)  # fmt: skip
LOSS = Op(
    "linear_grpo_loss", "", _ours_grpo_loss, definitions.grpo_loss, 3, True,
    lambda device: {"Liger": peers.liger_grpo_loss()},
)  # fmt: skip


def _both(forward: Peer, inputs: Inputs) -> tuple[Tensor, ...]:
    return definitions.with_gradients(forward(inputs), inputs)


def _products(count: int, inputs: Inputs) -> tuple[Tensor, ...]:
    """The logits, again where they are not kept, and both gradients from as large a matrix: nothing else."""
    hidden, weight = inputs["hidden"].detach().flatten(0, -2), inputs["weight"].detach()
    for _ in range(count - 2):
        logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def _providers(op: Op, device: str) -> tuple[Provider, ...]:
    eager = partial(definitions.of_linear, op.definition)
    found = [
        Provider("ours", partial(_both, op.ours), "ours"),
        Provider("eager", partial(_both, eager), "eager"),
        Provider("torch.compile", partial(_both, compiled(eager)), "compile"),
        Provider("the bare GEMMs", partial(_products, op.products), "part"),
    ]
    others = [Provider(name, partial(_both, run), "peer") for name, run in op.others(device).items() if run]
    return (*found, *others)


def _make(op: Op, shape: Shape, dtype: torch.dtype, device: str, size: str) -> Inputs:
    rows, width, vocab = shape if size == "full" else SMOKE
    leading = (_SEQUENCES, rows // _SEQUENCES) if op.sequences else (rows,)
    hidden = torch.randn(*leading, width, device=device, dtype=torch.float32).to(dtype)
    weight = torch.randn(vocab, width, device=device, dtype=torch.float32).mul_(3.0 / width**0.5).to(dtype)
    token_ids = torch.randint(vocab, leading, device=device)
    made = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "token_ids": token_ids}
    if op.products == 4:
        return made | {name: torch.randn(leading, device=device) for name in ("grad_log_probs", "grad_entropy")}
    made |= {"upstream": torch.tensor(1.5, device=device), "tokens": torch.tensor(float(rows), device=device)}
    if op.sequences:
        made |= _make_policy(made)
    return made


def _make_policy(inputs: Inputs) -> Inputs:
    """Log-probs of a policy one step back, whose ratios lie inside the clip range but for a few, and of a reference."""
    log_probs = definitions.old_log_probs(inputs["hidden"], inputs["weight"], inputs["token_ids"])
    return {
        "old_log_probs": log_probs + 0.07 * torch.randn_like(log_probs),
        "ref_log_probs": log_probs + 0.3 * torch.randn_like(log_probs),
        "advantages": torch.randn(len(log_probs), 1, device=log_probs.device),
        "mask": torch.ones(log_probs.shape, device=log_probs.device, dtype=torch.bool),
    }


def _against_peers(rows: Rows) -> float | None:
    times = [row["median_us"] for row in rows.values() if row["kind"] == "peer" and "median_us" in row]
    ours = rows["ours"].get("median_us")
    return min(times) / ours if times and ours else None


def _targets(op: Op, device: str, dtype: torch.dtype) -> tuple[Target, ...]:
    if op.name == "linear_cross_entropy":
        return ()
    loss = op.name == "linear_grpo_loss"
    if device == "cuda":
        if not loss:
            text = "at most 1.2x the time of its four GEMMs"
            return (Target(text, 1.2, ratio("ours", "the bare GEMMs"), at_least=False),)
        return (
            Target("6 N H V at >= 75 % of the matmul rate", 75.0, figure("percent_of_matmul")),
            Target("faster than every peer", 1.0, _against_peers),
        )
    part = 8 if loss else 5
    memory = ratio("ours", "eager", "extra_bytes")
    targets = [Target(f"memory above inputs and gradients <= 1/{part} of eager's", 1 / part, memory, at_least=False)]
    speed = ratio("eager", "ours")
    if dtype == torch.float32:
        wanted = 1.0 if loss else 0.75
        targets.insert(0, Target(f">= {wanted:g}x eager", wanted, speed))
    else:
        targets.insert(0, Target("speed against eager", None, speed))
    return tuple(targets)


def case(op: Op, device: str, shape: Shape, dtype: torch.dtype) -> Case:
    """One of the ops, forward and backward."""
    rows, width, vocab = shape
    return Case(
        op=op.name,
        name=f"{rows}x{width}x{vocab} {str(dtype).removeprefix('torch.')}{op.variant}",
        make=partial(_make, op, shape, dtype),
        providers=_providers(op, device),
        operations=6 * rows * width * vocab,
        matmul_dtype=dtype,
        targets=_targets(op, device, dtype),
        definition=partial(definitions.in_chunks, op.definition),
        sample_outputs=definitions.sample,
        quick=not op.variant and (shape, dtype) in _QUICK,
        memory=4 * rows * vocab,
        results_are_extra=False,
        absent=tuple(name for name, run in op.others(device).items() if run is None),
    )


def cases(device: str) -> list[Case]:
    """Up to three shapes of each op: bf16 on a GPU, fp32 and bf16 on a CPU; the log-probs of one with entropy, too."""
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    ops = (_LOG_PROBS, _ENTROPY, CROSS_ENTROPY, LOSS)
    return [
        case(op, device, shape, dtype)
        for op in ops
        for dtype in dtypes
        for shape in _shapes(device, dtype)[: 1 if op is _ENTROPY else None]
    ]


def _shapes(device: str, dtype: torch.dtype) -> Sequence[Shape]:
    if device == "cuda":
        return _GPU_SHAPES
    return _SLOW_BF16_SHAPES if machine.multiplies_slowly(dtype) else _CPU_SHAPES
