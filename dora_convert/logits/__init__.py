"""Run models and compare their outputs."""
