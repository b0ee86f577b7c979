"""Compute LoRA and DoRA on tensors: tensors in, tensors out, nothing of names, files or devices."""
