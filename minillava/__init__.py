"""minillava: the LLaVA family in a few files of plain PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillava.api import LLaVA as LLaVA

# In a checkout kernels/ stands beside this folder and is imported as minillava.kernels. It is found here, so that a
# checkout never runs the kernels of another one that was installed first.
_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "frame.py").is_file() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

__version__ = "0.1.0"
__all__ = ["LLaVA"]


def __getattr__(name: str) -> Any:
    """`from minillava import LLaVA` costs seconds (torch); `import minillava` alone does not."""
    if name == "LLaVA":
        from minillava.api import LLaVA

        return LLaVA
    raise AttributeError(f"module 'minillava' has no attribute '{name}'")
