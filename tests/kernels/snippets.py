"""Kernels of a few instructions for the tests of the PTX machine."""

import numpy as np
import ptx
import torch

FRAME = """
.version 8.6
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet(
{params}
)
.reqntid {threads}
.maxnreg {registers}
{{
.reg .pred %p<32>; .reg .b16 %rs<128>; .reg .b32 %r<1024>; .reg .b64 %rd<64>;
$L__func_begin0:
{body}
ret;
$L__func_end0:
}}
"""
SIZES = {"pred": 32, "bf16x2": 32, "f32x2": 64} | {
    f"{k}{n}": n for k in ("b", "u", "s", "f", "bf") for n in (8, 16, 32, 64)
}
PREFIX = {16: "%rs", 32: "%r", 64: "%rd"}
TYPES = {"s": "i", "u": "u", "b": "u"}


def kernel(body: str, params: int, threads: int = 32, registers: int = 128) -> str:
    """A whole module of one kernel with pointers as parameters, the addresses of which are in %rd0, %rd1, ..."""
    names = ",\n".join(f".param .u64 .ptr .global .align 1 snippet_param_{i}" for i in range(params))
    loads = "".join(f"ld.param.b64 %rd{i}, [snippet_param_{i}];\n" for i in range(params))
    return FRAME.format(params=names, threads=threads, registers=registers, body=loads + body)


def run(body: str, *arrays: np.ndarray, threads: int = 32, registers: int = 128, seed: int | None = None) -> None:
    """Run instructions on arrays, which change; 64 KiB of shared memory."""
    tensors = [torch.from_numpy(a.reshape(-1).view(np.uint8)) for a in arrays]
    ptx.run(kernel(body, len(arrays), threads, registers), (1,), tensors, 1 << 16, seed=seed)


def each_thread(lines: str, inputs: str, output: str, threads: int) -> str:
    """Instructions whose inputs `{0}`, `{1}` ... a thread finds in arrays and whose result `{d}` it leaves in one."""
    body, names, kinds = "mov.u32 %r0, %tid.x;\n", [], [*inputs.split(), output]
    for i, kind in enumerate(kinds):
        size = max(SIZES[kind], 16)
        register = f"{PREFIX[size]}{10 + i}"
        body += f"mad.wide.u32 %rd{20 + i}, %r0, {size // 8}, %rd{i};\n"
        if i < len(kinds) - 1:
            body += f"ld.global.b{size} {register}, [%rd{20 + i}];\n"
            body += f"setp.ne.b32 %p{10 + i}, {register}, 0;\n" if kind == "pred" else ""
        names.append(f"%p{10 + i}" if kind == "pred" else register)
    *sources, d = names
    body += lines.format(*sources, d=d) + "\n"
    if output == "pred":
        body += f"selp.b32 %r99, 1, 0, {d};\nst.global.b32 [%rd{20 + len(sources)}], %r99;\n"
    else:
        body += f"st.global.b{max(SIZES[output], 16)} [%rd{20 + len(sources)}], {d};\n"
    return body


def opcodes(text: str) -> set[str]:
    """What a kernel consists of."""
    return {instruction.opcode for instruction in ptx.parse(text).code}


def wrong(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where bits differ, any NaN being as good as another."""
    same = got == wanted
    if got.dtype.kind == "f":
        same |= np.isnan(got) & np.isnan(wanted)
    return np.flatnonzero(~same)
