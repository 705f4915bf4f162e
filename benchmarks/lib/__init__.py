"""Parts that the benchmark programs share."""

import sys
from pathlib import Path

# For python/shared, whose parts the programs in python/ use too.
sys.path.append(str(Path(__file__).parents[2] / "python"))
