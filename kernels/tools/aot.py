"""Compile kernels for a card that is not there, and read back what the compiler made of them.

A stand-in for Triton's driver answers which card there is, so that the very launch that a GPU would see (arguments,
specialisation, shipped configuration) is compiled; registers and spills are then read from the binary, shared memory
from Triton's own count, instructions from the PTX. `python -m minillava.kernels.tools.aot FOLDER` writes the table of
every shipped configuration.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from minillava.kernels import configs, frame, fused_mlp, nf4_matmul
from minillava.kernels.frame import Card
from minillava.kernels.tools import cases

MARKERS = {
    "wgmma": "wgmma.mma_async",
    "tma": "cp.async.bulk.tensor",
    "tma reduce": "cp.reduce.async.bulk.tensor",
    "setmaxnreg": "setmaxnreg",
    "mma.sync": "mma.sync",
    "cp.async": "cp.async.cg",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
}
MOST_PER_WEIGHT = {"sm_80": 4.2, "sm_89": 4.2}  # and 4.1 from Hopper on; bitsandbytes takes 8.7


@dataclass
class Compiled:
    """One compiled kernel: what it was compiled from and what it needs."""

    kernel: str
    arch: str
    settings: dict[str, Any]
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: list[str] = field(default_factory=list)
    shared_coordinates: list[str] = field(default_factory=list)  # values that also count rows: see frame.coordinate
    opcodes: Counter[str] = field(default_factory=Counter, repr=False)  # PTX instructions, as often as they are written
    serialized: bool = False  # products of Hopper's tensor cores wait for each other (ptxas's C7515)
    per_weight: float = 0.0  # SASS instructions a weight of the innermost loop, where 4-bit weights are looked up

    def complaints(self) -> list[str]:
        """What is wrong with it: spills, too much shared memory, an instruction missing that was the point."""
        wrong = [f"spills {self.spill_bytes} bytes"] if self.spill_bytes else []
        if self.shared_bytes > self.shared_limit:
            wrong.append(f"takes {self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        most = MOST_PER_WEIGHT.get(self.arch, 4.1)
        if self.kernel == "_gemv" and self.per_weight > most:
            wrong.append(f"takes {self.per_weight:.2f} instructions a weight, {most} wanted")
        wrong += ["runs its wgmma one by one (ptxas C7515)"] if self.serialized else []
        wrong += [f"counts rows from {name}, a descriptor's coordinate" for name in self.shared_coordinates]
        return wrong + [f"has no {name}" for name in self._wanted() if name not in self.instructions]

    def _wanted(self) -> list[str]:
        if self.kernel == "_decode_split" and not self.arch.startswith("gfx"):
            return ["cp.async", "mma.sync"]
        if "BLOCK_M" not in self.settings:
            return []  # no matrix product, or none that decides
        if self.arch.startswith("gfx"):
            return ["mfma"]
        wanted = ["setmaxnreg"] if self.settings.get("SPECIALIZE") else []
        if self.kernel == "_descriptor" or self.settings.get("TMA"):
            wanted += ["tma reduce"] if self.settings.get("REDUCE") else []
            return [*wanted, "tma", "tcgen05" if self.arch == "sm_100" else "wgmma"]
        if self.kernel == "_product":  # y^T = W x^T: BLOCK_N is its first side
            return ["cp.async", {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(self.arch, "mma.sync")]
        small = self.settings["BLOCK_M"] < 64 or self.arch != "sm_90"
        return ["cp.async", "mma.sync" if small else "wgmma"]


def _driver(arch: str) -> Any:
    """Triton's driver as far as compiling asks it. Binders are kept by device: one a card."""
    digits = arch.removeprefix("sm_").removeprefix("gfx")
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(digits), 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: int(digits, 16),
        get_current_stream=lambda device: 0,
    )


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Within, a launch on meta tensors compiles for `arch` and lands in the list."""
    card = frame.CARDS[arch]
    found: list[Compiled] = []
    previous = triton.runtime.driver._active

    def keep(kernel: Any, compiled: Any, options: dict, constants: dict) -> None:
        found.append(_read_back(kernel, compiled, card, {**constants, **options}))

    saved = frame.compiling_for, frame.on_compiled
    frame.compiling_for, frame.on_compiled = card, keep
    triton.runtime.driver.set_active(_driver(arch))
    try:
        yield found
    finally:
        triton.runtime.driver._active = previous
        frame.compiling_for, frame.on_compiled = saved


def _read_back(kernel: Any, compiled: Any, card: Card, settings: dict[str, Any]) -> Compiled:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spill = _number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text, usage = compiled.asm["ptx"], _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
        # Bytes of stack are in these kernels what registers spilled to.
        registers, spill = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    return Compiled(
        kernel=kernel.__name__,
        arch=card.arch,
        settings={name: value for name, value in settings.items() if name != "enable_fp_fusion"},
        warps=compiled.metadata.num_warps,
        registers=registers,
        spill_bytes=spill,
        shared_bytes=compiled.metadata.shared,
        shared_limit=card.shared_bytes,
        instructions=[name for name, marker in MARKERS.items() if marker in text],
        opcodes=_opcodes(compiled.asm.get("ptx", "")),
        serialized="wgmma.mma_async" in text and "C7515" in _ptxas_log(text),
        shared_coordinates=_shared_coordinates(compiled.asm["ttir"]),
        per_weight=_per_weight(compiled.asm["cubin"]) if settings.get("SHUFFLE") else 0.0,
    )


def _shared_coordinates(ttir: str) -> list[str]:
    """Values that are a descriptor's coordinate and something else, read from Triton's intermediate code.

    See `frame.coordinate` for what Triton makes of such a value in a specialised loop. Asked of every specialised
    kernel, before Triton splits it: what one consumer counts rows from may be another warp's coordinate.
    """
    if "tt.warp_specialize" not in ttir:
        return []
    places: set[str] = set()
    others: set[str] = set()
    for line in ttir.splitlines():
        line = re.sub(r"^\s*%[\w:#, %]+ = ", "", line.partition(" loc(")[0])  # without what it gives
        if found := re.search(r"tt\.descriptor_\w+.*?\[([^\]]*)\]", line):
            places |= {name.strip() for name in found[1].split(",")}
            line = line.replace(f"[{found[1]}]", "")
        others |= set(re.findall(r"%[\w#]+", line))
    return sorted(name for name in places & others if not re.match(r"%c-?\d+_", name))  # constants are no one's own


def _opcodes(ptx: str) -> Counter[str]:
    """Instructions of a kernel, those of inline assembly as well."""
    body = re.sub(r"//[^\n]*|\.loc\b[^\n]*", "", ptx.partition("$L__func_begin0:")[2])
    first = re.compile(r"(?:@!?[%\w]+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?![\w:])")
    statements = (re.sub(r"^(?:[{}\s]|[$\w]+:(?!:))+", "", text) for text in body.split(";"))
    return Counter(found[1] for text in statements if (found := first.match(text)))


def _ptxas_log(ptx: str) -> str:
    """What ptxas says of a kernel for Hopper, asked once more as Triton drops it."""
    options = "-v", "--gpu-name=sm_90a", "-o", os.devnull
    newer = _path_of("ptxas-blackwell").exists()  # which Triton takes from sm_90 on
    return _tool("ptxas-blackwell" if newer else "ptxas", ptx.encode(), *options)


def _path_of(tool: str) -> Path:
    """One of CUDA's tools, which come with Triton."""
    return Path(triton.knobs.nvidia.cuobjdump.path).with_name(tool)


def _tool(name: str, given: bytes, *options: str) -> str:
    """What a tool says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(given)
        file.flush()
        command = [str(_path_of(name)), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _per_weight(cubin: bytes) -> float:
    """Instructions of a loop for each of its shuffles by index, which look a 4-bit weight up; 0 if there is no loop."""
    code: list[str] = []
    labels: dict[str, int] = {}
    ratios = [0.0]
    for line in _tool("nvdisasm", cubin, "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", code[-1])
            loop = code[labels[target[1]] :] if target and target[1] in labels else []
            if looked_up := sum("SHFL.IDX" in i for i in loop):
                ratios.append(len(loop) / looked_up)
    return round(max(ratios), 3)


def _number(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


# -- what is shipped ---------------------------------------------------------------------------------------------------


def compile_case(
    arch: str, kernel: str, part: str, bucket: dict[str, Any], config: dict[str, Any], **options: Any
) -> list[Compiled]:
    """Compile one configuration through its own wrapper."""
    run = cases.CASES[kernel](part, bucket, "meta", **options)
    with compiling(arch) as found:
        run(config)
    return found


# Part, head size, options: the towers' heads, the decoder's, and the largest
FLASH: list[tuple[str, int, dict[str, bool]]]
FLASH = [("forward", K, {"causal": K > 72}) for K in (64, 72, 128, 256)]
FLASH += [(part, K, {"causal": K != 72}) for part in ("backward", "backward_keys") for K in (64, 72, 128, 256)]
FLASH += [("backward_queries", K, {"causal": K != 72}) for K in (72, 128, 256)]
FLASH += [("decode", K, {}) for K in (64, 128)]
FEWER = "sm_89", "gfx942"  # cards for which only the decoder's heads are compiled


def shipped(arch: str) -> Iterator[Compiled]:
    """Compile everything that tuned/*.json ships for `arch`: erf GELU throughout, tanh where descriptors are used;
    4-bit weights with plain and nested scales."""
    for kernel, part, bucket, options in configurations(arch):
        found = compile_case(arch, kernel, part, bucket, bucket["config"], **options)
        yield from (row for row in found if row.kernel != "_delta" or part == "backward")


def configurations(arch: str) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """What is shipped for a card: kernel, part, bucket with its "config", and further options of its case."""
    for kernel in cases.CASES:
        yield from ((kernel, *rest) for rest in (_flash(arch) if kernel == "flash" else _buckets(kernel, arch)))


def _flash(arch: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for part, K, options in FLASH:
        if arch not in FEWER or K == 128:
            config = configs.choose("flash", part, frame.CARDS[arch], 2048, K)
            yield part, {"width": K, "config": config}, options


def _buckets(kernel: str, arch: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The architecture's, and those that were tuned on the card that stands for it."""
    for part, cards in configs.table(kernel).items():
        for bucket in (*cards.get(arch, ()), *cards.get(frame.CARDS[arch].name, ())):
            variant = bucket["config"].get("variant")
            if variant == "descriptor":
                yield from ((part, bucket, {"activation": name}) for name in fused_mlp.APPROXIMATE)
            elif variant in nf4_matmul.TYPES:  # 11008 inputs are no whole tiles of the row's kernel
                yield from ((part, bucket, options) for options in ({"K": 4096}, {"K": 11008, "nested": True}))
            elif variant != "library":
                yield part, bucket, {}


def write_table(folder: Path) -> None:
    """FOLDER/compile.json and compile.md: every shipped configuration on every architecture."""
    rows = [row for arch in frame.CARDS for row in shipped(arch)]
    folder.mkdir(parents=True, exist_ok=True)
    counted = {arch: sum((row.opcodes for row in rows if row.arch == arch), Counter()) for arch in frame.CARDS}
    opcodes = {arch: dict(sorted(counts.items())) for arch, counts in counted.items() if counts}
    report = {"triton": triton.__version__, "torch": torch.__version__, "opcodes": opcodes}
    report["rows"] = [{k: v for k, v in asdict(row).items() if k != "opcodes"} for row in rows]
    (folder / "compile.json").write_text(json.dumps(report, indent=1) + "\n")
    names = "arch", "kernel", "settings", "warps", "registers", "spilled bytes", "shared bytes", "limit", "instructions"
    how = f"Compiled without a card by Triton {triton.__version__}; bf16, K-H-O {'-'.join(map(str, cases.MLP))}."
    lines = [how, "", f"| {' | '.join(names)} | a weight |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        settings = " ".join(f"{name.lower()}={value}" for name, value in row.settings.items())
        cells: tuple[Any, ...] = (row.arch, row.kernel, settings, row.warps, row.registers, row.spill_bytes)
        cells += row.shared_bytes, row.shared_limit, ", ".join(row.instructions), row.per_weight or ""
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "compile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
