"""The folder of a run's models: the policy after each stage, and the reward model."""

from __future__ import annotations

from pathlib import Path

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
        try:
            into.load_state_dict(own_state(self._ranks, tensors, shard_names(into)))
        except RuntimeError as error:
            raise CheckpointError(f"{path} holds a model of other sizes: {error}") from None
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
