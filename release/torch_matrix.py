"""`make test-torch-matrix`: one wheel under several versions of torch, in fresh environments, one after another."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from release import contents, interpreters
from release.environment import Failed, fresh, verify

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """0 where the wheel passes under every version."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser = argparse.ArgumentParser(prog="python -m release.torch_matrix", description=__doc__)
    parser.add_argument("--torch", action="append", required=True, metavar="VERSION", help="may be repeated")
    parser.add_argument("--python", default=here, metavar="3.X", help=f"{here} by default")
    parser.add_argument("--wheel", type=Path, help="by default the one in dist/ for this Python")
    parser.add_argument("--dtype", action="append", default=[], help="verify these alone; all by default")
    options = parser.parse_args(arguments)
    tag = f"cp{options.python.replace('.', '')}"
    wheels = [options.wheel] if options.wheel else sorted((ROOT / "dist").glob(f"*-{tag}-{tag}-manylinux*.whl"))
    found = interpreters.find()
    if len(wheels) != 1 or options.python not in found:
        parser.error(f"needs Python {options.python} and one wheel for it; here are {', '.join(found)}; {wheels}")
    choice = [word for dtype in options.dtype for word in ("--dtype", dtype)]
    failures = 0
    print(f"{wheels[0].name} under Python {options.python}")
    for torch in options.torch:
        start = time.perf_counter()
        try:
            with fresh(found[options.python]) as environment:
                environment.install(f"torch=={torch}")
                environment.install("--no-deps", str(wheels[0].resolve()))
                version, summary, _ = verify(environment, contents.is_native(wheels[0]), choice)
        except Failed as failure:
            failures += 1
            print(f"FAILED torch {torch}: {failure}", flush=True)
        else:
            print(f"passed torch {version}: {summary} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
