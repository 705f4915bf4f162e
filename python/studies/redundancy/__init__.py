"""Study of the claims about expert redundancy (arXiv 2503.22517)."""
