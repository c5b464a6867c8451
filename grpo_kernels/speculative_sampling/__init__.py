"""Verification of drafted tokens against the model that they were drafted for."""

from grpo_kernels.speculative_sampling.api import VerifyDraftOutput, verify_draft

__all__ = ["VerifyDraftOutput", "verify_draft"]
