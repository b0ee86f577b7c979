"""The Hugging Face Hub: files from it, headers by ranges, uploads to it, and what goes on its way while a merge runs."""
