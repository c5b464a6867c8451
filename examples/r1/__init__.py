"""A small character-level transformer goes through all stages of DeepSeek-R1."""

import os

# Before the first import of torch: threads that spin while they wait slow every other process on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
