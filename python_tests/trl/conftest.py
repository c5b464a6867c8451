"""The tiny model that the folder's tests share. Nothing here imports TRL: without it the tests skip by name."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model with its tokenizer, as a directory.

    A trainer collects garbage when it starts, which takes longer than its steps here: what was imported is exempt.
    """
    from python_tests.trl import tiny

    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    gc.collect()
    gc.freeze()
    yield folder
    gc.unfreeze()
