"""FusedLMHead under FSDP2, DDP and hooks like those of ZeRO-3: two processes compute what one does."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from grpo_kernels import FusedLMHead, GRPOLossConfig, linear_token_log_probs
from grpo_kernels.distributed import VocabShard
from python_tests.distributed import launch
from python_tests.distributed.partitioned import PartitionedParameters

WORLD = 2
VOCABULARY, WIDTH, BATCH, LENGTH = 11, 8, 2, 5  # 11 rows do not divide by 2: shards are padded
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ROUNDED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
CONFIG = GRPOLossConfig(kl_coef=0.1, entropy_coef=0.01)


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    tokens: Tensor  # [B, T] inputs of the model
    hidden: Tensor  # [B, T, H] inputs of a head alone
    ids: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor
    upstream: Tensor  # [2, B, T]


def _batch(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (BATCH, LENGTH)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Batch(
        torch.randint(VOCABULARY, shape, generator=generator),
        normal(*shape, WIDTH),
        torch.randint(VOCABULARY, shape, generator=generator),
        normal(*shape) * 0.3 - 2.4,
        normal(*shape) * 0.3 - 2.4,
        normal(BATCH),
        torch.rand(shape, generator=generator) < 0.8,
        normal(2, *shape),
    )


class Model(nn.Module):
    """Embedding, one layer, head. Its forward is a loss, or the hidden states."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            head.weight = self.embedding.weight
        self.head = FusedLMHead(head, logit_scale=1.5, softcap=20.0)

    def forward(self, batch: Batch, loss: str | None) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(batch.tokens)))
        return hidden if loss is None else LOSSES[loss](self.head, hidden, batch)


# losses -------------------------------------------------------------------------------------------------------


def _log_probs(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    output = head.token_log_probs(hidden, batch.ids, temperature=0.7, mask=batch.mask, outputs=("entropy", "top1_ids"))
    assert output.log_probs.dtype == torch.float32
    return (output.log_probs * batch.upstream[0] + output.entropy * batch.upstream[1]).sum()


def _cross_entropy(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    return head.cross_entropy(hidden, batch.ids.masked_fill(~batch.mask, -100), z_loss=0.01)


def _grpo(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    output = head.grpo_loss(hidden, batch.ids, batch.old, batch.advantages, batch.mask, CONFIG, ref_log_probs=batch.ref)
    assert output.metrics.to_dict()["head_passes"] == 1
    assert output.metrics.to_dict()["tokens"] == int(batch.mask.sum())
    return output.loss


def _twice(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    """Two forwards, then one backward."""
    return _grpo(head, hidden, batch) + 0.5 * _log_probs(head, hidden * 0.5, batch)


def _without_gradient_first(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    """The log-probs that the ratio refers to come from the head itself."""
    with torch.no_grad():
        old = head.token_log_probs(hidden + 0.1, batch.ids, mask=batch.mask).log_probs
    return _grpo(head, hidden, batch._replace(old=old))


def _logits(head: FusedLMHead, hidden: Tensor, batch: Batch) -> Tensor:
    return (head(hidden).float().softmax(dim=-1)[..., 0] * batch.upstream[0]).sum()


LOSSES: dict[str, Callable[[FusedLMHead, Tensor, Batch], Tensor]] = {
    "log_probs": _log_probs,
    "cross_entropy": _cross_entropy,
    "grpo": _grpo,
    "twice": _twice,
    "without gradient first": _without_gradient_first,
    "logits": _logits,
}


# shardings -----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    wrap: str
    loss: str = "grpo"
    policy: MixedPrecisionPolicy | None = None
    reshard: bool = True
    micro_batches: int = 1

    def __str__(self) -> str:
        precision = {None: "fp32", BF16: "bf16", ROUNDED: "bf16-output"}[self.policy]
        return f"{self.wrap}-{self.loss}-{precision}-{'reshard' if self.reshard else 'keep'}-{self.micro_batches}"

    @property
    def alone(self) -> bool:
        return self.wrap.startswith("head")


CASES = (
    *(Case("head", loss) for loss in LOSSES),
    *(Case("head", loss, policy) for loss in ("log_probs", "cross_entropy", "grpo") for policy in (BF16, ROUNDED)),
    Case("head_compiled", "cross_entropy"),
    *(Case("model", loss, reshard=reshard) for loss in ("grpo", "log_probs", "twice") for reshard in (True, False)),
    *(Case("model", loss, micro_batches=2) for loss in ("grpo", "twice")),
    Case("model", "grpo", BF16, micro_batches=2),
    *(Case("model_tied", loss) for loss in ("grpo", "twice", "without gradient first")),
    Case("pair_tied", "grpo"),
    Case("outside", "grpo"),
    Case("outside", "log_probs", reshard=False),
    *(Case("ddp", loss, micro_batches=micro) for loss in ("grpo", "twice") for micro in (1, 2)),
    Case("ddp_tied", "grpo"),
    # F.linear keeps the memory of its weight; DeepSpeed replaces it for that reason.
    *(Case("head_zero3", loss) for loss in LOSSES if loss != "logits"),
    Case("model_zero3", "grpo", micro_batches=2),
    Case("model_zero3", "twice"),
)


class Trained(NamedTuple):
    """What a rank ends with: losses, gradients of its hidden states, of the parameters, and the parameters then."""

    losses: list[Tensor]
    grad_hidden: list[Tensor]
    grads: dict[str, Tensor]
    parameters: dict[str, Tensor]


def _module(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = Model(case.wrap.endswith("tied"))
    return model.head if case.alone else model


def _loss(case: Case, module: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
    if case.alone:
        return LOSSES[case.loss](module, hidden, batch)
    if case.wrap == "outside":
        return LOSSES[case.loss](module.head, module(batch, None), batch)
    return module(batch, case.loss)


def _shard(case: Case, module: nn.Module) -> nn.Module:
    options: dict[str, Any] = {"reshard_after_forward": case.reshard}
    if case.policy is not None:
        options["mp_policy"] = case.policy
    if case.wrap.startswith("ddp"):
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    if case.alone or case.wrap == "model_tied":
        return fully_shard(module, **options)
    fully_shard([module.embedding, module.head] if case.wrap == "pair_tied" else module.head, **options)
    if case.policy is not None:  # the root gets the old log-probs: they stay in float32
        options["mp_policy"] = replace(case.policy, cast_forward_inputs=False)
    return fully_shard(module, **options)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _train(case: Case, rank: int) -> Trained:
    """One optimiser step of a rank."""
    module = _module(case)
    names = dict(module.named_parameters())
    partitioned = PartitionedParameters(module, WORLD) if case.wrap.endswith("zero3") else None
    wrapped = module if partitioned else _shard(case, module)
    compute = torch.compile(_loss, backend="eager") if case.wrap == "head_compiled" else _loss
    losses, hiddens = [], []
    for step in range(case.micro_batches):
        batch, last = _batch(rank, step), step + 1 == case.micro_batches
        hiddens.append(batch.hidden.clone().requires_grad_())
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        with nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
            loss = compute(case, wrapped, batch, hiddens[-1])
            (loss / case.micro_batches).backward()
        losses.append(loss.detach())
    grad_hidden = [hidden.grad for hidden in hiddens if case.alone]
    if partitioned:
        partitioned.descend(0.1)
        grads = {name: partitioned.grads[parameter] for name, parameter in names.items()}
        return Trained(losses, grad_hidden, grads, {n: partitioned.whole(p) for n, p in names.items()})
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    grads = {name: _whole(parameter.grad) for name, parameter in module.named_parameters()}
    return Trained(losses, grad_hidden, grads, {n: _whole(p.detach()) for n, p in module.named_parameters()})


class _Calling(nn.Module):
    """A call on a module, for torch.func.functional_call."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.module)


def _expected(case: Case) -> list[Trained]:
    """The same in one process, by rank. Under a policy each rank rounds parameters and hidden states, as FSDP2 does."""
    module = _module(case)
    dtype = torch.float32 if case.policy is None else torch.bfloat16
    results = []
    for rank in range(WORLD):
        losses, hiddens = [], []
        for step in range(case.micro_batches):
            batch = _batch(rank, step)
            hiddens.append(batch.hidden.clone().requires_grad_())
            hidden = hiddens[-1].to(dtype)
            calling = _Calling(module, lambda m, batch=batch, hidden=hidden: _loss(case, m, batch, hidden))
            parameters = {name: parameter.to(dtype) for name, parameter in calling.named_parameters()}
            loss = torch.func.functional_call(calling, parameters, ())
            (loss / case.micro_batches / WORLD).backward()
            losses.append(loss.detach())
        results.append(Trained(losses, [hidden.grad * WORLD for hidden in hiddens if case.alone], {}, {}))
    grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return [result._replace(grads=grads, parameters=parameters) for result in results]


def _message(function: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    return str(caught.value)


def _misuse() -> dict[str, str]:
    """What is said where nothing gathered the weight."""
    batch, messages = _batch(0, 0), {}
    head, kept = fully_shard(Model(tied=False).head, reshard_after_forward=True), []
    handle = head.register_forward_pre_hook(lambda module, arguments: kept.append(module.weight))
    head(batch.hidden)
    handle.remove()
    messages["freed"] = _message(lambda: linear_token_log_probs(batch.hidden, kept[0], batch.ids))
    messages["dtensor"] = _message(lambda: linear_token_log_probs(batch.hidden, head.weight, batch.ids))
    late = nn.Linear(WIDTH, VOCABULARY)
    messages["wrapped late"] = _message(lambda: FusedLMHead(fully_shard(late)))
    late = fully_shard(nn.Sequential(nn.Linear(WIDTH, VOCABULARY)))
    messages["parent sharded"] = _message(lambda: FusedLMHead(late[0]).token_log_probs(batch.hidden, batch.ids))
    model = Model(tied=False)
    PartitionedParameters(model, WORLD)
    messages["zero3"] = _message(lambda: linear_token_log_probs(batch.hidden, model.head.weight, batch.ids))
    return messages


def _tensor_parallel(with_fsdp: bool) -> tuple[Any, ...]:
    """Each rank holds a part of the vocabulary and sees the same batch; FSDP2 has a mesh dimension of its own."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    head, batch = _module(Case("head")), _batch(0, 0)
    for name, parameter in list(head.named_parameters()):
        head.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh["tensor"], [Shard(0)])))
    shard = VocabShard.from_dtensor(head.weight, "tensor")
    if with_fsdp:
        fully_shard(head, mesh=mesh["data"], reshard_after_forward=True)
    hidden = batch.hidden.clone().requires_grad_()
    loss = _two_passes(head, hidden, batch, vocab_shard=shard)
    loss.backward()
    grads = {name: _whole(parameter.grad) for name, parameter in head.named_parameters()}
    return loss.detach(), hidden.grad, grads


def _two_passes(head: FusedLMHead, hidden: Tensor, batch: Batch, **options: Any) -> Tensor:
    output = head.grpo_loss(
        hidden, batch.ids, batch.old, batch.advantages, batch.mask, CONFIG, ref_log_probs=batch.ref, **options
    )
    target = batch.ids.masked_fill(~batch.mask, -100)
    tokens = head.token_log_probs(hidden, batch.ids, mask=batch.mask, **options).log_probs
    return output.loss + head.cross_entropy(hidden, target, **options) + (tokens * batch.upstream[0]).sum()


Ranks = list[tuple[dict[str, tuple[Any, ...]], dict[str, str]]]
"""Results by case, and messages; of every rank."""


def _rank(rank: int, world: int) -> tuple[dict[str, tuple[Any, ...]], dict[str, str]]:
    results = {str(case): tuple(_train(case, rank)) for case in CASES}
    parallel = {f"tensor parallel {with_fsdp}": _tensor_parallel(with_fsdp) for with_fsdp in (False, True)}
    return results | parallel, _misuse()


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return launch.run(WORLD, _rank)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one(case: Case, ranks: Ranks) -> None:
    for (results, _), expected in zip(ranks, _expected(case), strict=True):
        assert all(grad.any() for grad in expected.grads.values())
        torch.testing.assert_close(results[str(case)], tuple(expected))


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_parts_of_the_vocabulary_equal_the_whole(with_fsdp: bool, ranks: Ranks) -> None:
    head, batch = _module(Case("head")), _batch(0, 0)
    hidden = batch.hidden.clone().requires_grad_()
    loss = _two_passes(head, hidden, batch)
    loss.backward()
    expected = (loss.detach(), hidden.grad, {name: parameter.grad for name, parameter in head.named_parameters()})
    for results, _ in ranks:
        torch.testing.assert_close(results[f"tensor parallel {with_fsdp}"], expected)


@pytest.mark.parametrize(
    ("misuse", "pattern"),
    [
        ("freed", r"the memory of weight \[11, 8\] is freed.*FusedLMHead"),
        ("dtensor", r"placements \(S\(0\)\).*FusedLMHead.*VocabShard.from_dtensor"),
        ("wrapped late", r"head has forward hooks.*wrap the head before fully_shard"),
        ("parent sharded", r"FusedLMHead: weight must not be a DTensor.*wrap the head before fully_shard"),
        ("zero3", r"weight must have shape \[V, H\], got \[0\].*ZeRO-3.*FusedLMHead"),
    ],
)
def test_a_weight_that_is_not_there_is_an_error_that_says_what_to_do(misuse: str, pattern: str, ranks: Ranks) -> None:
    for _, messages in ranks:
        assert re.search(pattern, messages[misuse])
