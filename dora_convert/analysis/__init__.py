"""Measure how far training moved each weight, in magnitude and in direction (section 3.2 of arXiv:2402.09353)."""
