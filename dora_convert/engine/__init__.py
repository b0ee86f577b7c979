"""Run a plan: workers take each tensor from read to write within a memory budget."""
