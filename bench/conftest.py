"""Makes `pytest bench` find the package that it is in, from wherever it is called."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
