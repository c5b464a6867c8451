"""docs/trl.md: its programs run as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs TRL")

import trl

from grpo_kernels.integrations.trl import is_patched, unpatch

pytestmark = [pytest.mark.trl, pytest.mark.slow]

_PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
_PROGRAMS = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("program", _PROGRAMS, ids=["patch", "fused"])
def test_a_program_runs(program: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = '"outputs", use_cpu=True, bf16=False, report_to=[]'
    program = program.replace('"path/to/model"', repr(model_folder)).replace('"outputs"', here)
    names: dict[str, Any] = {}
    try:
        exec(compile(program, str(_PAGE), "exec"), names)
        assert is_patched() == ("patch()" in program)
    finally:
        unpatch()
    assert isinstance(names["trainer"], trl.GRPOTrainer)
    assert names["trainer"].state.global_step == 2
