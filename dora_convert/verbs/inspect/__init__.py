"""Describe a REF: an adapter or a checkpoint."""
