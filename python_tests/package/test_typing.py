"""A user's own type checker sees the types of the public functions, and not `Any`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Under `mypy --strict` a comment that ignores an error is one itself where there is none.
USER = """
from typing import assert_type

from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, GRPOMetrics, RouterReplay, ScaledTensor
from grpo_kernels.distributed import ExpertParallel, VocabShard
from grpo_kernels.testing import assert_as_accurate


def step(hidden: Tensor, head: grpo_kernels.FusedLMHead, ids: Tensor, rewards: Tensor) -> Tensor:
    groups = grpo_kernels.group_advantages(rewards, group_size=8)
    assert_type(groups, grpo_kernels.GroupAdvantagesOutput)
    assert_type(groups.advantages, Tensor)
    config = GRPOLossConfig.preset("dapo", kl_coef=0.0)
    assert_type(config, GRPOLossConfig)
    out = head.grpo_loss(hidden, ids, None, groups.advantages, ids >= 0, config)
    assert_type(out, grpo_kernels.GRPOLossOutput)
    assert_type(out.metrics, GRPOMetrics)
    assert_type(out.metrics.to_dict(), dict[str, float])
    with grpo_kernels.backend("reference"):
        rows = grpo_kernels.token_log_probs(hidden, ids, vocab_shard=VocabShard(0, 4, None))
    assert_type(rows.entropy, Tensor | None)
    return out.loss


def experts(x: Tensor, moe: grpo_kernels.MoE, gate_up: Tensor, down: Tensor, replay: RouterReplay) -> Tensor:
    hidden, routes = moe(x, replay=replay)
    routes = grpo_kernels.moe_router(hidden, 2)
    assert_type(routes.topk_ids, Tensor)
    assert_type(grpo_kernels.build_permutation(routes.topk_ids, 8), grpo_kernels.Permutation)
    assert_type(grpo_kernels.fp8_quantize(x), ScaledTensor)
    assert_type(grpo_kernels.fp8_quantize(x, transpose="both"), tuple[ScaledTensor, ScaledTensor])
    assert_type(replay[:4], RouterReplay)
    parallel = ExpertParallel(8)
    assert_type(parallel.local_range, tuple[int, int])
    return grpo_kernels.moe_experts(x, gate_up, down, routes, recipe="fp8_block128")


def mistakes(x: Tensor, ids: Tensor) -> None:
    grpo_kernels.token_log_probs(x, "ids")  # type: ignore[arg-type]
    grpo_kernels.token_log_probs(x, ids, temprature=1.0)  # type: ignore[call-arg]
    grpo_kernels.verify_draft(x, ids).tokens  # type: ignore[attr-defined]
    grpo_kernels.grpo_loss(x, None, x, None).loss + "1"  # type: ignore[operator]
    grpo_kernels.GRPOLossConfig.preset("dapo") + 1  # type: ignore[operator]
    grpo_kernels.nothing  # type: ignore[attr-defined]
    assert_as_accurate(1)  # type: ignore[call-arg, arg-type]
"""


def test_types_of_a_users_code(tmp_path: Path) -> None:
    """With the settings and the cache of `make lint`, which has seen torch."""
    (tmp_path / "user.py").write_text(USER)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "user.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "grpo_kernels" / "py.typed").is_file()
    assert (ROOT / "grpo_kernels" / "_C.pyi").is_file()
