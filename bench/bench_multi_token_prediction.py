"""The losses of the model and of its D modules that predict further ahead: all in one pass over the head, forward and
backward, against one call a depth, of ours, of eager PyTorch, which keeps the logits of all of them, and of others.

Rates count 6 (D + 1) N H V operations for everybody. One case has the GRPO loss in the place of the model's own
cross-entropy. The targets of all depths, which cost next to nothing, have a case of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from grpo_kernels import _dispatch

from . import linear_definitions as linear
from . import linear_peers as peers
from . import machine
from . import mtp_definitions as definitions
from .case import Case, Inputs, Provider, compiled
from .linear_definitions import Values
from .linear_peers import Peer
from .mtp_definitions import Problem
from .target import Target, figure, ratio, speedup

Shape = tuple[int, int, int]  # rows of a depth, hidden width, vocabulary

_GPU_SHAPE: Shape = (8192, 4096, 129280)
_CPU_SHAPE: Shape = (1024, 1024, 32320)
_SLOW_BF16_SHAPE: Shape = (1024, 32, 16160)
_SMOKE: Shape = (96, 32, 211)
_SEQUENCES = 8
_PROBLEMS = (Problem(1), Problem(2), Problem(1, policy=True))

_TARGETS = (65536, 2048)  # tokens, and of a sequence
_SMOKE_TARGETS = (60, 12)


# --- the head --------------------------------------------------------------------------------------------------------


def _make(problem: Problem, shape: Shape, dtype: torch.dtype, device: str, size: str) -> Inputs:
    rows, width, vocab = shape if size == "full" else _SMOKE
    tokens = (_SEQUENCES, rows // _SEQUENCES)

    def states() -> Tensor:
        return torch.randn(*tokens, width, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    made: Inputs = {name: states() for name in problem.states}
    weight = torch.randn(vocab, width, device=device, dtype=torch.float32).mul_(3.0 / width**0.5).to(dtype)
    made |= {"weight": weight.requires_grad_(), "token_ids": torch.randint(vocab, tokens, device=device)}
    made |= {"upstream": torch.tensor(1.5, device=device), "tokens": torch.tensor(float(rows), device=device)}
    if problem.policy:
        log_probs = linear.old_log_probs(made["hidden_0"], weight, made["token_ids"])
        made |= {
            "old_log_probs": log_probs + 0.07 * torch.randn_like(log_probs),
            "ref_log_probs": log_probs + 0.3 * torch.randn_like(log_probs),
            "advantages": torch.randn(len(log_probs), 1, device=device),
            "mask": torch.ones(tokens, device=device, dtype=torch.bool),
        }
    return made


def _products(problem: Problem, inputs: Inputs) -> tuple[Tensor, ...]:
    """The logits of all depths and both gradients from as large a matrix: nothing else."""
    hidden = torch.cat([inputs[name].detach().flatten(0, 1) for name in problem.states])
    weight = inputs["weight"].detach()
    logits = hidden @ weight.T
    return logits @ weight, logits.T @ hidden


def _one_depth_peers(problem: Problem, device: str) -> dict[str, Peer | None]:
    """Heads that know one depth; none of them has the loss of a policy as well."""
    if problem.policy:
        return {}
    return peers.cross_entropies(device)


def _providers(problem: Problem, device: str) -> tuple[Provider, ...]:
    def run(forward: Callable[[Inputs], Values]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        return partial(definitions.with_gradients, problem, forward)

    def each(cross_entropy: Peer) -> Peer:
        return partial(definitions.separate, problem, cross_entropy, definitions.one_policy_loss)

    eager = partial(definitions.separate, problem, definitions.kept_logits, definitions.kept_policy_logits)
    found = [
        Provider("ours", run(partial(definitions.together, problem)), "ours"),
        Provider("ours, a call a depth", run(each(definitions.one_cross_entropy)), "peer"),
        Provider("eager", run(eager), "eager"),
        Provider("torch.compile", run(compiled(eager)), "compile"),
        Provider("the bare GEMMs", partial(_products, problem), "part"),
    ]
    others = _one_depth_peers(problem, device).items()
    return (*found, *(Provider(name, run(each(peer)), "peer") for name, peer in others if peer))


def _targets(device: str, dtype: torch.dtype) -> tuple[Target, ...]:
    separate = Target(">= 1x a call a depth", 1.0, ratio("ours, a call a depth", "ours"))
    if device == "cuda":
        rate = Target("6 (D+1) N H V at >= 75 % of the matmul rate", 75.0, figure("percent_of_matmul"))
        return (rate, separate)
    shared = ratio("ours", "ours, a call a depth", "extra_bytes")
    found = [separate, Target("memory <= 1x that of a call a depth", 1.0, shared, at_least=False)]
    if dtype == torch.float32:
        memory = ratio("ours", "eager", "extra_bytes")
        found.append(Target(">= 1x eager", 1.0, ratio("eager", "ours")))
        found.append(Target("memory above inputs and gradients <= 1/4 of eager's", 1 / 4, memory, at_least=False))
    return tuple(found)


def _case(device: str, problem: Problem, shape: Shape, dtype: torch.dtype) -> Case:
    rows, width, vocab = shape
    every = (problem.depths + 1) * rows * vocab
    return Case(
        op="mtp_linear_cross_entropy",
        name=f"{rows}x{width}x{vocab} D={problem.depths} {str(dtype).removeprefix('torch.')}"
        + (" + GRPO" if problem.policy else ""),
        make=partial(_make, problem, shape, dtype),
        providers=_providers(problem, device),
        operations=6 * every * width,
        matmul_dtype=dtype,
        targets=_targets(device, dtype),
        definition=partial(definitions.definition, problem),
        sample_outputs=definitions.sample,
        quick=problem == _PROBLEMS[0] and dtype == (torch.bfloat16 if device == "cuda" else torch.float32),
        memory=4 * every,
        results_are_extra=False,
        absent=tuple(name for name, peer in _one_depth_peers(problem, device).items() if peer is None),
    )


# --- the targets -----------------------------------------------------------------------------------------------------


def _make_targets(device: str, size: str) -> Inputs:
    """Packed documents of many lengths, and a mask."""
    tokens, length = _TARGETS if size == "full" else _SMOKE_TARGETS
    starts = torch.rand(tokens, device=device) < 4 / length
    starts[0] = True
    rows = torch.arange(tokens, device=device)
    positions = rows - torch.where(starts, rows, 0).cummax(0).values
    mask = torch.rand(tokens, device=device) < 0.9
    return {"token_ids": torch.randint(129280, (tokens,), device=device), "positions": positions, "mask": mask}


def _ours_targets(depths: int, inputs: Inputs) -> Values:
    ids = inputs["token_ids"]
    backend = _dispatch.resolve("mtp_linear_cross_entropy", ids)
    return tuple(
        torch.ops.grpo_kernels.mtp_targets(ids, inputs["positions"], inputs["mask"], depths, 1, 0, -100, backend)
    )


def _eager_targets(depths: int, inputs: Inputs) -> Values:
    """Rolled copies of the ids, as trainers have them."""
    ids, positions, mask = (inputs[name] for name in ("token_ids", "positions", "mask"))
    every = []
    for ahead in range(1, depths + 1):
        valid = torch.roll(mask, -ahead) & (torch.roll(positions, -ahead) == positions + ahead)
        valid[-ahead:] = False
        every.append(torch.where(valid, torch.roll(ids, -ahead), -1))
    targets = torch.stack(every)
    return targets, (targets >= 0).sum(1)


def _targets_case(depths: int) -> Case:
    tokens = _TARGETS[0]
    eager = partial(_eager_targets, depths)

    def wide(outputs: Values) -> list[Tensor]:
        return [output.double() for output in outputs]

    return Case(
        op="mtp_linear_cross_entropy",
        name=f"the targets alone, N={tokens} D={depths - 1}",
        make=_make_targets,
        providers=(
            Provider("ours", partial(_ours_targets, depths), "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
        ),
        bytes_moved=tokens * (8 + 8 + 1 + 8 * depths),  # ids, positions and mask read, targets written
        targets=(speedup(2),),
        definition=lambda inputs: wide(eager(inputs)),
        sample_outputs=wide,
    )


def cases(device: str) -> list[Case]:
    """One and two depths behind the model, one behind a policy, and the targets. On a GPU in bf16; on a CPU in fp32,
    with 1/8 of the rows and 1/4 of width and vocabulary, and one in bf16, smaller where the CPU lacks instructions."""
    on_gpu = device == "cuda"
    shape, dtype = (_GPU_SHAPE, torch.bfloat16) if on_gpu else (_CPU_SHAPE, torch.float32)
    heads = [_case(device, problem, shape, dtype) for problem in _PROBLEMS]
    narrow_shape = _SLOW_BF16_SHAPE if machine.multiplies_slowly(torch.bfloat16) else shape
    narrow = [] if on_gpu else [_case(device, _PROBLEMS[0], narrow_shape, torch.bfloat16)]
    return [*heads, *narrow, _targets_case(3)]
