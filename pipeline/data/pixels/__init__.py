"""From encoded bytes to augmented pixels: pure functions of a row, its view and a seed."""
