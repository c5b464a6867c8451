"""mtp_linear_cross_entropy with a policy: depth 0 carries the GRPO loss, the others cross-entropy, in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, PolicyTerms, grpo_loss, linear_grpo_loss, mtp_linear_cross_entropy
from grpo_kernels.linear_log_probs import chunks, losses, ops_one_pass
from grpo_kernels.multi_token_prediction import loss
from python_tests.mtp_problems import LAYOUTS, VOCAB, Layout, Leaves, assert_close, definition, problem, run, tokens
from python_tests.samples.grpo_loss import VARIANTS, config_of
from python_tests.test_multi_token_prediction_loss import judge

pytestmark = pytest.mark.usefixtures("native_cpu")

CHOSEN = (
    "ppo", "ppo_on_policy", "ppo_token_advantages", "gspo", "cispo_cap", "sapo", "vespo", "kl_weighted_sequence",
    "sequence_mask", "off_policy", "entropy_mask", "entropy_bonus", "weights_per_sequence", "everything",
)  # fmt: skip
PRESETS = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "gspo")


@pytest.fixture(params=["one_pass", "within", "two_passes", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "one_pass":
        monkeypatch.setattr(chunks, "fits", lambda *_: False)
        monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 5)
    if request.param == "two_passes":
        monkeypatch.setattr(loss, "may_form_gradients", lambda options: False)
    with grpo_kernels.backend("reference" if request.param == "reference" else "native"):
        yield request.param


def terms(variant: str, leaves: Leaves, ids: Tensor, layout: Layout, **options: Any) -> PolicyTerms:
    """Log-probs around those of depth 0."""
    fields = VARIANTS[variant]
    log_probs = definition(leaves, ids, layout, torch.float64, shift=0, **options)[0].log_probs
    shape = layout.leading
    batch = len(layout.documents) if len(shape) == 1 else shape[0]

    def near(value: Tensor, scale: float) -> Tensor:
        return (value + torch.randn(shape) * scale).float().double()

    old = near(log_probs, 0.3)
    weights = torch.rand((batch, 1) if fields.get("_token_weights") == "sequence" else shape).double() + 0.5
    return PolicyTerms(
        None if "_old_log_probs" in fields else old,
        torch.randn(shape if fields.get("_token_advantages") else (batch,)).double(),
        config_of(variant, "sequence_mean_token_mean"),
        near(log_probs, 0.4),
        None if "_sampler_log_probs" in fields else near(old, 0.15),
        weights if fields.get("_token_weights") else None,
    )


def takes_one_pass(variant: str, packed: bool) -> bool:
    fields = VARIANTS[variant]
    whole = "off_policy_threshold" in fields or fields.get("ratio_level") == "sequence"
    return "top_entropy_quantile" not in fields and not (packed and (whole or fields.get("surrogate") == "vespo"))


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "packed", "left_padding"])
@pytest.mark.parametrize("variant", CHOSEN)
def test_every_kind_of_loss(variant: str, name: str, way: str) -> None:
    layout = LAYOUTS[name]
    leaves, ids = problem(layout, 3), tokens(layout)
    mask = torch.rand(layout.leading) < 0.8
    policy = terms(variant, leaves, ids, layout, mask=mask)
    options = {"mask": mask, "policy": policy, "shift": 0, "depth_weights": (0.7, 0.3, -0.2), "z_loss": 0.1}
    expected = definition(leaves, ids, layout, torch.float64, **options)
    actual = run(leaves, ids, **options, **layout.options)
    assert_close(actual, expected)
    torch.testing.assert_close(actual[0].entropy, torch.where(mask, expected[0].entropy, 0), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(actual[0].metrics.values, expected[0].metrics.values, equal_nan=True)
    one = way in ("one_pass", "within") and takes_one_pass(variant, name == "packed")
    assert actual[0].metrics.passes == (1 if one else 2)


@pytest.mark.parametrize("depths", [1, 2, 4])
def test_options(depths: int, way: str) -> None:
    layout = LAYOUTS["left_padding"]
    leaves, ids = problem(layout, depths), tokens(layout)
    head = {"temperature": torch.rand(layout.leading) + 0.5, "logit_scale": 0.6, "softcap": 2.0, "ignore_index": 5}
    policy = terms("ppo", leaves, ids, layout, **head)._replace(
        config=GRPOLossConfig(), kl_coef=0.2, entropy_coef=torch.tensor(0.1), num_items=torch.tensor(9.0)
    )
    for options in ({"normalizer": "tokens"}, {"num_items": 13, "z_loss": 0.1}, {"detach_head": True}):
        options = {**options, **head, "policy": policy, "shift": 0}
        expected = definition(leaves, ids, layout, torch.float64, **options)
        assert_close(run(leaves, ids, **options, **layout.options), expected)


@pytest.mark.parametrize("size", [1, 4, 6, 10, 21, 22, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["entropy_bonus", "gspo"])
def test_chunks_of_both_kinds_of_rows(variant: str, masked: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end before, at and behind the last row of depth 0; those of sequences hold whole ones of 7 tokens."""
    monkeypatch.setattr(chunks, "fits", lambda *_: False)
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: size)
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 3), torch.randint(VOCAB, layout.leading)
    mask = torch.rand(layout.leading) < (0.7 if masked else 1.1)
    policy = terms(variant, leaves, ids, layout, mask=mask)
    options = {"mask": mask, "policy": policy, "shift": 0, "z_loss": 0.1}
    assert_close(run(leaves, ids, **options), definition(leaves, ids, layout, torch.float64, **options))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_accurate_as_float32_allows(preset: str) -> None:
    layout, results = LAYOUTS["batch"], []
    for _ in range(16):
        leaves, ids = problem(layout, 2, scale=0.5), tokens(layout)
        policy = terms("ppo", leaves, ids, layout)
        policy = policy._replace(config=GRPOLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.05))
        options = {"policy": policy, "shift": 0}
        eager, exact = (definition(leaves, ids, layout, dtype, **options) for dtype in (torch.float32, torch.float64))
        narrow = {name: leaf.float() for name, leaf in leaves.items()}
        results.append((run(narrow, ids, **options), exact, eager))
    judge(results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = {name: leaf.to(dtype) for name, leaf in problem(layout, 3).items()}, tokens(layout)
    options = {"policy": terms("kl_k3", leaves, ids, layout), "shift": 0}
    actual = run(leaves, ids, **options)
    assert actual[0].metrics.passes == (1 if dtype == torch.bfloat16 else 2)
    eager, exact = (definition(leaves, ids, layout, wide, **options) for wide in (torch.float32, torch.float64))
    judge([(actual, exact, eager)])


# --- against the policy's own ops ------------------------------------------------------------------------------------


def _policy_alone(leaves: Leaves, ids: Tensor, policy: PolicyTerms) -> tuple[Any, list[Tensor]]:
    taken = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    output = linear_grpo_loss(
        taken["hiddens"][0], taken["weight"], ids, policy.old_log_probs, policy.advantages, None, policy.config,
        bias=taken["bias"], ref_log_probs=policy.ref_log_probs, sampler_log_probs=policy.sampler_log_probs,
    )  # fmt: skip
    return output, list(torch.autograd.grad(output.loss, list(taken.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["kl_k3", "gspo", "entropy_bonus"])
def test_depth_0_alone_is_linear_grpo_loss_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 1, names=("hiddens", "weight", "bias")), tokens(layout)
    policy = terms(variant, leaves, ids, layout)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    expected, gradients = _policy_alone(leaves, ids, policy)
    actual, found = run(leaves, ids, trained=tuple(leaves), upstream=1.0, policy=policy, shift=0)
    for a, b in (
        (actual.loss, expected.loss), (actual.log_probs, expected.log_probs), (actual.entropy, expected.entropy),
        (actual.metrics.values, expected.metrics.values),
    ):  # fmt: skip
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    for a, b in zip(found.values(), gradients, strict=True):
        assert torch.equal(a, b)


def test_depth_0_among_others_is_linear_grpo_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where the products have the same rows: here chunks are one sequence each."""
    monkeypatch.setattr(chunks, "fits", lambda *_: False)
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 7)
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 3, names=("hiddens", "weight", "bias")), torch.randint(VOCAB, layout.leading)
    policy = terms("gspo", leaves, ids, layout)
    leaves = {name: leaf.float() for name, leaf in leaves.items()}
    expected, (grad_hidden, *_) = _policy_alone({**leaves, "hiddens": leaves["hiddens"][:1]}, ids, policy)
    actual, found = run(leaves, ids, trained=tuple(leaves), upstream=1.0, policy=policy, shift=0)
    assert torch.equal(actual.depth_losses[0], expected.loss)
    assert torch.equal(actual.log_probs, expected.log_probs)
    assert torch.equal(actual.entropy, expected.entropy)
    assert torch.equal(actual.metrics.values.nan_to_num(), expected.metrics.values.nan_to_num())
    assert torch.equal(found["hiddens"][0], grad_hidden[0])


@pytest.mark.parametrize("variant", ["kl_k3", "gspo", "sequence_mask"])
def test_the_loss_is_that_of_the_log_probs(variant: str) -> None:
    layout = LAYOUTS["packed"]
    leaves, ids = problem(layout, 3, names=("hiddens", "weight")), tokens(layout)
    policy = terms(variant, leaves, ids, layout)
    output = mtp_linear_cross_entropy(
        leaves["hiddens"].float(), leaves["weight"].float(), ids, policy=policy, shift=0, **layout.options
    )
    mask = torch.zeros(layout.leading, dtype=torch.bool)
    mask[2:21] = True
    expected = grpo_loss(
        output.log_probs, policy.old_log_probs, policy.advantages, mask & (ids >= 0), policy.config,
        ref_log_probs=policy.ref_log_probs, sampler_log_probs=policy.sampler_log_probs, entropy=output.entropy,
        **layout.options,
    )  # fmt: skip
    assert torch.equal(output.depth_losses[0], expected.loss)
    assert torch.equal(output.metrics.values.nan_to_num(), expected.metrics.values.nan_to_num())


# --- edge cases ------------------------------------------------------------------------------------------------------


def test_nothing_counts(way: str) -> None:
    for layout in (LAYOUTS["batch"], LAYOUTS["no_length"], Layout((0, 4), [], {})):
        leaves, ids = problem(layout, 3), tokens(layout)
        leaves["hiddens"].fill_(float("nan"))
        policy = PolicyTerms(torch.zeros(layout.leading), torch.zeros(layout.leading[0]))
        output, grads = run(leaves, ids, policy=policy, shift=0, mask=torch.zeros(layout.leading), z_loss=0.1)
        for value in (output.loss, *output[1:7], *grads.values()):
            assert not value.any()
            assert not value.isnan().any()


def test_rows_behind_the_tokens_take_no_share_in_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the entropy's slope on every row, as if all were of the policy."""
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 2), tokens(layout)
    policy = terms("entropy_bonus", leaves, ids, layout)
    expected = definition(leaves, ids, layout, torch.float64, policy=policy, shift=0)
    assert_close(run(leaves, ids, policy=policy, shift=0), expected)
    joined = losses.joined
    monkeypatch.setattr(
        losses,
        "joined",
        lambda a, b: joined(a, b._replace(entropy=torch.full_like(b.log_probs, a.entropy.amin().item()))),
    )
    with pytest.raises(AssertionError):
        assert_close(run(leaves, ids, policy=policy, shift=0), expected)


def test_the_policys_loss_needs_no_second_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of one op serves all depths."""
    calls = []
    op = ops_one_pass.linear_grpo_loss
    monkeypatch.setattr(ops_one_pass, "linear_grpo_loss", lambda *given: (calls.append(given[0].shape), op(*given))[1])
    layout = LAYOUTS["batch"]
    leaves, ids = problem(layout, 3), tokens(layout)
    run(leaves, ids, policy=terms("ppo", leaves, ids, layout), shift=0)
    assert calls == [(63, leaves["weight"].shape[1])]
