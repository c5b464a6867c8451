"""What trains: the stages, what rewards and judges their samples, what evaluates them."""
