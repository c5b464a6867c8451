"""verify_draft: its noise, its kernel against the definition, and what holds for every input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import VerifyDraftOutput, verify_draft
from grpo_kernels.speculative_sampling import noise_reference
from grpo_kernels.testing import assert_as_accurate
from grpo_kernels.testing.verification import Case, speculative_sampling

INF, NAN = float("inf"), float("nan")
MODES = ["token", "block", "greedy"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("native_cpu")


def _by_definition(*args: Any, **options: Any) -> VerifyDraftOutput:
    with grpo_kernels.backend("reference"):
        return verify_draft(*args, **options)


def _problem(
    batch: int, drafts: int, vocab: int, dtype: torch.dtype, far: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Target logits, draft ids drawn from the draft, draft logits."""
    target = (torch.randn(batch, drafts + 1, vocab) * 2).to(dtype)
    draft = (target[:, :drafts] + torch.randn(batch, drafts, vocab) * far).to(dtype)
    ids = torch.zeros(batch, drafts, dtype=torch.int64)
    if drafts and batch:
        ids = torch.multinomial(draft.double().softmax(-1).flatten(0, 1), 1).view(batch, drafts)
    return target, ids, draft


def _assert_equal(a: VerifyDraftOutput, b: VerifyDraftOutput) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: Any, key: Any, expected: Any) -> None:
    """Those of Random123, the library of the generator's authors."""
    words = noise_reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_spread_as_it_should_be() -> None:
    seeds, places = torch.arange(1000) * 12345 - 400000, torch.arange(1000)
    uniform = noise_reference.uniforms(seeds, places, 20, torch.float64)
    assert 0.0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1.0
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 20000) ** 0.5
    times = noise_reference.exponentials(seeds, places, 403, torch.float64)
    assert times.min() > 0.0
    assert times.max() <= 24 * torch.tensor(2.0).log()
    assert abs(times.mean() - 1.0) < 4 * (1 / times.numel()) ** 0.5
    assert abs(times.square().mean() - 2.0) < 4 * (20 / times.numel()) ** 0.5
    assert torch.unique(times).numel() > times.numel() - 50  # of 403000 draws of 32 bits 19 are expected to be others


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_kernel_uses_that_noise(backend: str) -> None:
    """The race: of equal weights the shortest time wins. Acceptance: p = u is rejected, p just above is not."""
    seeds, offsets = torch.randint(-(2**62), 2**62, (64,)), torch.randint(2**40, (64,))
    with grpo_kernels.backend(backend):
        drawn = verify_draft(torch.zeros(64, 1, 4099), torch.empty(64, 0).long(), seeds=seeds, offsets=offsets)
        times = noise_reference.exponentials(seeds, offsets, 4099, torch.float64)
        assert torch.equal(drawn.token_ids[:, 0], times.argmin(1))
        uniform = noise_reference.uniforms(seeds, offsets, 2, torch.float64)[:, 1]
        for factor, accepted in ((1 - 1e-9, 1), (1 + 1e-9, 2)):
            share = uniform * factor
            odds = torch.stack([share, 1 - share], -1).log()[:, None]  # of the second draft
            certain = torch.tensor([0.0, -INF], dtype=torch.float64).expand(64, 1, 2)
            target = torch.cat([certain, odds, certain], 1)
            out = verify_draft(target, torch.zeros(64, 2).long(), seeds=seeds, offsets=offsets)
            assert out.num_accepted.tolist() == [accepted] * 64


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_token_of_hardly_any_weight_may_win(backend: str) -> None:
    """With this seed the time of token 2048 is 2.4e-9, that of token 0 is 0.18: their ratio is 1.33e-8."""
    for weight, winner in ((1.2e-8, 0), (1.5e-8, 2048)):
        logits = torch.full((1, 1, 2049), -INF)
        logits[0, 0, 0], logits[0, 0, 2048] = 0.0, math.log(weight)
        with grpo_kernels.backend(backend):
            out = verify_draft(logits, torch.empty(1, 0).long(), seeds=torch.tensor([652419467]))
        assert out.token_ids.item() == winner


def test_noise_belongs_to_a_row_s_place_alone() -> None:
    """Neither the order of the rows, nor their number, nor K changes a token."""
    target, ids, draft = _problem(40, 4, 101, torch.float32)
    seeds, offsets = torch.arange(40) * 7919, torch.arange(40) * 3
    out = verify_draft(target, ids, draft_logits=draft, seeds=seeds, offsets=offsets)
    order = torch.randperm(40)[:23]
    again = verify_draft(
        target[order], ids[order], draft_logits=draft[order], seeds=seeds[order], offsets=offsets[order]
    )
    _assert_equal(again, VerifyDraftOutput(*(value[order] for value in out)))
    lengths = torch.full((40,), 4)
    wider = verify_draft(
        torch.cat([target, target[:, :2]], 1), torch.cat([ids, ids[:, :2]], 1),
        draft_logits=torch.cat([draft, draft[:, :2]], 1), draft_lengths=lengths, seeds=seeds, offsets=offsets,
    )  # fmt: skip
    assert torch.equal(wider.token_ids[:, :5], out.token_ids)
    assert (wider.token_ids[:, 5:] == -1).all()
    one = verify_draft(target[:, :1], ids[:, :0], seeds=seeds, offsets=offsets)
    other = verify_draft(target[:, :1], ids[:, :0], seeds=seeds, offsets=offsets + 1)
    assert (one.token_ids != other.token_ids).any()
    assert (out.num_accepted < 4).any()


def test_seeds_come_from_torch_s_generator() -> None:
    logits, none = torch.zeros(500, 1, 1000), torch.empty(500, 0).long()
    torch.manual_seed(5)
    first, second = verify_draft(logits, none), verify_draft(logits, none)
    torch.manual_seed(5)
    _assert_equal(verify_draft(logits, none), first)
    assert (first.token_ids == second.token_ids).sum() < 20
    assert torch.unique(first.token_ids).numel() > 300


# --- the kernel against the definition ------------------------------------------------------------------------------


def _options(trial: int, batch: int, drafts: int, vocab: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "seeds": torch.randint(-(2**62), 2**62, (batch,)),
        "offsets": torch.randint(2**40, (batch,)),
        "draft_lengths": torch.randint(drafts + 1, (batch,)),
        "temperature": torch.rand(batch, dtype=torch.float64) * 1.5 + 0.2,
    }
    if trial % 3 == 1:
        options["top_k"] = torch.randint(-1, vocab + 2, (batch,))
    if trial % 4 >= 2:
        options["top_p"] = torch.rand(batch, dtype=torch.float64) * 0.99 + 0.01
    return options


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_emits_what_the_definition_emits(mode: str, dtype: torch.dtype) -> None:
    """In float64, wherever a change of the temperature by some roundings changes nothing."""
    compared = near = 0
    for trial, vocab in enumerate([1, 2, 3, 5, 17, 64, 300, 2048, 2049, 4099] * 2):
        batch, drafts = 40, trial % 5
        target, ids, draft = _problem(batch, drafts, vocab, dtype, far=float(trial % 3))
        if trial % 5 == 0:
            target, draft = target.round(), draft.round()
        if trial % 7 == 0 and vocab > 2:
            target[..., ::2] = -INF
        options = _options(trial, batch, drafts, vocab)
        drafted = {"draft_logits": draft} if trial % 2 else {}
        found = verify_draft(target, ids, mode=mode, **drafted, **options)
        exact = {name: logits.double() for name, logits in drafted.items()}
        temperature = options.pop("temperature")
        low, high = (
            _by_definition(target.double(), ids, mode=mode, **exact, **options, temperature=temperature * factor)
            for factor in (1 - 1e-6, 1 + 1e-6)
        )
        sure = (low.token_ids == high.token_ids).all(1)
        for a, b in ((found.token_ids, low.token_ids), (found.num_accepted, low.num_accepted)):
            assert torch.equal(a[sure], b[sure]), (trial, vocab)
        near, compared = near + int((~sure).sum()), compared + int(sure.sum())
    assert near < compared / 200


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_are_those_of_the_emitted_tokens(mode: str, dtype: torch.dtype) -> None:
    """What token_log_probs gives at the temperature, filters or not; 0 behind the end."""
    target, ids, draft = _problem(50, 3, 5003, dtype, far=0.3)
    temperature = torch.rand(50, dtype=torch.float64) + 0.5
    out = verify_draft(target, ids, draft_logits=draft, temperature=temperature, top_k=60, top_p=0.9, mode=mode)
    emitted = out.token_ids >= 0
    assert torch.equal(emitted, torch.arange(4) <= out.num_accepted[:, None])
    assert (out.log_probs[~emitted] == 0.0).all()
    place = out.token_ids.clamp(min=0)[..., None]
    numbers = temperature.float().double() if dtype != torch.float64 else temperature
    exact = (target.double() / numbers[:, None, None]).log_softmax(-1).gather(-1, place).squeeze(-1)[emitted]
    eager = (target.float() / numbers.float()[:, None, None]).log_softmax(-1).gather(-1, place).squeeze(-1)[emitted]
    assert_as_accurate(out.log_probs[emitted], exact, eager)
    with grpo_kernels.backend("native"):
        other = grpo_kernels.token_log_probs(target, out.token_ids, temperature=numbers[:, None].expand(50, 4))
    assert_as_accurate(other.log_probs[emitted], exact, eager)


@pytest.mark.parametrize("mode", MODES)
def test_threads_and_repetition_change_no_bit(mode: str) -> None:
    target, ids, draft = _problem(12, 3, 20011, torch.float32)
    options: dict[str, Any] = {"draft_logits": draft, "seeds": torch.arange(12), "top_p": 0.9, "mode": mode}
    out = verify_draft(target, ids, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            _assert_equal(verify_draft(target, ids, **options), out)
    finally:
        torch.set_num_threads(threads)


def test_rows_are_read_where_they_lie() -> None:
    """Strides of the batch and the positions, 0 included; a vocabulary that is not dense is copied."""
    target, ids, draft = _problem(6, 2, 333, torch.bfloat16)
    options: dict[str, Any] = {"seeds": torch.arange(6)}
    for view in (
        target.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.functional.pad(target, (3, 5))[..., 3:-5],
        target.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert not view.is_contiguous()
        _assert_equal(verify_draft(view, ids, **options), verify_draft(target, ids, **options))
    shared = target[:1, :1].expand(6, 3, 333)
    draft = draft[:1, :1].expand(6, 2, 333)
    _assert_equal(
        verify_draft(shared, ids, draft_logits=draft, **options),
        verify_draft(shared.contiguous(), ids, draft_logits=draft.contiguous(), **options),
    )


def test_a_huge_vocabulary() -> None:
    vocab = 1_000_003
    target, ids, draft = _problem(2, 1, vocab, torch.float32, far=2.0)
    options: dict[str, Any] = {"draft_logits": draft, "seeds": torch.tensor([3, 4]), "top_k": 300_000, "top_p": 0.99}
    out, expected = verify_draft(target, ids, **options), _by_definition(target, ids, **options)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert out.token_ids[:, 0].min() >= 0


@pytest.mark.parametrize("case", speculative_sampling.CASES, ids=lambda case: case.name)
def test_no_case_of_the_verification_stands_on_an_edge(case: Case) -> None:
    """Else the rounding of a machine would decide what `grpo-kernels verify` says of it."""
    for dtype in set(case.dtypes) - {torch.float64}:
        found = []
        for factor in (1 - 2e-6, 1 + 2e-6):
            inputs = case.make(torch.Generator().manual_seed(0))
            rows = len(inputs["draft_ids"])
            inputs = {name: v.to(dtype).double() if v.is_floating_point() else v for name, v in inputs.items()}
            inputs["temperature"] = inputs.get("temperature", torch.ones(rows, dtype=torch.float64)) * factor
            with grpo_kernels.backend("reference"):
                found.append(case.run(inputs)["token_ids"])
        assert torch.equal(*found)
