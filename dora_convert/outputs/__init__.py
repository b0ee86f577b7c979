"""Base and adapter against the merged model, both run on sample prompts; transformers and PEFT are imported here alone."""
