"""A small decoder-only transformer with a key-value cache; its head, experts and MTP layers are this package's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.r1.policy import vocabulary
from examples.r1.policy.routes import Pass, Routes
from grpo_kernels import FusedLMHead, MoE, MultiTokenPrediction, RouterOutput, RouterReplay
from grpo_kernels.distributed import ExpertParallel


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. `max_length` bounds prompt plus completion."""

    max_length: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary_size: int = vocabulary.SIZE
    experts: int = 0  # of a layer; 0: a dense model
    experts_per_token: int = 2
    shared_expert: bool = True
    balance_coef: float = 0.0  # of the balance loss of each sequence
    recipe: str = "fp32"  # of the experts' products
    mtp: int = 0  # layers of multi-token prediction


class Cache(ABC):
    """Keys and values of the tokens that a pass continues."""

    length = 0
    visible: Tensor | None = None  # [B, 1, Q, K] bool, the keys that each query sees; None: all up to itself

    @abstractmethod
    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a layer's new keys and values [B, heads, T, width / heads]; returns what the new tokens may see."""

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Places of the next tokens in their sequences, [count] or [B, count]."""
        return torch.arange(self.length, self.length + count, device=device)

    def advance(self, count: int) -> None:
        """Every layer has taken this many tokens."""
        self.length += count


class KVCache(Cache):
    """Keys and values of the tokens so far, [layers, B, heads, T, width / heads], written in place: for sampling."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys = keys
        self.values = values
        self.length = length

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, like: Tensor) -> KVCache:
        shape = (config.layers, batch, config.heads, config.max_length, config.width // config.heads)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values; returns those of all tokens so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat(self, times: int) -> KVCache:
        """The cache of every sequence `times` over: one prefill serves a whole group of samples."""
        return KVCache(
            self.keys.repeat_interleave(times, dim=1), self.values.repeat_interleave(times, dim=1), self.length
        )


class SharedPrefix(Cache):
    """Keys and values of prompts, read once for all completions of a group: for training, where nothing is in place."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Records the prompts' keys and values in the first pass; puts them before the completions' in the second."""
        if self.length == 0:
            self.layers.append((keys, values))
            return keys, values
        prefix_keys, prefix_values = self.layers[layer]
        return (
            torch.cat((prefix_keys.repeat_interleave(self.group_size, dim=0), keys), dim=2),
            torch.cat((prefix_values.repeat_interleave(self.group_size, dim=0), values), dim=2),
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, layer: int, cache: Cache) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        k, v = cache.append(layer, k, v)
        mixed = _attend(q, k, v, cache.visible)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return output


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = _experts(config, layer, expert_parallel) if config.experts else _feed_forward(config)
        self.recipe = config.recipe

    def forward(self, x: Tensor, cache: Cache, routing: Pass | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), self.layer, cache)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MoE) and routing is not None:
            with _operands(self.recipe, x.device):
                mixed = routing.through(self.mlp, normed)
            return x + mixed
        output: Tensor = x + self.mlp(normed)
        return output


def _feed_forward(config: ModelConfig) -> nn.Module:
    return nn.Sequential(
        nn.Linear(config.width, 4 * config.width, bias=False),
        nn.ReLU(),
        nn.Linear(4 * config.width, config.width, bias=False),
    )


_FP8_OPTIONS: dict[str, dict[str, Any]] = {
    "fp8_block128": {"recipe": "fp8_block128"},
    "fp8_block128_wgrad": {"recipe": "fp8_block128", "fp8_wgrad": True},
}


def _operands(recipe: str, device: torch.device) -> AbstractContextManager[object]:
    """Where operands are not float32 they are bfloat16, or FP8 with bfloat16 between the products."""
    return nullcontext() if recipe == "fp32" else torch.autocast(device.type, torch.bfloat16)


def _experts(config: ModelConfig, layer: int, expert_parallel: ExpertParallel | None) -> MoE:
    """A layer like DeepSeek-V3's. A token passes about as many weights as in the dense model."""
    return MoE(
        config.width,
        config.width,
        config.experts,
        config.experts_per_token,
        scoring_func="sigmoid",
        e_score_correction_bias=True,
        seq_aux_loss_coef=config.balance_coef,
        shared_intermediate_size=config.width if config.shared_expert else 0,
        expert_parallel=expert_parallel,
        layer_id=layer,
        **_FP8_OPTIONS.get(config.recipe, {}),
    )


def _multi_token_prediction(config: ModelConfig) -> MultiTokenPrediction:
    """Layers that guess further tokens. Their feed-forward is dense in an MoE model too: guesses have no routes."""
    dense = replace(config, experts=0)
    blocks = [Block(dense, layer) for layer in range(config.mtp)]
    return MultiTokenPrediction(config.width, blocks, final_norm=nn.RMSNorm(config.width))


class CharTransformer(nn.Module):
    """Character-level language model. Padding on the left is a token like any other; the model learns to ignore it.

    With `expert_parallel` it holds this rank's experts only.
    """

    def __init__(self, config: ModelConfig, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer, expert_parallel) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = FusedLMHead(nn.Linear(config.width, config.vocabulary_size, bias=False))
        self.apply(_initialise)
        self.mtp: MultiTokenPrediction | None = None
        if config.mtp > 0:  # last, so that the rest starts from the same parameters with and without it
            self.mtp = _multi_token_prediction(config).apply(_initialise)

    @property
    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def forward(
        self,
        tokens: Tensor,
        cache: Cache,
        replay: RouterReplay | None = None,
        reports: list[tuple[int, RouterOutput]] | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, width] of tokens [B, T] that continue what the cache holds.

        The MoE model takes or records the routes of this pass in `replay`, and adds to `reports`.
        """
        routing = Pass(tokens != vocabulary.PAD, replay, reports) if self.config.experts else None
        positions = cache.positions(tokens.shape[1], tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x, cache, routing)
        cache.advance(tokens.shape[1])
        hidden: Tensor = self.norm(x)
        return hidden

    def completion_hidden(self, prompts: Tensor, completions: Tensor, routes: Routes | None = None) -> Tensor:
        """Final hidden states [N * G, C, width] for completions [N * G, C] to prompts [N, P].

        Column t is what the head predicts completion token t from. The MoE model takes or records `routes`.
        """
        return self.prompt_and_completion_hidden(prompts, completions, routes)[1]

    def prompt_and_completion_hidden(
        self, prompts: Tensor, completions: Tensor, routes: Routes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states of all prompt tokens, [N, P, width], and `completion_hidden`."""
        routes = Routes() if routes is None else routes
        group_size = len(completions) // len(prompts)
        prefix = SharedPrefix(group_size)
        prompt_hidden = self(prompts, prefix, routes.prompts, routes.prompt_reports)
        first = prompt_hidden[:, -1:].repeat_interleave(group_size, dim=0)
        rest = self(completions[:, :-1], prefix, routes.completions, routes.completion_reports)
        return prompt_hidden, torch.cat((first, rest), dim=1)


def count_parameters(model: nn.Module) -> int:
    """With the experts of all ranks."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, MoE) and module.expert_parallel is not None:
            others = module.expert_parallel.world_size - 1
            count += others * sum(parameter.numel() for parameter in module.experts.parameters())
    return count


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention [B, heads, Q, width / heads] of the last Q of K tokens to what came before them and to themselves."""
    queries, keys = q.shape[2], k.shape[2]
    if visible is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    if queries == 1:  # sampling: two small products beat the fused kernel here
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, FusedLMHead)):
        nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
    elif isinstance(module, MoE):
        for weight in (module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
