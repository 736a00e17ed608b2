"""What a data loader does, batch by batch: the probe inside DataLoader, and what reads its recordings."""
