"""Read and write bytes: safetensors and torch files, checkpoints, hashes, journals, paths."""
