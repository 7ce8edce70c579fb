"""Between published PyTorch checkpoints and ours. Installed as `deqa_jax.convert`."""
