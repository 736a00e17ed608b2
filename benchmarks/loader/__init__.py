"""What `bsprof loader` promises: faults planted in loaders and found again, planted times, what looking costs."""
