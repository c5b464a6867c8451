"""`python -m examples.trl`: the same GRPO training with TRL as it is, with TRL patched, and with FusedGRPOTrainer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from examples.trl import report
from examples.trl.settings import WAY_NAMES, WAYS, Settings

_MISSING = (
    "examples.trl needs TRL 1.16, which `make demo-trl` installs: pip install 'trl>=1.16,<2' 'transformers>=5.23,<6'"
)
_INTRODUCTION = (
    "TRL's GRPOTrainer trains a tiny model with a large vocabulary: as it is, then after "
    "grpo_kernels.integrations.trl.patch(), then as FusedGRPOTrainer. Each has a process of its own, the same seed and "
    "the same samples. Then a smaller model learns, from its reward alone, to write digits.\n"
)
_EXPLANATION = (
    "\npatch() puts the kernels in the place of TRL's fused head, for all of its trainers; FusedGRPOTrainer computes "
    "the loss and its gradients there, too, in one pass over the head. Both compute what TRL computes: the differences "
    "of losses and gradient norms from TRL's, relative to the largest, are those of rounding. The other seconds of a "
    "step are spent on sampling, which stays TRL's. On a CPU, patched and fused take about the same time."
)


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.trl", description=__doc__)
    add = parser.add_argument
    add("--vocab", type=int, default=default.vocab, help="words of the timed model (default: %(default)s)")
    add("--width", type=int, default=default.width, help="of its hidden states (default: %(default)s)")
    add("--samples", type=int, default=default.samples, help="completions a step (default: %(default)s)")
    add("--tokens", type=int, default=default.tokens, help="of a completion (default: %(default)s)")
    add("--steps", type=int, default=default.steps, help="timed ones (default: %(default)s)")
    add("--learning-steps", type=int, default=default.learning_steps, help="(default: %(default)s)")
    add("--threads", type=int, default=default.threads, help="of PyTorch (default: %(default)s)")
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def run_in_process(way: str, settings: Settings) -> dict[str, Any]:
    """The result of `examples.trl.worker`.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """
    threads = str(settings.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "examples.trl.worker", way, json.dumps(asdict(settings)), str(path)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"training with {WAY_NAMES[way]} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(path.read_text())
    return result


def main(arguments: list[str] | None = None) -> int:
    console = Console()
    settings = parse_arguments(arguments)
    if importlib.util.find_spec("trl") is None:
        console.print(_MISSING, style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    console.print(_INTRODUCTION, highlight=False)
    start = perf_counter()
    results = {}
    for way in WAYS:
        with console.status(f"training with {WAY_NAMES[way]}"):
            try:
                results[way] = run_in_process(way, settings)
            except RuntimeError as error:
                console.print(str(error), style="red", highlight=False, markup=False)
                return 1
        line = f"{WAY_NAMES[way]}: {results[way]['seconds']:.2f} s a step, after {perf_counter() - start:.0f} s"
        console.print(line, highlight=False)
    console.print()
    console.print(report.table(results, settings))
    console.print(_EXPLANATION, highlight=False)
    console.print(f"\n{perf_counter() - start:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
