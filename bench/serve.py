"""python -m bench.serve: many requests at once beside the same ones one after the other, with random weights.

A request is a picture and a question, 640 tokens and 64 new ones at shape "a" (TinyLlama behind CLIP-L/336), in bf16
or with --quantize in few bits. Three crowds: all about pictures of their own; all about one picture, which stands in
front of their questions; and all of the second turn of a conversation with a 2,000-token first one (the time to its
first token). The requests that run alone are as many as --alone, each with an empty memory, and their mean is what
the crowd is measured against; one more comes behind a request about the same picture, whose tokens are then in
memory. Where llama-cpp-python and gguf are installed, llama.cpp answers the first crowd too. JSON and a table go to
bench/results/<device>, as serve.json and serve.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from bench import ggml, machine
from bench.decode import NAMES, SHAPES, NoText, build
from minillava.generation.engine import Engine, Request
from minillava.generation.memory import Memory
from minillava.generation.request import Row
from minillava.generation.scheduler import Scheduler
from minillava.layers.quantize import Linear4bit
from minillava.layers.scheme import Scheme
from minillava.media.visual import Media
from minillava.visual_tokens import image_span

CHUNK = 512  # prompt tokens of a step, as `minillava serve`
FIRST_TURN = 2000  # tokens


class Bench:
    """One model and its random requests."""

    def __init__(self, shape: str, quantize: str | None, slots: int, new: int):
        model = build(shape).eval()
        if quantize:
            scheme = Scheme.parse(quantize)
            blocks: Any = model.decoder.blocks
            for block in blocks:
                for part in (block.attn, block.mlp):
                    for name, layer in list(part.named_children()):
                        if isinstance(layer, torch.nn.Linear):
                            setattr(part, name, Linear4bit.from_weight(layer.weight.detach(), scheme=scheme))
        model.decoder.fuse()
        self.engine = Engine(model, NoText())  # type: ignore[arg-type]
        self.engine.eos_ids = frozenset()
        self.words, self.slots, self.new, self.seed = SHAPES[shape][2], slots, new, 0
        self.config, self.quantized = model.config, bool(quantize)

    def fresh(self, capacity: int, rows: int) -> Scheduler:
        """A scheduler that remembers nothing yet."""
        with torch.inference_mode():
            slots = self.engine.new_slots(rows, capacity)
            return Scheduler(
                self.engine, slots, CHUNK, Memory(self.engine.processor.placeholders, slots.cache, 1 << 30, 1 << 28)
            )

    def numbers(self, count: int) -> list[int]:
        """Random words."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, self.config.decoder.vocab_size - 1, (count,), generator=generator).tolist()

    def picture(self) -> torch.Tensor:
        self.seed += 1
        size = self.config.vision.image_size
        return torch.randn(3, size, size, generator=torch.Generator().manual_seed(self.seed))

    def request(self, picture: torch.Tensor) -> Request:
        """A picture behind the same five words, then words of its own."""
        size = self.config.vision.image_size
        visual = [self.config.chat.image_token_id] * image_span(self.config, size, size).tokens
        ids = [1, 10, 11, 12, 13, *visual, *self.numbers(self.words - 5)]
        return Request(prompt_ids=ids, media=[Media(picture)], max_new_tokens=self.new)

    def run(self, scheduler: Scheduler, requests: list[Request]) -> tuple[float, list[Row]]:
        """Seconds for all of them, which come together."""
        began = time.perf_counter()
        rows = [scheduler.row(request) for request in requests]
        for row in rows:
            scheduler.submit(row)
        while scheduler.busy:
            scheduler.step()
        return time.perf_counter() - began, rows

    def alone_s(self, count: int) -> float:
        """Mean seconds of a request that runs alone."""
        times = []
        for _ in range(count):
            request = self.request(self.picture())
            scheduler = self.fresh(len(request.prompt_ids or ()) + self.new, 1)
            times.append(self.run(scheduler, [request])[0])
        return mean(times)

    def remembered_s(self) -> float:
        """Seconds of a request that runs alone when the one before it was about the same picture."""
        picture = self.picture()
        requests = [self.request(picture) for _ in range(2)]
        scheduler = self.fresh(len(requests[0].prompt_ids or ()) + self.new, 1)
        return [self.run(scheduler, [request])[0] for request in requests][-1]

    def crowd(self, shared: bool) -> dict[str, Any]:
        """All slots at once, about one picture or each about its own."""
        picture = self.picture()
        requests = [self.request(picture if shared else self.picture()) for _ in range(self.slots)]
        scheduler = self.fresh(len(requests[0].prompt_ids or ()) + self.new, self.slots)
        seconds, rows = self.run(scheduler, requests)
        new = sum(len(row.token_ids) for row in rows)
        return {"crowd_s": seconds, "tok_per_s": new / seconds, "prefilled_tokens": scheduler.prefilled_tokens}

    def llama_cpp(self) -> dict[str, Any] | None:
        """The same crowd in llama.cpp's parallel sequences: bf16, or Q4_0 where we have few bits; tower in F16."""
        if reason := ggml.absent("gguf"):
            print(reason, file=sys.stderr)
            return None
        form, side = "Q4_0" if self.quantized else "BF16", self.config.vision.image_size
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as name:
            decoder, tower = Path(name) / "decoder.gguf", Path(name) / "tower.gguf"
            ggml.write(self.engine.model.decoder, decoder, form)
            ggml.write_tower(self.engine.model, tower)
            capacity = -(-(len(self.request(self.picture()).prompt_ids or ()) + self.new) // 256) * 256
            model = ggml.Model(decoder, capacity, tower, self.slots)
        pictures = (rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(self.slots))
        requests = [([1, 10, 11, 12, 13], picture, self.numbers(self.words - 5)) for picture in pictures]
        model.crowd(requests[:1], 2)
        seconds = model.crowd(requests, self.new)
        return {"form": form, "crowd_s": seconds, "tok_per_s": self.slots * self.new / seconds}

    def second_turn(self, tokens: int) -> dict[str, float]:
        """Seconds to the first token of a conversation's first and second turn."""
        first_ids = self.numbers(tokens)
        scheduler = self.fresh(min(tokens + 48, self.config.decoder.max_positions), 1)
        first_s, (first,) = self.run(scheduler, [Request(prompt_ids=first_ids, max_new_tokens=1)])
        ids = [*first_ids, *first.token_ids, *self.numbers(40)]
        second_s, _ = self.run(scheduler, [Request(prompt_ids=ids, max_new_tokens=1)])
        return {"first_turn_s": first_s, "second_turn_s": second_s, "share": second_s / first_s}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"{report['slots']} requests of {report['prompt_tokens']} tokens and {report['new']} new ones, "
             f"{report['name']}, {report['type']}. {machine.made_of(report['machine'])}",
             "",
             "| requests | seconds | new tokens a second | times one after the other |",
             "|---|---|---|---|"]  # fmt: skip
    alone = report["alone_s"] * report["slots"]
    remembered = report["alone_s"] + report["remembered_s"] * (report["slots"] - 1)
    for label, seconds in (("one after the other", alone), ("one after the other, one picture in memory", remembered)):
        new = report["new"] * report["slots"] / seconds
        lines.append(f"| {label} | {seconds:.1f} | {new:.1f} | {alone / seconds:.1f} |")
    for label, crowd in (("each its own picture", report["own"]), ("one picture", report["shared"])):
        lines.append(f"| at once, {label} | {crowd['crowd_s']:.1f} | {crowd['tok_per_s']:.1f} | "
                     f"{alone / crowd['crowd_s']:.1f} |")  # fmt: skip
    if there := report["llama.cpp"]:
        lines.append(f"| at once, llama.cpp {there['form']} | {there['crowd_s']:.1f} | {there['tok_per_s']:.1f} | "
                     f"{alone / there['crowd_s']:.1f} |")  # fmt: skip
    turn = report["turns"]
    lines += ["", f"To the first token of a first turn of {report['turn_tokens']} tokens {turn['first_turn_s']:.2f} s, "
              f"of the second {turn['second_turn_s']:.2f} s ({turn['share']:.0%})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="a", choices=SHAPES)
    parser.add_argument("--quantize", metavar="nf4", help="decoder in 4 bits")
    parser.add_argument("--slots", type=int, default=16, help="requests at once")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each")
    parser.add_argument("--alone", type=int, default=2, help="requests that are measured alone")
    machine.add_out(parser)
    args = parser.parse_args(arguments)
    bench = Bench(args.shape, args.quantize, args.slots, args.new)
    bench.run(bench.fresh(64, 1), [Request(prompt_ids=bench.numbers(40), max_new_tokens=2)])  # what first use prepares
    turn_tokens = min(FIRST_TURN, bench.config.decoder.max_positions - 48)
    report: dict[str, Any] = {"name": NAMES.get(args.shape, args.shape), "type": args.quantize or "bf16"}
    report |= {"slots": args.slots, "new": args.new, "turn_tokens": turn_tokens, "machine": machine.facts("cpu")}
    report["prompt_tokens"] = len(bench.request(bench.picture()).prompt_ids or ())
    for name, measure in (
        ("alone_s", lambda: bench.alone_s(args.alone)),
        ("remembered_s", bench.remembered_s),
        ("turns", lambda: bench.second_turn(turn_tokens)),
        ("shared", lambda: bench.crowd(True)),
        ("own", lambda: bench.crowd(False)),
        ("llama.cpp", bench.llama_cpp),
    ):
        report[name] = measure()
        print(f"{name}: {report[name]}", file=sys.stderr, flush=True)
    folder = machine.out(args, "cpu")
    (folder / "serve.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "serve.md").write_text(text := table(report))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
