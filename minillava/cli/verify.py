"""Whether a checkpoint computes what it should in this dtype, in these bits, on this device: stage by stage.

It is compared with our own plain PyTorch code in float64 (for models in 16 bits float32), or with transformers, on one
question. Each stage gets the reference's values, so the first that departs is where the fault is. Allowed is twice the
error of plain PyTorch in the same dtype. With --quantize the weights are compared too. Exit status: 0, 1 where a stage
departs, 2 for bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minillava.chat.tokenizer import check_unicode
from minillava.checkpoints.hub import resolve
from minillava.cli.model import BASE, add_numbers, check_numbers, find_model
from minillava.cli.values import whole
from minillava.errors import UserError

if TYPE_CHECKING:
    from minillava.evaluation.verify import Report


def add_arguments(p: argparse.ArgumentParser) -> None:
    """A model as it is to be used, what it is compared with, and on what."""
    add = p.add_argument
    add("model", metavar="DIR|HUB_ID", help="checkpoint")
    add("--base", metavar="DIR|HUB_ID", help=BASE)
    add(
        "--against", metavar="transformers|DIR",
        help="transformers' model of the same folder, pixels and ids included; or another checkpoint, such as the one\n"
        "that this was converted from (default: the checkpoint itself as our plain code)",
    )  # fmt: skip
    add_numbers(p)
    add("--image", metavar="FILE", help="a picture (default: a drawn scene)")
    add("--prompt", default="What is in this picture?", metavar="TEXT", help="the question")
    add("--tokens", type=whole(1), default=16, metavar="N", help="tokens of the answer (default: 16)")
    add("--json", action="store_true", help="print the report as one line of JSON")
    add("--plot", metavar="FILE.png", help="draw the errors by depth (the extra plots)")


def run(args: argparse.Namespace) -> int:
    """Compare and report."""
    check_numbers(args)
    check_unicode(args.prompt)
    if args.against == "transformers" and args.quantize:
        raise UserError("--against transformers is for weights as they are; leave one of it and --quantize out")
    if args.plot and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib; pip install 'minillava[plots]'")
    if args.image and not Path(args.image).is_file():
        raise UserError(f"{args.image}: no such image file; check the path")
    source = find_model(args)
    if args.against not in (None, "transformers"):
        args.against = resolve(args.against)
    report = _report(args, source)
    first = report.first
    if args.json:
        print(json.dumps(dataclasses.asdict(report) | {"first": first.name if first else None}))
    else:
        _print(report)
    if args.plot:
        _plot(report, args.plot)
    return 0 if first is None else 1


def _report(args: argparse.Namespace, source: Path) -> Report:
    from minillava import LLaVA
    from minillava.evaluation.references import Own, Reference, Transformers
    from minillava.evaluation.verify import Report, compare_weights, verify
    from minillava.media.image import open_image
    from minillava.synthetic.shapes import demo_scene

    subject = LLaVA.from_pretrained(source, args.dtype, args.device, args.quantize, args.base)
    reference: Reference
    if args.against == "transformers":
        reference = Transformers(source, subject.config)
    else:
        base, on_cpu = None if args.against else args.base, subject.engine.device.type == "cpu"
        reference = Own(args.against or source, base, args.quantize, on_cpu)
    dtype = str(subject.model.decoder.embed.weight.dtype).removeprefix("torch.")
    report = Report(str(source), reference.name, dtype, str(subject.engine.device), args.quantize)
    if args.quantize:
        compare_weights(report, subject, args.against or source, None if args.against else args.base)
    image = open_image(args.image) if args.image else demo_scene()[0]
    return verify(subject, reference, args.prompt, image, args.tokens, report)


def _print(report: Report) -> None:
    bits = f", {report.quantize}" if report.quantize else ""
    print(f"{report.model} in {report.dtype}{bits} on {report.device}, against {report.against}\n")
    print(f"{'stage':28} {'error':>9} {'allowed':>9}")
    for stage in report.stages:
        mark = " DEPARTS" if stage.departs else ""
        print(f"{stage.name:28} {stage.error:9.2e} {stage.allowed:9.2e}{mark}  {stage.note}")
    first = report.first
    if first is None:
        print("\nevery stage is within what the dtype allows")
    else:
        times = f"{first.error / first.allowed:.3g} times what is allowed" if first.allowed else "none is allowed"
        print(f"\nfirst to depart: {first.name}, {first.error:.3g}: {times}")


def _plot(report: Report, path: str) -> None:
    """Errors and bounds, stage after stage, on a logarithmic axis."""
    from matplotlib.figure import Figure

    stages = [stage for stage in report.stages if math.isfinite(stage.error)]
    figure = Figure(figsize=(max(6.0, 0.22 * len(stages)), 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style in (("error", "o-"), ("allowed", "k--")):
        values = [getattr(stage, name) or math.nan for stage in stages]
        axes.plot(range(len(stages)), values, style, label=name, markersize=3)
    axes.set_xticks(range(len(stages)), [stage.name for stage in stages], rotation=90, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title(f"{Path(report.model).name}, {report.dtype}, against {report.against}", fontsize=9)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({why}); give a .png file in a folder that is there") from None
