"""Read and write PEFT's adapter folders."""
