"""Hold what verbs return, as plain data."""
