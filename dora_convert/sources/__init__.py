"""Turn a REF into headers and readable files, on this machine or on the Hub."""
