"""Which sources a row was compiled from: a hash that changes when their code does, and not when a comment does."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _with_headers(source: Path) -> list[Path]:
    """A C++ source and everything of csrc that it includes."""
    seen: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.append(path)
            names = re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)
            waiting += [ROOT / "csrc" / name for name in names]
    return sorted(seen)


def _imports(source: Path) -> set[str]:
    """What a Python source imports: `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _with_shared(package: Path, sources: Iterable[Path]) -> set[Path]:
    """The Triton sources of an op, and everything of the package's own Triton sources that they import."""
    shared = {f"{package.name}.{path.stem}": path for path in package.glob("_*triton.py")}
    seen: set[Path] = set()
    waiting = list(sources)
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [shared[name] for name in _imports(path) & shared.keys()]
    return seen


def _without_comments(text: str) -> str:
    """Python without its comments. Not by its syntax tree: that looks different in every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return "\n".join(lines)


def code(path: Path) -> str:
    """The text of a source without its comments and its spacing."""
    text = path.read_text()
    if path.suffix == ".py":
        return " ".join(_without_comments(text).split())
    return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL).split())


def of(op: str, compiler: str) -> str:
    """Hash of the code that `compiler` ("nvcc ..." or "Triton ...") makes the kernels of an op from."""
    if compiler.startswith("nvcc"):
        sources = {path for source in (ROOT / "csrc" / op).glob("*.cu") for path in _with_headers(source)}
    else:
        sources = _with_shared(ROOT / "grpo_kernels", (ROOT / "grpo_kernels" / op).glob("_*triton.py"))
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(code(path).encode())
    return digest.hexdigest()[:16]
