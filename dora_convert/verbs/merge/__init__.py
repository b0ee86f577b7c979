"""Merge adapters into a base."""
