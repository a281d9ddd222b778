"""Which coordinates of descriptors share a value with an index, read from Triton's intermediate code (TTIR).

See `frame.coordinate` for what Triton makes of such a value in a specialised loop. Asked of every specialised kernel,
before Triton splits it: what one consumer counts rows from may be another warp's coordinate.
"""

from __future__ import annotations

import re

PLACES = re.compile(r"tt\.descriptor_\w+.*?\[([^\]]*)\]")
RESULTS = re.compile(r"^\s*%[\w:#, %]+ = ")
CONSTANT = re.compile(r"%c-?\d+_")


def shared(ttir: str) -> list[str]:
    """Values that are a descriptor's coordinate and something else; none without a specialised loop."""
    if "tt.warp_specialize" not in ttir:
        return []
    places: set[str] = set()
    others: set[str] = set()
    for line in ttir.splitlines():
        line = RESULTS.sub("", line.partition(" loc(")[0])
        if found := PLACES.search(line):
            places |= {name.strip() for name in found[1].split(",")}
            line = line.replace(f"[{found[1]}]", "")
        others |= set(re.findall(r"%[\w#]+", line))
    return sorted(name for name in places & others if not CONSTANT.match(name))
