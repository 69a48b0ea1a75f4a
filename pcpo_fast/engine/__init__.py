"""Training with DeepSpeed: engine, optimizers, moving average, offload, and resharding of its checkpoints."""
