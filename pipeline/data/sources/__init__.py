"""Data sets, one registered entry each, and what reads their files."""
