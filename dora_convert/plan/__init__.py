"""Decide every output tensor from headers alone, before anything is read or written."""
