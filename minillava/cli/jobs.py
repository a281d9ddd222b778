"""Answer a file of questions: a row of JSON a line in, an answer a line out, in the same order.

  {"id": "1", "image": "photo.jpg", "prompt": "What is this?"}       also messages, images, video, temperature, ...
  {"custom_id": "1", "body": {"messages": [...], "max_tokens": 64}}   a line of OpenAI's batches
The same command goes on with a file that a kill has cut short. Exit status 1 where a row has an error in its place."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minillava.cli.model import add_model, add_numbers, check_numbers, find_model
from minillava.cli.values import amount, some_path, whole
from minillava.errors import UserError
from minillava.files import claimed_file, write_whole


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Files, a model, and how to answer where a row does not say."""
    p.add_argument("rows", type=some_path, metavar="IN.jsonl")
    p.add_argument("out", type=some_path, metavar="OUT.jsonl")
    add_asking(p)


def add_asking(p: argparse.ArgumentParser, new_tokens: int = 512) -> None:
    """Who answers, and how."""
    add = p.add_argument
    add_model(p)
    add("--images", type=some_path, metavar="DIR", help="folder of the pictures and videos that rows name")
    add("--fetch", action="append", default=[], metavar="HOST", help="pictures may come from this host")
    add("--slots", type=whole(1), default=16, metavar="N", help="rows answered at once (default: 16)")
    add("--context", type=whole(1), default=4096, metavar="N", help="tokens of prompt and answer (default: 4096)")
    limit = "length limit (default: %(default)s)"
    add("--max-new-tokens", type=whole(1), default=new_tokens, metavar="N", help=limit)
    add("--temperature", type=amount(), default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-p", type=amount(zero=False, most=1), default=1.0, metavar="P", help="of sampling")
    seed = "of the first row; then S + 1, ... (default: 0)"
    add("--seed", type=whole(-(2**63), 2**64 - 1), default=0, metavar="S", help=seed)
    add_numbers(p)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be refused before torch is imported."""
    if not args.rows.is_file():
        what = "is a folder" if args.rows.is_dir() else "no such file"
        raise UserError(f"{args.rows}: {what}; give a file with a row of JSON a line")
    if args.out.exists() and (not args.out.is_file() or args.out.samefile(args.rows)):
        what = "is a folder" if args.out.is_dir() else "is no file, which can be read again, or the rows themselves"
        raise UserError(f"{args.out}: {what}; give another file")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"{args.images}: no such folder of pictures; check the path")
    check_numbers(args)


def run(args: argparse.Namespace) -> int:
    """Load the model, answer what is not answered yet."""
    check(args)
    source = find_model(args)
    with claimed_file(args.out):
        return _answer(args, source)


def _answer(args: argparse.Namespace, source: Path) -> int:
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("rows", "out", "slots", "device")}
    begun = args.out.with_name(f".{args.out.name}.settings.json")
    if begun.is_file() and begun.read_bytes() != json.dumps(settings).encode():
        raise UserError(f"{args.out}: was begun with other settings; repeat those, or choose another file")
    from tqdm import tqdm

    from minillava import LLaVA
    from minillava.generation import jobs
    from minillava.generation.request import Request
    from minillava.generation.sampling import Sampling
    from minillava.media.sources import OwnSources

    how = Request(max_new_tokens=args.max_new_tokens, sampling=Sampling(args.temperature, args.top_p, seed=args.seed))
    how.sampling.check()
    model = LLaVA.from_pretrained(source, args.dtype, args.device, args.quantize, args.base)
    write_whole(begun, json.dumps(settings))
    total = sum(1 for _ in jobs.lines(args.rows))
    with tqdm(total=total, unit="row", file=sys.stderr) as bar:
        sources = OwnSources(args.fetch, args.images)
        done = jobs.run(model.engine, args.rows, args.out, how, sources, args.slots, args.context, bar.update)
    begun.unlink()
    kept = f"; {done.kept:,} were there already" if done.kept else ""
    print(f"{args.out}: {done.answered:,} answered, {done.failed:,} with an error in their place{kept}")
    return 1 if done.failed else 0
