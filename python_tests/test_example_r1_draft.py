"""Sampling with drafts in the training example: the samples' law, the ragged cache, counts, routes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from examples.r1.policy import draft, rollout, vocabulary
from examples.r1.policy.model import CharTransformer, KVCache, ModelConfig, SharedPrefix
from examples.r1.policy.mtp import hidden_of_depths
from examples.r1.policy.ragged_cache import RaggedCache
from examples.r1.policy.routes import DraftRecorder, Routes
from examples.r1.policy.sequences import make_sequences
from examples.r1.randomness import torch_rng
from examples.r1.stages.log_probs import sequence_log_probs
from grpo_kernels import VerifyDraftOutput
from python_tests.r1_stages import CPU, DIGITS, beginner, one_thread, tiny_run

__all__ = ["one_thread"]

PROMPT, COMPLETION = 8, 12
LONGEST = 22  # tokens that a completion of the tasks may have


def _model(mtp: int, **changes: int) -> CharTransformer:
    torch.manual_seed(0)
    sizes = {"max_length": PROMPT + COMPLETION, "width": 16, "layers": 2, "heads": 2} | changes
    return CharTransformer(ModelConfig(**sizes, mtp=mtp)).double()  # type: ignore[arg-type]


def _prompts(count: int = 3, size: int = vocabulary.SIZE) -> Tensor:
    prompts = torch.randint(2, size, (count, PROMPT), generator=torch.Generator().manual_seed(1))
    prompts[1:2, :3] = vocabulary.PAD
    return prompts


@pytest.fixture(scope="module")
def drafting() -> CharTransformer:
    """A model that has learnt enough for some of its drafts to be accepted and others not."""
    run = tiny_run(width=32, mtp=2, sft_learning_rate=6e-3, sft_batch=32, cold_start_steps=40)
    return beginner(run, (DIGITS,))


def _task_prompts(count: int) -> Tensor:
    run = tiny_run()
    assert run.completion_length == LONGEST
    return run.encode_prompts(run.tasks[DIGITS].held_out(count))


# the law ---------------------------------------------------------------------------------------------------------


def _codes(completions: Tensor, size: int) -> Tensor:
    """A number for every completion: its tokens as digits, padding behind END."""
    digits = completions * make_sequences(completions, completions).mask
    return (digits * size ** torch.arange(completions.shape[1])).sum(dim=1)


def _law(model: CharTransformer, prompt: Tensor, length: int) -> Tensor:
    """The probability of every completion, up to END, by its number: from the model's own probabilities."""
    size = model.config.vocabulary_size
    every = torch.tensor(list(product(range(size), repeat=length)))
    with torch.no_grad():
        log_probs = model.head(model.completion_hidden(prompt.expand(len(every), -1), every)).log_softmax(dim=-1)
    steps = log_probs.gather(-1, every.unsqueeze(-1)).squeeze(-1) * make_sequences(prompt, every).mask
    law = torch.zeros(size**length, dtype=torch.float64)
    law[_codes(every, size)] = steps.double().sum(dim=1).exp()  # what differs behind END only has one number
    return law


def _p_value(completions: Tensor, law: Tensor, size: int) -> float:
    """Of the chi-square test that completions follow the law; rare ones are counted together."""
    seen = torch.bincount(_codes(completions, size), minlength=len(law)).double()
    expected = law * len(completions)
    common = expected >= 10.0
    cells = [torch.cat((counts[common], counts[~common].sum()[None])) for counts in (seen, expected)]
    chi_square = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    return float(torch.special.gammaincc(torch.tensor((len(cells[0]) - 1) / 2), chi_square.float() / 2))


def _sharp_model(length: int) -> CharTransformer:
    """A vocabulary of four; model and drafts differ, and so do places."""
    model = _model(mtp=3, width=8, vocabulary_size=4, max_length=PROMPT + length).float()
    with torch.no_grad():
        model.head.weight[vocabulary.END] *= 0.2
        model.position_embedding.weight.mul_(20.0)
    return model


@pytest.mark.parametrize("fault", ["none", "likeliest drafts", "noise used again"])
def test_the_samples_have_exactly_the_law_of_the_model(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint law of five tokens by enumeration; 20,000 samples. Faults of two known kinds do not survive 8,000."""
    model, prompt = _sharp_model(5), _prompts(1, size=4)
    if fault == "likeliest drafts":  # verified as if they had been drawn
        monkeypatch.setattr(draft._Noise, "draw", lambda noise, logits: logits.argmax(dim=-1))
    if fault == "noise used again":
        monkeypatch.setattr(draft._Noise, "_offsets", lambda noise, stream, _: torch.zeros_like(noise._seeds[stream]))
    found = draft.generate(
        model, prompt, 5, group_size=20_000 if fault == "none" else 8_000, generator=torch_rng(CPU, "law")
    )
    p_value = _p_value(found.completions, _law(model, prompt, 5), 4)
    assert (p_value > 0.01) if fault == "none" else (p_value < 1e-9)


@pytest.mark.parametrize("mtp", [1, 2, 3])
def test_greedy_completions_are_those_without_drafts(mtp: int) -> None:
    model = _model(mtp)
    with torch.no_grad():
        model.head.weight[vocabulary.END] *= 0.5
    prompts = _prompts(16)
    without = rollout.generate(model, prompts, COMPLETION)
    assert torch.equal(draft.generate(model, prompts, COMPLETION).completions, without)


def test_more_drafts_than_a_completion_has_tokens() -> None:
    model, prompts = _model(mtp=5), _prompts()
    assert torch.equal(draft.generate(model, prompts, 2).completions, rollout.generate(model, prompts, 2))


def test_greedy_completions_of_a_trained_model_are_those_without_drafts(drafting: CharTransformer) -> None:
    prompts = _task_prompts(64)
    with_drafts = draft.generate(drafting, prompts, LONGEST)
    assert torch.equal(with_drafts.completions, rollout.generate(drafting, prompts, LONGEST))
    assert with_drafts.counts.record()["tokens_per_pass"] > 1.5


def test_log_probs_of_the_rollout_are_those_of_training(drafting: CharTransformer) -> None:
    prompts = _task_prompts(16)
    found = draft.generate(drafting, prompts, LONGEST, group_size=4, temperature=0.7, generator=torch_rng(CPU, 3))
    sequences = make_sequences(prompts, found.completions.clone())
    expected = sequence_log_probs(drafting, sequences, 0.7)
    torch.testing.assert_close(found.log_probs.clone(), expected)
    assert not found.log_probs[~sequences.mask].any()
    assert not found.completions[~sequences.mask].any()
    again = draft.generate(drafting, prompts, LONGEST, group_size=4, temperature=0.7, generator=torch_rng(CPU, 3))
    other = draft.generate(drafting, prompts, LONGEST, group_size=4, temperature=0.7, generator=torch_rng(CPU, 4))
    assert torch.equal(found.completions, again.completions)
    assert not torch.equal(found.completions, other.completions)


# the caches ------------------------------------------------------------------------------------------------------


def test_hidden_states_from_the_ragged_cache_are_those_of_plain_passes() -> None:
    """Rows go on from different places, over what they wrote behind them."""
    model = _model(mtp=1)
    prompts = _prompts(2)
    prefix = SharedPrefix(2)
    with torch.no_grad():
        model(prompts, prefix)
        cache = RaggedCache(prefix, capacity=PROMPT + COMPLETION, last_position=PROMPT + COMPLETION - 1)
        with pytest.raises(RuntimeError, match=r"begin\(\) says where a pass writes, and comes before it"):
            model(torch.zeros((4, 1), dtype=torch.int64), cache)
        tokens = torch.randint(2, vocabulary.SIZE, (4, 9))
        kept = torch.tensor([0, 1, 2, 3])
        for start, count in ((torch.zeros_like(kept), 3), (kept, 4), (kept + torch.tensor([4, 2, 0, 1]), 2)):
            cache.begin(PROMPT + start, count, PROMPT + int(start.max()) + count)
            columns = start.unsqueeze(1) + torch.arange(count)
            tokens.scatter_(1, columns, torch.randint(2, vocabulary.SIZE, (4, count)))
            hidden = model(tokens.gather(1, columns), cache)
            for row in range(4):
                end = int(start[row]) + count
                whole = torch.cat((prompts[row // 2], tokens[row, :end])).unsqueeze(0)
                expected = model(whole, KVCache.empty(model.config, 1, model.head.weight))[0, -count:]
                torch.testing.assert_close(hidden[row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mtp", [1, 2, 3])
def test_drafts_are_drawn_from_what_training_computes(mtp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth k sees the true tokens and the drafts before its own, and nothing of drafts that were rejected earlier."""
    model, prompts = _model(mtp), _prompts()
    model.head.weight.requires_grad_(False)[vocabulary.END] = 0.0
    make = draft._Rows.draft
    rounds = []

    def watched(rows: draft._Rows) -> tuple[Tensor, Tensor]:
        drafts, logits = make(rows)
        rounds.append((rows.lengths.clone(), rows.tokens.clone(), logits))
        return drafts, logits

    monkeypatch.setattr(draft._Rows, "draft", watched)
    found = draft.generate(model, prompts, COMPLETION, group_size=2, generator=torch_rng(CPU, 5))
    assert 0 < sum(found.counts.accepted) < sum(found.counts.looked_at)
    for lengths, tokens, logits in rounds:
        with torch.no_grad():
            hiddens = hidden_of_depths(model, prompts, tokens[:, :COMPLETION].clone())
        for depth in range(1, mtp + 1):
            used = lengths + depth <= COMPLETION
            expected = model.head(hiddens[depth][torch.arange(6), lengths - 1])
            torch.testing.assert_close(logits[used, depth - 1], expected[used], rtol=1e-10, atol=1e-10)


def test_counts_are_those_of_the_verdicts(drafting: CharTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: tokens up to END, and drafts that were looked at before one was rejected or END came."""
    verify = draft._Noise.verify
    verdicts = []

    def watched(noise: draft._Noise, logits: Tensor, *inputs: Tensor) -> VerifyDraftOutput:
        output = verify(noise, logits, *inputs)
        verdicts.append((output, inputs[-1].tolist()))
        return output

    monkeypatch.setattr(draft._Noise, "verify", watched)
    counts = draft.generate(drafting, _task_prompts(24), LONGEST, generator=torch_rng(CPU, 6)).counts
    length, ended = [0] * 24, [False] * 24
    passes, looked_at, accepted = 0, [0, 0], [0, 0]
    for output, lengths in verdicts:
        for row, tokens in enumerate(output.token_ids.tolist()):
            if ended[row]:
                continue
            passes += 1
            for step in range(int(output.num_accepted[row]) + 1):
                if step < lengths[row]:
                    looked_at[step] += 1
                    accepted[step] += step < int(output.num_accepted[row])
                length[row] += 1
                ended[row] = tokens[step] == vocabulary.END or length[row] == LONGEST
                if ended[row]:
                    break
    assert counts == draft.DraftCounts(sum(length), passes, looked_at, accepted)
    assert all(0 < taken < seen for seen, taken in zip(looked_at, accepted, strict=True))
    assert counts.record()["tokens_per_pass"] == sum(length) / passes


def test_depths_see_their_own_sample_and_no_token_ahead() -> None:
    model, prompts = _model(mtp=2), _prompts()
    completions = torch.randint(2, vocabulary.SIZE, (6, 5))
    with torch.no_grad():
        together = torch.stack(hidden_of_depths(model, prompts, completions))
        alone = [torch.stack(hidden_of_depths(model, prompts[i // 2, None], completions[i, None])) for i in range(6)]
        changed = completions.clone()
        changed[:, 3] = 2
        late = torch.stack(hidden_of_depths(model, prompts, changed))
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
    for depth in range(3):  # depth k embeds token t + k - 1 in column t; the model itself token t - 1
        first = 4 - depth
        torch.testing.assert_close(late[depth, :, :first], together[depth, :, :first], rtol=1e-12, atol=1e-12)
        assert float((late[depth, :, first] - together[depth, :, first]).abs().amax(dim=-1).min()) > 1e-6


# routes of the MoE model -----------------------------------------------------------------------------------------


def test_routes_of_drafted_samples_are_those_of_their_tokens() -> None:
    model = _model(2, experts=4, vocabulary_size=12)
    prompts = _prompts(3, size=12)
    recorder = DraftRecorder(4)
    found = draft.generate(model, prompts, COMPLETION, group_size=2, generator=torch_rng(CPU, 7), recorder=recorder)
    completions = found.completions.clone()
    assert 0 < sum(found.counts.accepted) < sum(found.counts.looked_at)
    routes, live = recorder.routes(len(completions), COMPLETION), Routes()
    model.completion_hidden(prompts, completions, live)
    lengths = make_sequences(prompts, completions).mask.sum(dim=1)
    assert int(lengths.min()) < COMPLETION  # END came in one of them at least
    fed = torch.arange(COMPLETION - 1) < lengths.unsqueeze(1) - 1
    for layer in range(2):
        expected = live.reports[2 + layer][1].topk_ids.view(6, COMPLETION - 1, 2)
        ids = routes.completions.ids(layer).view(6, COMPLETION - 1, 2)  # type: ignore[union-attr]
        assert torch.equal(ids[fed].int(), expected[fed].int())
        assert (ids[~fed] == -1).all()


def test_a_model_without_layers_cannot_draft() -> None:
    with pytest.raises(ValueError, match="the model has no layers of multi-token prediction"):
        draft.generate(_model(mtp=0), _prompts(), COMPLETION)
