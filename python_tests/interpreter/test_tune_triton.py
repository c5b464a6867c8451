"""The tuner's candidates in Triton's interpreter: each reaches its kernel as an entry of a table, and is accepted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.moe_definitions import QWEN
from bench.tune import problems
from bench.tune.candidates import candidates
from bench.tune.experts import Experts
from bench.tune.heads import Head
from bench.tune.problems import Group, Problem

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
_MODEL = dataclasses.replace(QWEN, experts=2, hidden=32, width=16)
_PROBLEMS: dict[str, Problem] = {
    "forward 16-bit plain": Head("small", 300, 32, 40),
    "dlogits 16-bit lora": Head("small", 300, 32, 40),
    "grouped 16-bit few": Experts(_MODEL, False, 9),
    "grouped_wgrad 16-bit many": Experts(_MODEL, True, 97),
}


@pytest.mark.parametrize("name", _PROBLEMS)
def test_candidates_reach_their_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = next(group for group in problems.GROUPS if group.text == name)
    from grpo_kernels.grouped_gemm import _triton as grouped
    from grpo_kernels.linear_log_probs import _triton as linear

    assert problems.backend_of(torch.empty(0)) == "triton"
    head = group.package == "linear_log_probs"
    module, function = (linear if head else grouped), "wgrad_config" if group.op == "grouped_wgrad" else "launch_config"
    launched, real = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: launched.append(real(*arguments)) or launched[-1])
    torch.manual_seed(0)
    tried = candidates(group.op, 90, group.size)
    other = next(choice for choice in tried if (choice.block_m, choice.block_n) != tried[0][:2])
    inputs = problems.make(group, _PROBLEMS[name], "cpu")
    judge = problems.judge(group, inputs, tried[0])
    assert judge(tried[0]) == {"held": True}
    launched.clear()
    assert judge(other) == {"held": True}
    assert {(config.block_m, config.block_n, config.pieces) for config in launched} == {(*other[:2], other.pieces)}


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another result than the default's is no candidate's."""
    group = Group("grouped", "16-bit few", ())
    inputs = problems.make(group, _PROBLEMS["grouped 16-bit few"], "cpu")
    first, other = candidates(group.op, 90, group.size)[:2]
    judge = problems.judge(group, inputs, first)
    monkeypatch.setitem(inputs, "bias", inputs["bias"] + 1)
    found = judge(other)
    assert (found["held"], found["why"]) == (False, "other bits")
