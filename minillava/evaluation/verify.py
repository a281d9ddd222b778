"""Whether a checkpoint in this dtype, on this device, computes what it should, stage by stage: `minillava verify`.

Each stage is given what an exact reference gave it, so that an error shows where it is made. A stage departs when its
error is more than twice that of the reference in the model's own dtype, both against the exact one: this bound is the
dtype's, and nothing is tuned. Letters: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.api import LLaVA
from minillava.chat.prompt import render
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.errors import UserError
from minillava.evaluation.references import Prompt, Reference, by_steps
from minillava.evaluation.trace import Trace, our_stages, record
from minillava.generation.engine import Request
from minillava.kernels.nf4_dequantize import CODES, scales
from minillava.layers.int8 import Linear8bit
from minillava.layers.linear import Fused
from minillava.layers.quantize import Linear4bit
from minillava.media.visual import media
from minillava.processor import user_message

TIMES = 2  # of the error of plain PyTorch in the same dtype, as all kernels here are judged
DRAWS = 5  # passes of the whole model in its dtype: how errors grow through it is a matter of luck
PIXEL_STEPS = 4  # roundings of a prepared pixel: times 1/255, minus the mean, over the deviation, and one to spare
ROUNDED = 1 + 1e-5  # what float32 adds to a value right between two codes
SCALE_ERROR = 0.02  # of the largest of 256 scales, for those in 8 bits: dynamic_map's widest step is 0.014


@dataclass(frozen=True)
class Stage:
    """An error, relative to the reference's values, and what is allowed."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def departs(self) -> bool:
        return not self.error <= self.allowed


@dataclass
class Report:
    model: str
    against: str
    dtype: str
    device: str
    quantize: str | None
    stages: list[Stage] = field(default_factory=list)

    @property
    def first(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.departs), None)

    def add(self, name: str, error: float, allowed: float, note: str = "") -> None:
        self.stages.append(Stage(name, error, allowed, note))


def verify(
    subject: LLaVA, reference: Reference, question: str, image: Any, tokens: int = 16, report: Report | None = None
) -> Report:
    """Compare a model with a reference on one question about a PIL picture, and on `tokens` tokens of its answer.

    What comes behind the first stage that departs may be missing. Raises UserError for a prompt that cannot be made.
    """
    model, device = subject.model, subject.engine.device
    dtype = model.decoder.embed.weight.dtype
    report = report or Report("", reference.name, str(dtype), str(device), None)
    given = media([image])
    message = user_message(subject.config.chat, question, given)
    pieces = render(subject.config.chat, subject.tokenizer, [message], generate=True)
    example = subject.engine.processor([message], given, generate=True)
    prompt = Prompt("".join(text for text, _ in pieces), image, example)
    ids, pixels_NCHW = reference.read(prompt)
    if reference.reads:
        _compare_inputs(report, subject, prompt, ids, pixels_NCHW)
    if prompt.example.pixels_NCHW is None or prompt.example.pixels_NCHW.shape != pixels_NCHW.shape:
        return report
    high = torch.float64 if dtype == torch.float32 else torch.float32
    exact = reference.run(high)
    plain = reference.run(dtype, fed=exact)
    try:
        ids_T, spans = torch.tensor(prompt.example.ids, device=device), prompt.example.spans
        found = record(our_stages(model), lambda: model(ids_T, pixels_NCHW.to(device), spans=spans), exact)
    except UserError as error:
        report.add("visual tokens", float("inf"), 0.0, str(error))
        return report
    theirs_T, ours_T = _visual(subject, ids), _visual(subject, prompt.example.ids)
    near, ours = _values(plain, theirs_T), _values(found, ours_T)
    for name, right in _values(exact, theirs_T).items():
        made = ours.get(name)
        if right is None or made is None:
            continue
        if right.shape != made.shape:
            report.add(name, float("inf"), 0.0, f"{tuple(made.shape)}, there {tuple(right.shape)}")
            continue
        allowed = max(TIMES * distance(near[name], right), torch.finfo(dtype).eps / 2)
        report.add(name, distance(made, right), allowed, f"{tuple(made.shape)}")
    if report.first is None:
        _compare_answer(report, subject, reference, prompt, high, tokens)
    return report


def _compare_inputs(report: Report, subject: LLaVA, prompt: Prompt, ids: Sequence[int], pixels_NCHW: Tensor) -> None:
    """Ids (equal ones in a row as one: how many visual tokens there are is a stage of its own) and pixels."""
    ours, theirs = ([id for id, _ in groupby(some)] for some in (prompt.example.ids, ids))
    wrong = sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
    report.add("prompt", wrong, 0, f"{len(ids)} ids")
    found = prompt.example.pixels_NCHW
    if found is None or found.shape != pixels_NCHW.shape:
        shape = None if found is None else tuple(found.shape)
        report.add("pixels", float("inf"), 0.0, f"{shape}, there {tuple(pixels_NCHW.shape)}")
        return
    largest = pixels_NCHW.abs().max().item()
    error = (found - pixels_NCHW).abs().max().item() / largest
    report.add("pixels", error, PIXEL_STEPS * torch.finfo(torch.float32).eps, f"{tuple(found.shape)}")


def _visual(subject: LLaVA, ids: Sequence[int]) -> Tensor:
    return torch.isin(torch.tensor(ids), torch.tensor([*subject.engine.processor.placeholders]))


def _values(trace: Trace, visual_T: Tensor) -> dict[str, Any]:
    """What is compared at each stage, in order; None where the pass did not come so far."""
    taken, made = trace.taken.get, trace.made.get
    seen, spoken = ([name for name in trace.taken if name.startswith(part)] for part in ("vision", "decoder"))
    visual_TD = text_TD = None
    if (x_TD := taken("decoder layer 0")) is not None:
        at_T = visual_T[: len(x_TD)]
        visual_TD, text_TD = x_TD[at_T], x_TD[~at_T]
    return {
        "vision embedding": taken("vision layer 0"),
        **{name: made(name) for name in seen},
        "vision features": taken("projector"),
        "projector": made("projector"),
        "visual tokens": visual_TD,
        "splice": text_TD,
        "rotary embedding": trace.rotary,
        **{name: made(name) for name in spoken},
        "logits": trace.logits,
    }


def distance(found_TD: Tensor, right_TD: Tensor) -> float:
    """The error of a row over the row's norm, root mean square over the rows: no large row hides a small one."""
    norms_T = right_TD.norm(dim=1).clamp(min=1e-30)
    return ((found_TD - right_TD).norm(dim=1) / norms_T).square().mean().sqrt().item()


# ---- the answer ----


def _compare_answer(
    report: Report, subject: LLaVA, reference: Reference, prompt: Prompt, high: torch.dtype, tokens: int
) -> None:
    """The whole model at once, as it answers: prompt and decode steps through the cache, then the text itself.

    The reference sees the model's own answer and says which token it would have taken at each place. Another is right
    where the two are closer than twice what the logits may be off.
    """
    request = Request(raw=prompt.text, media=media([prompt.image]), max_new_tokens=tokens)
    (answer,) = subject.engine.generate([request])
    ids, dtype = answer.token_ids, subject.model.decoder.embed.weight.dtype
    trace, pixels = reference.run(high, ids[:-1]), prompt.example.pixels_NCHW
    assert trace.logits is not None and pixels is not None
    right_NV = trace.logits[-len(ids) :]
    if not reference.reads:  # its steps are our code too: exactly computed they have to agree with a single pass
        error = distance(reference.steps(high, ids), right_NV)
        report.add("decode steps, exactly", error, torch.finfo(dtype).eps / 2, "against one pass")
    draws = [reference.steps(dtype, ids, draw) for draw in range(DRAWS)]
    found_NV = by_steps(subject.model, prompt.example, pixels.to(subject.engine.device), ids)
    allowed = TIMES * max(distance(near_NV, right_NV) for near_NV in draws)
    report.add("whole model", distance(found_NV, right_NV), allowed, f"{len(ids)} positions, by decode steps")
    chosen_N = torch.tensor(ids)
    gap_N = right_NV.amax(1) - right_NV.gather(1, chosen_N[:, None])[:, 0]
    allowed = 2 * TIMES * max((near_NV - right_NV).abs().max().item() for near_NV in draws)
    others = int((gap_N > 0).sum())
    which = f"{others} of them others that are as likely" if others else "the same"
    report.add("answer", gap_N.max().item(), allowed, f"{len(ids)} tokens, {which}: {answer.text!r}")


# ---- weights in few bits ----


def compare_weights(report: Report, subject: LLaVA, source: Path | str, base: Path | str | None) -> None:
    """Every weight that was put in few bits against the file's: within half the widest step between two codes of its
    block's (or row's) largest. Raises UserError where the file cannot be read."""
    layers = _few_bits(subject.model)
    worst, allowed, squares, total = 0.0, 0.0, 0.0, 0.0

    def look(name: str, weight: Tensor) -> None:
        nonlocal worst, allowed, squares, total
        layer = layers.pop(name.removesuffix(".weight"), None)
        if layer is None:
            return
        weight = weight.float().cpu()
        off = layer.dequantize(torch.float32).cpu() - weight
        error, most = _steps(layer, weight, off)
        if error - most > worst - allowed or not allowed:
            worst, allowed = error, most
        squares, total = squares + off.square().sum().item(), total + weight.square().sum().item()

    Checkpoint.open(source, base).load(torch.float32, sink=look)
    report.add("weights in few bits", worst, allowed, f"root mean square {(squares / max(total, 1e-30)) ** 0.5:.2%}")


def _few_bits(model: Any) -> dict[str, Linear4bit | Linear8bit]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            found |= {f"{name.rpartition('.')[0]}.{part}": layer for part, layer in module.parts()}
        elif not name.endswith(".product"):
            found[name] = module
    return {name: layer for name, layer in found.items() if isinstance(layer, Linear4bit | Linear8bit)}


def _steps(layer: Linear4bit | Linear8bit, weight: Tensor, off: Tensor) -> tuple[float, float]:
    """The largest error of a weight over the largest weight of its block, and half the widest step of the codes."""
    if isinstance(layer, Linear8bit):
        return (off.abs().amax(1) / weight.abs().amax(1).clamp(min=1e-30)).max().item(), 0.5 / 127 * ROUNDED
    size, code = layer.blocksize, sorted(CODES[layer.quant_type])
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % size)).view(-1, size)
    errors = torch.nn.functional.pad(off.flatten(), (0, -weight.numel() % size)).view(-1, size).abs()
    largest = flat.abs().amax(1).clamp(min=1e-30)
    stored = scales(layer.absmax, layer.nested, layer.dynamic).cpu()
    beyond = ((stored - largest).abs() / largest.max()).max().item()
    half = max(b - a for a, b in pairwise(code)) / 2 * ROUNDED
    if layer.nested is None:
        return (errors.amax(1) / largest).max().item(), half
    if beyond > SCALE_ERROR:
        return float("inf"), half
    return ((errors.amax(1) - (stored - largest).abs()) / largest).max().item(), half
