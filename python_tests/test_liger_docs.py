"""docs/liger.md: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "liger.md"

pytestmark = pytest.mark.usefixtures("native_cpu")


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    assert re.match(r"loss -?\d+\.\d{3}, KL \d+\.\d{3}, clipped [01]\.\d{3}\n", capsys.readouterr().out)
    assert names["per_token_loss"].shape == (4, 16)
    assert names["lm_head"].weight.grad.isfinite().all()
    assert 0 <= names["output"].token_accuracy <= 1
    mask = names["completion_mask"]
    assert not (names["old_logps"] * (1 - mask)).any()
    assert torch.equal(names["targets"] >= 0, mask.bool())
