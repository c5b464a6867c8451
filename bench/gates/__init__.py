"""Compile gates: every shipped kernel, compiled for GPUs that need not be here, against limits on what it may cost.

    python -m bench.gates [--op NAME] [--arch 90] [--quick]

`ops/<op>.py` holds the gates of an op. Triton kernels are compiled as their launchers launch them: `triton_kernels.py`
runs the launchers on tensors without memory and records what they pass. CUDA C++ kernels are compiled with the flags of
the build.
"""
