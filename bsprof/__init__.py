"""Where a PyTorch training step's time goes, in numbers that can be trusted."""
