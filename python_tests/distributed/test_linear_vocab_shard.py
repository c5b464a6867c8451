"""A head whose vocabulary is spread over ranks: every rank gets what one process with the whole head gets."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors
from grpo_kernels.distributed import VocabShard
from python_tests.distributed.launch import run
from python_tests.distributed.test_vocab_shard import CUTS, VOCAB, assert_equal_to_one_process

NAN = float("nan")
BATCH, TOKENS, WIDTH, RANK = 3, 7, 24, 4
LEADING = (BATCH, TOKENS)
LOCAL = ("weight", "bias", "lora_b", "accumulator")  # of which a rank has rows
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


class Case(NamedTuple):
    """A call of an op, by one process or by ranks that each have a part of its head."""

    op: str
    options: dict[str, Any] = {}  # noqa: RUF012
    cuts: int = 0  # which of CUTS
    padding: int = 0  # rows of garbage behind each part
    reduce: bool = True
    bias: bool = False
    lora: bool = False
    frozen: bool = False  # the weight
    accumulate: bool = False
    dtype: torch.dtype = torch.float32
    dtensor: bool = False

    def inputs(self) -> dict[str, Any]:
        """Tensors of the whole problem. Masked tokens hold garbage."""
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype)

        # A ratio has the digits that its log-probs have behind the point: six, as long as they are above -8.
        spread = 0.1 if self.op == "grpo_loss" else 0.5
        mask = torch.rand(LEADING, generator=generator) < 0.7
        mask[0, 0], mask[1] = True, True
        made: dict[str, Any] = {
            "hidden": normal(*LEADING, WIDTH),
            "weight": normal(VOCAB, WIDTH, scale=spread),
            "bias": normal(VOCAB, scale=2 * spread) if self.bias else None,
            "lora_a": normal(RANK, WIDTH, scale=0.3) if self.lora else None,
            "lora_b": normal(VOCAB, RANK, scale=0.3) if self.lora else None,
            "accumulator": normal(VOCAB, WIDTH) if self.accumulate else None,
            "ids": torch.randint(VOCAB, LEADING, generator=generator),
            "mask": mask,
            "temperature": torch.rand(LEADING, generator=generator) * 0.5 + 0.75,
            "old": normal(*LEADING, scale=0.3),
            "reference": normal(*LEADING, scale=0.3),
            "advantages": normal(BATCH).abs() + 0.5,  # of one sign: a loss that cancels has no six digits
            "upstream": normal(4, *LEADING),
        }
        made["hidden"][~mask], made["ids"][~mask] = NAN, 2**30
        if self.op == "grpo_loss":  # ratios near 1, as in training
            names = ("per_row", "temperature", "softcap", "logit_scale")
            options = {name: self.options[name] for name in names if name in self.options}
            like = Case("log_probs", options, bias=self.bias, lora=self.lora, dtype=self.dtype)
            current = call(like, made | {"accumulator": None}, None)["log_probs"]
            made["old"] += current
            made["reference"] += current
        return made

    def part(self, inputs: dict[str, Any], shard: VocabShard) -> dict[str, Any]:
        """What one rank has of it."""
        local = dict(inputs)
        for name in LOCAL:
            if inputs[name] is not None:
                rows = inputs[name][shard.start : shard.end]
                local[name] = torch.cat([rows, rows.new_full((self.padding, *rows.shape[1:]), NAN)])
        return local


_EVERY = {"outputs": ("entropy", "sum_squared_probs", "top1_ids")}
_GRPO = {"config": GRPOLossConfig(kl_coef=0.1, entropy_coef=0.03, clip_low=0.2, clip_high=0.3)}
LOG_PROBS = [
    Case("log_probs", _EVERY),
    Case("log_probs", _EVERY | {"per_row": True}, cuts=1, padding=3, bias=True),
    Case("log_probs", _EVERY | {"softcap": 6.0, "logit_scale": -1.3}, reduce=False, bias=True, padding=2),
    Case("log_probs", _EVERY, cuts=2, lora=True, frozen=True),
    Case("log_probs", {"temperature": 0.7}, lora=True, bias=True, padding=1, reduce=False),
    Case("log_probs", _EVERY, accumulate=True, padding=4),
    Case("log_probs", _EVERY | {"per_row": True}, padding=2, bias=True, lora=True, dtype=torch.float64),
    Case("log_probs", _EVERY, dtensor=True, bias=True),
    Case("log_probs", _EVERY, cuts=2, reduce=False, bias=True, lora=True, accumulate=True),
]
CROSS_ENTROPY = [
    Case("cross_entropy", {"z_loss": 1e-2}),
    Case("cross_entropy", {"z_loss": 1e-2, "reduction": "sum", "softcap": 8.0}, cuts=1, padding=3, bias=True),
    Case("cross_entropy", {"reduction": "none", "ignore_index": 2**30}, reduce=False, padding=1),
    Case("cross_entropy", {"z_loss": 1e-1}, cuts=2, lora=True, frozen=True, dtype=torch.float64),
    Case("cross_entropy", {"logit_scale": 0.7}, accumulate=True, bias=True),
]
GRPO = [
    Case("grpo_loss", _GRPO),
    Case("grpo_loss", _GRPO | {"per_row": True}, cuts=1, padding=3, bias=True, reduce=False),
    Case("grpo_loss", {"config": GRPOLossConfig.preset("gspo"), "softcap": 8.0}, lora=True, frozen=True),
    Case("grpo_loss", {"config": GRPOLossConfig.preset("dapo"), "temperature": 0.8}, cuts=2, accumulate=True),
    Case("grpo_loss", {"config": GRPOLossConfig(reduction="none"), "on_policy": True}, dtype=torch.float64),
]
MTP = [
    Case("mtp", {"z_loss": 1e-2, "detach_head": True, "per_row": True}, cuts=1, padding=3, bias=True, lora=True),
    Case("mtp", {"policy": True, "softcap": 8.0}, reduce=False, accumulate=True, dtype=torch.float64),
]
CASES = [*LOG_PROBS, *CROSS_ENTROPY, *GRPO, *MTP]


def call(case: Case, inputs: dict[str, Any], shard: VocabShard | None) -> dict[str, Tensor]:
    """Values, and the gradients of everything that is trained."""
    leaves = {name: inputs[name] for name in ("hidden", "weight", "bias", "lora_a", "lora_b")}
    leaves = {
        name: value.clone().requires_grad_(not (case.frozen and name == "weight"))
        for name, value in leaves.items()
        if value is not None
    }
    accumulator = None if inputs["accumulator"] is None else inputs["accumulator"].clone()
    options = dict(case.options)
    options.update(
        bias=leaves.get("bias"),
        lora=LoRAFactors(leaves["lora_a"], leaves["lora_b"], 0.7) if case.lora else None,
        vocab_shard=shard,
        weight_grad_accumulator=accumulator,
    )
    if options.pop("per_row", False):
        options["temperature"] = inputs["temperature"]
    values = FUNCTIONS[case.op](leaves["hidden"], leaves["weight"], inputs, options)
    upstream = inputs["upstream"].unbind(0)
    differentiable = [value for value in values.values() if value.requires_grad]
    loss = sum((value * up).sum() for value, up in zip(differentiable, upstream, strict=False))
    loss.backward()  # type: ignore[union-attr]
    found = {name: value.detach() for name, value in values.items()}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if accumulator is not None:
        found["gradient of accumulator"] = accumulator
    return found


def _log_probs(hidden: Tensor, weight: Tensor, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    out = grpo_kernels.linear_token_log_probs(hidden, weight, inputs["ids"], mask=inputs["mask"], **options)
    return {name: value for name, value in out._asdict().items() if value is not None}


def _cross_entropy(
    hidden: Tensor, weight: Tensor, inputs: dict[str, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    target = torch.where(inputs["mask"], inputs["ids"], options.get("ignore_index", -100))
    return {"loss": grpo_kernels.linear_cross_entropy(hidden, weight, target, **options)}


def _grpo_loss(hidden: Tensor, weight: Tensor, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    old = None if options.pop("on_policy", False) else inputs["old"]
    config = options.pop("config")
    if config.kl_coef:
        options["ref_log_probs"] = inputs["reference"]
    out = grpo_kernels.linear_grpo_loss(
        hidden, weight, inputs["ids"], old, inputs["advantages"], inputs["mask"], config, **options
    )
    if options["vocab_shard"] is not None:
        assert out.metrics.passes == 2
    return {"loss": out.loss, "metrics": out.metrics.values, "log_probs": out.log_probs, "entropy": out.entropy}


def _mtp(hidden: Tensor, weight: Tensor, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Two depths, the second of whose rows stand also where the token of the first does not count."""
    hiddens = torch.stack([hidden, torch.where(hidden.isnan(), 0.1, hidden).sin()])
    if options.pop("policy", False):
        options["policy"] = grpo_kernels.PolicyTerms(inputs["old"], inputs["advantages"])
    out = grpo_kernels.mtp_linear_cross_entropy(hiddens, weight, inputs["ids"], shift=0, mask=inputs["mask"], **options)
    return {name: value for name, value in out._asdict().items() if isinstance(value, Tensor)}


FUNCTIONS = {"log_probs": _log_probs, "cross_entropy": _cross_entropy, "grpo_loss": _grpo_loss, "mtp": _mtp}


def _shard(case: Case, rank: int, world: int) -> VocabShard:
    if case.dtensor:
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        weight = distribute_tensor(case.inputs()["weight"], init_device_mesh("cpu", (world,)), [Shard(0)])
        shard = VocabShard.from_dtensor(weight, 0, reduce_hidden_grad=case.reduce)
        assert torch.equal(weight.to_local(), case.inputs()["weight"][shard.start : shard.end])
        with pytest.raises(TypeError, match=r"weight must not be a DTensor.*VocabShard.from_dtensor"):
            grpo_kernels.linear_token_log_probs(case.inputs()["hidden"], weight, case.inputs()["ids"])
        return shard
    cuts = CUTS[world][case.cuts]
    return VocabShard(cuts[rank], cuts[rank + 1], dist.group.WORLD, case.reduce)


def _rank(rank: int, world: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    results = []
    for case in CASES:
        shard = _shard(case, rank, world)
        results.append(([shard.start, shard.end], call(case, case.part(case.inputs(), shard), shard)))
    _check_ids(rank, world)
    return results


def _check_ids(rank: int, world: int) -> None:
    """An id of no rank raises on every rank alike, and the ranks stay in step."""
    shard = VocabShard(rank * 5, rank * 5 + 5, None)
    hidden, weight = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 3)
    ids = torch.tensor([[0], [5 * world]])
    for function in (
        lambda: grpo_kernels.linear_token_log_probs(hidden, weight, ids, vocab_shard=shard),
        lambda: grpo_kernels.linear_cross_entropy(hidden, weight, ids, vocab_shard=shard),
        lambda: grpo_kernels.linear_grpo_loss(hidden, weight, ids, None, torch.ones(2), None, vocab_shard=shard),
        lambda: grpo_kernels.mtp_linear_cross_entropy(hidden[None], weight, ids, shift=0, vocab_shard=shard),
    ):
        with pytest.raises(ValueError, match=rf"must be the id of a token that one rank.* got {5 * world}"):
            function()
    out = grpo_kernels.linear_token_log_probs(hidden[:1], weight, ids[:1], vocab_shard=shard)
    torch.testing.assert_close(out.log_probs.exp(), torch.tensor([[1 / (5 * world)]]))
    empty = grpo_kernels.linear_token_log_probs(hidden[:0], weight, ids[:0], vocab_shard=shard)
    assert empty.log_probs.shape == (0, 1)


def _whole(case: Case, name: str, of_ranks: list[tuple[list[int], dict[str, Tensor]]]) -> Tensor:
    """One tensor of the whole head from those of the ranks."""
    tensors = [found[name] for _, found in of_ranks]
    of = name.removeprefix("gradient of ")
    if of in LOCAL:
        for (start, end), tensor in zip((bounds for bounds, _ in of_ranks), tensors, strict=True):
            padding = tensor[end - start :]
            assert padding.isnan().all() if of == "accumulator" else padding.count_nonzero() == 0
        return torch.cat([t[: end - start] for (start, end), t in zip((b for b, _ in of_ranks), tensors, strict=True)])
    if of == "hidden" and not case.reduce:
        return torch.stack(tensors).sum(0)
    for tensor in tensors[1:]:
        assert tensor.equal(tensors[0]) or tensor.isnan().any(), f"{case} {name} differs from rank to rank"
    return tensors[0]


@pytest.mark.parametrize("world", [2, 4])
def test_ops_on_a_spread_head(world: int) -> None:
    results = run(world, _rank)
    failures = []
    for index, case in enumerate(CASES):
        inputs = case.inputs()
        expected = call(case, inputs, None)
        of_ranks = [results[rank][index] for rank in range(world)]
        assert of_ranks[0][1].keys() == expected.keys()
        for name, value in expected.items():
            whole = _whole(case, name, of_ranks)
            assert whole.dtype == value.dtype
            try:
                assert_equal_to_one_process(f"{case} {name}", whole, value, TOLERANCE[case.dtype])
            except AssertionError as error:
                failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)
