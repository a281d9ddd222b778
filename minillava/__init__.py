"""minillava: the LLaVA family in a few files of plain PyTorch."""

__version__ = "0.1.0"
