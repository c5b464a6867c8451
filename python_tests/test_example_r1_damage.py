"""Checkpoints of the training example that are damaged, or that other settings made: what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.r1.command_line import parse_arguments
from examples.r1.policy.model import CharTransformer, ModelConfig
from examples.r1.saving.checkpoint import CheckpointError, CheckpointFolder, CheckpointMismatch, Progress
from examples.r1.saving.model_folder import ModelFolder
from examples.r1.saving.run_state import RunState
from examples.r1.saving.storage import load_tensors, save_tensors
from examples.r1.settings import Settings
from python_tests.r1_line import SETTINGS, LineStage, saved, train_to

# damage ----------------------------------------------------------------------------------------------------------


def _edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """As a program would have written it whose settings are others."""
    state = RunState.read(folder / "state.json")
    edit(state.settings)
    (folder / "state.json").write_text(state.to_json())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", r"is cut off or damaged \(Expecting value"),
        (lambda text: text[: len(text) // 2], "is cut off or damaged"),
        (lambda text: b"\xff\xfe" + text.encode(), "is cut off or damaged"),
        (lambda text: "[]", "has format None, and this program reads format 2"),
        (lambda text: text.replace('"format": 2', '"format": 1'), "has format 1, and this program reads format 2"),
        (lambda text: text.replace('"sha256"', '"sha"'), "is damaged: its content is not what was written"),
        (lambda text: text.replace('"steps_done": 3', '"steps_done": 4'), "its content is not what was written"),
        (lambda text: text.replace('"seconds": {', '"seconds": {}, "more": {'), "its content is not what was written"),
        (lambda text: text.replace('"digest"', '"other"'), "its content is not what was written"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, damage: Callable[[str], str | bytes], message: str) -> None:
    checkpoints = saved(tmp_path)
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
    checkpoints = saved(tmp_path)
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
    checkpoints = saved(tmp_path)
    stage = LineStage(SETTINGS)
    stage.reference = nn.Sequential(*layers)
    with pytest.raises(CheckpointError, match=rf"{_tensor_file(tmp_path)}: does not fit this stage: .*--resume"):
        checkpoints.restore(stage)


def test_tensors_of_the_stage_that_are_missing_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LineStage, "tensors", lambda self: {})
        checkpoints = saved(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this stage: 'data'"):
        checkpoints.restore(LineStage(SETTINGS))


# settings --------------------------------------------------------------------------------------------------------


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    message = r"was made with clip = None \(now 0.3\), kl_coef = 0.01 \(now 0.5\), start_from = None \(now old\); go on"
    with pytest.raises(CheckpointMismatch, match=message):
        checkpoints.load(replace(SETTINGS, kl_coef=0.5, clip=0.3, start_from=Path("old")))


def test_what_does_not_change_the_curve_may_change(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    other = replace(
        SETTINGS, resume=True, save_every=7, threads=1, output=tmp_path, report=tmp_path / "r.html", compare_ppo=True
    )
    assert checkpoints.load(other) is not None


def test_stages_may_be_added_behind_those_that_were_run(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    for stages in (("cold_start",), ("cold_start", "reward_model"), Settings().stages):
        assert checkpoints.load(replace(SETTINGS, stages=stages)) is not None
    with pytest.raises(CheckpointMismatch, match=r"stages cold_start \(now reasoning_rl\)"):
        checkpoints.load(replace(SETTINGS, stages=("reasoning_rl",)))


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    _edit_state(tmp_path, lambda settings: settings.pop("heads") and settings.update(colour="red"))
    with pytest.raises(CheckpointMismatch, match=r"colour = red \(now unknown\), heads = unknown \(now 4\)"):
        checkpoints.load(SETTINGS)


def test_a_new_run_forgets_the_old_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    (tmp_path / "state.json.tmp").write_text("half")
    checkpoints.clear()
    assert checkpoints.load(SETTINGS) is None
    assert not list(tmp_path.glob("*.safetensors"))


def test_options_that_a_resumed_run_does_not_name_are_the_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(
        SETTINGS, kl_coef=0.5, shuffle_rewards=True, threads=1, report=tmp_path / "r.html", output=tmp_path
    )
    stage = LineStage(settings)
    CheckpointFolder(tmp_path / "checkpoint").save(stage, train_to(stage, Progress(), 3), settings)
    resuming = ["--resume", "--output", str(tmp_path)]
    assert parse_arguments(resuming) == replace(settings, resume=True)
    assert parse_arguments([*resuming, "--threads", "3"]) == replace(settings, resume=True, threads=3)
    assert parse_arguments([*resuming, "--kl-coef", "0.1"]).kl_coef == 0.1  # which will not do
    assert parse_arguments(["--output", str(tmp_path)]) == Settings(output=tmp_path)
    (tmp_path / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(resuming)
    assert f"{tmp_path}/checkpoint/state.json: is cut off or damaged" in capsys.readouterr().err


def test_a_model_of_other_sizes_is_named(tmp_path: Path) -> None:
    folder = ModelFolder(replace(SETTINGS, output=tmp_path, stages=("cold_start",)))
    folder.save("cold_start", CharTransformer(ModelConfig(max_length=8, width=16, layers=1, heads=2)))
    for other in ({"width": 32}, {"layers": 2}):
        sizes = {"max_length": 8, "width": 16, "layers": 1, "heads": 2, **other}
        with pytest.raises(CheckpointError, match=r"of other sizes: \S+ is .* there and .* here; give the options"):
            folder.load("cold_start", CharTransformer(ModelConfig(**sizes)))
