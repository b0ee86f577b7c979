"""Keep what a merge loses, and take a merge out again."""
