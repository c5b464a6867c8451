"""Problems for mtp_linear_cross_entropy, and its definition: documents one by one, from all logits."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import LoRAFactors, MTPLossOutput, PolicyTerms, grpo_loss, mtp_linear_cross_entropy

WIDTH, VOCAB, RANK, LORA_SCALE = 48, 37, 3, 0.7  # so wide that the weight's gradient has room for all logits
EVERY = ("hiddens", "weight", "bias", "a", "b")
Leaves = dict[str, Tensor]


class Layout(NamedTuple):
    """Where rows lie, and how a call says so."""

    leading: tuple[int, ...]
    documents: list[list[int]]  # flat rows
    options: dict[str, Tensor]


def _positions(leading: tuple[int, ...], documents: list[list[int]]) -> Tensor:
    found = torch.full(leading, -1).view(-1)
    for rows in documents:
        found[rows] = torch.arange(len(rows))
    return found.view(leading)


def _cuts(*bounds: int) -> list[list[int]]:
    return [list(range(start, end)) for start, end in itertools.pairwise(bounds)]


def _layouts() -> dict[str, Layout]:
    bounds = (2, 7, 7, 8, 17, 21)  # an empty document, one of a single token, and rows outside of all
    packed = _cuts(*bounds)
    ragged = [[4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [20], [15, 16, 17]]  # of rows of seven
    padded = _cuts(3, 7) + _cuts(7, 14) + _cuts(19, 21)
    return {
        "packed": Layout((23,), packed, {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}),
        "positions": Layout((23,), packed, {"positions": _positions((23,), packed)}),
        "one": Layout((9,), _cuts(0, 9), {}),
        "batch": Layout((3, 7), _cuts(0, 7, 14, 21), {}),
        "left_padding": Layout((3, 7), padded, {"positions": _positions((3, 7), padded).int()}),
        "packed_batch": Layout((3, 7), ragged, {"positions": _positions((3, 7), ragged)}),
        "single_tokens": Layout((5, 1), _cuts(0, 1, 2, 3, 4, 5), {}),
        "empty": Layout((0,), [], {"cu_seqlens": torch.tensor([0, 0])}),
        "no_length": Layout((3, 0), [], {}),
    }


LAYOUTS = _layouts()


def problem(layout: Layout, depths: int, *, scale: float = 1.0, names: tuple[str, ...] = EVERY) -> Leaves:
    """The leaves in float64, with values that float32 holds."""
    sizes = {
        "hiddens": (depths, *layout.leading, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,), "a": (RANK, WIDTH),
        "b": (VOCAB, RANK),
    }  # fmt: skip
    scales = {"hiddens": 1.0, "weight": scale * 0.3, "bias": 1.0, "a": 0.1, "b": 0.3}
    return {name: (torch.randn(sizes[name]) * scales[name]).double() for name in names}


def tokens(layout: Layout) -> Tensor:
    """The first and the last id among them, an id 5, and two that do not count."""
    found = torch.randint(VOCAB, layout.leading).view(-1)
    found[3:9] = torch.tensor([0, VOCAB - 1, 5, -100, 5, -1])[: max(len(found) - 3, 0)]
    return found.view(layout.leading)


def gradients(loss: Tensor, leaves: Leaves, upstream: float) -> Leaves:
    found = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def run(
    leaves: Leaves, token_ids: Tensor, *, upstream: float = -1.7, trained: tuple[str, ...] = EVERY, **options: Any
) -> tuple[MTPLossOutput, Leaves]:
    """The output, and the gradients of the leaves."""
    leaves = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    lora = LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE) if "a" in leaves else None
    output = mtp_linear_cross_entropy(
        leaves["hiddens"], leaves["weight"], token_ids, bias=leaves.get("bias"), lora=lora, **options
    )
    wanted = {name: leaf for name, leaf in leaves.items() if name in trained}
    return output, gradients(output.loss, wanted, upstream)


class _Head(NamedTuple):
    leaves: Leaves
    logit_scale: float
    softcap: float | None
    temperature: Any

    def logits(self, hidden: Tensor, rows: list[int], *, detached: bool) -> Tensor:
        leaves = {name: leaf.detach() if detached else leaf for name, leaf in self.leaves.items()}
        x = hidden[rows]
        z = F.linear(x, leaves["weight"], leaves.get("bias"))
        if "a" in leaves:
            z = z + LORA_SCALE * F.linear(F.linear(x, leaves["a"]), leaves["b"])
        z = z * self.logit_scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        if isinstance(self.temperature, Tensor) and self.temperature.ndim > 0:
            return z / self.temperature.reshape(-1)[rows][:, None].to(z.dtype)
        return z / self.temperature


def predictions(layout: Layout, token_ids: Tensor, depth: int, shift: int, counts: Tensor) -> list[tuple[int, int]]:
    """(row, row of the token it predicts), flat, document by document."""
    return [
        (rows[i], rows[i + depth + shift])
        for rows in layout.documents
        for i in range(len(rows) - depth - shift)
        if counts.view(-1)[rows[i + depth + shift]]
    ]


def definition(
    leaves: Leaves, token_ids: Tensor, layout: Layout, dtype: torch.dtype, *, upstream: float = -1.7, shift: int = 1,
    mask: Tensor | None = None, ignore_index: int = -100, depth_weights: Any = None, normalizer: str = "valid",
    num_items: Any = None, policy: PolicyTerms | None = None, detach_head: bool = False, temperature: Any = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, z_loss: float = 0.0,
) -> tuple[MTPLossOutput, Leaves]:  # fmt: skip
    """What a plain loop over depths and documents gives. Rows that predict nothing are never looked at."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    head = _Head({name: leaf for name, leaf in leaves.items() if name != "hiddens"}, logit_scale, softcap, temperature)
    hiddens = leaves["hiddens"].flatten(1, -2)
    depths, rows_count = hiddens.shape[:2]
    counts = (token_ids >= 0) & (token_ids != ignore_index) & (True if mask is None else mask != 0)
    ids = token_ids.reshape(-1).long()
    losses, number, top1, log_probs, entropy = [], [], [], hiddens.new_zeros(rows_count), hiddens.new_zeros(rows_count)
    pairs = [predictions(layout, token_ids, depth, shift, counts) for depth in range(depths)]
    for depth, found in enumerate(pairs):
        rows, places = [row for row, _ in found], [place for _, place in found]
        z = head.logits(hiddens[depth], rows, detached=detach_head and depth > 0)
        each = F.cross_entropy(z, ids[places], reduction="none")
        if depth == 0:
            log_probs = log_probs.index_put((torch.tensor(rows, dtype=torch.long),), -each)
            every = torch.log_softmax(z, -1)
            entropy = entropy.index_put((torch.tensor(rows, dtype=torch.long),), -(every.exp() * every).sum(-1))
        losses.append((each + z_loss * z.logsumexp(-1).square()).sum())
        number.append(len(found))
        top1.append(dict(zip(rows, z.argmax(-1).tolist(), strict=True)))
    divisors = [max(number[0 if normalizer == "tokens" else k] if num_items is None else float(num_items), 1)
                for k in range(depths)]  # fmt: skip
    depth_losses = [loss / divisor for loss, divisor in zip(losses, divisors, strict=True)]
    metrics = None
    if policy is not None:
        depth_losses[0], metrics = _policy_loss(policy, layout, log_probs, entropy, pairs[0], dtype)
    if depth_weights is None:
        depth_weights = [1.0] + [0.3 / max(depths - 1, 1)] * (depths - 1)
    loss = sum(float(weight) * value for weight, value in zip(depth_weights, depth_losses, strict=True))
    hits = [sum(top1[k][row] == int(ids[place]) for row, place in pairs[k]) for k in range(depths)]
    agreed = [sum(top1[k][row] == top1[0][place - shift] for row, place in pairs[k]) for k in range(depths)]
    output = MTPLossOutput(
        loss.detach(), torch.stack(depth_losses).detach(), torch.tensor(number),
        *(torch.tensor([hit / max(count, 1) for hit, count in zip(found, number, strict=True)], dtype=dtype)
          for found in (hits, agreed)),
        log_probs.detach().view(layout.leading), entropy.detach().view(layout.leading), metrics,
    )  # fmt: skip
    return output, gradients(loss, leaves, upstream)


def _policy_loss(
    policy: PolicyTerms, layout: Layout, log_probs: Tensor, entropy: Tensor, pairs: list[Any], dtype: torch.dtype
) -> tuple[Tensor, Any]:
    live = torch.zeros(log_probs.shape, dtype=torch.bool)
    live[[row for row, _ in pairs]] = True
    shape = layout.leading
    given = {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in policy._asdict().items()
        if name != "config"
    }
    with grpo_kernels.backend("reference"):
        output = grpo_loss(
            log_probs.view(shape), given.pop("old_log_probs"), given.pop("advantages"), live.view(shape),
            policy.config, entropy=entropy.view(shape), cu_seqlens=layout.options.get("cu_seqlens"), **given,
        )  # fmt: skip
    return output.loss, output.metrics


def assert_close(actual: tuple[MTPLossOutput, Leaves], expected: tuple[MTPLossOutput, Leaves]) -> None:
    """In float64."""
    for name in ("loss", "depth_losses", "valid_counts", "acceptance", "agreement", "log_probs"):
        values = (getattr(output, name) for output, _ in (actual, expected))
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-11)
