"""Checkpoints: tensors in safetensors, the rest in JSON, both written so that a crash leaves the last good one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from examples.r1.parallel import Ranks
from examples.r1.saving.run_state import REMEDY, STATE_FILE, CheckpointMismatch, Progress, RunState
from examples.r1.saving.storage import (
    CheckpointError,
    check_writable,
    digest_of,
    load_tensors,
    remove,
    remove_leftovers,
    save_tensors,
    write_atomically,
)
from examples.r1.settings import Settings
from examples.r1.shards import full_state, own_state, shard_names
from examples.r1.stages.stage import Stage

__all__ = ["CheckpointError", "CheckpointFolder", "CheckpointMismatch", "Progress"]


class CheckpointFolder:
    """The latest checkpoint of a run. `state.json` names the tensor file that it belongs to and is replaced last.

    The name of a tensor file has a part of its content's digest in it, so that no save puts other tensors in the
    place of those that the present `state.json` belongs to. All ranks make the same calls; the first one reads and
    writes, so that a checkpoint does not depend on their number. Every method raises CheckpointError on all of them.
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None) -> None:
        self.folder = folder
        self.ranks = Ranks.single() if ranks is None else ranks
        self._state_file = folder / STATE_FILE

    def save(self, stage: Stage, progress: Progress, settings: Settings) -> None:
        """Replaces the last checkpoint. If that fails or is cut off, the last one is still there."""
        tensors = full_state(self.ranks, _stage_tensors(stage), _shards(stage))
        self.ranks.from_main(lambda: self._write(tensors, progress, settings))

    def clear(self) -> None:
        """Forgets an earlier run, so that a crash before the first save does not resume it."""

        def forget() -> None:
            check_writable(self.folder)
            remove(self._state_file)
            self._remove_tensors()

        self.ranks.from_main(forget)

    def load(self, settings: Settings) -> Progress | None:
        """The saved progress, or None if there is none. Raises CheckpointMismatch when other settings made it."""

        def read() -> Progress | None:
            check_writable(self.folder)
            if not self._state_file.exists():
                return None
            state = RunState.read(self._state_file)
            state.check_settings(settings, self.folder)
            self._read_tensors(state)
            return state.progress

        return self.ranks.from_main(read)

    def restore(self, stage: Stage) -> None:
        """Puts the saved parameters, optimiser state and further tensors into `stage`."""
        name, tensors = self.ranks.from_main(self._read)
        try:
            _restore(stage, own_state(self.ranks, tensors, _shards(stage)))
        except (KeyError, RuntimeError, ValueError) as error:
            what = " ".join(str(error).split())
            raise CheckpointError(f"{self.folder / name}: does not fit this stage: {what}; {REMEDY}") from error

    def _write(self, tensors: Mapping[str, Tensor], progress: Progress, settings: Settings) -> None:
        remove_leftovers(self.folder)
        stage, steps, digest = progress.stage, progress.steps_done, digest_of(tensors)
        path = self.folder / f"{stage}-{steps:06d}-{digest[:8]}.safetensors"
        save_tensors(path, tensors, {"stage": stage, "steps_done": str(steps)})
        write_atomically(self._state_file, RunState.of(path.name, digest, settings, progress).to_json())
        self._remove_tensors(but=path)

    def _read(self) -> tuple[str, dict[str, Tensor]]:
        state = RunState.read(self._state_file)
        return state.tensors, self._read_tensors(state)

    def _read_tensors(self, state: RunState) -> dict[str, Tensor]:
        path = self.folder / state.tensors
        tensors, _ = load_tensors(path, REMEDY)
        if digest_of(tensors) != state.sha256:
            raise CheckpointError(f"{path}: is not the file that {self._state_file} was written with; {REMEDY}")
        return tensors

    def _remove_tensors(self, but: Path | None = None) -> None:
        """What cannot be removed stays: it does no harm, and the next save tries again."""
        for path in self.folder.glob("*.safetensors"):
            if path != but:
                with suppress(OSError):
                    path.unlink()


def _shards(stage: Stage) -> frozenset[str]:
    return frozenset[str]().union(*map(shard_names, (stage.model, *stage.frozen_models().values())))


def _stage_tensors(stage: Stage) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, model in {"model": stage.model, **stage.frozen_models()}.items():
        tensors |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
    for name, parameter in stage.model.named_parameters():
        moments = stage.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
    return tensors | {f"stage/{name}": value for name, value in stage.tensors().items()}


def _restore(stage: Stage, tensors: Mapping[str, Tensor]) -> None:
    """Raises KeyError, RuntimeError or ValueError if the stage has other tensors."""
    for name, model in {"model": stage.model, **stage.frozen_models()}.items():
        model.load_state_dict(_with_prefix(tensors, f"{name}/"))
    names = {parameter: name for name, parameter in stage.model.named_parameters()}
    moments = {}
    parameters = [parameter for group in stage.optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        found = _with_prefix(tensors, f"optimizer/{names[parameter]}/")
        if found:
            moments[index] = found
    stage.optimizer.load_state_dict({**stage.optimizer.state_dict(), "state": moments})
    stage.restore({name: value.to(stage.device) for name, value in _with_prefix(tensors, "stage/").items()})


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
