"""What a run works with: interpreter, device, folders, environment."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 570.0  # seconds: ten minutes, less what starting and copying results may take


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interpreter(rehearse: bool) -> str:
    """The Python that runs the phases: the caller's; in a rehearsal on a development machine, that of `.venv`."""
    asked = os.environ.get("GK_PYTHON")
    if asked:
        found = shutil.which(asked)
        return os.path.abspath(found) if found else asked  # phases look for programs beside it
    developers = ROOT / ".venv" / "bin" / "python"
    return str(developers) if rehearse and developers.exists() else sys.executable


@dataclass(frozen=True)
class Settings:
    rehearse: bool  # on the CPU, where there is no GPU
    python: str
    work: Path  # what is kept from run to run: builds, caches, outcomes
    output: Path  # what is brought home
    budget: float = BUDGET
    bench_seconds: float = 0.5  # for each case
    workers: int = 1
    fresh: bool = False  # keep nothing that an earlier run found out

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def stretch(self) -> float:
        """Limits of phases are for BUDGET seconds; a larger budget stretches them."""
        return max(1.0, self.budget / BUDGET)

    def environment(self) -> dict[str, str]:
        """That of the phases."""
        site = self.work / "site"
        here = Path(self.python).parent  # not resolved: a virtual environment's python is a link
        added = [str(here), str(site / "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        caches = {"TRITON_CACHE_DIR": str(self.work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        return {
            **({} if " " in str(self.work) else caches),  # Inductor does not quote the path for the compiler
            **{key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")},
            "PATH": os.pathsep.join(filter(None, added)),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(site), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",  # what a phase printed before it was killed is wanted most
            "OMP_WAIT_POLICY": "passive",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
