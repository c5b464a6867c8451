"""docs/verl.md: its example runs, and it names what is registered, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "verl.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_example_runs(adapter: ModuleType) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["sum_pi_squared"].shape == names["labels"].shape
    assert names["weight"].grad is not None


def test_it_names_what_is_registered(adapter: ModuleType) -> None:
    rows = [line.split("|")[1] for line in section("Policy losses").splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([a-z_]+)`", "".join(rows[1:]))) == set(adapter.POLICY_LOSSES)
    listed = section("Advantage estimators").split("each after")[0]
    assert set(re.findall(r"`([a-z_]+)`", listed)) == set(adapter.ESTIMATORS)
    for name in re.findall(r"grpo_kernels:([a-z_]+)", PAGE):
        assert name in {*adapter.POLICY_LOSSES, *adapter.ESTIMATORS, "bypass_mode"}
