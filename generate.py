"""Ask a LLaVA about pictures, from the command line. With no arguments it answers about a drawn scene.

Text goes to stdout as it comes; timing and everything else to stderr. Bad input is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import minillava
from minillava.config import UserError

if TYPE_CHECKING:  # torch takes seconds to import, so everything that needs it comes after the arguments are checked
    from minillava import LLaVA
    from minillava.answer import Answer

NANO = Path(minillava.__file__).parent / "nano"
DEMO_PICTURE = Path("runs/demo.png")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parser() -> Parser:
    p = Parser(prog="generate.py", description="Ask a LLaVA about pictures. With no arguments: about a drawn scene.")
    p.add_argument("--model", default=str(NANO), metavar="DIR|HUB_ID", help="checkpoint (default: the one that ships)")
    p.add_argument("--base", metavar="DIR|HUB_ID", help="what a delta, a lone projector or LoRA adapters belong to")
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    p.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, or a folder of frames")
    p.add_argument("--frames", type=int, metavar="N", help="frames of a video to look at, at most")
    p.add_argument("--fps", type=float, metavar="F", help="frames a second to look at; 0: spread evenly over the video")
    p.add_argument("--prompt", metavar="TEXT", help="the question; <image> in it says where a picture goes")
    p.add_argument("--chat", action="store_true", help="a conversation: one question a line, the pictures stay")
    p.add_argument("--raw", action="store_true", help="--prompt is the whole prompt: no chat template around it")
    p.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length limit (default: 512)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    p.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="likeliest tokens of this probability together"
    )
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="K likeliest tokens; 0: all (default)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling (default: 0)")
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: what suits device and size)")
    p.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... or mps (default: cuda if there, else cpu)")
    p.add_argument(
        "--quantize",
        metavar="nf4",
        help="decoder in 4 bits: nf4, nf4-double, fp4, ...; nf4:decoder,vision for more parts",
    )
    p.add_argument("--json", action="store_true", help="print an answer as one line of JSON")
    return p


def check(args: argparse.Namespace) -> None:
    """What can be refused before torch is imported."""
    if args.raw and (args.chat or args.prompt is None):
        raise UserError("--raw takes the whole prompt from --prompt, and does not go with --chat")
    if (args.image or args.video) and args.prompt is None and not args.chat:
        raise UserError(
            f"--{'image' if args.image else 'video'} needs a question: give --prompt TEXT, or --chat to ask several"
        )
    for image in args.image:
        if not Path(image).is_file():
            raise UserError(f"{image}: no such image file; check the path")
    for video in args.video:
        if not Path(video).exists():
            raise UserError(f"{video}: no such video file or folder of frames; check the path")
    if (args.frames is not None and args.frames < 1) or (args.fps or 0) < 0:
        raise UserError("--frames takes 1 or more, --fps 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        started = time.perf_counter()
        args = parser().parse_args(argv)
        check(args)
        from minillava import LLaVA

        model = LLaVA.from_pretrained(args.model, args.dtype, args.device, args.quantize, args.base)
        if args.frames is not None or args.fps is not None:
            model.look(args.frames, args.fps)
        run = Run(args, model, load_s=time.perf_counter() - started)
        if args.chat:
            run.chat()
        elif args.prompt is not None:
            run.once(args.prompt, args.image, args.video)
        else:
            run.demo()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    return 0


class Run:
    """One loaded model and how its answers are shown."""

    def __init__(self, args: argparse.Namespace, model: LLaVA, load_s: float):
        self.args, self.model, self.load_s = args, model, load_s
        self.peak = self.with_buffers = 0  # bytes

    def once(self, prompt: str, images: Sequence[str], videos: Sequence[str] = ()) -> None:
        a = self.args
        how = (a.max_new_tokens, a.temperature, a.top_p, a.top_k, a.seed, a.raw)
        self.show(self.model.generate(prompt, images, *how, self.write, videos))

    def demo(self) -> None:
        """The built-in world: draw, save, ask."""
        from minillava.shapes import demo_scene

        image, question, expected = demo_scene()
        try:
            DEMO_PICTURE.parent.mkdir(parents=True, exist_ok=True)
            image.save(DEMO_PICTURE)
        except OSError as error:
            raise UserError(
                f"{DEMO_PICTURE}: cannot be written ({error.strerror}); start in a folder of yours"
            ) from None
        out = sys.stderr if self.args.json else sys.stdout
        print(f"picture:  {DEMO_PICTURE.resolve()}\nquestion: {question}\nexpected: {expected}", file=out)
        print("answer:   ", end="", file=out, flush=True)
        self.once(question, [str(DEMO_PICTURE)])

    def chat(self) -> None:
        """Questions from --prompt, then from stdin until its end. Ctrl-C stops an answer; at the prompt, the chat."""
        from minillava.sampling import Sampling

        a = self.args
        conversation = self.model.conversation(a.image, a.video)
        sampling = Sampling(a.temperature, a.top_p, a.top_k, a.seed)
        question = a.prompt
        while True:
            if question is None:
                try:
                    question = input("> " if sys.stdin.isatty() else "").strip()
                except EOFError:
                    return
            if question:
                try:
                    self.show(conversation.ask(question, sampling, a.max_new_tokens, lambda _, text: self.write(text)))
                except KeyboardInterrupt:
                    print("\ninterrupted; this turn is left out of the conversation", file=sys.stderr)
            question = None

    def write(self, text: str) -> None:
        if not self.args.json:
            print(text, end="", flush=True)

    def show(self, answer: Answer) -> None:
        """The end of an answer: timing, or all of it as JSON."""
        from minillava.device import copy_bytes_per_s, peak_bytes

        device = self.model.engine.device
        speed, token_s, now = answer.decode_tok_per_s, answer.token_s, peak_bytes(device)
        peak = self.peak = now if now > self.with_buffers else self.peak  # without what measuring the copy took
        share = answer.read_bytes / token_s / copy_bytes_per_s(device) if token_s else None
        self.with_buffers = max(now, peak_bytes(device))
        if self.args.json:
            fields = {
                "text": answer.text,
                "token_ids": answer.token_ids,
                "prompt_tokens": answer.prompt_tokens,
                "image_tokens": answer.image_tokens,
                "finish_reason": answer.finish_reason,
                "load_s": round(self.load_s, 4),
                "vision_s": round(answer.vision_s, 4),
                "prefill_s": round(answer.prefill_s, 4),
                "decode_tok_per_s": None if speed is None else round(speed, 2),
                "peak_bytes": peak,
                "token_s": None if token_s is None else round(token_s, 6),
                "bandwidth_share": None if share is None else round(share, 4),
            }
            print(json.dumps(fields, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        visual = f", {answer.image_tokens} of them visual" if answer.image_tokens else ""
        decoding = ""
        if speed is not None and token_s is not None and share is not None:
            decoding = f" | decode {speed:.1f} tok/s (median {token_s * 1e3:.2f} ms, {share:.0%} of copy bandwidth)"
        cut = " | stopped at the length limit" if answer.finish_reason == "length" else ""
        print(
            f"[load {self.load_s:.2f} s | vision {answer.vision_s:.3f} s | prefill {answer.prefill_s:.3f} s "
            f"({answer.prompt_tokens} tokens{visual}){decoding} | peak {peak / 2**30:.2f} GiB{cut}]",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
