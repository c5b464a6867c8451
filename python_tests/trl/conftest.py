"""The tiny model that the folder's tests share. Nothing here imports TRL: without it the tests skip by name."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer, as a directory."""
    from python_tests.trl import tiny

    return tiny.save_model(tmp_path_factory.mktemp("model"))
