"""Verification of drafts in logits space against softmaxes, gathers, a residual and a draw, as it is usually written.

Bytes are the target's and the draft's logits once, and those of the position that the last token is drawn from once
more. A CPU reads no position behind the first rejection, so there the rate may be above what was moved. Everybody
returns the log-probs of the emitted tokens as well, and everybody accepts by the same uniform numbers; the token behind
the accepted ones is drawn by each in its own way, so that only the accepted ones are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.speculative_sampling.noise_reference import uniforms

from .case import Case, Inputs, Provider, compiled
from .speculative_definitions import drawn, emitted, flashinfer_chain, log_softmaxes
from .target import speedup

Values = tuple[Tensor, ...]
Forward = Callable[[Inputs], Values]

_SMOKE = (3, 2, 97)
_SPREAD, _APART = 3.0, 0.5  # of the logits, and between target and draft: about four of five tokens are accepted


@dataclass(frozen=True)
class Problem:
    """Sequences, drafted tokens of each, vocabulary; how they are verified."""

    batch: int
    drafts: int
    vocab: int
    dtype: torch.dtype
    mode: str = "token"
    top_k: int = 0  # no filter
    top_p: float = 1.0  # no filter

    @property
    def name(self) -> str:
        kind = self.mode + "".join(f", {name.replace('_', '-')} {value:g}" for name, value in self.filters.items())
        return f"B={self.batch} K={self.drafts} V={self.vocab} {str(self.dtype).removeprefix('torch.')}, {kind}"

    @property
    def filters(self) -> dict[str, Any]:
        asked = {"top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in asked.items() if value not in (0, 1.0)}


def _make(problem: Problem, device: str, size: str) -> Inputs:
    batch, drafts, vocab = (problem.batch, problem.drafts, problem.vocab) if size == "full" else _SMOKE
    target = torch.randn(batch, drafts + 1, vocab, device=device, dtype=torch.float32).mul_(_SPREAD)
    draft = target[:, :drafts] + _APART * torch.randn(batch, drafts, vocab, device=device, dtype=torch.float32)
    seeds = torch.randint(2**62, (batch,), device=device)
    made = {"target_logits": target.to(problem.dtype), "draft_logits": draft.to(problem.dtype), "seeds": seeds}
    if problem.mode == "greedy":
        made["draft_ids"] = made["draft_logits"].argmax(-1)
    else:
        probs = log_softmaxes(made["draft_logits"], **problem.filters)[1].exp()
        made["draft_ids"] = drawn(probs.flatten(0, 1)).view(batch, drafts)
    return made | {"uniforms": uniforms(seeds, torch.zeros_like(seeds), drafts, torch.float32)}


def _ours(problem: Problem, inputs: Inputs) -> Values:
    return tuple(
        grpo_kernels.verify_draft(
            inputs["target_logits"], inputs["draft_ids"], draft_logits=inputs["draft_logits"], seeds=inputs["seeds"],
            mode=problem.mode, **problem.filters,
        )
    )  # fmt: skip


def _definition(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The definition in float64; in float32 what eager PyTorch makes of it."""
    if inputs["target_logits"].dtype != torch.float64:
        return _sample(_RULES[problem.mode](problem, inputs))
    with grpo_kernels.backend("reference"):
        return _sample(_ours(problem, inputs))


def _sample(outputs: Values) -> list[Tensor]:
    """What does not hang on how the last token is drawn: counts, accepted tokens and their log-probs, and that a token
    stands behind them and none behind that."""
    token_ids, num_accepted, log_probs = outputs
    places = torch.arange(token_ids.shape[1], device=token_ids.device)
    accepted = places < num_accepted[:, None]
    in_order = (token_ids >= 0) == (places <= num_accepted[:, None])
    return [
        num_accepted.double(), torch.where(accepted, token_ids, -1).double(), torch.where(accepted, log_probs, 0.0),
        in_order.double(),
    ]  # fmt: skip


# --- the usual implementation ----------------------------------------------------------------------------------------


def _token_rule(problem: Problem, inputs: Inputs) -> Values:
    ids = inputs["draft_ids"]
    log_probs, target = log_softmaxes(inputs["target_logits"], **problem.filters)
    p = target.exp()
    q = log_softmaxes(inputs["draft_logits"], **problem.filters)[1].exp()
    chosen_p, chosen_q = (probs[:, : ids.shape[1]].gather(2, ids[..., None]).squeeze(2) for probs in (p, q))
    num_accepted = (inputs["uniforms"] < chosen_p / chosen_q).long().cumprod(1).sum(1)
    return _finish(inputs, log_probs, p, q, num_accepted, torch.ones_like(p[:, 0, 0]))


def _block_rule(problem: Problem, inputs: Inputs) -> Values:
    """arXiv 2403.10444, algorithm 2."""
    ids = inputs["draft_ids"]
    drafts = ids.shape[1]
    log_probs, target = log_softmaxes(inputs["target_logits"], **problem.filters)
    p = target.exp()
    q = log_softmaxes(inputs["draft_logits"], **problem.filters)[1].exp()
    chosen_p, chosen_q = (probs[:, :drafts].gather(2, ids[..., None]).squeeze(2) for probs in (p, q))
    kept, products = torch.ones_like(chosen_p[:, 0]), []
    for ratio in (chosen_p / chosen_q).unbind(1):
        kept = (kept * ratio).clamp(max=1)
        products.append(kept)
    joint = torch.stack(products, 1)
    sums = (joint[:, :-1, None] * p[:, 1:drafts] - q[:, 1:]).clamp(min=0).sum(2)
    inner = torch.nan_to_num(sums / (sums + 1 - joint[:, :-1]), nan=1.0)
    accepted = inputs["uniforms"] < torch.cat([inner, joint[:, -1:]], 1)
    num_accepted = (accepted * torch.arange(1, drafts + 1, device=ids.device)).amax(1)
    before = torch.cat([torch.ones_like(joint[:, :1]), joint], 1).gather(1, num_accepted[:, None]).squeeze(1)
    return _finish(inputs, log_probs, p, q, num_accepted, torch.where(num_accepted < drafts, before, 1.0))


def _finish(inputs: Inputs, log_probs: Tensor, p: Tensor, q: Tensor, num_accepted: Tensor, factor: Tensor) -> Values:
    """The token behind the accepted ones, from the residual or, behind all of them, from the target."""
    rows, drafts = torch.arange(len(p), device=p.device), q.shape[1]
    target = p[rows, num_accepted]
    other = q[rows, num_accepted.clamp(max=drafts - 1)] * (num_accepted < drafts)[:, None]
    residual = (factor[:, None] * target - other).clamp(min=0)
    last = drawn(torch.where(residual.sum(1, keepdim=True) > 0, residual, target))
    return emitted(inputs["draft_ids"], num_accepted, last, log_probs)


def _greedy_rule(problem: Problem, inputs: Inputs) -> Values:
    log_probs, _ = log_softmaxes(inputs["target_logits"])
    best = log_probs.argmax(2)
    num_accepted = (best[:, :-1] == inputs["draft_ids"]).long().cumprod(1).sum(1)
    last = best.gather(1, num_accepted[:, None]).squeeze(1)
    return emitted(inputs["draft_ids"], num_accepted, last, log_probs)


_RULES = {"token": _token_rule, "block": _block_rule, "greedy": _greedy_rule}

# --- cases -----------------------------------------------------------------------------------------------------------


def _providers(problem: Problem, device: str) -> tuple[Provider, ...]:
    eager = partial(_RULES[problem.mode], problem)
    found = [
        Provider("ours", partial(_ours, problem), "ours"),
        Provider("eager", eager, "eager"),
        Provider("torch.compile", compiled(eager), "compile"),
    ]
    chain = _chain(problem, device)
    # FlashInfer's uniform numbers are its own: its results cannot be compared with anybody's.
    return (*found, Provider("FlashInfer, and softmaxes", chain, "part")) if chain else tuple(found)


def _chain(problem: Problem, device: str) -> Forward | None:
    return flashinfer_chain(device) if problem.mode == "token" and not problem.filters else None


def _bytes(problem: Problem) -> int:
    row = problem.vocab * torch.empty((), dtype=problem.dtype).element_size()
    if problem.mode == "greedy":
        return problem.batch * (problem.drafts + 1) * row
    return problem.batch * (2 * problem.drafts + 1 + 2) * row


def _case(device: str, problem: Problem, quick: bool) -> Case:
    return Case(
        op="verify_draft",
        name=problem.name,
        make=partial(_make, problem),
        providers=_providers(problem, device),
        bytes_moved=_bytes(problem),
        targets=(speedup(2),),
        definition=partial(_definition, problem),
        sample_outputs=_sample,
        quick=quick,
        memory=_bytes(problem),
        absent=("FlashInfer",)
        if problem.mode == "token" and not problem.filters and not _chain(problem, device)
        else (),
    )


def cases(device: str) -> list[Case]:
    """The token rule on several shapes, in bf16 on a GPU and fp32 on a CPU; then the other rules, and filters."""
    if device == "cuda":
        shapes = [(16, 5, 32000), (32, 5, 128256), (256, 1, 151936)]
        first = Problem(64, 3, 129280, torch.bfloat16)
    else:
        shapes = [(16, 5, 32000), (8, 1, 151936)]
        first = Problem(8, 3, 129280, torch.float32)
    plain = [first, *(replace(first, batch=b, drafts=k, vocab=v) for b, k, v in shapes)]
    filtered = [replace(first, top_k=50, top_p=0.95), replace(first, top_p=0.95)]
    kinds = [replace(first, mode="block"), replace(first, mode="greedy"), *filtered]
    narrow = [] if device == "cuda" else [replace(first, dtype=torch.bfloat16)]
    return [_case(device, problem, quick=problem in (first, kinds[0])) for problem in (*plain, *narrow, *kinds)]
