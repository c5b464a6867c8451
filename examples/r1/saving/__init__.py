"""Checkpoints and models on disk."""
