"""Score answers by a benchmark's own rules, beside published numbers.

  minillava evaluate gqa testdev_balanced_questions.json answers.jsonl
  minillava evaluate gqa testdev_balanced_questions.json answers.jsonl --questions gqa.jsonl --images images --model DIR
With --questions the answers are made first, as `minillava jobs` makes them: killed, the same command goes on."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from minillava.cli import jobs
from minillava.cli.jobs import add_asking
from minillava.cli.values import some_path
from minillava.errors import UserError, nearest
from minillava.files import misfit

BENCHMARKS = (
    "vqav2", "okvqa", "vizwiz", "textvqa", "gqa", "pope", "scienceqa", "mme", "seed", "mmbench", "chartqa", "docvqa"
)  # fmt: skip
NEW_TOKENS = 128  # of an answer to a benchmark


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What is scored, by what, and a model where there are no answers yet."""
    p.add_argument("benchmark", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    p.add_argument("annotations", type=some_path, metavar="FILE", help="the benchmark's file with the right answers")
    p.add_argument("answers", type=some_path, metavar="ANSWERS.jsonl", help="rows with question_id (or id) and text")
    p.add_argument("--questions", type=some_path, metavar="FILE", help="rows to answer first, as LLaVA has them")
    add_asking(p, NEW_TOKENS)
    p.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Answer where asked to, score, print. Returns 0."""
    if args.benchmark not in BENCHMARKS:
        raise UserError(f"benchmark '{args.benchmark}' is unknown{nearest(args.benchmark, BENCHMARKS)}")
    for path in (args.annotations, *([args.questions] if args.questions else [args.answers])):
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {what}; check the path")
    usual = argparse.ArgumentParser()
    add_asking(usual, NEW_TOKENS)
    asking = vars(usual.parse_args([]))
    given = [f"--{name.replace('_', '-')}" for name in asking if getattr(args, name) != asking[name]]
    if given and not args.questions:
        raise UserError(f"{given[0]} is for answers that are to be made; give --questions FILE, or leave it out")
    if args.questions:
        how = {name: getattr(args, name) for name in asking}
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # of one line of JSON
            jobs.run(argparse.Namespace(rows=args.questions, out=args.answers, **how))
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
        counts = {"answers": len(found), "unanswered": len(found.missed)}
        print(json.dumps({"benchmark": args.benchmark, **counts, "scores": scores, "models": near}))
        return 0
    missed = f"; {len(found.missed):,} questions have none and count as wrong" if found.missed else ""
    print(f"{args.benchmark}: {len(found):,} answers{missed}")
    width = max(map(len, [*scores, *(model for model, _, _ in published)]))
    print("\n".join(f"  {name:{width}}  {value:8.2f}" for name, value in scores.items()))
    for model, value, close in published:
        print(f"  {model:{width}}  {value:8.2f}  published{', within the usual spread' if close else ''}")
    return 0
