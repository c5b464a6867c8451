"""`python -m examples.r1.reporting.html_report results.json out.html`: a run as one page that stands by itself."""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path

from examples.r1.reporting import html_parts
from examples.r1.reporting.html_style import STYLE
from examples.r1.results import PipelineResult
from examples.r1.saving.storage import write_atomically

# The page may use its own style and pictures and nothing else, whatever a completion says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(result: PipelineResult) -> str:
    """The whole page. Sections without anything to show are left out."""
    sections = [
        ("Curves", html_parts.curves(result)),
        ("Watch the judge", html_parts.judge_watch(result)),
        ("Stages", html_parts.stage_tables(result)),
        ("Completions", html_parts.samples(result)),
        ("Against the alternatives", html_parts.comparisons(result)),
        ("Memory of PPO", html_parts.ppo(result)),
        ("Settings and machine", html_parts.settings(result)),
    ]
    shown = [(title, _anchor(title), body) for title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for title, anchor, _ in shown)
    bodies = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>' for title, anchor, body in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(html_parts.headline(result))}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
{html_parts.header(result)}
<nav>{links}</nav>
</header>
<main>
{bodies}
</main>
<footer>Made by examples.r1 of grpo_kernels from results.json; this file needs no network.</footer>
</body>
</html>
"""


def save(path: Path, result: PipelineResult) -> None:
    write_atomically(path, page(result))


def load(path: Path) -> PipelineResult:
    """A run's results.json. Raises OSError, or ValueError where it is something else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return PipelineResult.from_json(content)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.r1.reporting.html_report", description=__doc__)
    parser.add_argument("results", type=Path, metavar="results.json", help="of a run, in its folder")
    parser.add_argument("page", type=Path, metavar="out.html", help="is written anew")
    options = parser.parse_args(arguments)
    try:
        save(options.page, load(options.results))
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"examples.r1.reporting.html_report: {options.results}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
