"""Ask a LLaVA about pictures and videos. With no arguments: about a drawn scene.

Text goes to stdout as it comes; timing and everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minillava.chat.tokenizer import check_unicode
from minillava.checkpoints.hub import NANO
from minillava.cli import ranks
from minillava.cli.model import add_model, add_numbers, check_numbers, find_model
from minillava.cli.values import amount, whole
from minillava.errors import UserError
from minillava.files import named

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
SAMPLED = ("temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty")  # fields of Sampling


def add_arguments(p: argparse.ArgumentParser) -> None:
    """A model, pictures, a question, and how to answer."""
    add = p.add_argument
    add_model(p)
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    add("--video", action="append", default=[], metavar="FILE", help="a video, or a folder of frames")
    add("--frames", type=whole(1), metavar="N", help="frames of a video to look at, at most")
    add("--fps", type=amount(), metavar="F", help="frames a second to look at; 0: spread evenly over the video")
    add("--prompt", metavar="TEXT", help="the question; <image> in it says where a picture goes")
    add("--chat", action="store_true", help="a conversation: one question a line, the pictures stay")
    add("--raw", action="store_true", help="--prompt is the whole prompt: no chat template around it")
    add("--max-new-tokens", type=whole(1), default=512, metavar="N", help="length limit (default: 512)")
    add("--temperature", type=amount(), default=0.0, metavar="T", help="0 is greedy (default)")
    likeliest = "likeliest tokens of this probability together"
    add("--top-p", type=amount(zero=False, most=1), default=1.0, metavar="P", help=likeliest)
    add("--top-k", type=whole(), default=0, metavar="K", help="K likeliest tokens; 0: all (default)")
    add("--min-p", type=amount(most=1), default=0.0, metavar="P", help="tokens P times as likely as the likeliest")
    add("--seed", type=whole(-(2**63), 2**64 - 1), default=0, metavar="S", help="of sampling (default: 0)")
    penalty = "of tokens that came before (default: the checkpoint's)"
    add("--repetition-penalty", type=amount(zero=False), metavar="R", help=penalty)
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given several times")
    add_numbers(p)
    add("--look", metavar="WORD", help="draw the attention from a word of the answer over the picture: no explanation")
    add("--out", metavar="FILE", help="picture of --look (default: look.png; look-1.png, ... for several)")
    add("--json", action="store_true", help="print an answer as one line of JSON")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be refused before torch is imported."""
    if args.raw and (args.chat or args.prompt is None):
        raise UserError("--raw takes the whole prompt from --prompt, and does not go with --chat; give --prompt alone")
    if (args.image or args.video) and args.prompt is None and not args.chat:
        flag = "--image" if args.image else "--video"
        raise UserError(f"{flag} needs a question; give --prompt TEXT, or --chat to ask several")
    check_unicode(args.prompt or "")
    for image in args.image:
        if not Path(image).is_file():
            what = "is a folder" if Path(image).is_dir() else "no such image file"
            raise UserError(f"{image}: {what}; check the path")
    for video in args.video:
        if not Path(video).exists():
            raise UserError(f"{video}: no such video file or folder of frames; check the path")
        if Path(video).is_file() and find_spec("av") is None:
            raise UserError(f"{video}: videos need PyAV; pip install av, or give a folder of frames")
    if args.look is None and args.out is not None:
        raise UserError("--out is where --look WORD draws; give a word of the answer")
    if args.look is not None:
        _check_look(args)
    check_numbers(args)


def _check_look(args: argparse.Namespace) -> None:
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
        how = {name: getattr(self.args, name) for name in (*SAMPLED, "max_new_tokens", "raw", "stop")}
        answer = self.model.generate(prompt, images, videos=videos, on_text=self.write, **how)
        self.show(answer)
        if self.args.look is not None:
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

        sampling = Sampling(**{name: getattr(self.args, name) for name in SAMPLED})
        limit, stop = self.args.max_new_tokens, self.args.stop
        self.show(conversation.ask(question, sampling, limit, lambda _, text: self.write(text), stop))

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
            said = ("text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason")
            fields = {name: getattr(answer, name) for name in said} | {
                "load_s": round(self.load_s, 4),
                "vision_s": round(answer.vision_s, 4),
                "prefill_s": round(answer.prefill_s, 4),
                "decode_tok_per_s": speed and round(speed, 2),
                "peak_bytes": peak,
                "token_s": token_s and round(token_s, 6),
                "bandwidth_share": share and round(share, 4),
            }
            print(json.dumps(fields, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        visual = f", {answer.image_tokens} of them visual" if answer.image_tokens else ""
        parts = [f"load {self.load_s:.2f} s", f"vision {answer.vision_s:.3f} s"]
        parts += [f"prefill {answer.prefill_s:.3f} s ({answer.prompt_tokens} tokens{visual})"]
        if speed is not None and token_s is not None and share is not None:
            parts += [f"decode {speed:.1f} tok/s (median {token_s * 1e3:.2f} ms, {share:.0%} of copy bandwidth)"]
        parts += [f"peak {peak / 2**30:.2f} GiB"] if peak else []  # Windows does not say
        parts += [describe_device(device)]
        parts += ["stopped at the length limit"] if answer.finish_reason == "length" else []
        print(f"[{' | '.join(parts)}]", file=sys.stderr, flush=True)
