"""What builds and checks releases: records of commits, contents of wheels, interpreters, and the definitions of CI."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from grpo_kernels import _build_info, _extension
from release import contents, interpreters, wheels

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- which sources ----------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    line = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with one commit, of 2001-09-09 01:46:40 UTC."""
    folder = tmp_path / "clone"
    (folder / "grpo_kernels").mkdir(parents=True)
    (folder / "grpo_kernels" / "a.py").write_text("1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    dates = {"GIT_AUTHOR_DATE": "1000000000 +0000", "GIT_COMMITTER_DATE": "1000000000 +0000"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dates.items():
            patch.setenv(name, value)
        git(folder, "commit", "-qm", "one")
    return folder


@pytest.fixture(autouse=True)
def _no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def test_a_clone_has_its_commit_and_says_what_differs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(clone, "rev-parse", "HEAD")
    assert _build_info.of_sources(clone) == (head, "2001-09-09")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert _build_info.of_sources(clone) == (head, "1970-01-01")
    (clone / "grpo_kernels" / "a.py").write_text("2\n")
    assert _build_info.of_sources(clone).commit == f"{head}+dirty"


def test_a_folder_inside_another_repository_is_not_of_its_commit(clone: Path) -> None:
    inside = clone / "unpacked"
    (inside / "grpo_kernels").mkdir(parents=True)
    assert _build_info.of_sources(inside) == ("unknown", "unknown")
    _build_info.BuildInfo(COMMIT, "2001-09-09").write(inside / "grpo_kernels" / _build_info.RECORD)
    assert _build_info.of_sources(inside) == (COMMIT, "2001-09-09")


def test_without_git_the_commit_is_unknown(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(clone))
    assert _build_info.of_sources(clone) == ("unknown", "unknown")


@pytest.mark.parametrize(
    ("label", "status", "text"),
    [
        ("", 0, r"\d+\.\d+\.\d+"),
        ("cu128", 0, r"\d+\.\d+\.\d+\+cu128"),
        ("CUDA 12", 1, "GRPO_KERNELS_LOCAL_VERSION must be .*, got 'CUDA 12'"),
    ],
)
def test_a_label_joins_the_version(label: str, status: int, text: str) -> None:
    environment = {**os.environ, "GRPO_KERNELS_LOCAL_VERSION": label, "GRPO_KERNELS_NATIVE": "0"}
    line = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert re.fullmatch(text, (done.stderr if status else done.stdout).splitlines()[-1])


# --- contents ---------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, tag: str = "py3-none-any", **changes: bytes | None) -> Path:
    """A wheel with every file that is wanted; `changes` name files of the package, None for one that is left out."""
    files: dict[str, bytes] = {f"grpo_kernels/{name}": b"" for name in contents.WANTED}
    files["grpo_kernels/build_info.json"] = json.dumps({"commit": COMMIT}).encode()
    files["grpo_kernels/_version.py"] = b'__version__ = "1.0"\n'
    files["grpo_kernels-1.0.dist-info/WHEEL"] = f"Wheel-Version: 1.0\nTag: {tag}\n".encode()
    files |= {name: content for name, content in changes.items() if content is not None}
    files = {name: content for name, content in files.items() if name not in changes or changes[name] is not None}
    record = "grpo_kernels-1.0.dist-info/RECORD"
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}\n")
    path = folder / f"grpo_kernels-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(record, "".join(rows) + f"{record},,\n")
    return path


def test_a_pure_wheel_with_everything_passes(tmp_path: Path) -> None:
    assert contents.problems_of_wheel(make_wheel(tmp_path), ["/build/"]) == []


@pytest.mark.parametrize(
    ("tag", "changes", "problem"),
    [
        ("py3-none-any", {"grpo_kernels.libs/libgomp-a1.so.1": b""}, "libgomp-a1.so.1 has no place in it"),
        ("py3-none-any", {"torch/lib/a.py": b""}, "torch has no place in it"),
        ("py3-none-any", {"python_tests/a.py": b""}, "python_tests has no place in it"),
        ("py3-none-any", {"grpo_kernels/py.typed": None}, "grpo_kernels/py.typed is missing"),
        ("py3-none-any", {"grpo_kernels/a.py": b"/build/a"}, "grpo_kernels/a.py names /build/"),
        ("py3-none-any", {"grpo_kernels/a.py": bytes(20_000_001)}, "more than 20000000"),
        ("py3-none-any", {"grpo_kernels/build_info.json": b'{"commit": "unknown"}'}, "the commit is unknown"),
        ("py3-none-any", {"grpo_kernels/_version.py": b'"2.0"'}, "_version.py does not say 1.0"),
        ("py3-none-any", {"grpo_kernels-1.0.dist-info/WHEEL": b"Tag: py2-none-any\n"}, "WHEEL has other tags"),
        ("cp311-cp311-linux_x86_64", {}, "cp311-cp311-linux_x86_64 without an extension"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_said(
    tmp_path: Path, tag: str, changes: dict[str, bytes | None], problem: str
) -> None:
    assert problem in "; ".join(contents.problems_of_wheel(make_wheel(tmp_path, tag, **changes), ["/build/"]))


def test_a_record_that_differs_is_found(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("grpo_kernels/more.py", "")
    assert contents.problems_of_wheel(path, []) == ["RECORD and the archive differ about grpo_kernels/more.py"]


@pytest.mark.usefixtures("native_cpu")
def test_an_extension_goes_with_its_interpreter_and_a_manylinux(tmp_path: Path) -> None:
    module = Path(str(_extension.extension().__file__))
    digits = "".join(map(str, sys.version_info[:2]))
    extension = {f"grpo_kernels/{module.name}": module.read_bytes()}
    native = [f"cp{digits}-cp{digits}-{platform}" for platform in ("manylinux_2_28_x86_64", "linux_x86_64")]
    assert contents.problems_of_wheel(make_wheel(tmp_path, native[0], **extension), []) == []
    for tag in (native[1], "cp310-cp310-manylinux_2_28_x86_64", "py3-none-any"):
        wrong = contents.problems_of_wheel(make_wheel(tmp_path, tag, **extension), [])
        assert wrong
        assert all(sentence.startswith(f"{tag} with ") for sentence in wrong)


def test_a_library_that_no_system_has_is_named() -> None:
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    wrong = contents.problems_of_module("a.so", library.read_bytes())
    assert "a.so needs libtorch_cpu.so" in wrong or "a.so needs libtorch.so" in wrong
    assert any(sentence.startswith("a.so has a DT_R") for sentence in wrong)


def test_an_sdist_has_the_same_bytes_whenever_and_by_whomever_it_is_made(tmp_path: Path) -> None:
    made = []
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        path = tmp_path / f"{number}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                file = tmp_path / name
                file.write_text(name)
                os.utime(file, (number, number))
                entry = archive.gettarinfo(file, name)
                entry.uid, entry.uname = number, f"user{number}"
                archive.addfile(entry, file.open("rb"))
        wheels.normalise(path, 1_000_000_000)
        made.append(path.read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tmp_path / "0.tar.gz") as archive:
        assert [(entry.name, entry.mtime, archive.extractfile(entry).read()) for entry in archive] == [
            ("a", 1_000_000_000, b"a"),
            ("b", 1_000_000_000, b"b"),
        ]


# --- what is built, and where -----------------------------------------------------------------------------------------


def test_cibuildwheel_builds_for_the_supported_interpreters() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    assert options["build"].split() == [f"cp{version.replace('.', '')}-*" for version in interpreters.supported()]
    excluded = re.findall(r"--exclude (\S+)", options["linux"]["repair-wheel-command"])
    assert tuple(excluded) == wheels.SHARED
    script = options["linux"]["before-all"].rpartition("{package}/")[2]
    assert (ROOT / script).is_file()


def test_only_interpreters_that_can_build_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on PATH that starts nothing, or another version, is passed over."""
    for version, text in {"3.13": "exit 1", "3.14": f'exec {sys.executable} "$@"'}.items():
        (tmp_path / f"python{version}").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / f"python{version}").chmod(0o755)
    monkeypatch.setattr(interpreters, "MANAGED", ())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = interpreters.find()
    assert set(found) <= set(interpreters.supported())
    for version, path in found.items():
        line = [str(path), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        assert subprocess.check_output(line, text=True).strip() == version
    assert not {"3.13", "3.14"} & {version for version, path in found.items() if path.parent == tmp_path}


def make_targets(text: str) -> list[str]:
    return re.findall(r"\bmake ([a-z-]+)", "\n".join(line for line in text.splitlines() if not line.startswith("#")))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = make_targets("\n".join(commands))
    assert called
    assert set(called) <= targets
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"[\w/-]+@(v\d+|release/v\d+)", step.get("uses", "a@v1"))


def test_ci_of_the_repository_and_of_its_host_run_the_same() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    hosted = [
        target
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for target in make_targets(step.get("run", ""))
    ]
    assert hosted == make_targets((ROOT / ".ci" / "run").read_text(encoding="utf-8"))


def test_nothing_is_published_by_default() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))
    writers = {name for name, job in workflow["jobs"].items() if "permissions" in job}
    assert writers == {"publish"}
    condition = workflow["jobs"]["publish"]["if"]
    assert "github.ref_type == 'tag'" in condition
    assert "vars.PUBLISH_TO_PYPI == 'true'" in condition
    assert " || " not in condition
