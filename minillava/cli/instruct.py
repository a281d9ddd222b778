"""Instruction data from captions and boxes, as LLaVA's was made; or preferences between a model's answers.

Asks an OpenAI-compatible endpoint, or a checkpoint in this process, for conversations, descriptions and questions that
take thought about each picture. Killed and started again, it asks for nothing twice. The output trains as it is."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from minillava.checkpoints.hub import resolve
from minillava.cli.values import amount, whole
from minillava.errors import UserError, nearest

if TYPE_CHECKING:
    from minillava.synthetic.instruct.collect import Item
    from minillava.synthetic.instruct.models import Model
    from minillava.synthetic.instruct.scenes import Scene

INTERRUPTED = "stopped; the same command goes on"
CONNECT_S = 10.0  # before anything is read
KINDS = ("conversation", "detail", "complex")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is known of the pictures, who is asked, what is kept."""
    add = parser.add_argument
    known = "COCO's captions and instances (JSON), or JSON lines\nof id, image, captions and instances (category, bbox)"
    add("scenes", nargs="*", metavar="FILE", help=known)
    add("--out", metavar="DIR", default="runs/instruct", help="for replies and samples (default: %(default)s)")
    add("--model", metavar="NAME|DIR", help="the endpoint's name for the model; without --url a checkpoint")
    add("--url", help="an OpenAI-compatible endpoint, such as http://localhost:8000/v1;\nits key is in OPENAI_API_KEY")
    add("--kinds", default=",".join(KINDS), help="of data (default: %(default)s)")
    add("--limit", type=whole(1), metavar="N", help="pictures (or questions) to work on; default: all")
    add("--concurrency", type=whole(1), default=8, metavar="N", help="at once (default: %(default)s)")
    add("--tries", type=whole(1), default=2, metavar="N", help="for a usable reply (default: %(default)s)")
    add("--temperature", type=amount(), default=0.7, metavar="T", help="of the replies (default: %(default)s)")
    add("--max-tokens", type=whole(1), default=1024, metavar="N", help="of a reply (default: %(default)s)")
    add("--price", metavar="IN,OUT", help="of a million prompt tokens and of a million new ones")
    add("--max-cost", type=amount(), default=0.0, metavar="SUM", help="stop once so much is spent")
    add("--dry-run", action="store_true", help="show a request of each kind and count tokens; ask nobody")
    counting = "count by this checkpoint (default: --model where it is\na folder, else 4 characters are a token)"
    add("--tokenizer", metavar="DIR", help=counting)
    compared = "make preferences: two answers to each first question\nof this LLaVA JSON, and which a judge prefers"
    add("--questions", metavar="FILE", help=compared)
    add("--images", metavar="DIR", help="the pictures that the questions are about")
    add("--judge", metavar="NAME", help="the judge's name (default: --model)")
    add("--judge-url", metavar="URL", help="the judge's endpoint (default: --url)")


def run(args: argparse.Namespace) -> None:
    """Check what is asked for, then ask, or show what would be asked."""
    kinds = [kind.strip() for kind in args.kinds.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds {kind}: unknown{nearest(kind, KINDS)}")
    if not kinds:
        raise UserError(f"--kinds is '{args.kinds}'; give at least one of {', '.join(KINDS)}")
    if not args.scenes and not args.questions:
        raise UserError("no captions; give COCO's files or JSON lines, or --questions for preferences")
    if not args.model and not args.dry_run:
        raise UserError("nobody to ask; give --model, and --url where it is behind an endpoint")
    if args.questions and not args.images:
        raise UserError("--questions: the answers need the pictures; give --images DIR")
    if (args.judge or args.judge_url or args.images) and not args.questions:
        raise UserError("--judge, --judge-url and --images are for preferences; give --questions, or leave them out")
    if args.dry_run and args.questions:
        raise UserError("--dry-run shows requests about captions; leave --questions out")
    if args.images and not Path(args.images).is_dir():
        raise UserError(f"{args.images}: no such folder of pictures; check the path")
    prices = prices_of(args.price)
    if args.max_cost and not any(prices):
        raise UserError("--max-cost needs --price to count with; give both")
    for url in filter(None, (args.url, args.judge_url)):
        check_url(url)
    from minillava.synthetic.instruct.scenes import read_scenes

    scenes = read_scenes([Path(path) for path in args.scenes]) if args.scenes else []
    if args.dry_run:
        return dry_run(args, scenes[: args.limit], kinds, prices)
    here = [] if args.url else {args.model, *([args.judge] if args.judge and not args.judge_url else [])}
    args.folders = {name: resolve(name) for name in here}  # of checkpoints in this process, before one is loaded
    work(args, scenes, kinds, prices)


def check_url(url: str) -> None:
    """Raises UserError for what is no address of an endpoint, or where nobody listens now; proxies are believed."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"'{url}' is not the address of an endpoint; give one such as http://localhost:8000/v1")
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"{url}: cannot be reached ({why}); start the server, or check --url") from None


def prices_of(text: str | None) -> tuple[float, float]:
    """Of a million prompt tokens and of a million new ones."""
    try:
        read, written = map(amount(), text.split(",")) if text else (0.0, 0.0)
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--price {text}: expected two numbers, such as 0.15,0.6") from None
    return read, written


def work(args: argparse.Namespace, scenes: Sequence[Scene], kinds: Sequence[str], prices: tuple[float, float]) -> None:
    """Make the samples."""
    from tqdm import tqdm

    from minillava.synthetic.instruct import collect
    from minillava.synthetic.instruct.prompts import judged, messages_for
    from minillava.synthetic.instruct.scenes import Scene

    model = model_of(args, args.model, args.url)
    settings = {name: getattr(args, name) for name in ("model", "url", "temperature", "max_tokens")}
    items: list[Item]
    if args.questions:
        other = (args.judge or args.model, args.judge_url or args.url)
        judge = model if other == (args.model, args.url) else model_of(args, *other)
        known = {scene.image: str(scene) for scene in scenes}
        asked = collect.read_questions(Path(args.questions))[: args.limit]
        items = list(collect.preference_items(model, judge, asked, Path(args.images), known))
        settings |= {"judge": args.judge, "judge_url": args.judge_url}
        settings["prompts"] = collect.fingerprint(judged("", "", ["", ""]))
    else:
        items = list(collect.scene_items(model, scenes[: args.limit], kinds, args.tries))
        blank = Scene("", "")
        settings["prompts"] = collect.fingerprint([m for kind in KINDS for m in messages_for(kind, blank)])
    name = "preferences.json" if args.questions else "instruct.json"
    with tqdm(total=len(items), unit="sample", dynamic_ncols=True) as bar:
        collect.run(
            Path(args.out), name, items, settings, args.concurrency, prices, args.max_cost,
            note=lambda done: bar.update(done - bar.n) and None,
        )  # fmt: skip


def model_of(args: argparse.Namespace, name: str, url: str | None) -> Model:
    """Who is asked: behind an endpoint, or a checkpoint here."""
    from minillava.synthetic.instruct.models import Endpoint, Local

    if url is None:
        return Local(args.folders[name], args.temperature, args.max_tokens)
    return Endpoint(url, name, os.environ.get("OPENAI_API_KEY") or "none", args.temperature, args.max_tokens)


def dry_run(
    args: argparse.Namespace, scenes: Sequence[Scene], kinds: Sequence[str], prices: tuple[float, float]
) -> None:
    """A request of each kind, and how many tokens all of them have."""
    from minillava.synthetic.instruct.prompts import messages_for

    source = args.tokenizer or (args.model if args.model and Path(args.model).is_dir() else None)
    tokenizer = None
    if source:
        from minillava.chat.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(resolve(source))
    about = "" if tokenizer else "about "
    total = 0
    for kind in kinds:
        texts = ["\n".join(message.text for message in messages_for(kind, scene)) for scene in scenes]
        counts = [len(tokenizer.encode(text, True)) if tokenizer else -(-len(text) // 4) for text in texts]
        total += sum(counts)
        if scenes:
            print(f"--- {kind}, the first of {len(scenes):,}: {about}{counts[0]:,} prompt tokens")
            for message in messages_for(kind, scenes[0]):
                print(f"[{message.role}] {message.text}\n")
        print(f"{kind}: {len(scenes):,} requests, {about}{sum(counts):,} prompt tokens")
    most = len(scenes) * len(kinds) * args.max_tokens
    print(f"in all {about}{total:,} prompt tokens, and at most {most:,} new ones")
    if any(prices):
        read, written = prices[0] * total / 1e6, prices[1] * most / 1e6
        print(f"cost: {about}{read:.4g} for prompts, at most {written:.4g} for replies")
