"""`python -m bench.docs`: writes docs/kernels.md, docs/benchmarks.md, the tables of docs/fp8.md and README.md and the
pictures of the ops' pages from bench/results/*.json.

With --check nothing is written, and the exit status is 1 if a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import docs_fp8, docs_kernels, docs_page, docs_pictures, docs_readme, fp8_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

KINDS = ("benchmarks", "targets", "scaling")

Results = dict[str, Any]


def results(kind: str = "benchmarks") -> dict[str, Results]:
    """Every file of results of a machine, of this kind, by name; rehearsals of gpu-check prove nothing about a GPU."""
    files = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {
        name: content
        for name, content in files.items()
        if "machine" in content and content.get("kind", "benchmarks") == kind and not content.get("rehearsal")
    }


def between_markers(page: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: the page does not have each marker once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN} and one line {END}")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}"


def _benchmarks(old: str) -> str:
    return docs_page.text({kind: results(kind) for kind in KINDS})


def _kernels(old: str) -> str:
    return docs_kernels.text(results())


def _fp8(old: str) -> str:
    return between_markers(old, docs_fp8.text(fp8_bytes.load()))


def _readme(old: str) -> str:
    return between_markers(old, docs_readme.text(results()))


def _op(page: str) -> Callable[[str], str]:
    return lambda old: between_markers(old, docs_pictures.text(page, results()))


PICTURES = {f"docs/{page}.md": page for page in docs_pictures.PAGES}
PAGES: dict[str, Callable[[str], str]] = {
    "docs/kernels.md": _kernels,
    "docs/benchmarks.md": _benchmarks,
    "docs/fp8.md": _fp8,
    "README.md": _readme,
    **{name: _op(page) for name, page in PICTURES.items()},
}


def stale(names: Iterable[str] = tuple(PAGES)) -> dict[Path, str]:
    """Pages that are not what the results say -> what they should be."""
    found = {}
    for name in names:
        path = ROOT / name
        old = path.read_text() if path.is_file() else ""
        try:
            new = PAGES[name](old)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if new != old:
            found[path] = new
    return found


def stale_pictures(names: Iterable[str] = tuple(PAGES)) -> list[str]:
    """Of these pages, the ops whose picture shows other numbers than the results have."""
    files = results()
    return [PICTURES[name] for name in names if name in PICTURES and docs_pictures.stale(PICTURES[name], files)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__)
    parser.add_argument("page", nargs="*", choices=[*PAGES, []], help="these pages; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    arguments = parser.parse_args()
    pages, pictures = stale(arguments.page or PAGES), stale_pictures(arguments.page or PAGES)
    verdict = "stale, run python -m bench.docs" if arguments.check else "written"
    for path, text in pages.items():
        print(f"{path.relative_to(ROOT)}: {verdict}")
        if not arguments.check:
            path.write_text(text)
    for page in pictures:
        print(f"{docs_pictures.path_of(page).relative_to(docs_pictures.ROOT)}: {verdict}")
        if not arguments.check:
            docs_pictures.draw(page, results())
    return 1 if (pages or pictures) and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
