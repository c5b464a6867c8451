"""What the benchmarks of the mixture-of-experts ops compute, in plain PyTorch as good as a trainer would write it:
routes, permutation, experts one after another; and the models whose shapes are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Inputs

Values = tuple[Tensor, ...]
ALPHA, LIMIT = 1.702, 7.0
CHECKED_ROWS, CHECKED_EXPERTS = 64, 4


@dataclass(frozen=True)
class Model:
    """The mixture of experts of a model.

    Attributes:
        name: of the model, and by how much it is scaled down.
        width: of an expert.
        groups, kept_groups: of experts, for sigmoid scores.
        scale: of the weights.
        clamped: gpt-oss' experts: with biases, interleaved gates, a clamped activation, and parameters [E, in, out].
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    scoring: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    clamped: bool = False

    @property
    def biased(self) -> bool:
        """Whether a bias takes part in the selection."""
        return self.scoring == "sigmoid"

    def thinner(self, factor: int) -> Model:
        """With a fraction of the widths."""
        widths = {"hidden": self.hidden // factor, "width": self.width // factor}
        return replace(self, name=f"{self.name} 1/{factor} wide", **widths)

    def fewer(self, factor: int) -> Model:
        """With a fraction of the experts, as many as one rank of an expert-parallel group has."""
        return replace(self, name=f"{self.name} 1/{factor} of the experts", experts=self.experts // factor)


DEEPSEEK = Model("DeepSeek-V3", 256, 8, 7168, 2048, "sigmoid", groups=8, kept_groups=4, scale=2.5)
QWEN = Model("Qwen3-30B", 128, 8, 2048, 768)
GPT_OSS = Model("gpt-oss-120b", 128, 4, 2880, 2880, "topk_softmax", clamped=True)
GPT_OSS_SMALL = replace(GPT_OSS, name="gpt-oss-20b", experts=32)


def tiny(model: Model) -> Model:
    """To see that everything runs: the fewest experts of which `top_k` in `kept_groups` can be chosen."""
    return replace(model, experts=16, hidden=16, width=8)


def expert_cases(device: str) -> list[tuple[Model, torch.dtype]]:
    """What experts are timed on: one rank's of DeepSeek-V3 and those of two others on a GPU, thinner ones on a CPU."""
    if device == "cuda":
        return [(model, torch.bfloat16) for model in (DEEPSEEK.fewer(8), QWEN, GPT_OSS_SMALL)]
    return [
        (DEEPSEEK.thinner(16), torch.float32),
        (QWEN.thinner(4), torch.float32),
        (GPT_OSS_SMALL.thinner(8), torch.bfloat16),
    ]


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


# --- router ----------------------------------------------------------------------------------------------------------


def _best_groups(keys: Tensor, model: Model) -> Tensor:
    """The keys, -inf in groups that are not among the best."""
    grouped = keys.view(len(keys), model.groups, -1)
    scores = grouped.topk(2).values.sum(-1)
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(model.kept_groups).indices, 1.0)
    return grouped.masked_fill(kept[..., None] == 0, -torch.inf).view_as(keys)


def scores_of(logits: Tensor, model: Model) -> Tensor:
    """Dense scores [T, E]."""
    wide = _wide(logits)
    return wide.sigmoid() if model.scoring == "sigmoid" else wide.softmax(-1)


def route(logits: Tensor, model: Model, bias: Tensor | None) -> Values:
    """Weights and ids [T, K] in descending order. Softmax gates take the softmax of the chosen logits: the same as to
    renormalise the softmax of all, and less work.
    """
    if model.scoring != "sigmoid":
        best = _wide(logits).topk(model.top_k)
        return best.values.softmax(-1), best.indices
    scores = _wide(logits).sigmoid()
    with torch.no_grad():
        keys = scores if bias is None else scores + bias
        ids = _best_groups(keys, model).topk(model.top_k).indices
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * model.scale, ids


def counts_of(ids: Tensor, experts: int) -> Tensor:
    """Tokens per expert, int32; on a GPU without waiting for it, as bincount would."""
    flat = ids.flatten()
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.bincount(flat, minlength=experts).int()
    return flat.new_zeros(experts, dtype=torch.int32).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def balance_losses(logits: Tensor, ids: Tensor, counts: Tensor, inputs: Inputs, model: Model) -> Values:
    """z-loss, auxiliary loss and sequence-wise balance loss, without coefficients, of packed sequences."""
    scores = scores_of(logits, model)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20) if model.scoring == "sigmoid" else scores
    tokens, experts = shares.shape
    z_loss = _wide(logits).logsumexp(-1).square().mean()
    auxiliary = experts / (model.top_k * tokens**2) * (counts * shares.sum(0)).sum()
    sequence, lengths = inputs["sequence"], inputs["lengths"]
    with torch.no_grad():
        chosen = (sequence[:, None] * experts + scores.topk(model.top_k).indices).flatten()
        found = torch.zeros(len(lengths) * experts, dtype=shares.dtype, device=shares.device)
        found.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=shares.dtype))
        frequency = found.view(-1, experts) * experts / (model.top_k * lengths[:, None])
    mean = torch.zeros_like(frequency).index_add_(0, sequence, shares) / lengths[:, None]
    return z_loss, auxiliary, (frequency * mean).sum(1).mean()


def settled(logits: Tensor, model: Model, bias: Tensor | None, margin: float) -> Tensor:
    """Which tokens' routes stand when keys move by half the margin: rounding then decides nothing."""
    keys = _wide(logits)
    if model.scoring == "sigmoid":
        keys = keys.sigmoid()
        if bias is not None:
            keys = keys + bias
    apart = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    if model.groups > 1:
        groups = keys.view(len(keys), model.groups, -1).topk(2).values.sum(-1).sort(descending=True).values
        apart = groups[:, model.kept_groups - 1] - groups[:, model.kept_groups] > margin
        keys = _best_groups(keys, model)
    best = keys.topk(model.top_k + 1).values
    return apart & (best[:, :-1] - best[:, 1:]).gt(margin).all(1)


def settle(candidates: Tensor, good: Tensor, count: int) -> Tensor:
    """`count` of the good candidates; where there are fewer, some twice."""
    chosen = good.nonzero()[:, 0]
    if len(chosen) == 0:
        raise RuntimeError("every token's routes hang on rounding")
    return candidates[chosen[torch.arange(count, device=chosen.device) % len(chosen)]]


# --- permutation -----------------------------------------------------------------------------------------------------


def maps(ids: Tensor, experts: int) -> Values:
    """row_id_map [T, K], inv_map [T K], offsets [E] and tokens per expert [E] of rows sorted by expert, in int32."""
    order = ids.flatten().argsort(stable=True)
    rows = torch.arange(len(order), dtype=torch.int32, device=ids.device)
    row_id_map = torch.empty_like(rows).scatter_(0, order, rows)
    counts = counts_of(ids, experts)
    return row_id_map.view_as(ids), order.int(), counts.cumsum(0, dtype=torch.int32), counts


def permute(x: Tensor, inv_map: Tensor, top_k: int) -> Tensor:
    return x.index_select(0, inv_map // top_k)


def unpermute(y: Tensor, row_id_map: Tensor, weights: Tensor) -> Tensor:
    """Index operations: rows gathered, then weighted and summed as one product, in the dtype of the rows."""
    rows = y.index_select(0, row_id_map.flatten()).view(*row_id_map.shape, -1)
    return torch.einsum("tk,tkh->th", weights.to(y.dtype), rows)


def unpermute_bag(y: Tensor, row_id_map: Tensor, weights: Tensor) -> Tensor:
    """The same as a bag of embeddings, which PyTorch has fused."""
    return F.embedding_bag(row_id_map, y, per_sample_weights=weights.to(y.dtype), mode="sum")


# --- experts ---------------------------------------------------------------------------------------------------------


def activation(preact: Tensor, model: Model) -> Tensor:
    if not model.clamped:
        gate, up = preact.chunk(2, -1)
        return F.silu(gate) * up
    gate, up = preact[..., ::2].clamp(max=LIMIT), preact[..., 1::2].clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def experts_in_turn(x: Tensor, weights: Tensor, ids: Tensor, inputs: Inputs, model: Model) -> Tensor:
    """Rows sorted by expert, one expert's after another's through its own matrices."""
    row_id_map, inv_map, _, counts = maps(ids, len(inputs["gate_up"]))
    parts = permute(x, inv_map, model.top_k).split(counts.tolist())
    up, down = inputs["gate_up"].unbind(0), inputs["down"].unbind(0)
    if model.clamped:
        up_bias, down_bias = inputs["gate_up_bias"].unbind(0), inputs["down_bias"].unbind(0)
        preacts = [torch.addmm(up_bias[e], part, up[e]) for e, part in enumerate(parts)]
        outputs = [torch.addmm(down_bias[e], activation(h, model), down[e]) for e, h in enumerate(preacts)]
    else:
        outputs = [
            F.linear(activation(F.linear(part, up[e]), model), down[e]) for e, part in enumerate(parts) if len(part)
        ]
    return unpermute(torch.cat(outputs), row_id_map, weights)


def experts_at_once(x: Tensor, weights: Tensor, ids: Tensor, inputs: Inputs, model: Model) -> Tensor:
    """The same through PyTorch's grouped product, which needs no sizes on the host."""
    row_id_map, inv_map, offsets, _ = maps(ids, len(inputs["gate_up"]))
    rows = permute(x, inv_map, model.top_k)
    up, down = inputs["gate_up"], inputs["down"]
    if model.clamped:
        expert = ids.flatten().index_select(0, inv_map)
        preact = F.grouped_mm(rows, up, offs=offsets) + inputs["gate_up_bias"].index_select(0, expert)
        outputs = F.grouped_mm(activation(preact, model), down, offs=offsets)
        outputs = outputs + inputs["down_bias"].index_select(0, expert)
    else:
        preact = F.grouped_mm(rows, up.transpose(1, 2), offs=offsets)
        outputs = F.grouped_mm(activation(preact, model), down.transpose(1, 2), offs=offsets)
    return unpermute(outputs, row_id_map, weights)


def router_logits(inputs: Inputs) -> Tensor:
    """In float32: rounded to bf16, a token in ten would go elsewhere."""
    bias = inputs.get("router_bias")
    return F.linear(_wide(inputs["x"]), _wide(inputs["router"]), None if bias is None else _wide(bias))


def layer(experts: Callable[..., Tensor], model: Model, inputs: Inputs) -> Values:
    """Router, and `experts_in_turn` or `experts_at_once`."""
    weights, ids = route(router_logits(inputs), model, inputs.get("correction"))
    return (experts(inputs["x"], weights, ids, inputs, model),)


# --- results and what is compared ------------------------------------------------------------------------------------


def with_gradients(outputs: Sequence[Tensor], inputs: Inputs, upstreams: Sequence[str]) -> Values:
    """The outputs, detached, and the gradients of every input that takes one; those for outputs go by name."""
    given = [inputs[name].to(output.dtype) for name, output in zip(upstreams, outputs, strict=False)]
    leaves = [value for value in inputs.values() if value.requires_grad]
    gradients = torch.autograd.grad(list(outputs[: len(given)]), leaves, given)
    return (*(output.detach() for output in outputs), *gradients)


def _some(size: int, count: int, device: torch.device) -> Tensor:
    """`count` indices at even distances, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64).round().long()


def sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What is compared with float64: of tensors per expert a few rows of a few experts, of others a few rows; all of
    short ones. Integers become float32, which holds them exactly.
    """
    found = []
    for output in outputs:
        value = output.detach()
        if value.ndim == 3:
            value = value[_some(len(value), CHECKED_EXPERTS, value.device)]
            value = value[:, _some(value.shape[1], CHECKED_ROWS, value.device)]
        elif value.ndim == 2 and value.shape[1] > 1024:
            value = value[_some(len(value), CHECKED_ROWS * CHECKED_EXPERTS, value.device)]
        found.append(value if value.is_floating_point() else value.float())
    return found
