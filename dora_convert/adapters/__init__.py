"""Describe what an adapter says: which weight each of its tensors changes, and how."""
