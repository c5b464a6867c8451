"""Multi-token prediction: the modules that predict further ahead, and the loss of all depths in one pass."""
