"""Whether the TRL that the adapters were written for is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from grpo_kernels.integrations._patch import IncompatibleVersion

_MINIMUM = (1, 16)
_MISSING = "grpo_kernels.integrations.trl needs TRL 1.16: pip install 'trl>=1.16,<2' 'transformers>=5.23,<6'"


def require_trl() -> None:
    """Imports nothing.

    Raises:
        ImportError: TRL or transformers is not installed.
        IncompatibleVersion: TRL is older than 1.16.
    """
    for name in ("trl", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(_MISSING, name=name)
    found = importlib.metadata.version("trl")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < _MINIMUM:
        raise IncompatibleVersion(f"grpo_kernels.integrations.trl needs TRL 1.16, got {found}")
