"""A small character-level transformer trained the way of DeepSeek-R1: a cold start, then GRPO with rules."""

import os

# Before the first import of torch: threads that spin while they wait slow every other process on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
