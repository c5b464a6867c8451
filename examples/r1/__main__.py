"""`python -m examples.r1`: the whole demonstration."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from examples.r1.command_line import parse_arguments
from examples.r1.demo import run
from examples.r1.errors import RunError
from examples.r1.interrupt import Interrupted, signals_handled
from examples.r1.parallel import Ranks

WRONG = 2  # exit code of what the user can put right


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    settings = parse_arguments(given)
    is_main = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(Ranks.from_environment(settings.device))
        except ValueError as error:
            return _say(f"examples.r1: {error}", WRONG)
        try:
            with signals_handled():
                run(settings, Console(quiet=not is_main), ranks)
        except Interrupted as stop:
            where = f"with a checkpoint in {settings.output / 'checkpoint'}" if stop.saved else "at once"
            text = f"stopped {where}; to go on from the last one:\n{_resuming(given)}"
            return _say(text, stop.exit_code, is_main)
        except (RunError, ModuleNotFoundError) as error:  # the same on all ranks
            return _say(f"examples.r1: {error}", WRONG, is_main)
    return 0


def _resuming(given: Sequence[str]) -> str:
    """The command line that goes on: a run resumes with the options that it was started with."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks else "python"
    return f"{launcher} -m examples.r1 {shlex.join([*(word for word in given if word != '--resume'), '--resume'])}"


def _say(text: str, code: int, loud: bool = True) -> int:
    if loud:
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
