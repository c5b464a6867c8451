"""A small causal block with rotary positions, layouts of documents, and the modules' equations document by document."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo_kernels.multi_token_prediction.module import MTPLayer, MultiTokenPrediction

H, V = 8, 13
LENGTHS = (5, 1, 6, 2, 3)  # documents, some of which are shorter than there are depths


class Block(nn.Module):
    """Attention over the rows that `visible` [..., T, T] allows, then a product.

    Positions are rotary and absolute: rotary ones alone do not show that all of them are one too high.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.qkv = nn.Parameter(torch.randn(3 * H, H, generator=generator, dtype=torch.float64) / H**0.5)
        self.out = nn.Parameter(torch.randn(H, H, generator=generator, dtype=torch.float64) / H**0.5)

    def forward(self, x: Tensor, position_ids: Tensor, visible: Tensor) -> tuple[Tensor, str]:
        x = x + torch.sin(position_ids.unsqueeze(-1) + torch.arange(H, dtype=x.dtype))
        q, k, v = F.linear(x, self.qkv).chunk(3, dim=-1)
        scores = _rotate(q, position_ids) @ _rotate(k, position_ids).transpose(-1, -2) / H**0.5
        attended = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v
        return x + torch.tanh(F.linear(x + attended, self.out)), "what some blocks return beside it"


def _rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    angles = position_ids.unsqueeze(-1).to(x.dtype) / 10.0 ** (torch.arange(H // 2, dtype=x.dtype) / H * 2)
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)


class Layout(NamedTuple):
    """Where documents lie in [N] or [B, T].

    Attributes:
        shape: of the rows.
        documents: of each the flattened rows.
        options: how the module is told.
        position_ids: of the flattened rows, 0 in padding.
    """

    shape: tuple[int, ...]
    documents: list[Tensor]
    options: dict[str, Any]
    position_ids: Tensor

    def block_options(self) -> dict[str, Tensor]:
        """What the model's own blocks get: the original positions; of [B, T] each row of the batch by itself."""
        count = self.position_ids.numel()
        document = -1 - torch.arange(count)
        for index, rows in enumerate(self.documents):
            document[rows] = index
        visible = (document[:, None] == document[None, :]) & torch.ones(count, count).tril().bool()
        if len(self.shape) == 2:
            batch, length = self.shape
            visible = torch.stack([visible.view(batch, length, batch, length)[b, :, b] for b in range(batch)])
        return {"position_ids": self.position_ids.view(self.shape), "visible": visible}


def layout(name: str) -> Layout:
    """ "batch", "packed" by cu_seqlens, "positions", "left" and "right" padded, "packed_batch": documents in [B, T]."""
    if name == "batch":
        rows = torch.arange(3 * 5)
        return Layout((3, 5), list(rows.split(5)), {}, rows % 5)
    if name in ("left", "right"):
        width = max(LENGTHS)
        starts = [b * width + (width - n if name == "left" else 0) for b, n in enumerate(LENGTHS)]
        shape: tuple[int, ...] = (len(LENGTHS), width)
    else:
        starts = [sum(LENGTHS[:d]) for d in range(len(LENGTHS))]
        shape = (sum(LENGTHS),)
    documents = [torch.arange(start, start + n) for start, n in zip(starts, LENGTHS, strict=True)]
    count = int(torch.tensor(shape).prod())
    positions = torch.full((count,), -1)
    for rows in documents:
        positions[rows] = torch.arange(len(rows))
    if (
        name == "packed_batch"
    ):  # 17 rows and a row of padding as two rows of a batch, the second of which cuts a document
        documents = [part for rows in documents for part in (rows[rows < 9], rows[rows >= 9]) if len(part)]
        positions = torch.cat([positions, torch.tensor([-1])])
        return Layout((2, 9), documents, {"positions": positions.view(2, 9)}, positions.clamp(min=0))
    if name == "packed":
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        return Layout(shape, documents, {"cu_seqlens": ends}, positions.clamp(min=0))
    return Layout(shape, documents, {"positions": positions.view(shape)}, positions.clamp(min=0))


LAYOUTS = ("batch", "packed", "positions", "left", "right", "packed_batch")


def build(depths: int, *, shared: bool = False, final_norm: bool = False, **options: Any) -> MultiTokenPrediction:
    """Modules with norms that are not 1."""
    blocks = [Block(0)] * depths if shared else [Block(k) for k in range(depths)]
    norm = nn.RMSNorm(H, 1e-6, dtype=torch.float64) if final_norm else None
    torch.manual_seed(1)
    mtp = MultiTokenPrediction(H, blocks, final_norm=norm, dtype=torch.float64, **options)
    with torch.no_grad():
        for module in mtp.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.copy_(torch.rand(H) + 0.5)
    return mtp


def _norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def document_by_document(
    mtp: MultiTokenPrediction, hidden: Tensor, ids: Tensor, table: Tensor, where: Layout, shift: int
) -> list[dict[int, Tensor]]:
    """For every depth, by row, the states for the head of the rows that have a token: the paper's equations, with the
    concatenation, on one document at a time and on no row more."""
    found: list[dict[int, Tensor]] = [{} for _ in mtp.layers]
    for rows in where.documents:
        states, tokens = hidden.reshape(-1, H)[rows], ids.reshape(-1)[rows]
        for k, layer in enumerate(mtp.layers):
            assert isinstance(layer, MTPLayer)
            length = len(rows) - k - shift
            if length <= 0:
                break
            parts = [_norm(table[tokens[k + shift :]], layer.enorm), _norm(states[:length], layer.hnorm)]
            x = torch.cat(parts if layer.order == "emb_first" else parts[::-1], dim=-1) @ layer.eh_proj.weight.T
            visible = torch.ones(length, length, dtype=torch.bool).tril()
            states = layer.block(x, where.position_ids[rows[:length]], visible)[0]
            heads = states if mtp.final_norm is None else _norm(states, mtp.final_norm)  # type: ignore[arg-type]
            found[k].update(zip(rows[:length].tolist(), heads, strict=True))
    return found
