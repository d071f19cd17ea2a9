"""What a training run owes its user: the loop, checkpoints, locks, stopping, metrics."""
