"""The exchange of a spread vocabulary in a group of one, by NCCL on a GPU and by gloo on a CPU.

Groups of several ranks: python_tests/distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import grpo_kernels
from grpo_kernels.distributed import VocabShard
from python_tests.gpu.devices import DEVICES, assert_same, no_synchronization

ROWS, WIDTH, VOCAB, PADDING = 9, 64, 515, 5
EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """With a process group of one."""
    name: str = request.param
    backend = "nccl" if name == "cuda" else "gloo"
    if name == "cuda" and not dist.is_nccl_available():
        pytest.skip("torch has no NCCL")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield name
    finally:
        dist.destroy_process_group()


def _logits(device: str, padding: int) -> dict[str, Tensor]:
    logits = torch.randn(ROWS, VOCAB, device=device)
    return {"logits": torch.nn.functional.pad(logits, (0, padding), value=float("nan"))}


def _head(device: str, padding: int) -> dict[str, Tensor]:
    hidden, weight = torch.randn(ROWS, WIDTH, device=device), torch.randn(VOCAB, WIDTH, device=device) * 0.2
    return {"hidden": hidden, "weight": torch.nn.functional.pad(weight, (0, 0, 0, padding), value=float("nan"))}


def _values(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, grpo_kernels.GRPOLossOutput):
        return [result.loss, result.log_probs, result.entropy]
    return list(result)


Op = Callable[..., Any]
OPS: dict[str, tuple[Callable[[str, int], dict[str, Tensor]], Op]] = {
    "token_log_probs": (
        _logits,
        lambda x, ids, **options: grpo_kernels.token_log_probs(*x, ids, outputs=EVERY_OUTPUT, **options),
    ),
    "linear_token_log_probs": (
        _head,
        lambda x, ids, **options: grpo_kernels.linear_token_log_probs(*x, ids, outputs=EVERY_OUTPUT, **options),
    ),
    "linear_cross_entropy": (
        _head,
        lambda x, ids, **options: grpo_kernels.linear_cross_entropy(*x, ids, z_loss=1e-2, **options),
    ),
    "linear_grpo_loss": (
        _head,
        lambda x, ids, **options: grpo_kernels.linear_grpo_loss(
            x[0][None], x[1], ids[None], None, torch.ones(1, device=ids.device), None, **options
        ),
    ),
}


def _run(op: str, inputs: dict[str, Tensor], ids: Tensor, shard: VocabShard | None) -> list[Tensor]:
    """Values and gradients, those of the padding left out."""
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    values = _values(OPS[op][1](leaves, ids, vocab_shard=shard))
    used = [value for value in values if value.requires_grad]
    gradients = torch.autograd.grad(used, leaves, [torch.ones_like(value) for value in used])
    return [*(value.detach() for value in values), *gradients]


def _cut(tensor: Tensor) -> Tensor:
    """Without its padding, whose gradient is zero."""
    for axis, size in enumerate(tensor.shape):
        if size == VOCAB + PADDING:
            assert tensor.narrow(axis, VOCAB, PADDING).count_nonzero() == 0
            return tensor.narrow(axis, 0, VOCAB)
    return tensor


@pytest.mark.parametrize("op", OPS)
def test_a_group_of_one_changes_nothing_and_waits_for_nothing(op: str, device: str) -> None:
    make, _ = OPS[op]
    torch.manual_seed(0)
    whole = make(device, 0)
    torch.manual_seed(0)
    padded = make(device, PADDING)
    ids = torch.randint(VOCAB, (ROWS,), device=device)
    ids[4] = -100
    shard = VocabShard(0, VOCAB, dist.group.WORLD)
    expected = _run(op, whole, ids, None)
    _run(op, padded, ids, shard)  # compiles, connects
    with no_synchronization(device):
        actual = _run(op, padded, ids, shard)
    assert_same([_cut(tensor) for tensor in actual], expected)


@pytest.mark.parametrize("op", ["token_log_probs", "linear_token_log_probs"])
def test_an_id_of_no_rank_is_nan_on_a_gpu_and_raises_on_a_cpu(op: str, device: str) -> None:
    make, function = OPS[op]
    inputs = list(make(device, 0).values())
    inputs[0].requires_grad_()
    ids = torch.randint(VOCAB, (ROWS,), device=device)
    ids[3] = VOCAB
    shard = VocabShard(0, VOCAB, None)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"token_ids\[3\] must be the id of a token .* got {VOCAB}"):
            function(inputs, ids, vocab_shard=shard)
        return
    out = function(inputs, ids, vocab_shard=shard)
    gradient = torch.autograd.grad(out.log_probs.sum(), inputs[0])[0]
    expected = torch.arange(ROWS) == 3
    for value in (*out[:3], gradient.sum(-1)):
        assert torch.equal(value.isnan().cpu(), expected)
    assert torch.equal(out.top1_ids.cpu() == -1, expected)
