"""token_log_probs, forward and backward, against log_softmax and against a loop over the rows of the batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from .case import Case, Inputs, Provider, compiled, with_gradients
from .target import ALLOCATION, Rows, Target, figure, host_cost, ratio

# (batch, tokens, vocabulary): 2048 rows of Llama's vocabulary, 512 of Qwen's; on a GPU 4096 of Qwen's as well.
_SHAPES = ((8, 256, 32000), (4, 128, 151936))
_GPU_SHAPES = (*_SHAPES, (8, 512, 151936))
_SMOKE = (2, 5, 97)
CHECKED_ROWS = 16

Outputs = tuple[Tensor, ...]


def _ours(logits: Tensor, token_ids: Tensor, *, entropy: bool, inplace: bool) -> Outputs:
    wanted = ("entropy",) if entropy else ()
    result = grpo_kernels.token_log_probs(logits, token_ids, outputs=wanted, inplace_backward=inplace)
    return (result.log_probs,) if result.entropy is None else (result.log_probs, result.entropy)


def _eager(logits: Tensor, token_ids: Tensor, *, entropy: bool) -> Outputs:
    """In float32 where the logits are narrower: in bf16 the log-probs would be rounded to three digits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(wide, dim=-1)
    chosen = log_probs.gather(-1, token_ids[..., None]).squeeze(-1)
    return (chosen, -(log_probs.exp() * log_probs).sum(dim=-1)) if entropy else (chosen,)


def _selective(logits: Tensor, token_ids: Tensor) -> Outputs:
    """The target's logit minus the log-sum-exp of its row, one sequence after another, so that no softmax of the whole
    batch is kept; for narrow dtypes, where that difference cancels, the log-softmax of one sequence at a time.
    """
    if logits.dtype in (torch.float32, torch.float64):
        total = torch.stack([torch.logsumexp(sequence, dim=-1) for sequence in logits])
        return (logits.gather(-1, token_ids[..., None]).squeeze(-1) - total,)
    rows = [
        torch.log_softmax(sequence, dim=-1).gather(-1, ids[:, None]).squeeze(-1)
        for sequence, ids in zip(logits, token_ids, strict=True)
    ]
    return (torch.stack(rows),)


def _trl() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        function: Callable[[Tensor, Tensor], Tensor] = importlib.import_module(
            "trl.trainer.utils"
        ).selective_log_softmax
    except (ImportError, AttributeError, RuntimeError):
        return None
    return function


def _forward(forward: Callable[..., Outputs], inputs: Inputs) -> Outputs:
    return forward(inputs["logits"], inputs["token_ids"])


def _both(forward: Callable[..., Outputs], inputs: Inputs) -> Outputs:
    outputs = _forward(forward, inputs)
    upstreams = [inputs["grad_log_probs"], inputs["grad_entropy"]][: len(outputs)]
    return with_gradients(outputs, upstreams, inputs["logits"])


def _providers(entropy: bool) -> tuple[Provider, ...]:
    ours, in_place = (partial(_ours, entropy=entropy, inplace=inplace) for inplace in (False, True))
    eager = partial(_eager, entropy=entropy)
    found = [
        Provider("ours", partial(_both, ours), "ours"),
        Provider("ours, in place", partial(_both, in_place), "ours", overwrites=("logits",)),
        Provider("ours, forward alone", partial(_forward, ours), "part"),
        Provider("eager", partial(_both, eager), "eager"),
        Provider("torch.compile", partial(_both, compiled(eager)), "compile"),
    ]
    if not entropy:
        found.append(Provider("row by row", partial(_both, _selective), "peer"))
        if trl := _trl():
            found.append(Provider("TRL", partial(_both, lambda logits, token_ids: (trl(logits, token_ids),)), "peer"))
    return tuple(found)


def _make(shape: tuple[int, int, int], dtype: torch.dtype, device: str, size: str) -> Inputs:
    batch, tokens, vocab = shape if size == "full" else _SMOKE
    logits = torch.randn(batch, tokens, vocab, device=device, dtype=torch.float32).mul_(3.0).to(dtype)
    return {
        "logits": logits.requires_grad_(),
        "token_ids": torch.randint(vocab, (batch, tokens), device=device),
        "grad_log_probs": torch.randn(batch, tokens, device=device),
        "grad_entropy": torch.randn(batch, tokens, device=device),
    }


def _step(tokens: int) -> int:
    return max(1, tokens // CHECKED_ROWS)


def _sample_inputs(inputs: Inputs) -> Inputs:
    """Tokens at even distances, of every sequence: 16 a sequence are compared with float64."""
    step = _step(inputs["token_ids"].shape[1])
    sample = {name: value.detach()[:, ::step].contiguous() for name, value in inputs.items()}
    sample["logits"].requires_grad_()
    return sample


def _sample_outputs(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    step = _step(outputs[0].shape[1])
    return [output[:, ::step].contiguous() for output in outputs]


def _forward_percent(rows: Rows) -> float | None:
    """A third of the bytes of the whole, in the time of the forward."""
    return _part_percent(rows, 1 / 3, lambda whole, forward: forward)


def _backward_percent(rows: Rows) -> float | None:
    """Two thirds, in what the forward leaves of the whole time."""
    return _part_percent(rows, 2 / 3, lambda whole, forward: whole - forward)


def _part_percent(rows: Rows, share: float, time: Callable[[float, float], float]) -> float | None:
    whole, forward = rows["ours"], rows["ours, forward alone"]
    if "median_us" not in whole or "median_us" not in forward:
        return None
    part = time(whole["median_us"], forward["median_us"])
    return float(whole["percent_of_copy"] * share * whole["median_us"] / part) if part > 0 else None


def _targets(device: str, dtype: torch.dtype) -> tuple[Target, ...]:
    memory = (
        Target("extra memory <= 1.2x the logits", 1.2, figure("extra_memory_ratio"), at_least=False),
        Target(
            "extra memory in place about 0 (<= 0.05x)",
            0.05,
            figure("extra_memory_ratio", "ours, in place"),
            at_least=False,
        ),
    )
    if device == "cuda":
        return (
            Target("forward >= 90 % of copy bandwidth", 90.0, _forward_percent),
            Target("backward >= 85 % of copy bandwidth", 85.0, _backward_percent),
            *memory,
        )
    wanted = 2.5 if dtype == torch.float32 else 3.0
    return (
        Target(f"in place >= {wanted:g}x eager", wanted, ratio("eager", "ours, in place")),
        Target("in place >= 2x torch.compile", 2.0, ratio("torch.compile", "ours, in place")),
        *memory,
    )


def case(device: str, shape: tuple[int, int, int], dtype: torch.dtype, entropy: bool) -> Case:
    """[B, T, V] logits, forward and backward."""
    size = shape[0] * shape[1] * shape[2] * torch.empty((), dtype=dtype).element_size()
    name = f"{shape[0] * shape[1]}x{shape[2]} {str(dtype).removeprefix('torch.')}"
    return Case(
        op="token_log_probs",
        name=name + (" + entropy" if entropy else ""),
        make=partial(_make, shape, dtype),
        providers=_providers(entropy),
        bytes_moved=3 * size,  # logits read by the forward and by the backward, gradient written
        targets=_targets(device, dtype),
        sample_inputs=_sample_inputs,
        sample_outputs=_sample_outputs,
        quick=shape == (_GPU_SHAPES[-1] if device == "cuda" else _SHAPES[0]) and entropy,
        memory=size,
    )


class _Allocation(torch.autograd.Function):
    """The least that an op with these outputs, and what its backward needs, costs the host."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = logits.new_empty(token_ids.shape, dtype=torch.float32)
        statistics = logits.new_empty((4, *token_ids.shape), dtype=torch.float32)
        ctx.save_for_backward(logits, token_ids, statistics)
        return log_probs, torch.empty_like(log_probs)


def _host_case(device: str) -> Case:
    return Case(
        op="token_log_probs",
        name="host cost of a forward, 4x64 float32 + entropy",
        make=lambda device, size: _make((1, 4, 64), torch.float32, device, "full"),
        providers=(
            Provider("ours", partial(_forward, partial(_ours, entropy=True, inplace=False)), "ours"),
            Provider("eager", partial(_forward, partial(_eager, entropy=True)), "eager"),
            Provider(ALLOCATION, partial(_forward, _Allocation.apply), "part"),
        ),
        targets=(host_cost(device, native=False),),
        clock="host",
    )


def cases(device: str) -> list[Case]:
    """Shapes and dtypes, with and without entropy, forward and backward; and what a call costs the host."""
    found = [
        case(device, shape, dtype, entropy)
        for shape in (_GPU_SHAPES if device == "cuda" else _SHAPES)
        for dtype in (torch.float32, torch.bfloat16)
        for entropy in (False, True)
    ]
    return [*found, _host_case(device)]
