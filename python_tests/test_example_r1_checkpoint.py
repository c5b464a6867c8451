"""Checkpoints of the training example: a crash leaves the last one, and a resumed run is the same run."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.r1.saving import storage
from examples.r1.saving.checkpoint import CheckpointError, CheckpointFolder, Progress
from examples.r1.saving.storage import write_atomically
from examples.r1.stages.stage import Stage
from python_tests.r1_line import SETTINGS, LineStage, saved, train_to


def _state(stage: Stage) -> list[Tensor]:
    moments = [found[name] for found in stage.optimizer.state.values() for name in sorted(found)]
    models = [stage.model, *stage.frozen_models().values()]
    return [*(value for model in models for value in model.state_dict().values()), *moments, stage.tensors()["data"]]


def test_a_stage_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    stage = LineStage(SETTINGS)
    whole = train_to(stage, Progress(), 8)
    checkpoints = saved(tmp_path)
    progress = checkpoints.load(SETTINGS)
    assert progress is not None
    resumed = LineStage(SETTINGS, seed=1)
    checkpoints.restore(resumed)
    assert train_to(resumed, progress, 8) == whole
    assert all(map(torch.equal, _state(resumed), _state(stage)))
    assert len(_state(resumed)) == len(_state(stage)) == 2 * 9 + 3 * 6 + 1


def test_every_figure_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints, stage = CheckpointFolder(tmp_path), LineStage(SETTINGS)
    values = [0.1 + 0.2, float("inf"), -0.0, 5e-324, 1e308 * 1.7]
    records = [{"loss": value, "kl": float("nan")} for value in values]
    facts, evaluations = {"kept": 1 / 3}, [{"step": 0.0, "accuracy": 2 / 3}]
    samples = [{"prompt": "R αβ>", "correct": True}]
    name, count = stage.name, len(values)
    progress = Progress(name, count, {name: records}, {name: evaluations}, {name: facts}, {name: 0.7}, samples)
    checkpoints.save(stage, progress, SETTINGS)
    assert repr(checkpoints.load(SETTINGS)) == repr(progress)  # NaN does not equal itself


# crashes ---------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """Stands for kill -9: nothing that would tidy up afterwards happens."""


class _Faults:
    """Lets some file operations pass; the next one fails, half done. With `kill` so do all that follow."""

    def __init__(self, patch: pytest.MonkeyPatch, passing: int, kill: bool) -> None:
        self.left = passing
        self.kill = kill
        self.happened = False
        for name in ("open", "fsync", "replace", "unlink", "mkdir"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(storage, "open", self._open, raising=False)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.pass_or_fail()
            return function(*arguments, **options)

        return call

    def pass_or_fail(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.kill and self.left < 0):
            self.happened = True
            raise _Killed if self.kill else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self, path: Path, mode: str) -> Any:
        self.pass_or_fail()
        file = builtins.open(path, mode)  # noqa: SIM115
        write = file.write

        def torn(data: bytes) -> int:
            try:
                self.pass_or_fail()
            except BaseException:
                write(data[: len(data) // 2])
                raise
            return write(data)

        return _File(file, torn)


class _File:
    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self._file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _cut_off_saves(folder: Path, kill: bool) -> Iterator[tuple[CheckpointFolder, str]]:
    """A folder for each operation of the second save, at which that save was cut off; and what it raised."""
    for passing in range(100):
        checkpoints, stage = CheckpointFolder(folder / str(passing)), LineStage(SETTINGS)
        progress = train_to(stage, Progress(), 3)
        checkpoints.save(stage, progress, SETTINGS)
        train_to(stage, progress, 5)
        message = ""
        with pytest.MonkeyPatch.context() as patch:
            faults = _Faults(patch, passing, kill)
            try:
                checkpoints.save(stage, progress, SETTINGS)
            except (_Killed, CheckpointError) as error:
                message = str(error) or "killed"
        if not faults.happened:
            assert passing > 10
            return
        yield checkpoints, message
    raise AssertionError("a save has no end")


@pytest.mark.parametrize("kill", [False, True], ids=["disk full", "killed"])
def test_a_save_that_is_cut_off_anywhere_leaves_a_checkpoint(tmp_path: Path, kill: bool) -> None:
    whole = train_to(LineStage(SETTINGS), Progress(), 8)
    found = []
    for checkpoints, message in _cut_off_saves(tmp_path, kill):
        progress = checkpoints.load(SETTINGS)
        assert progress is not None
        found.append(progress.steps_done)
        if message:
            assert message == "killed" if kill else re.search(r"cannot be written: No space left.*--output", message)
        else:
            assert progress.steps_done == 5  # a save that says nothing has saved
        stage = LineStage(SETTINGS, seed=1)
        checkpoints.restore(stage)
        assert train_to(stage, progress, 8) == whole
        checkpoints.save(stage, progress, SETTINGS)
        names = sorted(path.name for path in checkpoints.folder.iterdir())
        assert [name.rsplit("-", 1)[0] for name in names] == ["cold_start-000008", "state.json"]
    assert set(found) == {3, 5}
    assert found == sorted(found) or not kill  # the old one up to some operation, then the new one


def test_the_first_save_cut_off_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    for passing in range(100):
        checkpoints, stage = CheckpointFolder(tmp_path / str(passing)), LineStage(SETTINGS)
        progress = train_to(stage, Progress(), 3)
        with pytest.MonkeyPatch.context() as patch:
            faults = _Faults(patch, passing, kill=True)
            with contextlib.suppress(_Killed):
                checkpoints.save(stage, progress, SETTINGS)
        assert checkpoints.load(SETTINGS) in (None, progress)
        if not faults.happened:
            return


def test_what_a_full_disk_leaves_is_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"results.json: cannot be written: No space left.* is kept"):
            write_atomically(path, "new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_folder_that_is_not_to_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file")
    checkpoints = CheckpointFolder(tmp_path / "output" / "checkpoint")
    for call in (checkpoints.clear, lambda: checkpoints.load(SETTINGS)):
        with pytest.raises(CheckpointError, match=r"output/checkpoint/.*: cannot be written: .* choose another folder"):
            call()
