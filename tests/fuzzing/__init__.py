"""The parts of tests/fuzz.py: good files, ways to break them, and the code that reads them."""
