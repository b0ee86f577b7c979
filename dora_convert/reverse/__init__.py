"""The way back: what a merge keeps so that it can be undone, and the merge's plan turned round."""
