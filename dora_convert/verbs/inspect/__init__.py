"""Say what a REF is."""
