"""Programs that use grpo_kernels from the outside, as a trainer would."""
