"""The Triton kernels of verify_draft, run by Triton's interpreter on CPU tensors, against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import grpo_kernels
from grpo_kernels import verify_draft
from grpo_kernels.speculative_sampling import _config_triton, noise_reference
from grpo_kernels.speculative_sampling._tiles_triton import exponentials, random_words, uniform
from grpo_kernels.testing import assert_as_accurate, guard_input, guarded_allocations, poisoned_allocations
from python_tests.gpu.devices import assert_identical, inputs_of, run
from python_tests.interpreter.quick import replaced_once
from python_tests.samples import speculative_sampling as samples

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("replaced_once"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
__all__ = ["replaced_once"]

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_config_triton, "_WARPS", 6)  # long parts of the race: here a program costs more than a GPU's
    with grpo_kernels.backend("triton"), poisoned_allocations():
        yield


class Problem(NamedTuple):
    """Sequences with drafts of lengths K, ..., and what they are verified with."""

    mode: str
    dtype: torch.dtype
    vocab: int
    batch: int = 2
    drafts: int = 2
    certain: bool = False  # no draft logits
    options: tuple[str, ...] = ()

    def make(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        target = (torch.randn(self.batch, self.drafts + 1, self.vocab) * 2).to(self.dtype)
        draft = (target[:, : self.drafts].float() + torch.randn(self.batch, self.drafts, self.vocab)).to(self.dtype)
        ids = drawn(draft) if self.drafts else torch.zeros(self.batch, 0, dtype=torch.int64)
        every = {
            "temperature": torch.linspace(0.6, 1.7, self.batch),
            "top_k": torch.arange(self.batch) * 7 + 5,
            "top_p": torch.linspace(0.95, 0.7, self.batch),
            "draft_lengths": torch.arange(self.batch).flip(0).clamp(max=self.drafts),
            "offsets": torch.arange(self.batch) * 2**33 + 2**32 - 1,
        }
        options: dict[str, Any] = {name: every[name] for name in self.options}
        seeds = torch.randint(-(2**63), 2**63 - 1, (self.batch,))
        draft_logits = None if self.certain else draft
        return target, ids.int(), {"draft_logits": draft_logits, "seeds": seeds, "mode": self.mode} | options


def drawn(logits: Tensor) -> Tensor:
    """A token of each row, by their probabilities."""
    chosen = torch.multinomial(torch.softmax(logits.float(), -1).flatten(0, -2), 1)
    return chosen.view(logits.shape[:-1])


def by_definition(dtype: torch.dtype, target: Tensor, ids: Tensor, options: dict[str, Any]) -> Any:
    draft = options["draft_logits"]
    with grpo_kernels.backend("reference"):
        wide = options | {"draft_logits": None if draft is None else draft.to(dtype)}
        return verify_draft(target.to(dtype), ids, **wide)


FILTERS = ("top_k", "top_p")
OTHERS = ("temperature", "draft_lengths", "offsets")
PROBLEMS = [
    Problem("token", torch.float32, 31, batch=4),
    Problem("token", torch.bfloat16, 1025, options=(*FILTERS, *OTHERS)),
    Problem("token", torch.float32, 1025, drafts=1, options=("top_p",)),
    Problem("token", torch.float16, 1, certain=True, options=("top_k", "top_p")),
    Problem("token", torch.bfloat16, 4112, drafts=1),  # two parts, aligned rows, a tile that is not full
    Problem("token", torch.float32, 2601, drafts=1, options=("temperature",)),
    Problem("token", torch.float16, 1025, drafts=0, certain=True, options=("top_k", "offsets")),
    Problem("token", torch.float16, 31, batch=3, certain=True, options=OTHERS),
    Problem("block", torch.float32, 31, batch=4, drafts=3),
    Problem("block", torch.float16, 1025, drafts=3, options=(*FILTERS, "temperature")),
    Problem("block", torch.bfloat16, 4112, drafts=2),
    Problem("block", torch.bfloat16, 31, batch=3, drafts=3, certain=True, options=("top_k", *OTHERS)),
    Problem("block", torch.float32, 31, drafts=0),
    Problem("greedy", torch.float32, 1025, batch=3, options=("temperature", "draft_lengths")),
    Problem("greedy", torch.bfloat16, 4112, drafts=1, certain=True),
    Problem("greedy", torch.float32, 1, drafts=0, certain=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_the_definition(problem: Problem) -> None:
    target, ids, options = problem.make()
    if problem.mode == "greedy" and problem.drafts:  # else none would be accepted
        ids[0] = target[0, : problem.drafts].argmax(-1)
    found = verify_draft(target, ids, **options)
    expected = by_definition(torch.float64, target, ids, options)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.num_accepted, expected.num_accepted)
    plain = by_definition(torch.float32, target, ids, options)
    if problem.vocab == 1:
        assert found.log_probs.count_nonzero() == 0
    else:
        assert_as_accurate(found.log_probs, expected.log_probs, plain.log_probs, name="log_probs")


def test_every_draft_is_tried() -> None:
    """The comparison above meets every number of accepted drafts."""
    torch.manual_seed(0)
    for mode in ("token", "block"):
        found = verify_draft_alike(mode, torch.linspace(0.0, 3.0, 9))
        assert found.num_accepted.unique().tolist() == [0, 1, 2]


def verify_draft_alike(mode: str, spread: Tensor) -> Any:
    """Drafts from a distribution that is further and further from the target's; checked against the definition."""
    rows = len(spread)
    target = torch.randn(rows, 3, 17)
    draft = target[:, :2] + spread[:, None, None] * torch.randn(rows, 2, 17)
    ids = drawn(draft)
    options = {"draft_logits": draft, "seeds": torch.arange(rows), "mode": mode}
    found = verify_draft(target, ids, **options)
    assert torch.equal(found.token_ids, by_definition(torch.float64, target, ids, options).token_ids)
    return found


@pytest.mark.parametrize("mode", ["token", "block"])
def test_equal_logits_accept_every_draft(mode: str) -> None:
    target = torch.randn(3, 3, 41).bfloat16()
    target[:, :, 3] = -INF
    draft, ids = target[:, :2], torch.tensor([[1, 7], [40, 0], [9, 9]])
    for seeds in (torch.arange(3), torch.full((3,), LARGEST_UNIFORM)):
        options = {"draft_logits": draft, "seeds": seeds, "mode": mode, "temperature": 0.7}
        assert verify_draft(target, ids, **options).num_accepted.tolist() == [2, 2, 2]


LARGEST_UNIFORM = 16390493
"""A seed whose uniform at place 0 is 1 - 2^-24: it accepts nothing less than a ratio of exactly 1."""


def test_the_seed_of_the_largest_uniform() -> None:
    seeds = torch.tensor([LARGEST_UNIFORM])
    assert noise_reference.uniforms(seeds, torch.zeros_like(seeds), 1, torch.float64).item() == 1 - 2.0**-24


@pytest.mark.parametrize("mode", ["token", "block"])
def test_a_residual_of_nothing_gives_the_target(mode: str) -> None:
    """A draft that q cannot have given is rejected; where p and q agree, p - q is then zero everywhere."""
    target = torch.randn(2, 2, 300)
    target[:, :, [4, 7]] = -INF
    ids, seeds = torch.tensor([[4], [7]]), torch.tensor([5, 6])
    options = {"draft_logits": target[:, :1], "seeds": seeds, "mode": mode}
    found = verify_draft(target, ids, **options)
    assert torch.equal(found.token_ids, by_definition(torch.float64, target, ids, options).token_ids)
    assert found.num_accepted.tolist() == [0, 0]
    assert torch.equal(found.token_ids[:, :1], verify_draft(target[:, :1], ids[:, :0], seeds=seeds).token_ids)


# --- how rows lie, and what is in them --------------------------------------------------------------------------------


def test_rows_are_read_where_they_lie_and_each_for_itself() -> None:
    target, ids, options = Problem("token", torch.bfloat16, 64, options=("temperature",)).make()
    draft = options.pop("draft_logits")
    expected = verify_draft(target, ids, draft_logits=draft, **options)
    turned = target.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.nn.functional.pad(draft, (16, 32), value=NAN)[..., 16:80]
    assert_identical(list(verify_draft(turned, ids, draft_logits=wide, **options)), list(expected))
    backwards = {name: value.flip(0) if isinstance(value, Tensor) else value for name, value in options.items()}
    found = verify_draft(target.flip(0), ids.flip(0), draft_logits=draft.flip(0), **backwards)
    assert_identical([value.flip(0) for value in found], list(expected))


def test_the_parts_of_the_race_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    target, ids, options = Problem("token", torch.float32, 1100, drafts=1).make()
    expected = verify_draft(target, ids, **options)
    for warps in (1, 2 * _config_triton.MAX_RACES):
        monkeypatch.setattr(_config_triton, "_WARPS", warps)
        assert_identical(list(verify_draft(target, ids, **options)), list(expected))


def test_parts_are_whole_tiles_and_cover_the_row() -> None:
    for vocab, size, batch in itertools.product((1, 31, 32000, 50257, 152064, 1 << 20), (2, 4), (1, 16, 256, 10**6)):
        columns, parts = _config_triton.race_config(batch, vocab, size)
        assert columns % (32 * 16 // size) == 0
        assert columns * (parts - 1) < vocab <= columns * parts
        assert parts <= _config_triton.MAX_RACES
        config = _config_triton.launch_config(vocab, size, True)
        assert config.columns % (config.slots * config.width) == 0
        assert config.columns * (config.splits - 1) < vocab <= config.columns * config.splits
        assert config.splits <= _config_triton.MAX_SPLITS
        assert config.room == 0 or config.splits * config.slots <= config.room
        assert config.room % (config.filter_slots * config.width) == 0


def test_one_row_for_all() -> None:
    target, seeds = torch.randn(1, 1, 50).expand(6, 1, 50), torch.arange(6)
    expected = verify_draft(target.contiguous(), torch.zeros(6, 0, dtype=torch.int64), seeds=seeds)
    found = verify_draft(target, torch.zeros(6, 0, dtype=torch.int64), seeds=seeds)
    assert_identical(list(found), list(expected))
    assert len(found.token_ids.unique()) > 2


def spoil(target: Tensor, draft: Tensor) -> None:
    target[0, 1, 9] = NAN
    target[1, 0, 36] = INF
    target[2, 2] = -INF  # behind its drafts: looked at if all are accepted
    draft[3, 0] = -INF
    draft[4, 1, 0] = NAN


def spoil_own_numbers(ids: Tensor) -> list[Tensor]:
    """Lengths, temperatures and top_p, each of them wrong in a row of its own, as ids are; those of row 7 are right."""
    ids[6, 1], ids[7, 1] = 2**40, -100  # the last is behind its drafts
    top_p = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, NAN, 0.5, 0.5])
    return [torch.tensor([3, -1, 2, 2, 2, 2, 2, 1]), torch.tensor([1, 1, NAN, 0, 1, 1, 1, 1]), top_p]


@pytest.mark.parametrize("fault", ["rows", "own numbers"])
@pytest.mark.parametrize("mode", ["token", "block", "greedy"])
def test_faults(mode: str, fault: str) -> None:
    rows = 5 if fault == "rows" else 8
    target, draft = torch.randn(rows, 3, 37), torch.randn(rows, 2, 37)
    draft += target[:, :2] * 3
    ids = target[:, :2].argmax(-1)
    numbers: list[Tensor | None] = [None, None, None]
    if fault == "rows":
        spoil(target, draft)
    else:
        numbers[:] = spoil_own_numbers(ids)
    lengths, temperatures, top_p = numbers
    if mode == "greedy":
        draft, top_p = None, None
    arguments = (target, ids, draft, lengths, temperatures, None, top_p, torch.arange(rows), None, mode)
    op = torch.ops.grpo_kernels.verify_draft
    found, expected = op(*arguments, "triton"), op(*arguments, "reference")
    torch.testing.assert_close(list(found), list(expected), equal_nan=True, rtol=1e-5, atol=1e-5)
    broken = found[2].isnan()
    assert torch.equal(broken, (found[0] == -1) & (torch.arange(3) == found[1][:, None]))
    everywhere = broken.any(1)[[0, 1, 3, 4]].all() if mode == "block" else broken.any()
    assert everywhere
    assert fault == "rows" or broken.any(1).tolist() == [mode != "greedy" or row not in (4, 5) for row in range(7)] + [
        False
    ]


def test_temperatures_without_a_finite_inverse_take_the_largest() -> None:
    target = torch.randn(2, 1, 50)
    temperature = torch.tensor([1e-42, 3e38])
    found = verify_draft(target, torch.zeros(2, 0, dtype=torch.int64), seeds=torch.arange(2), temperature=temperature)
    assert found.token_ids[0] == target[0].argmax()
    assert found.log_probs[0] == 0
    assert found.log_probs[1].item() == pytest.approx(-np.log(50))


@pytest.mark.parametrize("call", [c for c in samples.CALLS if c.name in ("certain_block", "sampling", "strided")],
                         ids=lambda call: call.name)  # fmt: skip
def test_nothing_outside_the_tensors_is_touched(call: Any) -> None:
    inputs = inputs_of(call, "cpu")
    expected = run(call, inputs)
    with guarded_allocations(), poisoned_allocations():
        actual = run(call, [guard_input(i) if isinstance(i, Tensor) else i for i in inputs])
    assert_identical(actual, expected)


# --- the noise, and the law -------------------------------------------------------------------------------------------


@triton.jit
def _words_kernel(out, first, seed, place, start, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    slots = tl.arange(0, SLOTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    words = random_words(seed, place.to(tl.int64), start, SLOTS, WIDTH)
    tl.store(out + slots, words.to(tl.int64))
    tl.store(first, uniform(seed, place.to(tl.int64), place * 0 + 7))


@pytest.mark.parametrize("width", [4, 8])
def test_the_noise_is_the_definition_s(width: int) -> None:
    for seed, place in ((-5, 3), (2**62 + 12345, 2**35 + 7)):
        out, first = torch.empty(16 * width, dtype=torch.int64), torch.empty(1)
        _words_kernel[(1,)](out, first, seed, place, 64, SLOTS=16, WIDTH=width)
        seeds, places = torch.tensor([seed]), torch.tensor([[place]])
        blocks = torch.arange(16, 16 + 4 * width)[None]
        words = noise_reference._words(seeds[:, None], places, blocks, noise_reference.RACE)
        assert torch.equal(out, torch.stack(words, -1).flatten())
        assert first.item() == noise_reference.uniforms(seeds, places[0], 8, torch.float64)[0, 7].item()


@triton.jit
def _exponentials_kernel(words, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, exponentials(tl.load(words + place).to(tl.uint32)))


def test_exponentials_are_precise_from_end_to_end() -> None:
    """Against float64: near zero, around the end of the series, near the cut. What rounding of 1 - y may cost where the
    logarithm is least, and a unit of the result."""
    words = torch.randint(2**32, (4096,))
    words[:512] = 2 ** torch.arange(32).repeat(16) + torch.arange(512) % 7
    words[512:516] = torch.tensor([0, 2**28 - 1, 2**28, 2**32 - 1])
    words = words.clamp(max=2**32 - 1)
    out = torch.empty(4096)
    _exponentials_kernel[(1,)](words, out, SIZE=4096)
    y = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    expected = -torch.log1p(-y)
    assert ((out.double() - expected).abs() / expected).max() <= 2.0**-25 / np.log(16 / 15) + 2.0**-23
    assert out[515].item() == pytest.approx(24 * np.log(2))


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    expected = probs * len(tokens)
    return float(((torch.bincount(tokens, minlength=len(probs)) - expected) ** 2 / expected).sum())


def test_the_law() -> None:
    """First tokens of 40 sequences: as the target has them; not so if drafts come from elsewhere than q."""
    count, beyond = 40, 13.8  # the chi-square of two degrees of freedom exceeds it once in 1000 times
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.2, 0.7])
    target, draft = p.log().expand(count, 2, 3), q.log().expand(count, 1, 3)
    ids = drawn(draft)
    found = verify_draft(target, ids, draft_logits=draft, seeds=torch.arange(count) * 1_000_003)
    assert chi_square(found.token_ids[:, 0], p) < beyond
    assert found.num_accepted.unique().tolist() == [0, 1]
    biased = verify_draft(target, ids * 0, draft_logits=draft, seeds=torch.arange(count) * 1_000_003)
    assert chi_square(biased.token_ids[:, 0], p) > beyond
