"""Runs one kernel of kernels/faults.cu in a process of its own, which a sanitizer may end: library, name, 0 or 1."""

from __future__ import annotations

import ctypes
import math
import sys


def run(library: ctypes.CDLL, name: str, faulty: bool) -> str:
    """What was noticed, or "": an error of the emulator, or a wrong result."""
    size = library.gk_fault_size(name.encode())
    values = (ctypes.c_float * size)(*range(1, size + 1))
    outputs = size * (2 if name == "store_after_the_counter" else 1)  # half of it is room for partial results
    result = (ctypes.c_float * outputs)(*[math.nan] * outputs)
    status = library.gk_fault(name.encode(), int(faulty), values, result)
    if status != 0:
        library.gk_error_text.restype = ctypes.c_char_p
        return library.gk_error_text(status).decode()
    return "" if list(result[:size]) == list(reversed(values)) else "wrong result"


if __name__ == "__main__":
    noticed = run(ctypes.CDLL(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
    print(noticed)
    sys.exit(1 if noticed else 0)
