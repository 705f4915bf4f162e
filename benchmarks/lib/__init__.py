"""Parts that the benchmark programs share."""
