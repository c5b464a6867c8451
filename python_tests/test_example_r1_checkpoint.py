"""Checkpoints of the training example: a crash leaves the last one, damage is named, a resumed run is the same run."""

from __future__ import annotations

import builtins
import contextlib
import copy
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.r1 import storage
from examples.r1.checkpoint import CheckpointError, CheckpointFolder, CheckpointMismatch, Progress
from examples.r1.results import Record
from examples.r1.settings import Settings
from examples.r1.stage import Stage
from examples.r1.storage import load_tensors, save_tensors, write_atomically


class _Stage(Stage):
    """Learns a line from points, with a frozen copy of its start and data of its own."""

    name = "cold_start"
    title = "a line"

    def __init__(self, settings: Settings, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model.mtp = None
        super().__init__(model, SimpleNamespace(settings=settings, device=torch.device("cpu")), 1e-2)  # type: ignore[arg-type]
        self.reference: Any = copy.deepcopy(model)
        self.data = torch.randn(16, 3)

    def step(self, index: int) -> Record:
        rows = torch.randint(16, (8,), generator=torch.Generator().manual_seed(index))
        x = self.data[rows]
        loss = (self.model(x) - self.reference(x).detach() - x.sum(dim=1, keepdim=True)).square().mean()
        return {"grad_norm": self.descend(loss, index), "loss": float(loss.detach())}

    def frozen_models(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data, "kept": self.data[:, 0] > 0, "view": self.data[:, 1]}

    def restore(self, tensors: Any) -> None:
        self.data = tensors["data"]


SETTINGS = Settings(stages=("cold_start", "reasoning_rl"))


def _train(stage: Stage, progress: Progress, until: int) -> Progress:
    progress.stage = stage.name
    records = progress.records.setdefault(stage.name, [])
    for index in range(progress.steps_done, until):
        records.append(stage.step(index))
        progress.steps_done = index + 1
    return progress


def _saved(folder: Path, steps: int = 3) -> CheckpointFolder:
    """A folder with a checkpoint after some steps."""
    checkpoints, stage = CheckpointFolder(folder), _Stage(SETTINGS)
    checkpoints.save(stage, _train(stage, Progress(), steps), SETTINGS)
    return checkpoints


def _state(stage: Stage) -> list[Tensor]:
    moments = [found[name] for found in stage.optimizer.state.values() for name in sorted(found)]
    models = [stage.model, *stage.frozen_models().values()]
    return [*(value for model in models for value in model.state_dict().values()), *moments, stage.tensors()["data"]]


def test_a_stage_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    stage = _Stage(SETTINGS)
    whole = _train(stage, Progress(), 8)
    checkpoints = _saved(tmp_path)
    progress = checkpoints.load(SETTINGS)
    assert progress is not None
    resumed = _Stage(SETTINGS, seed=1)
    checkpoints.restore(resumed)
    assert _train(resumed, progress, 8) == whole
    assert all(map(torch.equal, _state(resumed), _state(stage)))
    assert len(_state(resumed)) == len(_state(stage)) == 2 * 9 + 3 * 6 + 1


def test_every_figure_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints, stage = CheckpointFolder(tmp_path), _Stage(SETTINGS)
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
        checkpoints, stage = CheckpointFolder(folder / str(passing)), _Stage(SETTINGS)
        progress = _train(stage, Progress(), 3)
        checkpoints.save(stage, progress, SETTINGS)
        _train(stage, progress, 5)
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
    whole = _train(_Stage(SETTINGS), Progress(), 8)
    found = []
    for checkpoints, message in _cut_off_saves(tmp_path, kill):
        progress = checkpoints.load(SETTINGS)
        assert progress is not None
        found.append(progress.steps_done)
        if message:
            assert message == "killed" if kill else re.search(r"cannot be written: No space left.*--output", message)
        else:
            assert progress.steps_done == 5  # a save that says nothing has saved
        stage = _Stage(SETTINGS, seed=1)
        checkpoints.restore(stage)
        assert _train(stage, progress, 8) == whole
        checkpoints.save(stage, progress, SETTINGS)
        names = sorted(path.name for path in checkpoints.folder.iterdir())
        assert [name.rsplit("-", 1)[0] for name in names] == ["cold_start-000008", "state.json"]
    assert set(found) == {3, 5}
    assert found == sorted(found) or not kill  # the old one up to some operation, then the new one


def test_the_first_save_cut_off_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    for passing in range(100):
        checkpoints, stage = CheckpointFolder(tmp_path / str(passing)), _Stage(SETTINGS)
        progress = _train(stage, Progress(), 3)
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


# damage ----------------------------------------------------------------------------------------------------------


def _edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "state.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", r"is cut off or damaged \(Expecting value"),
        (lambda text: text[: len(text) // 2], "is cut off or damaged"),
        (lambda text: b"\xff\xfe" + text.encode(), "is cut off or damaged"),
        (lambda text: "[]", "has format None, and this program reads format 2"),
        (lambda text: text.replace('"format": 2', '"format": 1'), "has format 1, and this program reads format 2"),
        (lambda text: text.replace('"sha256"', '"sha"'), "is damaged: it lacks sha256"),
        (lambda text: text.replace('"progress"', '"state"'), "is damaged: it lacks progress"),
        (lambda text: text.replace('"steps_done": 3', '"steps_done": "3"'), "it lacks progress.steps_done"),
        (
            lambda text: text.replace('"steps_done": 3', '"steps_done": 4'),
            "records of the last stage's steps are missing",
        ),
        (lambda text: text.replace('"stage": "cold_start"', '"stage": "cold"'), "records of the last stage's steps"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, damage: Callable[[str], str | bytes], message: str) -> None:
    checkpoints = _saved(tmp_path)
    path = tmp_path / "state.json"
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(CheckpointError, match=rf"{path}: .*{message}.*run without --resume"):
        checkpoints.load(SETTINGS)


def _tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "is cut off or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut off or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is cut off or damaged"),
        (lambda path: _flip(path, -1), "are not those that were written"),
        (lambda path: _flip(path, 3), "is cut off or damaged"),
        (lambda path: save_tensors(path, {"model/0.weight": torch.zeros(4, 3)}), "is not the file that .*state.json"),
    ],
)
def test_damaged_tensors_are_named_at_the_start(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    checkpoints = _saved(tmp_path)
    damage(_tensor_file(tmp_path))
    with pytest.raises(CheckpointError, match=rf"{_tensor_file_name(tmp_path)}: .*{message}.*run without --resume"):
        checkpoints.load(SETTINGS)


def _tensor_file_name(folder: Path) -> str:
    return str(folder / json.loads((folder / "state.json").read_text())["tensors"])


def test_no_byte_of_a_tensor_file_changes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    tensors = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0), "mask": torch.tensor([True, False])}
    save_tensors(path, tensors, {"stage": "base"})
    content = path.read_bytes()
    expected = {name: (value.dtype, value.shape, value.tolist()) for name, value in tensors.items()}
    for place in range(len(content)):
        _flip(path, place)
        try:
            found, _ = load_tensors(path, "save it again")
        except CheckpointError:
            pass
        else:  # the stage's name, which is for people, or blanks
            assert {name: (value.dtype, value.shape, value.tolist()) for name, value in found.items()} == expected
        path.write_bytes(content)


@pytest.mark.parametrize("layers", [[nn.Linear(3, 5)], [nn.Linear(3, 4), nn.Linear(4, 4)], []])
def test_tensors_of_another_model_do_not_fit(tmp_path: Path, layers: list[nn.Module]) -> None:
    checkpoints = _saved(tmp_path)
    stage = _Stage(SETTINGS)
    stage.reference = nn.Sequential(*layers)
    with pytest.raises(CheckpointError, match=rf"{_tensor_file(tmp_path)}: does not fit this stage: .*--resume"):
        checkpoints.restore(stage)


def test_tensors_of_the_stage_that_are_missing_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_Stage, "tensors", lambda self: {})
        checkpoints = _saved(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this stage: 'data'"):
        checkpoints.restore(_Stage(SETTINGS))


# settings --------------------------------------------------------------------------------------------------------


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path)
    message = r"was made with clip = None \(now 0.3\), kl_coef = 0.01 \(now 0.5\), start_from = None \(now old\); go on"
    with pytest.raises(CheckpointMismatch, match=message):
        checkpoints.load(replace(SETTINGS, kl_coef=0.5, clip=0.3, start_from=Path("old")))


def test_what_does_not_change_the_curve_may_change(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path)
    other = replace(
        SETTINGS, resume=True, save_every=7, threads=1, output=tmp_path, report=tmp_path / "r.html", compare_ppo=True
    )
    assert checkpoints.load(other) is not None


def test_stages_may_be_added_behind_those_that_were_run(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path)
    for stages in (("cold_start",), ("cold_start", "reward_model"), Settings().stages):
        assert checkpoints.load(replace(SETTINGS, stages=stages)) is not None
    with pytest.raises(CheckpointMismatch, match=r"stages cold_start \(now reasoning_rl\)"):
        checkpoints.load(replace(SETTINGS, stages=("reasoning_rl",)))


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path)
    _edit_state(tmp_path, lambda state: state["settings"].pop("heads") and state["settings"].update(colour="red"))
    with pytest.raises(CheckpointMismatch, match=r"colour = red \(now unknown\), heads = unknown \(now 4\)"):
        checkpoints.load(SETTINGS)


def test_a_new_run_forgets_the_old_one(tmp_path: Path) -> None:
    checkpoints = _saved(tmp_path)
    (tmp_path / "state.json.tmp").write_text("half")
    checkpoints.clear()
    assert checkpoints.load(SETTINGS) is None
    assert not list(tmp_path.glob("*.safetensors"))
