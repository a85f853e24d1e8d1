"""Which rows there are, in which order a run sees them, and the blocks that they come in."""
