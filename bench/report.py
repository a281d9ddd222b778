"""python -m bench.report: measure the machine, then every kernel beside its peers; JSON, a table and a roofline plot.

The peers run in this process, one call of each in turn. On a CPU the sizes are tiny unless --full is given: that
rehearses the report and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import attention, machine, nf4
from bench.cases import KERNELS, Case, cases
from minillava.errors import nearest

PEERS = {"liger_kernel": "Liger-Kernel", "transformers": "transformers", "bitsandbytes": "bitsandbytes"}

# The goals for an H200: (kernel, direction, peer) -> least ratio of the peer's time to ours.
GOALS = {
    ("fused_mlp", "forward", "products only"): 1.00,  # at 4608 rows and more
    ("fused_mlp", "forward", "eager"): 1.05,
    ("fused_mlp", "forward", "torch.compile"): 1.00,
    ("fused_mlp", "forward+backward", "eager"): 1.05,
}
LOSS_SHARE_OF_PEAK = 0.90
NORM_SHARE_OF_COPY = 0.90


def measure(case: Case, device: str, limits: dict[str, float], rounds: int) -> dict[str, Any]:
    """One row: times of every peer, and our share of the roofline."""
    timed = machine.interleaved(case.functions, device, rounds)
    ours = timed["ours"]["median_s"]
    bound_s = max(case.flops / limits["matmul_flop_per_s"], case.bytes / limits["copy_bytes_per_s"])
    return {
        **{name: getattr(case, name) for name in ("kernel", "label", "shape", "direction", "flops", "bytes")},
        "peers": timed,
        "flop_per_s": case.flops / ours,
        "share_of_roofline": bound_s / ours,
        "ratios": {name: t["median_s"] / ours for name, t in timed.items() if name != "ours"},
    }


def missed(row: dict[str, Any]) -> list[str]:
    """Goals for an H200 that this row does not meet."""
    if row["kernel"] == "linear_cross_entropy":
        short = row["share_of_roofline"] < LOSS_SHARE_OF_PEAK
        return [f"{row['share_of_roofline']:.2f} of the peak, {LOSS_SHARE_OF_PEAK} wanted"] if short else []
    if row["kernel"] == "rms_norm":
        short = row["share_of_roofline"] < NORM_SHARE_OF_COPY
        return [f"{row['share_of_roofline']:.2f} of copy bandwidth, {NORM_SHARE_OF_COPY} wanted"] if short else []
    if row["kernel"] == "nf4_matmul":
        return nf4.missed(row)
    if row["kernel"].endswith("attention"):
        return attention.missed(row)
    few = int(row["shape"].split()[0]) < 4608
    found = []
    for (kernel, direction, peer), goal in GOALS.items():
        ratio = row["ratios"].get(peer)
        mine = (kernel, direction) == (row["kernel"], row["direction"]) and not (few and peer == "products only")
        if mine and ratio is not None and ratio < goal:
            found.append(f"{ratio:.2f} of {peer}, {goal:.2f} wanted")
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts, limits = report["facts"], report["limits"]
    peers = list(dict.fromkeys(name for row in report["rows"] for name in row["peers"] if name != "ours"))
    lines = [
        f"# Kernels on {facts['device']}",
        "",
        f"{machine.made_of(facts)}; {report['dtype']}; medians of {report['rounds']} interleaved rounds.",
        f"Measured first: copy {limits['copy_bytes_per_s'] / 1e12:.3f} TB/s, "
        f"matmul {limits['matmul_flop_per_s'] / 1e12:.3f} TFLOP/s.",
        *report["notes"],
        "",
        "| kernel | model | shape | direction | ms (quartiles) | TFLOP/s | of roofline | "
        + " | ".join(f"{p} / ours" for p in peers)
        + " |",
        "|" + "---|" * (7 + len(peers)),
    ]
    for row in report["rows"]:
        ours = row["peers"]["ours"]
        ms = f"{ours['median_s'] * 1e3:.3f} ({ours['low_s'] * 1e3:.3f}-{ours['high_s'] * 1e3:.3f})"
        ratios = [f"{row['ratios'][p]:.2f}" if p in row["ratios"] else "" for p in peers]
        cells = [row["kernel"], row["label"], row["shape"], row["direction"], ms, f"{row['flop_per_s'] / 1e12:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{row['share_of_roofline']:.2f}", *ratios]) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Roofline: FLOP/s over FLOP per byte, one point a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peak, bandwidth = report["limits"]["matmul_flop_per_s"], report["limits"]["copy_bytes_per_s"]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    intensities = [row["flops"] / row["bytes"] for row in report["rows"]]
    line = [min([*intensities, peak / bandwidth]) / 4, peak / bandwidth, max([*intensities, peak / bandwidth]) * 4]
    axes.loglog(line, [min(peak, bandwidth * x) / 1e12 for x in line], color="black", label="measured roofline")
    markers = {"fused_mlp": "o", "linear_cross_entropy": "s", "rms_norm": "^", "swiglu": "v"}
    for kernel, marker in (*markers.items(), ("attention", "D"), ("decode_attention", "P")):
        for direction, colour in (("forward", "tab:blue"), ("forward+backward", "tab:orange")):
            rows = [r for r in report["rows"] if (r["kernel"], r["direction"]) == (kernel, direction)]
            if rows:
                x, y = [r["flops"] / r["bytes"] for r in rows], [r["flop_per_s"] / 1e12 for r in rows]
                axes.loglog(x, y, marker, color=colour, label=f"{kernel} {direction}")
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title=f"Kernels on {report['facts']['device']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("kernel", nargs="*", help=f"only these (of {', '.join(KERNELS)})")
    machine.add_out(parser)
    parser.add_argument("--full", action="store_true", help="real shapes on a CPU too (slow)")
    parser.add_argument("--rounds", type=int, help="calls of every peer (30 on a GPU, 5 on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile peer out")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop taking new rows after this long")
    chosen = parser.parse_args(arguments)
    for name in set(chosen.kernel) - set(KERNELS):
        parser.error(f"there is no kernel '{name}'{nearest(name, KERNELS)}; there are {', '.join(KERNELS)}")
    device, tiny = chosen.device, chosen.device != "cuda" and not chosen.full
    dtype, rounds = torch.bfloat16, chosen.rounds or (30 if device == "cuda" else 5)
    started, notes = time.perf_counter(), []
    if tiny:
        notes.append("Tiny sizes on a CPU: a rehearsal of the report, no statement about any GPU.")
    absent = [name for package, name in PEERS.items() if find_spec(package) is None]
    if absent:
        notes.append(f"Not installed, so without a column: {', '.join(absent)}.")
    limits = machine.limits(device, dtype, tiny)
    rows = []
    for case in cases(device, dtype, tiny, not chosen.no_compile):
        if chosen.kernel and case.kernel not in chosen.kernel:
            continue
        if time.perf_counter() - started > chosen.seconds:
            notes.append(
                f"Stopped after {chosen.seconds:.0f} s: {case.kernel} {case.shape} and what follows is missing."
            )
            break
        rows.append(measure(case, device, limits, rounds))
        print(table({**_head(device, dtype, rounds, limits, []), "rows": rows[-1:]}).splitlines()[-1], flush=True)
    report = {**_head(device, dtype, rounds, limits, notes), "rows": rows}
    if "H200" in report["facts"]["device"]:
        report["missed"] = [f"{r['kernel']} {r['shape']} {r['direction']}: {m}" for r in rows for m in missed(r)]
        print("goals missed:", *(report["missed"] or ["none"]), sep="\n  ")
    folder = machine.out(chosen, device)
    (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "kernels.md").write_text(table(report))
    drawn = find_spec("matplotlib") is not None
    if drawn:
        plot(report, folder / "roofline.png")
    print(*notes, sep="\n")
    print(f"wrote {folder}/kernels.json, kernels.md{', roofline.png' if drawn else ' (a plot needs matplotlib)'}")
    return 0


def _head(device: str, dtype: torch.dtype, rounds: int, limits: dict[str, float], notes: list[str]) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"facts": machine.facts(device), "limits": limits, "dtype": name, "rounds": rounds, "notes": notes}


if __name__ == "__main__":
    raise SystemExit(main())
