"""Samples of token_log_probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.distributed import VocabShard
from python_tests.samples import BadCall, Call

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 37, generator=GENERATOR) * 3
X[0, 1, :20] = float("-inf")
IDS = torch.tensor([[36, 25, -100], [0, 12, 5]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
TEMPERATURES = torch.tensor([[1.0, 0.5, 2.0], [1.5, 0.7, 1.0]])
UPSTREAM = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.0, -1.0]])
PLAIN = (None, None, 1.0, 1.0, 0.0)  # mask, temperature tensor, temperature, logit_scale, softcap
FULL = (MASK, TEMPERATURES, 0.0, 1.3, 5.0)
EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")


def statistics(logits: Tensor, ids: Tensor) -> Tensor:
    """What the forward leaves for the backward, without a transform."""
    z = logits.float()
    top = z.amax(-1)
    u = (z - top[..., None]).clamp(min=-80)
    target = z.gather(-1, ids.clamp(min=0).long()[..., None])[..., 0]
    return torch.stack([top, u.exp().sum(-1), target, (u * u.exp()).sum(-1)])


def _backward(
    logits: Tensor, ids: Tensor, entropy: bool, transform: tuple[Any, ...] = PLAIN, z_loss: bool = False
) -> tuple[Any, ...]:
    shape = ids.shape
    upstream = UPSTREAM.reshape(-1)[: ids.numel()].reshape(shape)
    optional = (upstream.cos() if entropy else None, upstream.sin() if z_loss else None)
    return (logits, ids, *transform, statistics(logits, ids), upstream, *optional)


OPS = {
    "token_log_probs": [
        (X, IDS, *PLAIN, False, False, False, True),
        (X.bfloat16()[:, 1:], IDS.int()[:, 1:], *PLAIN, True, True, True, False),
        (X.half(), IDS, *FULL, True, False, True, True),
        (X[:0], IDS[:0], *PLAIN, True, True, True, True),
    ],
    "token_log_probs_backward": [
        (*_backward(X, IDS, True), None),
        (*_backward(X, IDS, True, z_loss=True), torch.bfloat16),
        (*_backward(X.bfloat16()[:, 1:], IDS.int()[:, 1:], False), None),
        (*_backward(X.half(), IDS, True, FULL, z_loss=True), None),
        (*_backward(X[:0], IDS[:0], True), torch.float16),
    ],
    "token_log_probs_backward_": [
        _backward(X, IDS, True, z_loss=True),
        _backward(X.bfloat16()[:, 1:], IDS.int()[:, 1:], False),
        _backward(X[:0], IDS[:0], False),
    ],
}


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


CALLS = [
    Call("plain", lambda x, i: grpo_kernels.token_log_probs(x, i), _make(X, IDS), (0,)),
    Call(
        "everything",
        lambda x, i, m, t: grpo_kernels.token_log_probs(
            x, i, mask=m, temperature=t, logit_scale=1.3, softcap=5.0, outputs=EVERY_OUTPUT
        ),
        _make(X, IDS, MASK, TEMPERATURES),
        (0,),
    ),
    Call(
        "bf16_view",
        lambda x, i: grpo_kernels.token_log_probs(x[:, :-1], i[:, 1:], outputs=("entropy",), temperature=0.7),
        _make(X.bfloat16(), IDS.int()),
        (0,),
    ),
    Call(
        "strided",
        lambda x, i: grpo_kernels.token_log_probs(x.transpose(0, 1), i.T, outputs=("entropy",)),
        _make(X, IDS),
        (0,),
    ),
    Call(
        "needs_a_copy",
        lambda x, i: grpo_kernels.token_log_probs(x.transpose(1, 2)[:, :3], i.clamp(max=2), outputs=("entropy",)),
        _make(X[:, :3, :3], IDS.clamp(max=2)),
        (0,),
    ),
    Call(
        "inplace_backward",
        lambda x, i: grpo_kernels.token_log_probs(x * 1.5, i, outputs=("entropy",), inplace_backward=True),
        _make(X, IDS),
        (0,),
    ),
    Call("one_row", lambda x, i: grpo_kernels.token_log_probs(x, i), _make(X[1, 1], IDS[1, 1]), (0,)),
    Call("empty", lambda x, i: grpo_kernels.token_log_probs(x, i, outputs=EVERY_OUTPUT), _make(X[:0], IDS[:0]), (0,)),
    Call("frozen", lambda x, i: grpo_kernels.token_log_probs(x, i, outputs=EVERY_OUTPUT), _make(X, IDS)),
]


def _bad(name: str, error: type[Exception], *says: str, logits: Any = X, ids: Any = IDS, **options: Any) -> BadCall:
    return BadCall(f"token_log_probs_{name}", lambda: grpo_kernels.token_log_probs(logits, ids, **options), error, says)


BAD_CALLS = [
    _bad("list", TypeError, "logits must be a torch.Tensor, got list", logits=[1.0]),
    _bad("integer", TypeError, "logits must have dtype float32", "int64", logits=X.nan_to_num(0, 0, 0).long()),
    _bad("no_vocab", ValueError, "[..., V] with V >= 1, got [2, 3, 0]", logits=X[..., :0]),
    _bad("scalar", ValueError, "[..., V] with V >= 1, got []", logits=torch.tensor(1.0)),
    _bad("id_shape", ValueError, "token_ids must have shape [...] = [2, 3], got [3, 2]", ids=IDS.T),
    _bad("id_dtype", TypeError, "token_ids must have dtype int64, int32, got float32", ids=IDS.float()),
    _bad("id_device", ValueError, "token_ids must be on cpu like logits, got meta", ids=IDS.to("meta")),
    _bad("id_range", ValueError, "token_ids[0, 1] must be < V = 20", "got 25", logits=X[..., :20], ids=IDS % 26),
    _bad("mask", ValueError, "mask must have shape [...] = [2, 3], got [3]", mask=MASK[0]),
    _bad("mask_list", TypeError, "mask must be a torch.Tensor, got list", mask=[True]),
    _bad("temperature", ValueError, "temperature must be finite and > 0, got 0", temperature=0),
    _bad("temperature_type", TypeError, "temperature must be a number, got str", temperature="hot"),
    _bad("temperature_shape", ValueError, "temperature must have shape [...] = [2, 3]", temperature=torch.ones(2)),
    _bad("temperature_dtype", TypeError, "temperature must have dtype", "int64", temperature=IDS),
    _bad(
        "temperature_grad",
        ValueError,
        "temperature is not differentiated",
        temperature=torch.tensor(1.0, requires_grad=True),
    ),
    _bad("logit_scale", ValueError, "logit_scale must be finite", logit_scale=float("inf")),
    _bad("logit_scale_zero", ValueError, "logit_scale must not be 0", logit_scale=0.0),
    _bad("softcap", ValueError, "softcap must be finite and > 0, got 0", softcap=0.0),
    _bad("outputs", ValueError, "outputs must be one of 'entropy'", "'top2'", outputs=("top2",)),
    _bad("outputs_str", TypeError, "outputs must be a collection of names", outputs="entropy"),
    _bad("outputs_none", TypeError, "outputs must be a collection of names, got NoneType", outputs=None),
    _bad("inplace_type", TypeError, "inplace_backward must be a bool, got int", inplace_backward=1),
    _bad(
        "inplace_overlap",
        ValueError,
        "inplace_backward needs logits with a dense last axis",
        "[0, 37, 1]",
        logits=X[:1].expand(2, 3, 37),
        inplace_backward=True,
    ),
    _bad(
        "inplace_copy",
        ValueError,
        "inplace_backward needs logits with a dense last axis",
        logits=X.transpose(1, 2),
        ids=torch.zeros(2, 37, dtype=torch.int64),
        inplace_backward=True,
    ),
    _bad("vocab_shard", TypeError, "vocab_shard must be a VocabShard", "got object", vocab_shard=object()),
    _bad("shard_start", ValueError, "vocab_shard.start must be >= 0, got -1", vocab_shard=VocabShard(-1, 3, None)),
    _bad("shard_end", ValueError, "vocab_shard.end must be >= 8, got 3", vocab_shard=VocabShard(8, 3, None)),
    _bad("shard_type", TypeError, "vocab_shard.end must be an int", vocab_shard=VocabShard(0, 3.0, None)),
    _bad("shard_size", ValueError, "at most 37 ids", "from 0 to 38", vocab_shard=VocabShard(0, 38, None)),
    _bad("shard_reduce", TypeError, "reduce_hidden_grad must be a bool", vocab_shard=VocabShard(0, 37, None, 1)),
    _bad("shard_alone", ValueError, "call init_process_group first", vocab_shard=VocabShard(0, 37, None)),
]
