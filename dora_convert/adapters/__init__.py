"""Adapters that are made: DoRA of LoRA, LoRA of anything, and either of a fine-tuned checkpoint."""
