"""What several test files share besides fixtures (conftest.py)."""

import os
from pathlib import Path

from minillava.store import ImageStore

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MINILLAVA_REAL", ROOT.parent / "shared" / "real"))  # files that no one here made


class Pictures(ImageStore):
    """Images (or the bytes of files) in memory, by name."""

    def __init__(self, pictures):
        self.pictures = pictures

    def has(self, name):
        return name in self.pictures

    def get(self, name, label):
        return self.pictures[name]
