"""Make adapters of adapters or checkpoints."""
