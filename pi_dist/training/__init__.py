"""The training loop: optimizer, DeepSpeed engine, checkpoints, metrics."""
