"""docs/transformers.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]
PAGE = Path(__file__).parents[2] / "docs/transformers.md"


def test_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
