"""What tests/fuzz.py is made of: good files, ways to break them, and who reads them."""
