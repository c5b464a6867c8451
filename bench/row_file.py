"""Records as JSON that can be read and compared line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(content: Mapping[str, Any], path: Path) -> None:
    """Writes an entry a line, and of an entry that is a list an item a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
