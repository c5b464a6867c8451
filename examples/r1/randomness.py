"""Random numbers as functions of (seed, stage, step): no generator has a state that a checkpoint would have to hold."""

from __future__ import annotations

import hashlib
from random import Random

import torch


def stream_seed(*parts: object) -> int:
    """A seed that is a function of its parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def python_rng(*parts: object) -> Random:
    return Random(stream_seed(*parts))


def torch_rng(device: torch.device, *parts: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(*parts))
