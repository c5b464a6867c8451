"""Runs a function in several gloo processes and brings their results back.

They are forks of a process that has done the imports and no more, so that no thread of it was running.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_START = "forkserver"
_IMPORTS = ["torch", "torch.distributed.fsdp", "hypothesis", "pytest", "grpo_kernels"]


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    except Exception:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results by rank of the importable `function(rank, world, *arguments)` in `world` processes."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    multiprocessing.get_context(_START).set_forkserver_preload(_IMPORTS)  # heeded before the first start
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, folder, function, arguments), nprocs=world, start_method=_START)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
