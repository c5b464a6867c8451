"""What is measured on a trained policy: the loss step, drafts, the model state of PPO."""
