"""What the benchmarks of the linear ops compute: functions of logits in plain PyTorch, and their results and gradients
in chunks of rows, so that float64 fits into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Inputs

Values = tuple[Tensor, ...]
OfLogits = Callable[[Tensor, Inputs], Values]
"""Values of rows, or parts of a sum over all of them, from logits [..., V] and the other inputs of these rows."""

HEAD = ("hidden", "weight")
KL_COEF, CLIP = 0.04, 0.2
_CHUNK = 2**25  # logits at a time
CHECKED_ROWS, CHECKED_COLUMNS = 64, 2048


def _wide(logits: Tensor) -> Tensor:
    """In float32 where the logits are narrower: in bf16 the log-probs would be rounded to three digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def chosen_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(_wide(logits), dim=-1).gather(-1, token_ids[..., None]).squeeze(-1)


def log_probs(logits: Tensor, inputs: Inputs) -> Values:
    return (chosen_log_probs(logits, inputs["token_ids"]),)


def log_probs_and_entropy(logits: Tensor, inputs: Inputs) -> Values:
    every = torch.log_softmax(_wide(logits), dim=-1)
    chosen = every.gather(-1, inputs["token_ids"][..., None]).squeeze(-1)
    return chosen, -(every.exp() * every).sum(dim=-1)


def cross_entropy(logits: Tensor, inputs: Inputs) -> Values:
    """The mean over all tokens, of which these may be a part."""
    return (F.cross_entropy(_wide(logits), inputs["token_ids"], reduction="sum") / inputs["tokens"],)


def grpo_loss(logits: Tensor, inputs: Inputs) -> Values:
    """The clipped loss with a k3 KL term: the mean over all tokens, of which these may be a part."""
    chosen = chosen_log_probs(logits, inputs["token_ids"])
    ratio = torch.exp(chosen - inputs["old_log_probs"])
    advantages = inputs["advantages"]
    policy = -torch.min(ratio * advantages, torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    gap = inputs["ref_log_probs"] - chosen
    loss = policy + KL_COEF * (torch.exp(gap) - gap - 1)
    return ((loss * inputs["mask"]).sum() / inputs["tokens"],)


def upstreams(outputs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """A gradient of its own for each value and row; one number for a loss."""
    if outputs[0].ndim == 0:
        return [inputs["upstream"].to(outputs[0].dtype)]
    named = [inputs["grad_log_probs"], inputs["grad_entropy"]][: len(outputs)]
    return [upstream.to(output.dtype) for upstream, output in zip(named, outputs, strict=True)]


def with_gradients(outputs: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs, detached, and the gradients of hidden states and weight."""
    gradients = torch.autograd.grad(outputs, [inputs[name] for name in HEAD], upstreams(outputs, inputs))
    return (*(output.detach() for output in outputs), *gradients)


def of_linear(function: OfLogits, inputs: Inputs) -> Values:
    """All logits at once, as eager PyTorch has them."""
    return function(F.linear(inputs["hidden"], inputs["weight"]), inputs)


def _checked(size: int, count: int, device: torch.device) -> Tensor:
    """`count` indices at even distances, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64).round().long()


def sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What is compared with float64: all values, some rows of the hidden states' gradient, some of the weight's."""
    *values, hidden, weight = outputs
    hidden = hidden.reshape(-1, hidden.shape[-1])
    rows = _checked(hidden.shape[0], CHECKED_ROWS, hidden.device)
    return [*values, hidden[rows], weight[_checked(weight.shape[0], CHECKED_COLUMNS, weight.device)]]


def _rows_of(inputs: Inputs) -> Inputs:
    """The inputs with their leading axes flattened."""
    leading = inputs["token_ids"].shape
    flat = {"hidden": inputs["hidden"].detach().reshape(-1, inputs["hidden"].shape[-1])}
    for name, value in inputs.items():
        if name not in HEAD and value.ndim > 0:
            flat[name] = value.expand(leading).reshape(-1)
    return flat


def in_chunks(function: OfLogits, inputs: Inputs) -> list[Tensor]:
    """The `sample` of values and gradients, in the dtype of the inputs, from a few rows' logits at a time."""
    weight, rows = inputs["weight"].detach(), _rows_of(inputs)
    numbers = {name: value for name, value in inputs.items() if value.ndim == 0}
    hidden = rows["hidden"]
    checked = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    checked[_checked(hidden.shape[0], CHECKED_ROWS, hidden.device)] = True
    columns = _checked(weight.shape[0], CHECKED_COLUMNS, weight.device)
    values: list[Values] = []
    of_hidden, of_weight = [], torch.zeros_like(weight[columns])
    step = max(1, _CHUNK // weight.shape[0])
    for begin in range(0, hidden.shape[0], step):
        part = {name: value[begin : begin + step] for name, value in rows.items()} | numbers
        logits = F.linear(part["hidden"], weight).requires_grad_()
        outputs = function(logits, part)
        (slope,) = torch.autograd.grad(outputs, logits, upstreams(outputs, part))
        values.append(tuple(output.detach() for output in outputs))
        of_hidden.append(slope[checked[begin : begin + step]] @ weight)
        of_weight += slope[:, columns].T @ part["hidden"]
    joined = [
        torch.cat(column) if column[0].ndim else torch.stack(column).sum() for column in zip(*values, strict=True)
    ]
    shaped = [value.view(inputs["token_ids"].shape) if value.ndim else value for value in joined]
    return [*shaped, torch.cat(of_hidden), of_weight]


def old_log_probs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """The log-probs themselves, in float32 and in the shape of `token_ids`: what a ratio near 1 refers to."""
    flat, ids = hidden.detach().reshape(-1, hidden.shape[-1]), token_ids.reshape(-1)
    step = max(1, _CHUNK // weight.shape[0])
    with torch.no_grad():
        parts = [
            chosen_log_probs(F.linear(flat[begin : begin + step], weight), ids[begin : begin + step])
            for begin in range(0, len(ids), step)
        ]
    return torch.cat(parts).view(token_ids.shape)
