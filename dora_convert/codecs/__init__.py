"""Read quantised tensors: stored parts on one side, one dense weight on the other; one file a kind."""
