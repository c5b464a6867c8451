import sys

from grpo_kernels.cli import main

sys.exit(main())
