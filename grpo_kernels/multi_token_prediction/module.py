"""The modules that predict further ahead: each takes the hidden states of the one before and the tokens that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo_kernels import _checks, _dispatch
from grpo_kernels._gemm import gemm_dtype
from grpo_kernels._sharded import check_present
from grpo_kernels.multi_token_prediction import ops
from grpo_kernels.multi_token_prediction.documents import check_shift, documents

_OP = "MultiTokenPrediction"
_ORDERS = ("emb_first", "hidden_first")
_DETACH = ("none", "trunk", "frozen")
_LEAST_EPS = 1e-24  # the gradient of a row of zeros takes eps^(-3/2), which float32 must hold
_REMEDY = "make the layer that holds it a unit of its own, fully_shard(layer), and call it as a module"


class MTPLayer(nn.Module):
    """One depth: block(W_e n_e(embeds) + W_h n_h(hidden)), with eh_proj.weight = [W_e | W_h].

    The halves of `eh_proj` are two products into one sum: their operands are never concatenated. Parameters have the
    names of DeepSeek-V3's checkpoints: `enorm`, `hnorm`, `eh_proj`; the block's stand under `block`.

    Args:
        hidden_size: H.
        block: takes [..., H] and gives it, alone or as the first of a tuple.
        order: "hidden_first": eh_proj.weight = [W_h | W_e].
        eps: of the norms, >= 1e-24.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        block: nn.Module,
        *,
        order: str = "emb_first",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_integer("MTPLayer", "hidden_size", hidden_size, minimum=1)
        _checks.check_choice("MTPLayer", "order", order, _ORDERS)
        _checks.check_number("MTPLayer", "eps", eps, minimum=_LEAST_EPS)
        _check_module("MTPLayer", "block", block)
        self.order = order
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.enorm = nn.RMSNorm(hidden_size, eps, **factory)
        self.hnorm = nn.RMSNorm(hidden_size, eps, **factory)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, **factory)
        self.block = block

    def reset_parameters(self) -> None:
        """Fresh norms and projection, in place. The block is left as it is."""
        for part in (self.enorm, self.hnorm, self.eh_proj):
            part.reset_parameters()

    def extra_repr(self) -> str:
        return f"order={self.order!r}"

    def forward(self, hidden: Tensor, embeds: Tensor, /, **block_options: Any) -> Tensor:
        """Hidden states [..., H] of this depth from those of the one before and the embeddings [..., H]."""
        _checks.check_choice("MTPLayer", "order", self.order, _ORDERS)
        _check_projection(self.eh_proj, hidden.shape[-1])
        output = self.block(self._project(self.enorm(embeds), self.hnorm(hidden)), **block_options)
        result: Tensor = output[0] if isinstance(output, tuple) and output else output
        _check_states("MTPLayer", "what block returns", result, ("[..., H]", hidden.shape))
        return result

    def _project(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        weight = self.eh_proj.weight
        dtype = gemm_dtype(hidden, weight)
        embeds, hidden, weight = embeds.to(dtype), hidden.to(dtype), weight.to(dtype)
        first, second = weight.chunk(2, dim=1)
        of_embeds, of_hidden = (first, second) if self.order == "emb_first" else (second, first)
        width = weight.shape[0]
        partial = F.linear(embeds.reshape(-1, width), of_embeds)
        return torch.addmm(partial, hidden.reshape(-1, width), of_hidden.t()).view(hidden.shape)


class MultiTokenPrediction(nn.Module):
    """D modules that follow a model, of which the k-th predicts k tokens further ahead (DeepSeek-V3, section 2.2).

    Depth k takes the hidden states of depth k - 1 (those of the model for k = 1) and the embedding of the token that
    depth k - 1 predicts, and gives hidden states for the model's own head::

        mtp = MultiTokenPrediction(H, [Block(config) for _ in range(D)], final_norm=nn.RMSNorm(H))
        hiddens = (final_hidden, *mtp(hidden, input_ids, model.embed_tokens, block_options={"position_ids": ids}))
        loss = head.mtp_cross_entropy(hiddens, input_ids).loss

    Rows keep their places at every depth: a block gets the position ids, masks and bounds of sequences that the model's
    own blocks get. Rows whose token lies behind the end of their document get a zero embedding; they are the last ones
    of the document, so that causal blocks show them to no row that has a target.

    Embedding and head belong to the model and are no part of this module. Names in the state dict: `layers.k.enorm`,
    `layers.k.hnorm`, `layers.k.eh_proj`, `layers.k.block`, and `final_norm`. Depths count from 1, layers from 0:
    depth 1 is `layers.0`, an `MTPLayer`.

    Args:
        hidden_size: H.
        blocks: A module for each depth, called with [..., H] and `block_options`; it returns [..., H], or a tuple that
            begins with it. One may stand for several depths.
        order: "emb_first": eh_proj.weight = [W_e | W_h], as in DeepSeek's checkpoints, Megatron and vLLM;
            "hidden_first": [W_h | W_e], as in the paper.
        detach: What the losses of these depths train. "none": everything. "trunk": hidden states and embeddings are cut
            off: the modules learn, and the head unless the loss has detach_head=True. "frozen": the modules run without
            autograd and do not learn; the head does unless detach_head=True. A head tied to the embedding trains the
            table.
        final_norm: Applied to what is returned, not to what the next depth takes: DeepSeek-V3's shared_head.norm.
            None: the head gets the bare states.
        eps: of enorm and hnorm, >= 1e-24.
        device, dtype: of norms and projections. Blocks and final_norm stay as they are.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range; there are no blocks.

    Numerics: the first half of the projection is rounded to its dtype before the second is added, in float32, and
        rounded again.
    Source: DeepSeek-V3 Technical Report, section 2.2, equations 21 to 23.
    """

    def __init__(
        self,
        hidden_size: int,
        blocks: Iterable[nn.Module],
        *,
        order: str = "emb_first",
        detach: str = "none",
        final_norm: nn.Module | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_integer(_OP, "hidden_size", hidden_size, minimum=1)
        _checks.check_choice(_OP, "order", order, _ORDERS)
        _checks.check_choice(_OP, "detach", detach, _DETACH)
        _checks.check_number(_OP, "eps", eps, minimum=_LEAST_EPS)
        if final_norm is not None:
            _check_module(_OP, "final_norm", final_norm)
        self.hidden_size = hidden_size
        self.detach = detach
        options: dict[str, Any] = {"order": order, "eps": eps, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(MTPLayer(hidden_size, block, **options) for block in _check_blocks(blocks))
        self.final_norm = final_norm

    def reset_parameters(self) -> None:
        """Fresh norms and projections, in place. Blocks and final_norm are left as they are."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, detach={self.detach!r}"

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        embedding: Callable[[Tensor], Tensor],
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        shift: int = 1,
        block_options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """The hidden states of depths 1 to D.

        Args:
            hidden: [N, H] or [B, T, H] float. The model's, before or after its final norm, as the checkpoint wants.
            token_ids: [N] or [B, T] int32 or int64. Depth k takes the embedding of token_ids[i + k - 1 + shift] in
                row i. Needed everywhere, prompts included: leave tokens out of the loss by its mask, not by -100. A
                negative id is no token: its embedding is 0.
            embedding: The model's, ids -> embeddings [..., H].
            positions: Like token_ids, int32 or int64. Position of every row in its document; rows i to j are of one
                document if the positions rise by one from each to the next. Negative: padding.
            cu_seqlens: [S + 1] int32 or int64, for token_ids [N] and in place of positions: where each document starts,
                and the end of the last. With neither, each row of a batch is a document, or all of [N].
            shift: 1: token_ids went into the model. 0: token_ids[i] is what row i of the model predicts.
            block_options: Keyword arguments of the blocks, the same at every depth.

        Returns:
            D tensors like hidden, for the head: final_norm is applied.
        """
        _checks.check_choice(_OP, "detach", self.detach, _DETACH)
        if self.detach == "frozen":
            with torch.no_grad():
                return self._depths(hidden, token_ids, embedding, positions, cu_seqlens, shift, block_options)
        return self._depths(hidden, token_ids, embedding, positions, cu_seqlens, shift, block_options)

    def _depths(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        embedding: Callable[[Tensor], Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        shift: int,
        block_options: Mapping[str, Any] | None,
    ) -> tuple[Tensor, ...]:
        _check_call(hidden, token_ids, embedding, self.hidden_size, block_options)
        shift = check_shift(_OP, shift)
        where = documents(_OP, token_ids, positions, cu_seqlens)
        backend = _dispatch.resolve("mtp_linear_cross_entropy", token_ids)
        following, _ = ops.mtp_targets(
            token_ids.reshape(-1), where.positions, None, len(self.layers), shift, where.sequence_length, -1, backend
        )
        following = following.view(len(self.layers), *token_ids.shape)
        if self.detach == "trunk":
            hidden = hidden.detach()
            with torch.no_grad():
                embeds = _embed(embedding, following, hidden)
        else:
            embeds = _embed(embedding, following, hidden)
        results = []
        for layer, of_depth in zip(self.layers, embeds.unbind(0), strict=True):
            hidden = layer(hidden, of_depth, **(block_options or {}))
            results.append(hidden if self.final_norm is None else self.final_norm(hidden))
        return tuple(results)


def _embed(embedding: Callable[[Tensor], Tensor], token_ids: Tensor, hidden: Tensor) -> Tensor:
    """[D, ..., H]. One call for all depths, so that its backward adds up one gradient of the table; 0 without token."""
    absent = token_ids < 0
    embeds = embedding(token_ids.masked_fill(absent, 0))
    _check_states(_OP, "what embedding returns", embeds, ("[D, ..., H]", (len(token_ids), *hidden.shape)))
    return embeds.masked_fill(absent.unsqueeze(-1), 0.0)


def _check_blocks(blocks: Any) -> list[nn.Module]:
    if isinstance(blocks, nn.Module) and not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"{_OP}: blocks must hold one nn.Module for each depth, got {type(blocks).__name__}")
    if not isinstance(blocks, Iterable):
        raise TypeError(f"{_OP}: blocks must hold one nn.Module for each depth, got {type(blocks).__name__}")
    listed = list(blocks)
    if not listed:
        raise ValueError(f"{_OP}: blocks must hold at least one nn.Module, got none")
    for index, block in enumerate(listed):
        _check_module(_OP, f"blocks[{index}]", block)
    return listed


def _check_states(op: str, name: str, value: Any, shape: tuple[str, Sequence[int]]) -> None:
    _checks.check_tensor(op, name, value)
    _checks.check_shape(op, name, value, shape)
    _checks.check_dtype(op, name, value)


def _check_module(op: str, name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{op}: {name} must be an nn.Module, got {type(value).__name__}")


def _check_call(hidden: Any, token_ids: Any, embedding: Any, hidden_size: int, block_options: Any) -> None:
    _checks.check_tensor(_OP, "hidden", hidden)
    _checks.check_dtype(_OP, "hidden", hidden)
    _checks.check_ndim(_OP, "hidden", hidden, "[N, H]", "[B, T, H]")
    if hidden.shape[-1] != hidden_size:
        raise ValueError(f"{_OP}: hidden must have shape [..., H] with H = {hidden_size}, got {list(hidden.shape)}")
    _checks.check_tensor(_OP, "token_ids", token_ids)
    _checks.check_shape(_OP, "token_ids", token_ids, ("that of hidden without H", hidden.shape[:-1]))
    _checks.check_same_device(_OP, "token_ids", token_ids, "hidden", hidden)
    if not callable(embedding):
        raise TypeError(f"{_OP}: embedding must be callable, ids -> embeddings, got {type(embedding).__name__}")
    if block_options is not None and not isinstance(block_options, Mapping):
        raise TypeError(f"{_OP}: block_options must be a mapping of names, got {type(block_options).__name__}")


def _check_projection(projection: nn.Module, width: int) -> None:
    """Raises unless it is a product with a weight [H, 2H] and nothing else: its forward is never called."""
    if projection._forward_pre_hooks or projection._forward_hooks:
        raise ValueError(f"MTPLayer: eh_proj has forward hooks, which the layer would leave out: {_REMEDY}")
    if projection._backward_pre_hooks or projection._backward_hooks:
        raise ValueError("MTPLayer: eh_proj has backward hooks, which the layer would leave out: put them on the layer")
    if type(projection) is not nn.Linear or "forward" in vars(projection) or projection.bias is not None:
        raise TypeError(
            f"MTPLayer: eh_proj must be an nn.Linear without bias or adapters, got {type(projection).__name__}: the "
            "layer multiplies by the halves of its weight, and would leave out anything else"
        )
    check_present("MTPLayer", "eh_proj.weight", projection.weight, _REMEDY, shape="[H, 2H]")
    _checks.check_shape("MTPLayer", "eh_proj.weight", projection.weight, ("[H, 2H]", (width, 2 * width)))
