"""The verbs, one module each: what the command line and Python callers run. Each gathers, plans, runs and reports."""
