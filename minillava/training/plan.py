"""What a training step or an answer holds in memory at its peak, and what it costs, before anything is loaded.

The step itself runs, the trainer's own, on tensors that have shapes and no values: "meta" tensors stand for a GPU
(whose code paths they take), fake ones for a CPU. Every storage is counted from where it is made to where it is freed.
What is not PyTorch's (the CUDA context, cuBLAS' workspaces, fragments) is not in it, nor what C code for CPUs keeps.
Letters: N outputs, K inputs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillava.checkpoints.checkpoint import without_memory
from minillava.config import IGNORE, ModelConfig
from minillava.data.batch import Batch, rounded_up
from minillava.generation.engine import TOWER_BATCH
from minillava.kernels.cpu import library
from minillava.kernels.frame import PLAIN
from minillava.kernels.nf4_dequantize import NESTED
from minillava.layers.cache import KVCache
from minillava.layers.int8 import Linear8bit
from minillava.layers.quantize import Linear4bit, chosen_layers
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.recipe import StageConfig
from minillava.training import parallel
from minillava.training.llava_task import LLaVATask
from minillava.training.metrics import Work
from minillava.training.trainer import Trainer
from minillava.visual_tokens import image_span

PARTS = ("weights", "copies", "gradients", "optimizer", "vision", "activations", "logits", "cache", "backward")


@dataclass
class Plan:
    """Bytes at the peak, by part; and the work of a step (training) or of prompt and token (answering)."""

    parts: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0  # of a step, what checkpointing computes again included; of the prompt
    token_bytes: int = 0  # read for each new token

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors of the planned device, by the label at their making, and keeps the peak's.

    Operations that ask for values are told 1; `found` are the numbers of places that `nonzero` finds, in turn, and
    `patches` are what a native tower keeps of its tokens.
    """

    def __init__(self, found: Sequence[int], patches: int):
        super().__init__()
        self.found, self.patches, self.label = cycle(found), patches, "weights"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.known: dict[int, list[Any]] = {}  # id of a storage -> label, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            return {torch.bool: True}.get(args[0].dtype, 1 if not args[0].is_floating_point() else 1.0)
        if name == "aten::nonzero":
            return self.count(args[0].new_empty((next(self.found), args[0].ndim), dtype=torch.int64))
        if name == "aten::index.Tensor" and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return self.count(args[0].new_empty((self.patches, *args[0].shape[1:])))
        if name.startswith("minillava::"):
            return self.operation(func, name.removeprefix("minillava::"), args, kwargs)
        return self.count(func(*args, **kwargs))

    def operation(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """One of ours: what it makes, and of those that make much in between, that too."""
        if name == "linear_cross_entropy":
            with self, self.labelled("logits"):
                return PLAIN[name](*args, **kwargs)
        if name.startswith("nf4_matmul"):
            x, packed = args[0], args[1]
            with self, self.labelled("weights"):
                dequantised = x.new_empty(2 * packed.numel())
                del dequantised
        return self.count(func(*args, **kwargs))

    def count(self, out: Any) -> Any:
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor)):
                self.note(tensor)
        return out

    def note(self, tensor: Tensor, label: str = "") -> None:
        """Count a tensor's storage if it is new; with a label, as that."""
        storage = tensor.untyped_storage()
        entry = self.known.get(id(storage))
        if entry is None:
            entry = self.known[id(storage)] = [label or self.label, storage.nbytes()]
            weakref.finalize(storage, self.freed, id(storage))
            self.live[entry[0]] += entry[1]
        elif label and entry[0] != label:
            self.live[entry[0]] -= entry[1]
            self.live[label] += entry[1]
            entry[0] = label
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def freed(self, key: int) -> None:
        label, size = self.known.pop(key)
        self.live[label] -= size

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before


class Ones(TorchFunctionMode):
    """Lists of values are of ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return [1 if not args[0].is_floating_point() else 1.0] * len(args[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(on_cpu: bool, found: Sequence[int], patches: int, answers: bool = False) -> Iterator[LiveBytes]:
    """Tensors without values for as long as this lasts; on a CPU without code of ours in C. Where that would compute
    `answers`, it holds what PyTorch does on CPUs that multiply bf16."""
    with contextlib.ExitStack() as stack:
        if on_cpu:
            told = {"library": None} | ({"multiplies_bf16": True} if answers and library.library() else {})
            for name, value in told.items():
                stack.callback(setattr, library, name, getattr(library, name))
                setattr(library, name, lambda value=value: value)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Ones())
        yield stack.enter_context(LiveBytes(found, patches))


def make_model(config: ModelConfig, dtype: torch.dtype, scheme: Scheme | None, on_cpu: bool) -> LLaVAModel:
    """The network in a dtype, with layers in few bits where the scheme says so; without values."""
    model = LLaVAModel(config) if on_cpu else without_memory(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if scheme:
        for name in chosen_layers(model, scheme):
            model.set_submodule(name, _in_few_bits(model.get_submodule(name), scheme.type_of(f"{name}.weight"), scheme))
    return model


def _in_few_bits(layer: Any, kind: str, scheme: Scheme) -> nn.Module:
    (N, K), like, size = layer.weight.shape, layer.weight, scheme.blocksize
    if kind == "int8":
        absmax = like.new_empty(N, dtype=torch.float32)
        return Linear8bit(like.new_empty(N, K, dtype=torch.int8), absmax, layer.bias, like.dtype)
    blocks, nested, dynamic = -(-N * K // size), None, None
    packed, absmax = like.new_empty((N * K + 1) // 2, dtype=torch.uint8), like.new_empty(blocks, dtype=torch.float32)
    if scheme.double:
        absmax, dynamic = absmax.to(torch.uint8), like.new_empty(256, dtype=torch.float32)
        nested = like.new_empty(2, -(-blocks // NESTED), dtype=torch.float32)
    return Linear4bit((packed, absmax, nested, dynamic), (N, K), kind, size, layer.bias, like.dtype)


# ---- training ----


class PlannedTask(LLaVATask):
    """LLaVA's task without data: its batches are given."""

    def __init__(self, model: LLaVAModel, stage: StageConfig, device: torch.device):
        self.run: Any = SimpleNamespace(device=device, model=model, recipe=None)
        self.model, self.config, self.stage = model, model.config, replace(stage, steps=1)
        self.parts = {"vision": model.vision, "projector": model.projector, "decoder": model.decoder}


class Moments:
    """What AdamW keeps of each parameter, made at its first step as fused kernels do: nothing beside it."""

    def __init__(self, groups: list[dict[str, Any]], in_8_bits: bool):
        self.param_groups, self.in_8_bits, self.state = groups, in_8_bits, list[Tensor]()

    def step(self) -> None:
        for p in [p for group in self.param_groups for p in group["params"] if not self.state]:
            if self.in_8_bits and p.numel() >= 4096:
                moments = [torch.empty_like(p, dtype=torch.uint8) for _ in range(2)]
                self.state += [*moments, p.new_empty(2 * -(-p.numel() // 256))]
            else:
                self.state += [torch.empty_like(p), torch.empty_like(p)]


def plan_training(
    config: ModelConfig,
    stage: StageConfig,
    held: torch.dtype,
    quantize: str = "",
    on_cpu: bool = False,
    tokens: int = 0,
    picture: tuple[int, int] | None = (336, 336),
) -> Plan:
    """The peak of two optimizer steps of a stage, and the FLOPs of one.

    held: dtype of the weights that a run starts with. tokens: of a sample, its picture (width, height) included; 0: as
    many as the stage and the decoder's context allow. A stage that packs rows of tokens counts rows.
    """
    tokens = stage.row_tokens or tokens or min(stage.max_tokens, config.decoder.max_positions)  # as training cuts
    batch = make_batch(config, tokens, stage.micro, picture, on_cpu)
    device = torch.device("cpu" if on_cpu else "meta")
    if stage.dtype == "auto" and not on_cpu:
        stage = replace(stage, dtype="bfloat16")
    visual = sum(span.tokens for span in batch.spans)
    patches = sum(span.views for span in batch.spans)
    with counted(on_cpu, [visual, batch.supervised] if visual else [batch.supervised], patches) as count:
        model = make_model(config, held, Scheme.parse(quantize) if quantize else None, on_cpu)
        with count.labelled("activations"):
            batch = batch._each(lambda t: torch.empty_like(t, device=device))  # without values
        trainer = Trainer(PlannedTask(model, stage, device), stage, device, Path("."), None, False)  # type: ignore[arg-type]
        _watch(trainer, count)
        undo = parallel.wrap_blocks(model, stage.checkpointing, False)
        model.train()
        count.peak = Counter(count.live)
        micros = [batch] * -(-stage.batch_size // stage.micro)
        for _ in range(2):
            count.label = "copies"
            trainer.train_step(micros[:2])
        undo()
        flops = trainer.task.counts([batch])["flops"] * len(micros) * (4 / 3 if stage.checkpointing == "full" else 1)
    return Plan(count.peak, flops)


def _watch(trainer: Trainer, count: LiveBytes) -> None:
    """Labels for what a step makes."""
    model: Any = trainer.task.model
    named = {id(p): p for p in model.parameters()}
    for key, copy in trainer.frozen.items():
        if copy.dtype != named[key].dtype:
            count.note(copy, "copies")

    def label(name: str) -> Any:
        return lambda *_: setattr(count, "label", name)

    model.register_forward_pre_hook(label("activations"))
    model.register_forward_hook(label("backward"))
    model.vision.register_forward_pre_hook(label("vision"))
    model.vision.register_forward_hook(label("activations"))
    for p in trainer.trained.values():
        p.register_post_accumulate_grad_hook(lambda p: count.note(p.grad, "gradients"))
    eight = trainer.stage.optimizer == "adamw8bit"
    optimizer: Any = trainer.optimizer
    if eight or (trainer.device.type == "meta" and trainer.stage.optimizer == "adamw"):
        optimizer = trainer.optimizer = Moments(optimizer.param_groups, eight)  # type: ignore[assignment]
    step = optimizer.step

    def labelled_step() -> None:
        with count.labelled("optimizer"):
            step()

    optimizer.step = labelled_step


def make_batch(
    config: ModelConfig, tokens: int, samples: int, picture: tuple[int, int] | None, on_cpu: bool = False
) -> Batch:
    """Samples of so many tokens, each a picture and text of which half is learned."""
    span = image_span(config, *picture) if picture else None
    visual = span.tokens if span else 0
    text = max(2, tokens - visual)
    placeholder = config.chat.image_token_id
    ids = ([placeholder] * visual + [1] * text) * samples
    labels = ([IGNORE] * (visual + text - text // 2) + [1] * (text // 2)) * samples
    pixels = torch.empty(samples * span.views, 3, *[config.vision.image_size] * 2) if span else None
    each, spans = visual + text, (span,) * samples if span else ()
    batch = Batch(
        torch.tensor(ids), torch.tensor(labels), tuple(range(0, each * samples + 1, each)), pixels,
        text // 2 * samples, spans=spans,
    )  # fmt: skip
    return rounded_up(batch, placeholder) if on_cpu else batch


# ---- answering ----


def plan_answer(
    config: ModelConfig,
    dtype: torch.dtype,
    quantize: str = "",
    on_cpu: bool = False,
    prompt: int = 0,
    new: int = 512,
    rows: int = 1,
    picture: tuple[int, int] | None = (336, 336),
) -> Plan:
    """The peak of `rows` prompts that are read together, and of a decode step behind them.

    prompt: tokens of each, its picture included (0: the picture and 64 more); new: of each answer.
    """
    visual = image_span(config, *picture).tokens if picture else 0
    batch = make_batch(config, prompt or visual + 64, rows, picture)
    device = torch.device("cpu" if on_cpu else "meta")
    scheme = Scheme.parse(quantize) if quantize else None
    views = sum(span.views for span in batch.spans)
    with counted(on_cpu, [visual * rows], views, answers=True) as count, torch.no_grad():
        model = make_model(config, dtype, scheme, on_cpu).eval()
        with count.labelled("activations"):
            batch = batch._each(lambda t: torch.empty_like(t, device=device))  # without values
        capacity = min(batch.cu_seqlens[1] + new, config.decoder.max_positions)
        with count.labelled("cache"):
            cache = KVCache(config.decoder, rows, capacity, device, dtype)
        count.peak = Counter(count.live)
        with count.labelled("vision"):
            seen = model.see(batch.pixels_NCHW, batch.spans, TOWER_BATCH) if batch.pixels_NCHW is not None else []
        with count.labelled("activations"):
            model(batch.ids_T, visual=seen, cu_seqlens=batch.cu_seqlens, cache=cache, last_only=True)
            model(torch.empty(rows, 1, dtype=torch.int64, device=device), cache=cache)
        native = [patches for span in batch.spans if span.native for patches in span.windows]
        patches = native or [config.vision.num_patches] * views
        for p in model.parameters():
            p.requires_grad_(False)
        flops = Work(model).flops(batch.cu_seqlens, rows, patches) / 2  # a frozen product is counted forward and back
        weights = sum(t.nbytes for t in (*model.decoder.parameters(), *model.decoder.buffers()))
        embedding = 0 if config.decoder.tie_embeddings else model.decoder.embed.weight.nbytes  # of which a row is read
        token_bytes = weights - embedding + cache.k_LBSGK.nbytes * 2
    return Plan(count.peak, flops, token_bytes)
