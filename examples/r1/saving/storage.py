"""Files of a run: each is there whole or not at all, and one that was damaged says so."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from examples.r1.errors import RunError

_TEMPORARY = ".tmp"
_DIGEST = "sha256"  # its name among the metadata


class CheckpointError(RunError):
    """A file of a run cannot be written or read. The message names the file and says what to do."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in one move: whoever reads it, be it after a power cut, sees the old one or the new one.

    Raises CheckpointError if it cannot be written; then the old one is still there.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; what was there before is kept. "
            "Make room or allow writing there, or choose another folder with --output"
        ) from error


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that every reader takes, in one move."""
    write_atomically(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in types that JSON has: NaN and infinities become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def check_writable(folder: Path) -> None:
    """Raises CheckpointError if files cannot be written there. Creates the folder if there is none."""
    probe = folder / f"writable{_TEMPORARY}"
    write_atomically(probe, "")
    remove(probe)


def remove(path: Path) -> None:
    """Removes a file, if it is there. Raises CheckpointError if that is not possible."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed: {error.strerror or error}") from error


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left half written."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        with suppress(OSError):
            path.unlink()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors atomically, as a safetensors file that holds their digest.

    Raises CheckpointError if it cannot be written; then the old one is still there.
    """
    entries = {**(metadata or {}), _DIGEST: digest_of(tensors)}
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    write_atomically(path, save(copies, entries))


def load_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file that `save_tensors` wrote.

    Raises CheckpointError if it is missing, cut off or altered; the message ends with the remedy.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file; {remedy}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is cut off or damaged ({error}); {remedy}") from error
    if metadata.pop(_DIGEST, None) != digest_of(tensors):
        raise CheckpointError(f"{path}: is damaged: its tensors are not those that were written; {remedy}")
    return tensors, metadata


def _sync_folder(folder: Path) -> None:
    """After this, moves into the folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot do this for a folder
            raise
    finally:
        os.close(descriptor)
