"""What `--quantize` and a recipe's model.quantize say. Without torch, so that a wrong word costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from minillava.errors import UserError, nearest

PARTS = {"decoder": "decoder.blocks.", "vision": "vision.", "projector": "projector.", "head": "decoder.head"}
FOUR_BITS = ("nf4", "fp4")
TYPES = {*FOUR_BITS, "int8"}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scheme:
    """Which linear layers are in few bits, and how."""

    quant_type: str = "nf4"
    double: bool = False  # scales in 8 bits: 4.13 bits a weight instead of 4.5
    blocksize: int = 64  # weights that share a scale
    parts: tuple[str, ...] = ("decoder",)  # linear layers of decoder, vision, projector; head
    exact: bool = False  # no CPU rounds inputs to bytes
    types: tuple[tuple[str, str], ...] = ()  # (part, type) of parts with one of their own

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """TYPE[-double][-BLOCKSIZE][-exact][:PART[=TYPE],...], as in "nf4", "nf4-double", "fp4-128:decoder,vision",
        "int8", "nf4:decoder,head=int8"."""
        how, colon, parts = text.partition(":")
        quant_type, *options = how.split("-")
        of = [part.partition("=") for part in parts.split(",")] if colon else [(part, "", "") for part in cls.parts]
        for wrong in [t for t in (quant_type, *(t for _, sign, t in of if sign)) if t not in TYPES]:
            raise UserError(f"quantize '{text}': type '{wrong}' is unknown{nearest(wrong, TYPES)}")
        known = {"double", "exact", *map(str, BLOCKSIZES)} if quant_type in FOUR_BITS else {"exact"}
        for wrong in [o for o in options if o not in known]:
            raise UserError(f"quantize '{text}': '{wrong}' is unknown{nearest(wrong, known)}")
        for wrong in [p for p, _, _ in of if p not in PARTS]:
            raise UserError(f"quantize '{text}': part '{wrong}' is unknown{nearest(wrong, PARTS)}")
        blocksize = next((int(o) for o in options if o.isdigit()), cls.blocksize)
        types = tuple((part, t) for part, _, t in of if t)
        return cls(quant_type, "double" in options, blocksize, tuple(p for p, _, _ in of), "exact" in options, types)

    def type_of(self, name: str) -> str:
        return next((t for part, t in self.types if name.startswith(PARTS[part])), self.quant_type)
