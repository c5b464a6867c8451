"""Hook of the site: Markdown that lies outside docs/ becomes its pages, and every link is one that the site can serve.

The pages are read in the repository too, so links there are paths between files. Those to a page of the site stay
links; those to any other file become the file's name or, where `repo_url` of mkdocs.yml is set, a link into the
repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# File of the repository -> page of the site. Pages of docs/ have their own names.
GUESTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/r1/README.md": "examples/r1.md",
}
_FENCED = re.compile(r"^(?P<fence> *(?:```+|~~~+)).*?^(?P=fence)\s*?$", re.MULTILINE | re.DOTALL)
_CODE = r"(?P<code>`+).+?(?P=code)(?!`)(?!\])"
_LINK = re.compile(_CODE + r"|(?P<start>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s]+)\)", re.DOTALL)
_ELSEWHERE = re.compile(r"[a-z]+:|#")


def outside_code(markdown: str, change: Callable[[re.Match[str]], str]) -> str:
    """The text with every link replaced by what `change` makes of its match; blocks and spans of code stay."""

    def links(text: str) -> str:
        return _LINK.sub(lambda match: change(match) if match["target"] else match[0], text)

    parts, end = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [links(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, links(markdown[end:])])


def source_of(page: str) -> str:
    """Path in the repository of a page of the site."""
    return {site: path for path, site in GUESTS.items()}.get(page, f"docs/{page}")


def served(path: str, target: str, repository: str | None = None) -> tuple[str | None, str]:
    """What a link becomes.

    Args:
        path: The file that has it, from the repository's root.
        target: As it stands there.
        repository: Address of the repository, if there is one.

    Returns:
        Its target in the site or the repository, None if there is none to link to, and the path of the file that is
        meant.

    Raises:
        PluginError: there is no such file.
    """
    name, mark, anchor = target.partition("#")
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    if meant.startswith("..") or not (ROOT / meant).exists():
        raise PluginError(f"{path}: no file is at the link {target!r}")
    page = meant.removeprefix("docs/") if meant.startswith("docs/") else GUESTS.get(meant)
    if page is not None:
        here = path.removeprefix("docs/") if path.startswith("docs/") else GUESTS[path]
        return posixpath.relpath(page, posixpath.dirname(here) or ".") + mark + anchor, meant
    if repository is None:
        return None, meant
    kind = "tree" if (ROOT / meant).is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/main/{meant}{mark}{anchor}", meant


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, page in GUESTS.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = source_of(page.file.src_uri)

    def change(match: re.Match[str]) -> str:
        if _ELSEWHERE.match(match["target"]):
            return match[0]
        target, meant = served(path, match["target"], config.repo_url)
        if target is not None:
            return f"{match['start']}{target})"
        return match["text"] if match["text"].strip("`") == meant else f"{match['text']} (`{meant}`)"

    return outside_code(markdown, change)
