"""What is measured of 4-bit weights: the layers of the 7B models at 1 to 4096 rows, beside peers.

"eager" is the library's product with the same weights in 16 bits; a CPU has "16 bits" too, the decoder's choice of
product. bitsandbytes runs the very same bytes; torchao and gemlite (where installed) have formats of their own, affine
ones with groups of 64, and so has llama.cpp, whose Q4_0 is a CPU's peer for one row. On a GPU every call is a replayed
CUDA graph and the L2 cache is overwritten in between. `python -m bench.nf4` measures this machine's CPU at full size,
`python -m bench.nf4 1 16` one and sixteen rows of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench import ggml, machine
from bench.cases import Case
from minillava.kernels.cpu import product
from minillava.layers.quantize import Linear4bit
from minillava.layers.scheme import Scheme

# label, N, K: q, k and v as one, output, gate and up as one, down; Vicuna-7B and Qwen2-7B
LAYERS = [("7B", 12288, 4096), ("7B", 4096, 4096), ("7B", 22016, 4096), ("7B", 4096, 11008), ("7B", 11008, 4096)]
LAYERS += [("Qwen2-7B", 37888, 3584), ("Qwen2-7B", 3584, 18944)]
GPU = [(*layer, rows) for layer in LAYERS for rows in (1, 4, 16)]
GPU += [("7B", 11008, 4096, rows) for rows in (64, 512, 4096)]
CPU = [("7B", N, K, rows) for N, K in ((11008, 4096), (4096, 11008)) for rows in (1, 4, 16, 64, 512)]
TINY = [("0.5B", 896, 896, 1)]
# Least ratio of a peer's time to ours on an H200, by rows
GOALS = {1: {"bitsandbytes": 1.8}, 16: {"bitsandbytes": 1.3}, 512: {"eager": 0.9}, 4096: {"eager": 0.94}}
SHARE_OF_COPY = 0.70  # of one row's traffic, on 11008 x 4096 and larger


def count(device: str) -> int:
    return len(GPU if device == "cuda" else TINY)


def cases(device: str, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    for label, N, K, rows in TINY if tiny else (GPU if device == "cuda" else CPU):
        yield case(label, N, K, rows, device, dtype)


def missed(row: dict[str, Any]) -> list[str]:
    """Goals for an H200 that this row does not meet."""
    rows, (N, K) = int(row["shape"].split()[0]), map(int, row["shape"].split()[2].split("-"))
    found = [
        f"{row['ratios'][peer]:.2f} of {peer}, {goal:.2f} wanted"
        for peer, goal in GOALS.get(rows, {}).items()
        if row["ratios"].get(peer, goal) < goal
    ]
    if rows == 1 and N * K >= 11008 * 4096 and row["share_of_roofline"] < SHARE_OF_COPY:
        found.append(f"{row['share_of_roofline']:.2f} of copy bandwidth, {SHARE_OF_COPY} wanted")
    return found


def case(label: str, N: int, K: int, rows: int, device: str, dtype: torch.dtype) -> Case:
    """x [rows, K] through one layer; traffic is the codes, their scales, x and y."""
    torch.manual_seed(0)
    weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
    x = torch.randn(rows, K, device=device).to(dtype)
    layer = Linear4bit.from_weight(weight, scheme=Scheme())
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: layer(x),
        "eager": lambda: F.linear(x, weight),
        **_peers(weight, x, device),
    }
    functions = {name: _without_launches(_no_grad(function), device) for name, function in functions.items()}
    traffic = N * K / 2 + N * K / 64 * 4 + (x.numel() + rows * N) * x.element_size()
    shape = f"{rows} x {N}-{K}"
    return Case("nf4_matmul", label, shape, "forward", 2.0 * rows * N * K, float(traffic), functions)


def _peers(weight: torch.Tensor, x: torch.Tensor, device: str) -> dict[str, Callable[[], Any]]:
    """Whatever of bitsandbytes, torchao and gemlite is installed and runs on this device."""
    N, K = weight.shape
    found: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        theirs = bitsandbytes.nn.Linear4bit(K, N, False, weight.dtype, False, "nf4")
        theirs.load_state_dict({"weight": weight.cpu()})
        theirs = theirs.to(device).eval()
        found["bitsandbytes"] = lambda: theirs(x)
    if device == "cpu":
        found["16 bits"] = lambda: product.linear(x, weight)
    if device == "cpu" and len(x) == 1 and not ggml.absent():
        found["llama.cpp Q4_0"], theirs_1N = ggml.product(weight, x)
        want_1N = F.linear(x, weight).float()
        off = ((theirs_1N - want_1N).norm() / want_1N.norm()).item()
        if off > 0.2:  # what is left of random weights in 16 even steps: 0.08
            raise RuntimeError(f"llama.cpp's product is {off:.2f} off")
    if device == "cuda" and importlib.util.find_spec("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        linear = _linear(weight)
        quantize_(linear, Int4WeightOnlyConfig(group_size=64))
        found["torchao int4"] = lambda: linear(x)
    if device == "cuda" and importlib.util.find_spec("gemlite"):
        from gemlite.helper import A16W4_HQQ_INT

        packed = A16W4_HQQ_INT(device=device, dtype=weight.dtype).from_linear(_linear(weight))
        found["gemlite"] = lambda: packed(x)
    return found


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], False, device=weight.device, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return linear


def _no_grad(function: Callable) -> Callable:
    def call() -> Any:
        with torch.no_grad():
            return function()

    return call


def _without_launches(function: Callable, device: str) -> Callable:
    """On a GPU a replayed CUDA graph of the call, so that a kernel of microseconds is not measured by its launch."""
    if device != "cuda":
        return function
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases of some numbers of rows, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench.nf4", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", type=int, help="only cases of so many rows (default: all)")
    machine.add_out(parser)
    args = parser.parse_args(arguments)
    chosen = args.rows
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    rows = []
    if device == "cpu" and (reason := ggml.absent()):
        print(reason)
    print(f"{'shape':>18} {'peer':>14} {'ms':>9} {'peer / ours':>12} {'Gweights/s':>11}")
    for label, N, K, batch in GPU if device == "cuda" else CPU:
        if chosen and batch not in chosen:
            continue
        one = case(label, N, K, batch, device, dtype)
        timed = machine.interleaved(one.functions, device, 30 if device == "cuda" else 15)
        rows.append({"shape": one.shape, "peers": timed})
        for peer, t in timed.items():
            s, ours = t["median_s"], timed["ours"]["median_s"]
            print(f"{one.shape:>18} {peer:>14} {s * 1e3:9.3f} {s / ours:12.2f} {N * K / s / 1e9:11.2f}", flush=True)
    folder = machine.out(args, device)
    (folder / "nf4.json").write_text(json.dumps({"facts": machine.facts(device), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
