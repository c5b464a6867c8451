"""TRL's GRPOTrainer beside itself: as it is, on patched functions, and as FusedGRPOTrainer. Start with
`python -m examples.trl`; importing this package imports nothing.
"""
