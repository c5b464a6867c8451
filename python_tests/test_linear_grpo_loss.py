"""linear_grpo_loss: one pass and two passes over the head against logits, log_softmax and the loss in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors, grpo_loss, linear_grpo_loss
from grpo_kernels.grpo_loss.metrics import NAMES
from grpo_kernels.linear_log_probs import chunks, grpo
from grpo_kernels.testing import assert_as_accurate
from python_tests.samples.grpo_loss import VARIANTS, batch, config_of, pack

pytestmark = pytest.mark.usefixtures("native_cpu")

LENGTHS = (9, 4, 1, 0, 7)
WIDTH, VOCAB, RANK, LORA_SCALE = 12, 37, 3, 0.7
PRESETS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "reinforce")
SCALARS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm")
EVERY = ("hidden", "weight", "bias", "a", "b")
NAN = math.nan
Problem = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside sequences."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, vocab, device_type: 5)


@contextmanager
def two_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "passes", lambda *_, **__: 2)
        yield


def log_probs_of(p: Problem, dtype: torch.dtype, temperature: Any = 1.0, scale: float = 1.0, softcap: Any = None):
    """What plain PyTorch makes of the leaves: log-probs and entropy; masked rows are cut out before."""
    live = (p["mask"] if p["mask"] is not None else torch.ones_like(p["ids"], dtype=torch.bool)) & (p["ids"] >= 0)
    x = p["hidden"][live].to(dtype)
    bias = None if p.get("bias") is None else p["bias"].to(dtype)
    z = F.linear(x, p["weight"].to(dtype), bias)
    if p.get("a") is not None:
        z = z + LORA_SCALE * F.linear(F.linear(x, p["a"].to(dtype)), p["b"].to(dtype))
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    per_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    z = z / (temperature[live][:, None].to(dtype) if per_row else temperature)
    every = torch.log_softmax(z, -1)
    chosen = every.gather(-1, p["ids"][live][:, None])[:, 0]
    zeros = torch.zeros(live.shape, dtype=dtype)
    return zeros.masked_scatter(live, chosen), zeros.masked_scatter(live, -(every.exp() * every).sum(-1)), live


def problem(variant: str = "ppo", *, packed: bool = False, seed: int = 0) -> tuple[Problem, dict[str, Any]]:
    """All inputs in float64, old and other log-probs around those of the head; and options of the call."""
    inputs = batch(variant, lengths=LENGTHS, seed=seed)
    options: dict[str, Any] = {}
    if packed:
        inputs, cu_seqlens = pack(inputs)
        options["cu_seqlens"] = cu_seqlens
        outside = (torch.arange(len(inputs["mask"])) < cu_seqlens[0]) | (
            torch.arange(len(inputs["mask"])) >= cu_seqlens[-1]
        )
        inputs["mask"] = inputs["mask"].masked_fill(outside, False)
    generator = torch.Generator().manual_seed(seed)
    shape = inputs["mask"].shape

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).double()

    p: Problem = {
        "hidden": normal(*shape, WIDTH), "weight": normal(VOCAB, WIDTH, scale=0.4), "bias": normal(VOCAB),
        "a": normal(RANK, WIDTH, scale=0.3), "b": normal(VOCAB, RANK, scale=0.3),
        "ids": torch.randint(VOCAB, shape, generator=generator),
    }  # fmt: skip
    shift = log_probs_of({**p, "mask": inputs["mask"]}, torch.float64)[0] - inputs["log_probs"].nan_to_num()
    for name in ("old_log_probs", "ref_log_probs", "sampler_log_probs"):
        if inputs[name] is not None:
            inputs[name] = (inputs[name] + shift).float().double()
    return {**{name: value for name, value in inputs.items() if name not in ("log_probs", "entropy")}, **p}, options


def cast(p: Problem, dtype: torch.dtype, *, half: torch.dtype | None = None) -> Problem:
    """Floating tensors in another dtype; hidden states and head in `half`."""

    def one(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        return value.to(half if half is not None and name in EVERY else dtype)

    return {name: one(name, value) for name, value in p.items()}


def leaves_of(p: Problem, trained: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: p[name].detach().clone().requires_grad_(name in trained) for name in EVERY if p[name] is not None}


def call(p: Problem, config: GRPOLossConfig, **options: Any) -> Any:
    """linear_grpo_loss on a problem."""
    lora = LoRAFactors(p["a"], p["b"], LORA_SCALE) if p.get("a") is not None else None
    return linear_grpo_loss(
        p["hidden"], p["weight"], p["ids"], p["old_log_probs"], p["advantages"], p["mask"], config, bias=p.get("bias"),
        lora=lora, ref_log_probs=p["ref_log_probs"], sampler_log_probs=p["sampler_log_probs"],
        token_weights=p["token_weights"], **options,
    )  # fmt: skip


def run(
    p: Problem, config: GRPOLossConfig, *, upstream: float = -1.7, trained: tuple[str, ...] = EVERY, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The output, and the gradients of all leaves."""
    leaves = leaves_of(p, trained)
    output = call({**p, **leaves}, config, **options)
    slope = torch.full_like(output.loss, upstream) * torch.linspace(1, 2, output.loss.numel()).view(output.loss.shape)
    wanted = [leaves[name] for name in trained]
    gradients = torch.autograd.grad(output.loss, wanted, slope.to(output.loss), materialize_grads=True)
    return output, dict(zip(trained, gradients, strict=True))


def definition(
    p: Problem, config: GRPOLossConfig, dtype: torch.dtype, *, upstream: float = -1.7, temperature: Any = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, **options: Any,
) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
    """The same from all logits, with plain PyTorch alone."""
    leaves = leaves_of(p, EVERY)
    log_probs, entropy, live = log_probs_of({**p, **leaves}, dtype, temperature, logit_scale, softcap)
    others = cast({name: p[name] for name in ("ref_log_probs", "sampler_log_probs", "token_weights")}, dtype)
    old = None if p["old_log_probs"] is None else p["old_log_probs"].to(dtype)
    with grpo_kernels.backend("reference"):
        output = grpo_loss(
            log_probs, old, p["advantages"].to(dtype), live, config, entropy=entropy, **others, **options
        )
    slope = torch.full_like(output.loss, upstream) * torch.linspace(1, 2, output.loss.numel()).view(output.loss.shape)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), slope.to(dtype), materialize_grads=True)
    return output._replace(log_probs=log_probs, entropy=entropy), dict(zip(leaves, gradients, strict=True))


def assert_close(actual: tuple[Any, dict[str, Tensor]], expected: tuple[Any, dict[str, Tensor]]) -> None:
    """In float64: roundings apart."""
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(actual[0], name), getattr(expected[0], name).detach(), **tolerance)
    values = zip(actual[0].metrics.values, expected[0].metrics.values, NAMES, strict=True)
    for value, other, name in values:
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], **tolerance)


# --- against the definition in float64 -------------------------------------------------------------------------------


def expected_passes(variant: str, reduction: str, packed: bool) -> int:
    """Written apart from the op: what must see more than a token's own log-prob."""
    fields = VARIANTS[variant]
    if reduction == "none" or "top_entropy_quantile" in fields:
        return 2
    whole = "off_policy_threshold" in fields or fields.get("ratio_level") == "sequence"
    return 2 if packed and (whole or fields.get("surrogate") == "vespo") else 1


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, packed: bool) -> None:
    for index, reduction in enumerate((*SCALARS, "none")):
        p, options = problem(variant, packed=packed, seed=index)
        config = config_of(variant, reduction)
        if reduction == "sequence_mean_token_sum_norm" and packed:
            options["max_length"] = 9
        if index % 2 and reduction != "none":
            options["num_items"] = torch.tensor(3.0) if index == 1 else 7
        expected = definition(p, config, torch.float64, **options)
        actual = run(p, config, **options)
        assert actual[0].metrics.passes == expected_passes(variant, reduction, packed)
        assert_close(actual, expected)
        with two_passes():
            again = run(p, config, **options)
        assert again[0].metrics.passes == 2
        assert_close(again, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_accurate_as_float32_allows(preset: str) -> None:
    config = GRPOLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.05)
    results: dict[str, list[tuple[Any, dict[str, Tensor]]]] = {"actual": [], "expected": [], "eager": []}
    for seed in range(12):
        p, options = problem(seed=seed, packed=seed % 4 == 2 and preset != "dr_grpo")
        p = cast(cast(p, torch.float32), torch.float64)
        results["expected"].append(definition(p, config, torch.float64, **options))
        results["eager"].append(definition(cast(p, torch.float32), config, torch.float32, **options))
        results["actual"].append(run(cast(p, torch.float32), config, **options))
    judge(**results)


def judge(actual: list[Any], expected: list[Any], eager: list[Any]) -> None:
    def joined(results: list[Any], name: str) -> Tensor:
        values = [getattr(r[0], name) if name in r[0]._fields else r[1][name] for r in results]
        return torch.cat([value.detach().flatten() for value in values])

    for name in ("loss", "log_probs", "entropy", *EVERY):
        a, e, plain = (joined(results, name) for results in (actual, expected, eager))
        assert_as_accurate(a, e.double(), plain, name=name)


@pytest.mark.parametrize("variant", ["ppo", "gspo", "everything"])
def test_bfloat16(variant: str) -> None:
    """Log-probs as from float32; gradients are rounded to bfloat16 once, twice with an upstream that is no power of
    two."""
    config = config_of(variant, "sequence_mean_token_mean")
    p, _ = problem(variant)
    p = cast(p, torch.float32, half=torch.bfloat16)
    wide = cast(p, torch.float64)
    actual = run(p, config)
    assert actual[0].loss.dtype == actual[0].log_probs.dtype == torch.float32
    assert {gradient.dtype for gradient in actual[1].values()} == {torch.bfloat16}
    judge(
        [actual], [definition(wide, config, torch.float64)], [definition(cast(p, torch.float32), config, torch.float32)]
    )


# --- options, and what the loss may not depend on --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": "per_row"}, {"logit_scale": -1.3, "temperature": torch.tensor(1.4)},
     {"softcap": 2.0, "logit_scale": 0.6}],
    ids=["temperature", "per_row", "scale", "softcap"],
)  # fmt: skip
def test_options_of_the_head(options: dict[str, Any]) -> None:
    for variant in ("entropy_bonus", "gspo"):
        p, _ = problem(variant)
        if options.get("temperature") == "per_row":
            options = {"temperature": torch.rand(p["ids"].shape).double() + 0.5}
        config = config_of(variant, "token_mean")
        actual = run(p, config, **options)
        assert actual[0].metrics.passes == 1
        assert_close(actual, definition(p, config, torch.float64, **options))


@pytest.mark.parametrize("absent", [("bias",), ("a", "b"), ("bias", "a", "b")], ids=["bias", "lora", "both"])
def test_a_head_without(absent: tuple[str, ...]) -> None:
    p, _ = problem()
    p = {**p, **dict.fromkeys(absent)}
    config = config_of("kl_k3", "token_mean")
    trained = tuple(name for name in EVERY if name not in absent)
    assert_close(run(p, config, trained=trained), definition(p, config, torch.float64))


def test_device_coefficients_equal_numbers() -> None:
    p, _ = problem("kl_k3")
    expected = run(p, GRPOLossConfig(), kl_coef=0.3, entropy_coef=0.2, num_items=11.0)
    numbers = {"kl_coef": 0.3, "entropy_coef": 0.2, "num_items": 11.0}
    actual = run(p, GRPOLossConfig(), **{name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})
    assert_close(actual, expected)


@pytest.mark.parametrize("variant", ["ppo", "gspo", "everything", "sequence_mask"])
def test_masked_rows_may_hold_anything(variant: str) -> None:
    for packed in (False, True):
        p, options = problem(variant, packed=packed)
        p["ids"][p["mask"].nonzero()[:2].unbind(1)] = -100  # a negative id masks as well
        dead = ~(p["mask"] & (p["ids"] >= 0))
        config = config_of(variant, "sequence_mean_token_mean")
        dirty: Problem = dict(p)
        for name, value in p.items():
            if value is not None and value.is_floating_point() and value.shape[: dead.ndim] == dead.shape:
                spoiled = value.clone()
                spoiled[dead] = NAN
                dirty[name] = spoiled
        dirty["ids"] = p["ids"].masked_fill(~p["mask"], 10**6)
        actual, clean = run(dirty, config, **options), run(p, config, **options)
        assert_close(actual, definition(p, config, torch.float64, **options))
        for gradient, other in zip(actual[1].values(), clean[1].values(), strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=0)
        assert not actual[1]["hidden"][dead].any()
        assert not actual[0].log_probs[dead].any()


@pytest.mark.parametrize("size", [2, 3, 7, 13, 1000])
def test_chunks_may_end_anywhere(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, vocab, device_type: size)
    for variant in ("ppo", "gspo"):
        for mask in (False, True):
            p, _ = problem(variant)
            p["mask"] = p["mask"] if mask else None
            config = config_of(variant, "sequence_mean_token_mean")
            assert_close(run(p, config), definition(p, config, torch.float64))


def test_a_sequence_longer_than_any_chunk_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "most_rows", lambda vocab, device_type: 8)
    for variant, passes in (("gspo", 2), ("vespo", 2), ("off_policy", 2), ("ppo", 1), ("sequence_mask", 1)):
        p, _ = problem(variant)
        config = config_of(variant, "token_mean")
        actual = run(p, config)
        assert actual[0].metrics.passes == passes
        assert actual[0].metrics.to_dict()["head_passes"] == passes
        assert_close(actual, definition(p, config, torch.float64))


def test_on_policy_with_a_correction_of_sequences() -> None:
    p, options = problem("sequence_truncate", packed=True)
    config = config_of("sequence_truncate", "token_mean")
    p["old_log_probs"] = None
    actual = run(p, config, **options)
    assert actual[0].metrics.passes == 2
    assert_close(actual, definition(p, config, torch.float64, **options))


def test_rows_without_a_derivative_take_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p, _ = problem()
    p["advantages"][:] = 0
    p["advantages"][0] = 1.0
    config = config_of("ppo_on_policy", "token_mean")
    p["old_log_probs"] = None
    rows: list[int] = []
    add = chunks.Sums.add
    monkeypatch.setattr(chunks.Sums, "add", lambda self, r, x, *rest: (rows.append(len(x)), add(self, r, x, *rest))[1])
    assert_close(run(p, config), definition(p, config, torch.float64))
    assert sum(rows) == p["mask"][0].sum()


def test_empty_and_all_masked() -> None:
    p, _ = problem("everything")
    p["mask"] = torch.zeros_like(p["mask"])
    empty = {
        name: value[:0] if value is not None and value.shape[:1] == p["mask"].shape[:1] else value
        for name, value in p.items()
    }
    for case in (p, empty):
        for variant in ("ppo", "everything"):
            output, gradients = run(case, config_of(variant, "sequence_mean_token_mean"))
            assert output.loss == 0
            assert not any(gradient.any() for gradient in gradients.values())
            assert output.log_probs.shape == case["mask"].shape


# --- gradients -------------------------------------------------------------------------------------------------------


def test_value_and_metrics_are_those_of_the_loss_bit_for_bit() -> None:
    for variant in ("kl_k3", "gspo", "sequence_mask"):
        p = cast(problem(variant)[0], torch.float32)
        config = config_of(variant, "token_mean")
        output = run(p, config)[0]
        expected = grpo_loss(
            output.log_probs, p["old_log_probs"], p["advantages"], p["mask"], config, entropy=output.entropy,
            **{name: p[name] for name in ("ref_log_probs", "sampler_log_probs", "token_weights")},
        )  # fmt: skip
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.metrics.values, expected.metrics.values)
        assert not output.log_probs.requires_grad
        assert not output.entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice(dtype: torch.dtype) -> None:
    p = cast(problem()[0], torch.float32, half=dtype)
    leaves = leaves_of(p, EVERY)
    loss = call({**p, **leaves}, config_of("entropy_bonus", "token_mean")).loss
    wanted = list(leaves.values())
    upstream = torch.tensor(-0.3)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    third = torch.autograd.grad(loss * 2 - loss, wanted, upstream)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
        assert a.data_ptr() != b.data_ptr()


def test_a_parameter_that_changes_before_the_backward_raises() -> None:
    p, _ = problem()
    for name in ("weight", "hidden", "old_log_probs"):
        leaves = leaves_of(p, EVERY)
        inputs = {**p, **leaves, "old_log_probs": p["old_log_probs"].clone()}
        loss = call(inputs, GRPOLossConfig()).loss
        with torch.no_grad():
            inputs[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("a",), ("b",), ("a", "b"), ("hidden", "a", "b")]
)
def test_only_what_needs_a_gradient_gets_one(trained: tuple[str, ...]) -> None:
    p, _ = problem("entropy_bonus")
    config = config_of("entropy_bonus", "token_mean")
    actual = run(p, config, trained=trained)
    assert actual[0].metrics.passes == 1
    assert_close(actual, definition(p, config, torch.float64))


def test_without_gradient_only_the_value_is_computed() -> None:
    p, _ = problem()
    config = config_of("gspo", "token_mean")
    expected = run(p, config)[0]
    with torch.no_grad():
        found = call({**p, **leaves_of(p, EVERY)}, config)
    for output in (found, call(p, config)):
        assert not output.loss.requires_grad
        assert output.metrics.passes == 1
        torch.testing.assert_close(output.loss, expected.loss.detach())


def test_the_gradient_is_given_away_and_not_copied() -> None:
    p = cast(problem()[0], torch.float32)
    leaves = leaves_of(p, EVERY)
    loss = call({**p, **leaves}, GRPOLossConfig()).loss
    held = loss.grad_fn.gradients
    addresses = {name: gradient.data_ptr() for name, gradient in zip(EVERY, held, strict=True)}
    del held
    (loss * 3.0).backward()
    assert {name: leaf.grad.data_ptr() for name, leaf in leaves.items()} == addresses


@pytest.mark.parametrize("variant", ["ppo", "entropy_mask"])
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_weight_grad_accumulator(variant: str, half: torch.dtype) -> None:
    p = cast(problem(variant)[0], torch.float32, half=half)
    config = config_of(variant, "token_mean")
    expected = run(cast(p, torch.float32), config, upstream=1.0)[1]["weight"]
    leaves = leaves_of(p, EVERY)
    accumulator = torch.full((VOCAB, WIDTH), 0.5)
    loss = call({**p, **leaves}, config, weight_grad_accumulator=accumulator).loss
    assert torch.equal(accumulator, torch.full((VOCAB, WIDTH), 0.5))
    for step in (1, 2):
        (loss * -3).backward(retain_graph=True)
        torch.testing.assert_close(accumulator, 0.5 - 3 * step * expected, rtol=1e-5, atol=1e-6)
    assert leaves["weight"].grad is None
    assert leaves["hidden"].grad is not None


def test_float16_takes_two_passes() -> None:
    p = cast(problem()[0], torch.float32, half=torch.float16)
    config = config_of("ppo", "token_mean")
    actual = run(p, config)
    assert actual[0].metrics.passes == 2
    judge([actual], [definition(cast(p, torch.float64), config, torch.float64)],
          [definition(cast(p, torch.float32), config, torch.float32)])  # fmt: skip


def test_autocast_casts_the_products_and_keeps_the_parameters() -> None:
    p = cast(problem()[0], torch.float32)
    config = config_of("ppo", "token_mean")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(p, config)
    expected = run(cast(cast(p, torch.float32, half=torch.bfloat16), torch.float32), config)
    assert actual[0].metrics.passes == 1
    for name, gradient in actual[1].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6)


def test_backends() -> None:
    p, _ = problem()
    config = config_of("kl_k3", "token_mean")
    expected = definition(p, config, torch.float64)
    with grpo_kernels.backend("reference"):
        actual = run(p, config)
    assert actual[0].metrics.passes == 2
    assert_close(actual, expected)
    with grpo_kernels.backend("native"):
        assert_close(run(p, config), expected)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["kl_k3", "gspo"])
def test_compiled_calls_do_not_recompile(variant: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = config_of(variant, "token_mean")
    p = cast(problem(variant)[0], torch.float32)
    weight, bias = p["weight"].requires_grad_(), p["bias"].requires_grad_()

    def loss(hidden, ids, old, ref, advantages, kl_coef, temperature):
        return linear_grpo_loss(
            hidden, weight, ids, old, advantages, None, config, bias=bias, ref_log_probs=ref, kl_coef=kl_coef,
            entropy_coef=kl_coef * 0.5, temperature=temperature,
        ).loss * 0.5  # fmt: skip

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for step in range(2, 8):
        shape = (step, 2 * step)
        hidden = torch.randn(*shape, WIDTH, requires_grad=True)
        ids, old, ref = torch.randint(VOCAB, shape), -torch.rand(shape) - 3, -torch.rand(shape) - 3
        arguments = (hidden, ids, old, ref, torch.randn(step), 0.01 * step, 0.5 + 0.1 * step)
        actual, expected = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2
