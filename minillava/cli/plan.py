"""What a recipe's stages, or a model that answers, hold in memory at their peak, and how long a step takes on a card.

The step itself is run on tensors without values, so that no weights are read: a config.json is enough. Bytes are those
of PyTorch's tensors, counted; times are estimates from FLOPs, bytes, the card's data sheet and a usual efficiency."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillava.checkpoints.hub import resolve
from minillava.cli.train import find_recipe, packaged
from minillava.cli.values import whole
from minillava.errors import UserError
from minillava.layers.scheme import Scheme
from minillava.recipe import read_recipe, stage_index, with_tables
from minillava.training.cards import card_of
from minillava.training.tasks import check_words

if TYPE_CHECKING:
    from minillava.training.plan import Plan


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What is planned, and for what sizes."""
    add = p.add_argument
    add("what", metavar="RECIPE|MODEL", help="a recipe (its training is planned), or a checkpoint (answers)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    add("--stage", metavar="NAME", help="this stage of the recipe only")
    add("--card", default="A100-80GB", metavar="NAME", help="for times (default: A100-80GB); ? lists all")
    add("--fit", action="store_true", help="settings that fit 16, 24, 40, 80 and 141 GB")
    picture = "pixels of the picture of each sample or prompt; 0x0: none"
    add("--picture", default="1024x768", metavar="WxH", help=picture)
    tokens = "of a sample or prompt, its picture included (default: max_tokens; the picture and 64)"
    add("--tokens", type=whole(), default=0, metavar="N", help=tokens)
    add("--new", type=whole(1), metavar="N", help="tokens of an answer (default: 512)")
    add("--rows", type=whole(1), metavar="N", help="answers at a time (default: 1)")
    add("--quantize", default="", metavar="nf4", help="weights of a model that answers, as `ask` takes it")
    add("--cpu", action="store_true", help="for this CPU's code paths in place of a GPU's")
    add("--json", action="store_true", help="print a line of JSON for each plan")


def run(args: argparse.Namespace) -> None:
    """Plan and print."""
    size = re.fullmatch(r"(\d+)x(\d+)", args.picture)
    if not size:
        raise UserError(f"--picture is '{args.picture}'; give width x height, as 1024x768, or 0x0 for none")
    width, height = map(int, size.groups())
    args.picture = (width, height) if width and height else None
    args.card = card_of(args.card)
    is_recipe = args.what in packaged() or Path(args.what).suffix == ".toml"
    if not is_recipe and (args.set or args.stage):
        raise UserError(f"{args.what}: --set and --stage are for recipes; leave them out")
    if is_recipe and args.quantize:
        raise UserError(f"{args.what}: --quantize is for models that answer; give --set model.quantize={args.quantize}")
    if is_recipe and (args.new or args.rows):
        raise UserError(f"{args.what}: --new and --rows are for models that answer; leave them out")
    args.new, args.rows = args.new or 512, args.rows or 1
    if args.quantize:
        Scheme.parse(args.quantize)
    for line in (_recipe if is_recipe else _model)(args):
        print(line, flush=True)


def _recipe(args: argparse.Namespace) -> Iterator[str]:
    recipe = read_recipe(find_recipe(args.what), args.set)
    check_words(recipe)
    stages = recipe.stage if args.stage is None else (recipe.stage[stage_index(recipe, args.stage)],)
    from minillava.training.fit import fit_training, recipe_model  # they import torch
    from minillava.training.plan import plan_training

    config, held = recipe_model(recipe, lambda name: read_recipe(find_recipe(name)))
    for stage in stages:
        if stage.task not in ("llava", "shapes"):
            yield f"stage {stage.name}: task '{stage.task}' is not planned; llava and shapes are"
            continue
        its = with_tables(config, {"chat": stage.chat, "layout": stage.layout}, f"stage '{stage.name}'")

        def plan(stage: Any, quantize: str, its: Any = its) -> Plan:
            return plan_training(its, stage, held, quantize, args.cpu, args.tokens, args.picture)

        tokens = stage.row_tokens or args.tokens or min(stage.max_tokens, its.decoder.max_positions)
        title = f"stage {stage.name}: {stage.batch_size} {'rows' if stage.row_tokens else 'samples'} a step, "
        title += f"{stage.micro} at a time, of {tokens:,} tokens"
        if args.fit:
            yield title
            for gb, how, micro, found in fit_training(plan, stage, recipe.model.quantize):
                yield _fits(args, gb, f"{how}, micro_batch {micro}", found, "a step")
        else:
            yield from _shown(args, title, plan(stage, recipe.model.quantize), "a step")


def _model(args: argparse.Namespace) -> Iterator[str]:
    source = resolve(args.what, weights=False)
    import torch

    from minillava.checkpoints.checkpoint import Checkpoint
    from minillava.training.fit import fit_answer
    from minillava.training.plan import plan_answer

    config = Checkpoint(source).config

    def plan(quantize: str, rows: int) -> Plan:
        how = (quantize, args.cpu, args.tokens, args.new, rows, args.picture)
        return plan_answer(config, torch.bfloat16, *how)

    title = f"{args.what}: {args.rows} answers of {args.new} tokens at a time"
    if args.fit:
        yield title
        for gb, bits, rows, found in fit_answer(plan):
            yield _fits(args, gb, f"{bits}, {rows:,} answers at a time", found, "a prompt")
    else:
        yield from _shown(args, title, plan(args.quantize, args.rows), "a prompt")


def _shown(args: argparse.Namespace, title: str, plan: Plan, unit: str) -> Iterator[str]:
    from minillava.training.plan import PARTS

    card = args.card
    if args.json:
        found = {"what": title, "peak": plan.peak, "parts": plan.parts, "flops": plan.flops, "card": card.name}
        yield json.dumps(found | {"step_s": card.step_s(plan), "token_s": card.token_s(plan)})
        return
    yield title
    for part in PARTS:
        if plan.parts[part]:
            yield f"  {part:12} {plan.parts[part] / 2**30:8.2f} GiB"
    fits = "fits" if plan.peak <= card.usable else "does not fit"
    yield f"  {'peak':12} {plan.peak / 2**30:8.2f} GiB, {fits} {card.name}"
    yield f"  {unit} is {plan.flops / 1e12:,.1f} TFLOPs: about {_time(args, plan)} on {card.name}"


def _fits(args: argparse.Namespace, gb: int, how: str, plan: Plan | None, unit: str) -> str:
    if plan is None:
        return f"  {gb:4} GB  nothing fits"
    return f"  {gb:4} GB  {how}: {plan.peak / 2**30:.1f} GiB, {unit} about {_time(args, plan)} on {args.card.name}"


def _time(args: argparse.Namespace, plan: Plan) -> str:
    token = f", a token {args.card.token_s(plan) * 1e3:.1f} ms" if plan.token_bytes else ""
    return f"{args.card.step_s(plan):.3g} s{token}"
