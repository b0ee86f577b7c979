"""Upload folders and running merges to the Hugging Face Hub."""
