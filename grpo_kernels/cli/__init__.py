"""The command `grpo-kernels`: one module per subcommand, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "env": "versions, what was built, the devices, and the backend that each op takes on them",
    "verify": "every op and backend, value and gradient, against float64 on your devices",
    "bench": "time, bandwidth and memory of every op against eager PyTorch, torch.compile and peers",
}
"""Subcommand (and module of this package) -> what it prints or does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns its exit status.

    A subcommand's module has `add_arguments(parser)` and `run(arguments) -> int`.
    """
    parser = argparse.ArgumentParser(prog="grpo-kernels", description="Tools of the grpo_kernels package.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        module.add_arguments(commands.add_parser(name, help=description, description=module.__doc__))
    parsed = parser.parse_args(arguments)
    status: int = importlib.import_module(f"{__name__}.{parsed.command}").run(parsed)
    return status
