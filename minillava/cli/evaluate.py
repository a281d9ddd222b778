"""Score answers by a benchmark's own rules, beside published numbers.

  minillava evaluate gqa testdev_balanced_questions.json answers.jsonl
  minillava evaluate gqa testdev_balanced_questions.json answers.jsonl --questions gqa.jsonl --images images --model DIR
With --questions the answers are made first, as `minillava jobs` makes them: killed, the same command goes on."""

from __future__ import annotations

import argparse
import json

from minillava.checkpoints.hub import NANO
from minillava.cli.values import some_path, whole
from minillava.errors import UserError, nearest
from minillava.files import misfit

BENCHMARKS = (
    "vqav2", "okvqa", "vizwiz", "textvqa", "gqa", "pope", "scienceqa", "mme", "seed", "mmbench", "chartqa", "docvqa"
)  # fmt: skip
# What a model is asked with, for answers that are not there yet.
ASKING = {
    "images": None,
    "model": str(NANO),
    "base": None,
    "max_new_tokens": 128,
    "slots": 16,
    "dtype": None,
    "device": None,
    "quantize": None,
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What is scored, by what, and a model where there are no answers yet."""
    p.add_argument("benchmark", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    p.add_argument("annotations", type=some_path, metavar="FILE", help="the benchmark's file with the right answers")
    p.add_argument("answers", type=some_path, metavar="ANSWERS.jsonl", help="rows with question_id (or id) and text")
    p.add_argument("--questions", type=some_path, metavar="FILE", help="rows to answer first, as LLaVA has them")
    p.set_defaults(**ASKING)
    p.add_argument("--images", type=some_path, metavar="DIR", help="folder of their pictures")
    p.add_argument("--model", metavar="DIR|HUB_ID", help="checkpoint (default: the one that ships)")
    p.add_argument("--base", metavar="DIR|HUB_ID", help="what a delta, a lone projector or LoRA adapters belong to")
    p.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="length limit (default: 128)")
    p.add_argument("--slots", type=whole(1), metavar="N", help="questions at once (default: 16)")
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: what suits device and size)")
    p.add_argument("--device", metavar="D", help="cpu, cuda, ... or mps (default: cuda if there, else cpu)")
    p.add_argument("--quantize", metavar="nf4", help="see `minillava ask --help`")
    p.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Answer where asked to, score, print. Returns 0."""
    if args.benchmark not in BENCHMARKS:
        raise UserError(f"benchmark '{args.benchmark}' is unknown{nearest(args.benchmark, BENCHMARKS)}")
    for path in (args.annotations, *([args.questions] if args.questions else [args.answers])):
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {what}; check the path")
    given = [f"--{name.replace('_', '-')}" for name, usual in ASKING.items() if getattr(args, name) != usual]
    if given and not args.questions:
        raise UserError(f"{given[0]} is for answers that are to be made; give --questions FILE, or leave it out")
    if args.questions:
        _answer(args)
    from minillava.evaluation import benchmarks

    found = benchmarks.read_answers(args.answers)
    try:
        scores = benchmarks.BENCHMARKS[args.benchmark](args.annotations, found)
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{args.annotations}: is not {args.benchmark}'s file ({misfit(error)}); give the benchmark's own"
        ) from None
    published = benchmarks.compared(args.benchmark, scores)
    if args.json:
        near = {model: {"published": value, "within": close} for model, value, close in published}
        print(json.dumps({"benchmark": args.benchmark, "answers": len(found), "scores": scores, "models": near}))
        return 0
    print(f"{args.benchmark}: {len(found):,} answers")
    width = max(map(len, scores))
    print("\n".join(f"  {name:{width}}  {value:8.2f}" for name, value in scores.items()))
    for model, value, close in published:
        print(f"  {model:{width}}  {value:8.2f}  published{', within the usual spread' if close else ''}")
    return 0


def _answer(args: argparse.Namespace) -> None:
    from minillava.cli import jobs

    parser = argparse.ArgumentParser()
    jobs.add_arguments(parser)
    given = parser.parse_args([str(args.questions), str(args.answers)])
    for name in ASKING:
        setattr(given, name, getattr(args, name))
    jobs.run(given)
