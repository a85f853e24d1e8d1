"""Configuration and run folders. Kept empty: the command line imports from here and must start at once."""
