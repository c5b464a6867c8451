"""FusedLMHead: a drop-in for the head it wraps, the ops through it, what hooks see of them, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    FusedLMHead,
    GRPOLossConfig,
    LoRAFactors,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_log_probs,
)
from grpo_kernels.linear_log_probs.weights import check_weight

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 5, 8, 37
CONFIG = GRPOLossConfig(kl_coef=0.1, entropy_coef=0.01)
TRANSFORM: dict[str, Any] = {"logit_scale": 1.5, "softcap": 9.0}


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


HIDDEN = _normal(BATCH, LENGTH, WIDTH)
IDS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7 % VOCABULARY
MASK = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 4 != 1
OLD = _normal(BATCH, LENGTH, seed=1) * 0.1 - 3.6
REF = _normal(BATCH, LENGTH, seed=2) * 0.1 - 3.6
ADVANTAGES = _normal(BATCH, seed=3)
TEMPERATURE = torch.tensor(0.7)
GRPO: tuple[Any, ...] = (IDS, OLD, ADVANTAGES, MASK, CONFIG)


def _linear(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(_normal(*parameter.shape, seed=4))
    return linear


def _factors() -> LoRAFactors:
    return LoRAFactors(nn.Parameter(_normal(2, WIDTH, seed=5)), nn.Parameter(_normal(VOCABULARY, 2, seed=6)), 0.5)


Loss = Callable[[FusedLMHead, Tensor], Tensor]


def _log_probs_loss(head: FusedLMHead, hidden: Tensor) -> Tensor:
    output = head.token_log_probs(hidden, IDS, temperature=TEMPERATURE, mask=MASK, outputs=("entropy",))
    return (output.log_probs * REF + output.entropy * OLD).sum()


LOSSES: dict[str, Loss] = {
    "log_probs": _log_probs_loss,
    "cross_entropy": lambda head, hidden: head.cross_entropy(hidden, IDS.masked_fill(~MASK, -100)),
    "grpo": lambda head, hidden: head.grpo_loss(hidden, *GRPO, ref_log_probs=REF).loss,
    "logits": lambda head, hidden: (head(hidden).sigmoid() * REF.unsqueeze(-1)).sum(),
}


def _results(head: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    """The loss, and the gradients of hidden states and parameters."""
    head.zero_grad()
    hidden = HIDDEN.clone().requires_grad_()
    value = loss(head, hidden)
    value.backward()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return [value.detach(), *(tensor.grad.clone() for tensor in (hidden, *trained))]


# the drop-in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_takes_the_place_of_the_head(bias: bool) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, WIDTH), "lm_head": _linear(bias)})
    model["lm_head"].weight = model["embed"].weight
    before = model.state_dict()
    model["lm_head"] = FusedLMHead(model["lm_head"], **TRANSFORM)
    after = model.state_dict()
    assert list(after) == list(before)
    assert model["lm_head"].weight is model["embed"].weight
    assert sum(1 for _ in model.parameters()) == 1 + bias
    expected = F.linear(HIDDEN, before["lm_head.weight"], before.get("lm_head.bias"))
    assert torch.equal(model["lm_head"](HIDDEN), expected)
    assert model.load_state_dict(before).missing_keys == []
    again = copy.deepcopy(model)
    assert again["lm_head"].weight is again["embed"].weight
    assert (model["lm_head"].in_features, model["lm_head"].out_features) == (WIDTH, VOCABULARY)
    assert f"in_features=8, out_features=37, bias={bias}, logit_scale=1.5, softcap=9.0" in repr(model)


def test_an_embedding_is_a_head() -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    head = FusedLMHead(embedding)
    assert head.weight is embedding.weight
    assert head.bias is None
    assert (head.in_features, head.out_features) == (WIDTH, VOCABULARY)
    assert torch.equal(head(HIDDEN), F.linear(HIDDEN, embedding.weight))
    expected = linear_token_log_probs(HIDDEN, embedding.weight, IDS)
    assert torch.equal(head.token_log_probs(HIDDEN, IDS).log_probs, expected.log_probs)


def _direct(name: str, lora: bool) -> Callable[[FusedLMHead, Tensor], Tensor]:
    """The loss by the public function."""

    def loss(head: FusedLMHead, hidden: Tensor) -> Tensor:
        factors = LoRAFactors(head.lora_a, head.lora_b, 0.5) if lora else None
        options: dict[str, Any] = {"bias": head.bias, "lora": factors, **TRANSFORM}
        if name == "cross_entropy":
            return linear_cross_entropy(hidden, head.weight, IDS.masked_fill(~MASK, -100), **options)
        if name == "grpo":
            return linear_grpo_loss(hidden, head.weight, *GRPO, ref_log_probs=REF, **options).loss
        output = linear_token_log_probs(
            hidden, head.weight, IDS, temperature=TEMPERATURE, mask=MASK, outputs=("entropy",), **options
        )
        return (output.log_probs * REF + output.entropy * OLD).sum()

    return loss


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["log_probs", "cross_entropy", "grpo"])
def test_computes_what_the_function_computes(name: str, lora: bool) -> None:
    linear = _linear().requires_grad_(not lora)
    head = FusedLMHead(linear, lora=_factors() if lora else None, **TRANSFORM)
    actual, expected = _results(head, LOSSES[name]), _results(head, _direct(name, lora))
    assert len(actual) == 4
    for result, wanted in zip(actual, expected, strict=True):
        assert wanted.any()
        assert torch.equal(result, wanted)


def test_every_output_comes_through() -> None:
    head = FusedLMHead(_linear())
    outputs = ("entropy", "sum_squared_probs", "top1_ids")
    expected = linear_token_log_probs(HIDDEN, head.weight, IDS, bias=head.bias, mask=MASK, outputs=outputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            actual = head.token_log_probs(HIDDEN, IDS, mask=MASK, outputs=outputs)
        for result, wanted in zip(actual, expected, strict=True):
            assert torch.equal(result, wanted)
    assert head.token_log_probs(HIDDEN, IDS).entropy is None
    actual_loss = head.grpo_loss(HIDDEN, *GRPO, ref_log_probs=REF)
    expected_loss = linear_grpo_loss(HIDDEN, head.weight, *GRPO, bias=head.bias, ref_log_probs=REF)
    assert torch.equal(actual_loss.metrics.values, expected_loss.metrics.values)
    assert actual_loss.metrics.to_dict() == expected_loss.metrics.to_dict()
    assert torch.equal(actual_loss.log_probs, expected_loss.log_probs)
    assert torch.equal(actual_loss.entropy, expected_loss.entropy)
    assert actual_loss.loss.requires_grad
    assert not actual_loss.log_probs.requires_grad


def test_factors_of_the_head_count_in_its_logits_and_stay_shared() -> None:
    factors, linear = _factors(), _linear().requires_grad_(False)
    head = FusedLMHead(linear, lora=factors)
    assert head.lora_a is factors.a
    assert sorted(head.state_dict()) == ["bias", "lora_a", "lora_b", "weight"]
    merged = linear.weight + 0.5 * factors.b @ factors.a
    torch.testing.assert_close(head(HIDDEN), F.linear(HIDDEN, merged, linear.bias))
    frozen = FusedLMHead(linear, lora=LoRAFactors(factors.a.detach(), factors.b.detach(), 0.5))
    assert dict(frozen.named_buffers()).keys() == {"lora_a", "lora_b"}
    assert torch.equal(frozen(HIDDEN), head(HIDDEN))


# where it must run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_under_activation_checkpointing(name: str) -> None:
    head = FusedLMHead(_linear())
    expected = _results(head, LOSSES[name])
    for reentrant in (False, True):
        recomputed = _results(head, lambda h, hidden, r=reentrant: _recomputed(LOSSES[name], h, hidden, r))
        for result, wanted in zip(recomputed, expected, strict=True):
            assert torch.equal(result, wanted)


def _recomputed(loss: Loss, head: FusedLMHead, hidden: Tensor, reentrant: bool) -> Tensor:
    value: Tensor = checkpoint(lambda states: loss(head, states), hidden, use_reentrant=reentrant)
    return value


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_into_one_graph(name: str) -> None:
    head = FusedLMHead(_linear(), **TRANSFORM)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    for result, wanted in zip(_results(head, compiled), _results(head, LOSSES[name]), strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("name", ["log_probs", "cross_entropy", "grpo"])
def test_under_autocast(name: str) -> None:
    head = FusedLMHead(_linear(), **TRANSFORM)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = _results(head, LOSSES[name]), _results(head, _direct(name, False))
    low = copy.deepcopy(head).bfloat16()
    rounded = LOSSES[name](low, HIDDEN.bfloat16())
    assert actual[0].dtype == torch.float32
    assert torch.equal(actual[0], rounded.detach())
    for result, wanted in zip(actual, expected, strict=True):
        assert torch.equal(result, wanted)


# what hooks see -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_hooks_see_the_call_and_round_nothing_but_the_hidden_states(name: str) -> None:
    head, seen = FusedLMHead(_linear()), []
    expected = _results(head, LOSSES[name])

    def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(([type(argument).__name__ for argument in arguments], options))

    head.register_forward_pre_hook(before, with_kwargs=True)
    for result, wanted in zip(_results(head, LOSSES[name]), expected, strict=True):
        assert torch.equal(result, wanted)
    assert seen == [(["Tensor"] if name == "logits" else ["Tensor", "function"], {})]


def _bfloat16(output: Any) -> Any:
    return tuple(t.bfloat16() for t in output) if isinstance(output, tuple) else output.bfloat16()


@pytest.mark.parametrize("name", ["log_probs", "cross_entropy", "grpo"])
def test_a_policy_that_rounds_outputs_rounds_no_result(name: str) -> None:
    head, hooked = FusedLMHead(_linear()), []
    expected = _results(head, LOSSES[name])

    def after(module: nn.Module, arguments: Any, output: Any) -> Any:  # as FSDP2: a hook on the tensor, then a cast
        for tensor in output:
            tensor.register_hook(lambda grad: hooked.append(grad.dtype))
        return _bfloat16(output)

    head.register_forward_hook(after)
    for result, wanted in zip(_results(head, LOSSES[name]), expected, strict=True):
        assert torch.equal(result, wanted)
    assert set(hooked) == {torch.float32}


def test_a_hook_that_replaces_a_rounded_result_is_refused() -> None:
    head = FusedLMHead(_linear())
    head.register_forward_hook(lambda module, arguments, output: tuple((t * 2).bfloat16() for t in output))
    with pytest.raises(ValueError, match="turned a result into bfloat16; take output_dtype out of the mixed precision"):
        head.token_log_probs(HIDDEN, IDS)


def test_any_computation_may_run_between_the_hooks() -> None:
    head = FusedLMHead(_linear())
    norm = head(HIDDEN, lambda hidden, weight, bias, lora: weight.norm() + bias.sum() + hidden.sum())
    assert torch.equal(norm, head.weight.norm() + head.bias.sum() + HIDDEN.sum())


# refusals -------------------------------------------------------------------------------------------------------


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _with_hook() -> nn.Linear:
    linear = _linear()
    linear.register_forward_hook(lambda module, arguments, output: output * 2)
    return linear


def _adapted() -> nn.Module:
    module = nn.Module()
    module.base_layer = _linear()
    return module


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (lambda: _linear().weight, TypeError, "head must be an nn.Module, got Parameter"),
        (lambda: nn.Conv1d(2, 2, 1), TypeError, "nn.Linear with nn.Linear's forward, or an nn.Embedding, got Conv1d"),
        (lambda: _Doubled(2, 3), TypeError, "nn.Linear with nn.Linear's forward, or an nn.Embedding, got _Doubled"),
        (_adapted, TypeError, r"carries adapters \(Module\).*lora=LoRAFactors"),
        (_with_hook, ValueError, "head has forward hooks.*wrap the head before fully_shard"),
        (
            lambda: nn.utils.parametrizations.weight_norm(_linear()),
            TypeError,
            "head.weight must be a parameter, not computed",
        ),
    ],
)
def test_refuses_what_it_would_leave_out(head: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"FusedLMHead: .*{message}"):
        FusedLMHead(head())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": float("nan")}, "logit_scale must be finite"),
        ({"logit_scale": 0.0}, "logit_scale must not be 0"),
        ({"softcap": 0.0}, "softcap must be finite and > 0"),
    ],
)
def test_refuses_a_bad_transform(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"FusedLMHead: {message}"):
        FusedLMHead(_linear(), **options)


@pytest.mark.parametrize("name", ["weight", "bias", "logit_scale", "softcap", "lora", "weight_grad_accumulator"])
def test_refuses_options_that_belong_to_the_head(name: str) -> None:
    with pytest.raises(TypeError, match=f"FusedLMHead: {name} is no option of a call"):
        FusedLMHead(_linear()).cross_entropy(HIDDEN, IDS, **{name: None})


def _freed() -> nn.Parameter:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.untyped_storage().resize_(0)
    return weight


def _partitioned(shape: tuple[int, ...], status: str) -> nn.Parameter:
    weight = nn.Parameter(torch.ones(shape))
    weight.ds_status = SimpleNamespace(name=status)
    return weight


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (lambda: [1.0], TypeError, "must be a torch.Tensor, got list"),
        (lambda: torch.ones(2, 3, 4), ValueError, r"must have shape \[V, H\], got \[2, 3, 4\]$"),
        (lambda: nn.Parameter(torch.empty(0)), ValueError, r"got \[0\], which is what ZeRO-3 and FSDP1.*FusedLMHead"),
        (lambda: nn.Parameter(torch.ones(6)), ValueError, r"got \[6\], which is what ZeRO-3 and FSDP1.*FusedLMHead"),
        (lambda: _partitioned((3, 2), "INFLIGHT"), ValueError, "is partitioned by ZeRO-3.*INFLIGHT.*FusedLMHead"),
        (_freed, ValueError, r"the memory of weight \[3, 2\] is freed.*FusedLMHead"),
    ],
)
def test_a_weight_that_is_not_there(weight: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"an_op: .*{message}"):
        check_weight("an_op", weight())


def test_a_weight_that_is_there() -> None:
    for weight in (
        torch.ones(3, 2),
        nn.Parameter(torch.ones(3, 2)),
        torch.empty(0, 2),
        torch.empty(3, 2, device="meta"),
    ):
        check_weight("an_op", weight)
    check_weight("an_op", _partitioned((3, 2), "AVAILABLE"))
