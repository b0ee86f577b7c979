"""Compare written weights with the definitions, recomputed in float64 by code of its own."""
