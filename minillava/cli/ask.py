"""Ask a LLaVA about pictures and videos. With no arguments: about a drawn scene.

Text goes to stdout as it comes; timing and everything else to stderr."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minillava.chat.tokenizer import check_unicode
from minillava.checkpoints.hub import NANO, resolve
from minillava.cli import ranks
from minillava.cli.values import amount, whole
from minillava.errors import UserError, nearest
from minillava.files import named
from minillava.layers.scheme import Scheme

if TYPE_CHECKING:
    from minillava import LLaVA
    from minillava.generation.answer import Answer
    from minillava.generation.conversation import Conversation

HELP = """One question a line, about all pictures so far.
/image FILE   show another picture, with the next question
/reset        forget what was said and shown since the start
/exit         end, as Ctrl-D does; Ctrl-C stops an answer
/help         these lines"""
DEMO_PICTURE = Path("runs/demo.png")
LOOK, DRAWN = "look.png", (".png", ".jpg", ".jpeg", ".webp")
INTERRUPTED = "interrupted"
DTYPES = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda", "mps")
GPU_NODES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # in /dev: NVIDIA's, Jetson's, AMD's, that of Windows' Linux


def add_arguments(p: argparse.ArgumentParser) -> None:
    """A model, pictures, a question, and how to answer."""
    p.add_argument(
        "--model", default=str(NANO), metavar="DIR|HUB_ID", help="checkpoint (default: the one that ships, nano)"
    )
    p.add_argument("--base", metavar="DIR|HUB_ID", help="what a delta, a lone projector or LoRA adapters belong to")
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    p.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, or a folder of frames")
    p.add_argument("--frames", type=whole(1), metavar="N", help="frames of a video to look at, at most")
    p.add_argument(
        "--fps", type=amount(), metavar="F", help="frames a second to look at; 0: spread evenly over the video"
    )
    p.add_argument("--prompt", metavar="TEXT", help="the question; <image> in it says where a picture goes")
    p.add_argument("--chat", action="store_true", help="a conversation: one question a line, the pictures stay")
    p.add_argument("--raw", action="store_true", help="--prompt is the whole prompt: no chat template around it")
    p.add_argument("--max-new-tokens", type=whole(1), default=512, metavar="N", help="length limit (default: 512)")
    p.add_argument("--temperature", type=amount(), default=0.0, metavar="T", help="0 is greedy (default)")
    p.add_argument(
        "--top-p",
        type=amount(zero=False, most=1),
        default=1.0,
        metavar="P",
        help="likeliest tokens of this probability together",
    )
    p.add_argument("--top-k", type=whole(), default=0, metavar="K", help="K likeliest tokens; 0: all (default)")
    p.add_argument(
        "--min-p", type=amount(most=1), default=0.0, metavar="P", help="tokens P times as likely as the likeliest"
    )
    p.add_argument("--seed", type=whole(-(2**63), 2**64 - 1), default=0, metavar="S", help="of sampling (default: 0)")
    p.add_argument(
        "--repetition-penalty",
        type=amount(zero=False),
        metavar="R",
        help="of tokens that came before (default: the checkpoint's)",
    )
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given several times"
    )
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: what suits device and size)")
    p.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... or mps (default: cuda if there, else cpu)")
    p.add_argument(
        "--quantize",
        metavar="nf4",
        help="decoder in 4 or 8 bits: nf4, nf4-double, fp4, int8, ...; nf4:decoder,vision,head=int8 for more parts;\n"
        "nf4-exact: CPUs do not round inputs to 8 bits for faster products",
    )
    p.add_argument(
        "--look", metavar="WORD", help="draw the attention from a word of the answer over the picture: no explanation"
    )
    p.add_argument("--out", metavar="FILE", help="picture of --look (default: look.png; look-1.png, ... for several)")
    p.add_argument("--json", action="store_true", help="print an answer as one line of JSON")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be refused before torch is imported."""
    _check_request(args)
    _check_look(args)
    check_numbers(args)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a dtype, a quantisation or a device that is unknown or not there."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"dtype '{args.dtype}' is unknown{nearest(args.dtype, DTYPES)}")
    if args.quantize is not None:
        Scheme.parse(args.quantize)
    check_device(args.device or "cpu")


def check_device(name: str) -> None:
    """Raises UserError for a device that is unknown, or as far as can be seen from here not there."""
    kind, _, number = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise UserError(f"device '{name}' is unknown{nearest(kind, DEVICES)}")
    if kind != "cuda" and int(number or 0):
        raise UserError(f"device '{name}' is not there (a machine has one {kind}); use {kind}")
    if kind == "cuda" and sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in GPU_NODES):
        raise UserError(f"device '{name}' is not there (this machine has no GPU driver); leave it out, or use cpu")


def find_model(args: argparse.Namespace) -> Path:
    """The folder of `--model`; `--base` becomes its folder. Raises UserError where there is none."""
    if args.base is not None:
        args.base = resolve(args.base)
    return resolve(args.model)


def _check_request(args: argparse.Namespace) -> None:
    if args.raw and (args.chat or args.prompt is None):
        raise UserError("--raw takes the whole prompt from --prompt, and does not go with --chat; give --prompt alone")
    if (args.image or args.video) and args.prompt is None and not args.chat:
        raise UserError(
            f"--{'image' if args.image else 'video'} needs a question; give --prompt TEXT, or --chat to ask several"
        )
    check_unicode(args.prompt or "")
    for image in args.image:
        if not Path(image).is_file():
            raise UserError(
                f"{image}: {'is a folder' if Path(image).is_dir() else 'no such image file'}; check the path"
            )
    for video in args.video:
        if not Path(video).exists():
            raise UserError(f"{video}: no such video file or folder of frames; check the path")
        if Path(video).is_file() and find_spec("av") is None:
            raise UserError(f"{video}: videos need PyAV; pip install av, or give a folder of frames")


def _check_look(args: argparse.Namespace) -> None:
    if args.look is None:
        if args.out is not None:
            raise UserError("--out is where --look WORD draws; give a word of the answer")
        return
    if not args.image or args.video or args.prompt is None or args.chat or args.raw:
        raise UserError("--look takes --image and --prompt, without --video, --chat or --raw")
    if Path(args.out or LOOK).suffix.lower() not in DRAWN:
        raise UserError(f"{args.out}: pictures end in {', '.join(DRAWN)}; choose one of these")
    if ranks.world() > 1:
        raise UserError("--look runs in one process; leave out torchrun")


def run(args: argparse.Namespace) -> None:
    """Load the model and answer."""
    began_s = time.perf_counter()
    check(args)
    source = find_model(args)
    if args.chat and ranks.world() > 1:
        raise UserError("--chat reads one terminal; leave out torchrun")
    model = ranks.load(source, args)
    ranks.mute()
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.frames is not None or args.fps is not None:
        model = model.with_frames(args.frames, args.fps)
    if source == NANO and (args.image or args.video):
        print(
            "note: the model that ships knows drawn scenes of a few coloured shapes and answers every picture as one; "
            "for photographs give --model (a folder, or an id of the hub)",
            file=sys.stderr,
        )
    answers = Run(args, model, load_s=time.perf_counter() - began_s)
    if args.chat:
        answers.chat()
    elif args.prompt is not None:
        answers.once(args.prompt, args.image, args.video)
    else:
        answers.demo()


class Run:
    """One loaded model and how its answers are shown."""

    def __init__(self, args: argparse.Namespace, model: LLaVA, load_s: float):
        self.args, self.model, self.load_s = args, model, load_s
        self.peak = self.with_buffers = 0  # bytes

    def once(self, prompt: str, images: Sequence[str], videos: Sequence[str] = ()) -> None:
        a = self.args
        how = (a.max_new_tokens, a.temperature, a.top_p, a.top_k, a.seed, a.raw)
        more = (a.stop, a.min_p, a.repetition_penalty)
        answer = self.model.generate(prompt, images, *how, self.write, videos, *more)
        self.show(answer)
        if a.look is not None:
            self.draw(prompt, images, answer)

    def draw(self, prompt: str, images: Sequence[str], answer: Answer) -> None:
        """The attention of a word over each picture, as files."""
        from minillava.generation.look import draw

        out, word = Path(self.args.out or LOOK), self.args.look
        looks = self.model.look(prompt, images, answer, word)
        for number, (look, picture) in enumerate(zip(looks, draw(looks)), 1):
            path = out if len(looks) == 1 else out.with_stem(f"{out.stem}-{number}")
            with named(path):
                picture.save(path)
            share = float(look.weights_T.sum())
            print(f"{path}: attention of {word!r}, {share:.1%} of it on this picture; no explanation", file=sys.stderr)

    def demo(self) -> None:
        """The built-in world: draw, save, ask."""
        from minillava.synthetic.shapes import demo_scene

        image, question, expected = demo_scene()
        with named(DEMO_PICTURE):
            DEMO_PICTURE.parent.mkdir(parents=True, exist_ok=True)
            image.save(DEMO_PICTURE)
        out = sys.stderr if self.args.json else sys.stdout
        print(f"picture:  {DEMO_PICTURE.resolve()}\nquestion: {question}\nexpected: {expected}", file=out)
        print("answer:   ", end="", file=out, flush=True)
        self.once(question, [str(DEMO_PICTURE)])

    def chat(self) -> None:
        """Questions from --prompt, then from stdin until its end. Ctrl-C stops an answer; at the prompt, the chat."""
        from torch import OutOfMemoryError

        a, question = self.args, self.args.prompt
        conversation = self.model.conversation(a.image, a.video)
        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        while True:
            if question is None:
                try:
                    question = input("> " if sys.stdin.isatty() else "").strip()
                except EOFError:
                    return
            word, _, rest = question.partition(" ")
            if word == "/exit":
                return
            try:
                if word == "/reset":
                    conversation = self.model.conversation(a.image, a.video)
                elif word.startswith("/") and word[1:].isalpha():
                    self._command(conversation, word, rest.strip())
                elif question:
                    self._ask(conversation, question)
            except (UserError, MemoryError, OutOfMemoryError) as error:  # of this turn alone
                reason = str(error) or "not enough memory; ask something shorter"
                print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print("\ninterrupted; this turn is left out of the conversation", file=sys.stderr)
            question = None

    def _command(self, conversation: Conversation, word: str, rest: str) -> None:
        from minillava.media.image import open_image
        from minillava.media.visual import Media

        if word == "/help":
            print(HELP, file=sys.stderr, flush=True)
        elif word == "/image" and rest:
            conversation.show(Media(open_image(rest)))
        else:
            raise UserError(f"{word}: no such command, or no file behind it; /help lists them")

    def _ask(self, conversation: Conversation, question: str) -> None:
        from minillava.generation.sampling import Sampling

        a = self.args
        sampling = Sampling(a.temperature, a.top_p, a.top_k, a.seed, a.min_p, a.repetition_penalty)
        how = (sampling, a.max_new_tokens, lambda _, text: self.write(text), a.stop)
        self.show(conversation.ask(question, *how))

    def write(self, text: str) -> None:
        if not self.args.json:
            print(text, end="", flush=True)

    def show(self, answer: Answer) -> None:
        """The end of an answer: timing, or all of it as JSON."""
        from minillava.device import copy_bytes_per_s, describe_device, peak_bytes

        device = self.model.engine.device
        speed, token_s, now = answer.decode_tok_per_s, answer.token_s, peak_bytes(device)
        peak = self.peak = now if now > self.with_buffers else self.peak  # without what measuring the copy took
        read = self.model.engine.step_bytes(answer.prompt_tokens + len(answer.token_ids) // 2)
        share = read / token_s / copy_bytes_per_s(device) if token_s else None
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
        memory = f" | peak {peak / 2**30:.2f} GiB" if peak else ""  # Windows does not say
        cut = " | stopped at the length limit" if answer.finish_reason == "length" else ""
        print(
            f"[load {self.load_s:.2f} s | vision {answer.vision_s:.3f} s | prefill {answer.prefill_s:.3f} s "
            f"({answer.prompt_tokens} tokens{visual}){decoding}{memory} | {describe_device(device)}{cut}]",
            file=sys.stderr,
            flush=True,
        )
