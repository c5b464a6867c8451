"""What a wheel or an sdist of the package must hold, and must not."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from packaging.tags import Tag
from packaging.utils import parse_sdist_filename, parse_wheel_filename

MOST_BYTES = 20_000_000
SYSTEM_LIBRARIES = re.compile(
    r"(libgomp|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+"
)
"""What manylinux allows, and OpenMP's run time, which torch brings."""
FOREIGN = re.compile(r"(^|/)(lib\w*|[\w.-]*\.libs|torch|triton|nvidia)(\.so|/|-)")
WANTED = {"__init__.py", "_C.pyi", "_bench/__init__.py", "_build_info.py", "_version.py", "build_info.json", "py.typed"}
SDIST = {"CMakeLists.txt", "LICENSE", "cmake/cuda.cmake", "csrc/bindings/module.cpp", "pyproject.toml", "setup.py"}


def problems_of_wheel(path: Path, build_folders: Iterable[str]) -> list[str]:
    """What is wrong with it, in sentences; `build_folders` may not be named inside."""
    name, version, _, tags = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        files = {item: archive.read(item) for item in archive.namelist() if not item.endswith("/")}
    wrong = [f"{path.stat().st_size} bytes, more than {MOST_BYTES}"] if path.stat().st_size > MOST_BYTES else []
    if str(name) != "grpo-kernels":
        wrong.append(f"its name is {name}")
    wrong += _problems_of_record(files)
    wrong += _problems_of_tags(files, tags)
    wrong += [f"{item} has no place in it" for item in files if FOREIGN.search(item)]
    tops = {item.partition("/")[0] for item in files}
    wrong += [f"{top} has no place in it" for top in tops if top != "grpo_kernels" and not top.endswith(".dist-info")]
    wrong += [f"grpo_kernels/{item} is missing" for item in sorted(WANTED) if f"grpo_kernels/{item}" not in files]
    for item, content in files.items():
        wrong += [f"{item} names {text}" for text in build_folders if text.encode() in content]
    for item in (item for item in files if item.endswith(".so")):
        wrong += problems_of_module(item, files[item])
    wrong += _problems_of_build_info(files.get("grpo_kernels/build_info.json", b"{}"))
    if f'"{version}"' not in files.get("grpo_kernels/_version.py", b"").decode():
        wrong.append(f"_version.py does not say {version}")
    return wrong


def problems_of_sdist(path: Path) -> list[str]:
    """What is wrong with it; whether it builds is another question."""
    name, version = parse_sdist_filename(path.name)
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}
        record = (
            archive.extractfile(files["grpo_kernels/build_info.json"])
            if "grpo_kernels/build_info.json" in files
            else None
        )
        wrong = _problems_of_build_info(record.read() if record else b"{}")
    if str(name) != "grpo-kernels" or version.local:
        wrong.append(f"it is called {path.name}")
    wrong += [f"{item} is missing" for item in sorted(SDIST - set(files))]
    wrong += [
        f"{item} has no place in it" for item in files if re.search(r"\.(so|o|pyc)$|^(build|dist|outputs)/", item)
    ]
    return wrong


def is_native(path: Path) -> bool:
    """Whether a wheel holds the extension, by its name."""
    return not path.name.endswith("-none-any.whl")


def _problems_of_record(files: dict[str, bytes]) -> list[str]:
    """RECORD names every file but itself, each with its digest and size."""
    names = [item for item in files if item.endswith(".dist-info/RECORD")]
    if len(names) != 1:
        return [f"it has {len(names)} files RECORD"]
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files[names[0]].decode()))}
    wrong = [f"RECORD and the archive differ about {item}" for item in sorted(set(rows) ^ set(files))]
    for item, (digest, size) in rows.items():
        if item == names[0] or item not in files:
            continue
        content = files[item]
        right = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if (digest, size) != (f"sha256={right}", str(len(content))):
            wrong.append(f"RECORD is wrong about {item}")
    return wrong


def _problems_of_tags(files: dict[str, bytes], tags: frozenset[Tag]) -> list[str]:
    """The name and WHEEL agree; an extension goes with an interpreter and a manylinux, and neither without one."""
    text = next((files[item].decode() for item in files if item.endswith(".dist-info/WHEEL")), "")
    wrong = []
    if set(re.findall(r"^Tag: (.*)$", text, flags=re.MULTILINE)) != {str(tag) for tag in tags}:
        wrong.append("WHEEL has other tags than the name")
    modules = [item for item in files if item.endswith(".so")]
    for tag in tags:
        if not modules and str(tag) != "py3-none-any":
            wrong.append(f"{tag} without an extension")
        if modules and not (tag.interpreter == tag.abi and tag.platform.startswith("manylinux")):
            wrong.append(f"{tag} with an extension")
        if modules and [re.sub(r".*/_C\.cpython-(\d+)-.*", r"cp\1", item) for item in modules] != [tag.abi]:
            wrong.append(f"{tag} with {', '.join(modules)}")
    return wrong


def _problems_of_build_info(record: bytes) -> list[str]:
    commit = str(json.loads(record).get("commit", ""))
    return [] if re.fullmatch(r"[0-9a-f]{40}", commit) else [f"the commit is {commit or 'missing'}"]


def problems_of_module(name: str, content: bytes) -> list[str]:
    """Of a shared library: what it needs must be on every system or come with torch, and is found without a path."""
    dynamic = ELFFile(io.BytesIO(content)).get_section_by_name(".dynamic")
    if not isinstance(dynamic, DynamicSection):
        return [f"{name} is not a shared library"]
    wrong = []
    for tag in dynamic.iter_tags():
        if tag.entry.d_tag == "DT_NEEDED" and not SYSTEM_LIBRARIES.fullmatch(tag.needed):
            wrong.append(f"{name} needs {tag.needed}")
        if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            wrong.append(f"{name} has a {tag.entry.d_tag}")
    return wrong
