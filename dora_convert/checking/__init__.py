"""Is it right? Recomputed in float64 by code that the merge does not share, and told to people."""
