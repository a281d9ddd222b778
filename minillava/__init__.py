"""minillava: the LLaVA family in a few files of plain PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillava.pretrained import LLaVA as LLaVA

__version__ = "0.1.0"
__all__ = ["LLaVA"]


def __getattr__(name: str) -> Any:
    """`from minillava import LLaVA` costs seconds (torch); `import minillava` alone does not."""
    if name == "LLaVA":
        from minillava.pretrained import LLaVA

        return LLaVA
    raise AttributeError(f"module 'minillava' has no attribute '{name}'")
