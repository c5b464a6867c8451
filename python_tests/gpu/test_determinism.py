"""Twenty runs of everything, each under other conditions, give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, _dispatch
from python_tests.gpu.devices import CALLS, DEVICES, assert_same_bits, inputs_of, run, synchronize
from python_tests.samples import Call

RUNS = 20
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)


class Conditions:
    """What changes from run to run: addresses, the stream and what else the device does; on the CPU the threads."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.threads = torch.get_num_threads()
        self.kept: list[Tensor] = []
        if device == "cuda":
            self.streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
            self.busy = torch.cuda.Stream()
            self.load = torch.randn(1024, 1024, device=device)

    def run(self, index: int, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """`work`, once everything before it is done."""
        self.kept = [*self.kept[-3:], torch.full((1 + 37 * index * index,), float("nan"), device=self.device)]
        if self.device != "cuda":
            torch.set_num_threads(1 + index % max(self.threads, 2))
            return work()
        torch.cuda.synchronize()
        if index % 2:
            with torch.cuda.stream(self.busy):
                for _ in range(4):
                    self.load = torch.tanh(self.load @ self.load)
        with torch.cuda.stream(self.streams[index % 3]):
            results = work()
        torch.cuda.synchronize()
        return results

    def restore(self) -> None:
        torch.set_num_threads(self.threads)


def _assert_deterministic(device: str, work: Callable[[], list[Tensor]]) -> None:
    first = [tensor.clone() for tensor in work()]
    synchronize(device)
    conditions = Conditions(device)
    try:
        for index in range(RUNS):
            assert_same_bits(conditions.run(index, work), first)
    finally:
        conditions.restore()


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_samples(call: Call, device: str) -> None:
    _assert_deterministic(device, lambda: run(call, inputs_of(call, device)))


# --- sizes that fill the device, so that blocks finish in another order every time -----------------------------------


def _token_log_probs(device: str, dtype: torch.dtype, **options: Any) -> Callable[[], list[Tensor]]:
    rows, vocab = (512, 50_257) if device == "cuda" else (9, 5_003)
    logits = (torch.randn(rows, vocab, device=device) * 4).to(dtype)
    ids = torch.randint(vocab, (rows,), device=device)
    ids[::7] = -100
    every = ("entropy", "sum_squared_probs", "top1_ids")

    def function(x: Tensor) -> Sequence[Tensor]:
        return grpo_kernels.token_log_probs(x * 1.0, ids, outputs=every, **options)

    call = Call("big", function, lambda device: (logits,), (0,))
    return lambda: run(call, inputs_of(call, device))


def _group_advantages(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    batch = 65_536 if device == "cuda" else 1_024
    rewards = torch.randn(batch, 3, device=device)
    rewards[torch.rand(rewards.shape, device=device) < 0.1] = float("nan")
    if "group_size" not in options:
        options["group_ids"] = torch.randint(-batch // 16, batch // 16, (batch,), device=device)
    return lambda: list(grpo_kernels.group_advantages(rewards, **options))


def _groups(device: str, function: Callable[[Tensor, Tensor], Any]) -> Callable[[], list[Tensor]]:
    batch = 65_536 if device == "cuda" else 1_024
    scores = torch.randint(4, (batch,), device=device).float()  # many ties
    ids = torch.randint(batch // 16, (batch,), device=device)

    def work() -> list[Tensor]:
        result = function(scores, ids)
        return [result] if isinstance(result, Tensor) else list(result)

    return work


def _grpo_loss(device: str, preset: str, packed: bool) -> Callable[[], list[Tensor]]:
    batch, tokens = (256, 2_048) if device == "cuda" else (7, 65)
    config = GRPOLossConfig.preset(preset)
    log_probs = -torch.rand(batch, tokens, device=device) * 3
    old = log_probs + 0.2 * torch.randn_like(log_probs)
    advantages = torch.randn(batch, device=device)
    lengths = torch.randint(0, tokens + 1, (batch,), device=device)
    mask = torch.arange(tokens, device=device) < lengths[:, None]
    options: dict[str, Any] = {"max_length": tokens} if config.reduction == "sequence_mean_token_sum_norm" else {}
    if packed:
        options["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        log_probs, old, mask = log_probs[mask], old[mask], mask[mask]

    def function(x: Tensor) -> list[Tensor]:
        output = grpo_kernels.grpo_loss(x, old, advantages, mask, config, **options)
        return [output.loss, output.metrics.values]

    call = Call(preset, function, lambda device: (log_probs,), (0,))
    return lambda: run(call, inputs_of(call, device))


_SEQUENCES = 4


def _head(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and ids, some of them masked; bf16 on a GPU."""
    rows, width, vocab = (2_048, 1_024, 50_257) if device == "cuda" else (65 * _SEQUENCES, 24, 517)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 / width**0.5).to(dtype)
    ids = torch.randint(vocab, (rows,), device=device)
    ids[::7] = -100
    return hidden, weight, ids


def _linear_token_log_probs(device: str, outputs: tuple[str, ...], **options: Any) -> Callable[[], list[Tensor]]:
    hidden, weight, ids = _head(device)

    def function(x: Tensor, w: Tensor) -> Any:
        return grpo_kernels.linear_token_log_probs(x, w, ids, outputs=outputs, **options)

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _linear_cross_entropy(device: str, reduction: str) -> Callable[[], list[Tensor]]:
    hidden, weight, target = _head(device)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return grpo_kernels.linear_cross_entropy(x, w, target, z_loss=0.01, reduction=reduction)

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _linear_grpo_loss(device: str, config: GRPOLossConfig) -> Callable[[], list[Tensor]]:
    hidden, weight, ids = _head(device)
    hidden, ids = hidden.view(_SEQUENCES, -1, hidden.shape[-1]), ids.view(_SEQUENCES, -1)
    old = -10.0 - 2 * torch.rand(ids.shape, device=device)
    advantages = torch.randn(len(ids), device=device)

    def function(x: Tensor, w: Tensor) -> list[Tensor | None]:
        output = grpo_kernels.linear_grpo_loss(x, w, ids, old, advantages, None, config)
        return [output.loss, output.metrics.values, output.log_probs, output.entropy]

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


BIG: dict[str, Callable[[str], Callable[[], list[Tensor]]]] = {
    "token_log_probs": lambda device: _token_log_probs(device, torch.float32),
    "token_log_probs-bf16": lambda device: _token_log_probs(device, torch.bfloat16, softcap=20.0, temperature=0.7),
    "token_log_probs-in_place": lambda device: _token_log_probs(device, torch.bfloat16, inplace_backward=True),
    "group_advantages": lambda device: _group_advantages(device, group_size=16),
    "group_advantages-ragged": lambda device: _group_advantages(device, normalize_by="batch"),
    "informative_groups": lambda device: _groups(
        device, lambda scores, ids: grpo_kernels.informative_groups(scores, group_ids=ids)
    ),
    "best_of_group": lambda device: _groups(
        device, lambda scores, ids: grpo_kernels.best_of_group(scores, 2, group_ids=ids)
    ),
    "grpo_loss": lambda device: _grpo_loss(device, "dapo", packed=False),
    "grpo_loss-sequences": lambda device: _grpo_loss(device, "gspo", packed=False),
    "grpo_loss-packed": lambda device: _grpo_loss(device, "grpo", packed=True),
    "linear_token_log_probs": lambda device: _linear_token_log_probs(device, ()),
    "linear_token_log_probs-everything": lambda device: _linear_token_log_probs(
        device, ("entropy", "sum_squared_probs", "top1_ids"), softcap=20.0, temperature=0.7
    ),
    "linear_cross_entropy": lambda device: _linear_cross_entropy(device, "mean"),
    "linear_cross_entropy-per_token": lambda device: _linear_cross_entropy(device, "none"),
    "linear_grpo_loss": lambda device: _linear_grpo_loss(device, GRPOLossConfig.preset("dapo", entropy_coef=0.1)),
    "linear_grpo_loss-sequences": lambda device: _linear_grpo_loss(device, GRPOLossConfig.preset("gspo")),
}


def test_every_op_has_a_big_case() -> None:
    assert {name.partition("-")[0] for name in BIG} == set(_dispatch.public_ops())


@ON_DEVICES
@pytest.mark.parametrize("name", BIG)
def test_big(name: str, device: str) -> None:
    _assert_deterministic(device, BIG[name](device))


def test_the_comparison_sees_one_bit() -> None:
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="tensor 1 differs"):
        assert_same_bits([zero, -zero], [zero, zero])
