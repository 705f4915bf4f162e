"""Does the routing do what the paper says on a real base? Pictures of coloured digits."""
