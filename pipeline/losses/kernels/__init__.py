"""Compiled loops of the soft rank, one module a compiler, imported when first needed."""
