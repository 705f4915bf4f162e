"""Study of MoExtend (arXiv 2408.03511): added experts against other ways to learn."""
