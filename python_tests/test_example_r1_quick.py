"""The shorter run: its options, and that every kind of model learns in it."""

from __future__ import annotations

from examples.r1.command_line import parse_arguments
from examples.r1.quick import QUICK
from examples.r1.settings import Settings


def test_the_quick_run_is_the_same_with_less() -> None:
    default, quick = Settings(), parse_arguments(["--quick"])
    for name, value in QUICK.items():
        assert getattr(quick, name) == value < getattr(default, name), name
    assert all(f"{stage}_steps" in QUICK for stage in default.stages)
    assert quick.stages == default.stages


def test_other_options_count_beside_it() -> None:
    settings = parse_arguments(["--prompts", "24", "--quick", "--model", "moe"])
    assert (settings.prompts, settings.model) == (24, "moe")
    assert settings.reasoning_rl_steps == QUICK["reasoning_rl_steps"]
