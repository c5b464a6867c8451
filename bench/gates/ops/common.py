"""The kernel that is never launched: the extension asks for its attributes to see if its binary fits the device."""

from __future__ import annotations

from bench.gates.gate import Gate

CUDA = (Gate("probe_kernel", registers=8, threads=1),)
