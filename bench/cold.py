"""python -m bench.cold: fresh processes to their first token, ours beside OpenVINO GenAI, with random weights.

Each round starts a process for every peer in turn, which answers a prompt of ids with one token and says how long after
its start that came, how many seconds of processors it took, and its peak of memory. Ours reads bf16 files and quantises
them, or files in NF4; the tower is loaded too. Files are in the page cache. JSON and a table go to
bench/results/<device>, as cold.json and cold.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from minillava.cli import threads

PEERS = {  # name: what its folder's name has behind the shape's, how ours quantises (None: it is OpenVINO's)
    "ours bf16": ("", ""),
    "ours NF4, from bf16 files": ("", "nf4"),
    "ours NF4, from NF4 files": ("-nf4", ""),
    "OpenVINO int4": ("-text/openvino-int4", None),
    "OpenVINO int8": ("-text/openvino-int8", None),
}
PROMPT = 640


def answer(folder: Path, quantize: str | None) -> None:
    """The first token of a prompt, and what it took since this process began, as a line of JSON."""
    ids = [3 + i * 7919 % 900 for i in range(PROMPT)]
    if quantize is None:
        from bench.cpu_peers import open_openvino

        open_openvino(folder)(ids, 1, 1)
    else:
        import torch

        from bench.decode import ours
        from minillava.generation.engine import Request
        from minillava.layers.quantize import Scheme

        with torch.inference_mode():
            engine, _ = ours(folder, "cpu", Scheme.parse(quantize) if quantize else None)
            engine.generate([Request(prompt_ids=ids, max_new_tokens=1)])
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")")[-1].split()[19])
    first_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak
    files = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"first_s": first_s, "cpu_s": time.process_time(), "peak": int(peak[1]) << 10, "files": files}))


def write(shape: str, folder: Path) -> None:
    """The folders that peers read, where they are not there."""
    import torch

    from bench import cpu_peers
    from bench.decode import build
    from minillava.checkpoints.checkpoint import Checkpoint
    from minillava.checkpoints.save import save_model
    from minillava.layers.quantize import Scheme

    at, text = folder / shape, folder / f"{shape}-text" / "text"
    model = build(shape)
    if not at.exists():
        save_model(model, at)
    if not (quantised := folder / f"{shape}-nf4").exists():
        save_model(Checkpoint.open(at).load(torch.bfloat16, torch.device("cpu"), Scheme()), quantised)
    if reason := cpu_peers.absent("OpenVINO int4"):
        return print(reason)
    if not text.exists():
        cpu_peers.write_text(model.decoder, text)
    for kind in ("int4", "int8"):
        cpu_peers.convert_openvino(text, kind)


def measure(shape: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians of every peer whose folder is there; the first round warms files up."""
    there = [name for name, (at, _) in PEERS.items() if Path(f"{folder / shape}{at}").exists()]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in there}
    for turn in range(rounds + 1):
        for name, answers in found.items():
            words = [sys.executable, "-m", "bench.cold", "--answer", name, "--shape", shape, "--folder", str(folder)]
            line = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            if turn:
                answers.append(json.loads(line))
    return {name: {key: median(a[key] for a in all_) for key in all_[0]} for name, all_ in found.items()}


def markdown(report: dict[str, Any]) -> str:
    from bench import machine

    lines = [
        f"# A fresh process to its first token on {report['facts']['device']}, {report['facts']['threads']} threads",
        "",
        f"{machine.made_of(report['facts'])}; shape {report['shape']}, a prompt of "
        f"{PROMPT} ids; medians of {report['rounds']} rounds, in turn.",
        "",
        "| | s | CPU s | peak GiB | files GiB |",
        "|---|---|---|---|---|",
    ]
    for name, s in report["peers"].items():
        gib = f"{s['peak'] / 2**30:.2f} | {s['files'] / 2**30:.2f}"
        lines.append(f"| {name} | {s['first_s']:.2f} | {s['cpu_s']:.2f} | {gib} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="a", help="of bench.decode (default: a)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer", choices=PEERS, help="be this peer, once")
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run (default: nowhere)")
    parser.add_argument("--name", default="cold", help="of the result's files (default: cold)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: runs/bench/cpu)")
    parser.add_argument("--keep", action="store_true", help="results go to bench/results/cpu, to be committed")
    chosen = parser.parse_args(arguments)
    if chosen.answer:
        at, quantize = PEERS[chosen.answer]
        threads.prepare()
        answer(Path(f"{chosen.folder / chosen.shape}{at}"), quantize)
        return 0
    from bench import machine

    machine.need("transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        write(chosen.shape, folder)
        peers = measure(chosen.shape, chosen.rounds, folder)
    report = {"facts": machine.facts("cpu"), "shape": chosen.shape, "rounds": chosen.rounds, "peers": peers}
    out = machine.out(chosen, "cpu")
    (out / f"{chosen.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{chosen.name}.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
