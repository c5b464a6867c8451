"""The folder of a run's models: the policy after each stage, and the reward model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from examples.r1.parallel import SINGLE, Ranks
from examples.r1.policy.model import CharTransformer
from examples.r1.saving.storage import CheckpointError, load_tensors, save_tensors
from examples.r1.settings import Settings
from examples.r1.shards import full_state, own_state, shard_names


class ModelFolder:
    """`models/<stage>.safetensors`: what later stages start from; what an earlier run made may stand in for it.

    All ranks make the same calls; the first one reads and writes, and the files do not depend on their number.
    """

    def __init__(self, settings: Settings, ranks: Ranks = SINGLE) -> None:
        self._ranks = ranks
        self._own = settings.output / "models"
        self._other = None if settings.start_from is None else settings.start_from / "models"
        self._stages = settings.stages

    def save(self, stage: str, model: CharTransformer) -> None:
        tensors = full_state(self._ranks, model.state_dict(), shard_names(model))
        self._ranks.from_main(lambda: save_tensors(self._own / f"{stage}.safetensors", tensors, {"stage": stage}))

    def load(self, stage: str, into: CharTransformer) -> CharTransformer:
        """Puts the parameters after a stage into a model. Raises CheckpointError where there are none that fit."""
        path = self._path(stage)
        tensors, _ = self._ranks.from_main(lambda: load_tensors(path, "run that stage again, without --resume"))
        own = own_state(self._ranks, tensors, shard_names(into))
        if found := _difference(own, into.state_dict()):
            raise CheckpointError(
                f"{path} holds a model of other sizes: {found}; give the options that it was made with"
            )
        into.load_state_dict(own)
        return into

    def _path(self, stage: str) -> Path:
        if stage in self._stages:
            return self._own / f"{stage}.safetensors"
        if self._other is None:
            raise CheckpointError(
                f"the stages {', '.join(self._stages)} need the model of {stage}: name the folder of a run that has it "
                "with --start-from"
            )
        return self._other / f"{stage}.safetensors"


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first tensor that only one model has, or whose shape differs; "" if there is none."""
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [str(list(model[name].shape)) if name in model else "none" for model in (found, wanted)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} there and {shapes[1]} here"
    return ""
