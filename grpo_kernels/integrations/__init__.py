"""Adapters for trainers: thin, reversible, and checked against the signatures that they replace.

Nothing is imported here: `grpo_kernels.integrations.trl` needs TRL, `.verl` verl, `.transformers` transformers;
`.liger` needs nothing.
"""
