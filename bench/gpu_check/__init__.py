"""Everything that a CUDA GPU can check, in one command: `make gpu-check`; docs/gpu_check.md says how to read it.

The command itself needs nothing but Python: what imports torch runs in processes of its own.
"""
