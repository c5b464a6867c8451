"""The launcher that spares the builds of the packaging tests what one of them has compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.package import compile_once

COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="c++ is not installed")


def build(folder: Path, text: str, *options: str, value: int = 1) -> tuple[int, Path, int]:
    """Exit status, the object, and how many different ones there are by now."""
    (folder / "include").mkdir(parents=True, exist_ok=True)
    (folder / "include" / "value.h").write_text(f"#define VALUE {value}\n")
    source, target = folder / "source.cpp", folder / "object.o"
    source.write_text(text)
    target.unlink(missing_ok=True)
    line = [sys.executable, compile_once.__file__, folder.parent / "objects", COMPILER, f"-I{folder}/include", *options]
    line += ["-MD", "-MT", target, "-MF", f"{target}.d", "-o", target, "-c", source]
    done = subprocess.run([str(word) for word in line], capture_output=True)
    return done.returncode, target, len(list((folder.parent / "objects").glob("*.o")))


def test_what_is_the_same_is_compiled_once(tmp_path: Path) -> None:
    text = '#include "value.h"\nint answer() { return VALUE; }\n'
    status, first, count = build(tmp_path / "a", text)
    assert (status, count) == (0, 1)
    status, again, count = build(tmp_path / "b", text)  # another folder
    assert (status, count) == (0, 1)
    assert again.read_bytes() == first.read_bytes()
    assert "include/value.h" in Path(f"{again}.d").read_text()
    for others, options in ((2, {"value": 2}), (3, {"text": text.replace("answer", "reply")})):
        assert build(tmp_path / "b", **{"text": text, **options})[::2] == (0, others)
    assert build(tmp_path / "b", text, "-DNDEBUG")[::2] == (0, 4)
    assert build(tmp_path / "b", text, "-O2")[::2] == (0, 5)


def test_what_does_not_compile_is_an_error(tmp_path: Path) -> None:
    for text in ("int answer() { return none; }\n", '#include "missing.h"\n'):
        status, target, count = build(tmp_path / "a", text)
        assert status != 0
        assert count == 0
        assert not target.exists()


def test_a_cached_object_is_what_is_linked(tmp_path: Path) -> None:
    """The launcher takes the object that is kept: one that was exchanged shows up."""
    text = "int answer() { return 42; }\n"
    build(tmp_path / "a", text)
    (kept,) = (tmp_path / "objects").glob("*.o")
    kept.write_bytes(b"kept")
    assert build(tmp_path / "b", text)[1].read_bytes() == b"kept"
