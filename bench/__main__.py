"""`python -m bench`: the command `grpo-kernels bench`."""

from __future__ import annotations

import sys

from grpo_kernels import cli

if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
