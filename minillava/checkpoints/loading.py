"""Reading weights into memory, a few megabytes at a time: as they are, in few bits, or added to those of a base."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minillava.checkpoints.names import CLASS_TOKEN, EXPERT, Plan
from minillava.checkpoints.tensor_files import Stored, finite, read, read_named
from minillava.errors import UserError
from minillava.layers.int8 import Linear8bit
from minillava.layers.quantize import Linear4bit, quantized_layer
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel

Quantized = Linear4bit | Linear8bit
Sink = Callable[[str, Tensor], None]  # takes each weight of ours by name
Cut = Callable[[str, Tensor], Tensor]  # what is kept of it


def take(
    source: Mapping[str, Stored],
    empty: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sink: Sink | None = None,
    cut: Cut | None = None,
) -> dict[str, Tensor]:
    """Read tensors in the order of the files; `empty` holds the parameters (on meta, say) by our names.

    With `cut` only what it leaves of each is kept. With a `sink` every tensor goes there once it is whole, and only its
    shape is kept. Raises UserError for values that are not finite, or that `dtype` does not hold.
    """
    state: dict[str, Tensor] = {}
    read_of: Counter[str] = Counter()
    for name, stored, values in read_named(source):
        values = values if cut is None else cut(name, values)
        tensor = values.to(device, dtype, copy=True)
        if not finite(tensor):
            if finite(values):
                raise UserError(f"{stored.path}: {stored.name} has values past what {dtype} holds; use bfloat16")
            raise UserError(
                f"{stored.path}: {stored.name} has values that are not finite: the training that wrote it diverged, or "
                "the file is damaged; use another checkpoint"
            )
        if expert := EXPERT.fullmatch(name):
            name = f"{expert[1]}.{expert[3]}"
            if name not in state:
                state[name] = tensor.new_empty(empty[name].shape)
            state[name][int(expert[2])] = tensor
            read_of[name] += 1
        else:
            state[name] = tensor.flatten() if name == CLASS_TOKEN else tensor
        if sink is not None and read_of[name] in (0, len(state[name])):
            sink(name, state[name])
            state[name] = state[name].to("meta")
    return state


def take_quantized(
    plan: Plan, names: Iterable[str], scheme: Scheme | None, device: torch.device | str
) -> dict[str, Quantized]:
    """Read the weights of those names in few bits: as they are stored where the files have them so, else by `scheme`.

    q, k and v of RICE's tower are shares of one tensor; it is read once.
    """
    layers = {}
    stored_at = {name: plan.source[name] for name in names}
    stored_at |= {name: replace(stored, share=(0, 1)) for name, stored in stored_at.items() if name in plan.companions}
    whole, entry = None, ""  # the last tensor that was read, and its name
    for name, stored, tensor in read_named(stored_at):
        if name not in plan.companions:
            layers[name] = quantized(tensor.to(device), scheme, name, stored.name)
            continue
        if whole is None or stored.name != entry:
            companions = {key: t.to(device) for key, t in plan.read_companions(name).items()}
            kind = Linear8bit if "SCB" in companions else Linear4bit
            try:
                whole, entry = kind.from_stored(tensor.to(device, copy=True), companions), stored.name
            except ValueError as error:
                raise UserError(f"{stored.path}: {stored.name} {error}; get the checkpoint again") from None
        which, shares = plan.source[name].share
        rows = whole.out_features // shares
        try:
            layers[name] = whole if shares == 1 else whole.rows(which * rows, (which + 1) * rows)
        except ValueError as error:
            why = f"its q, k and v cannot be taken apart: {error}; keep the tower in 16 bits"
            raise UserError(f"{stored.name}: {why}") from None
    return layers


def quantized(weight: Tensor, scheme: Scheme | None, name: str, stored: str) -> Quantized:
    """A weight of ours by name in few bits. Raises UserError with its name in the file for one that is not finite."""
    try:
        return quantized_layer(weight, scheme or Scheme(), name)
    except ValueError as error:
        raise UserError(f"{stored} {error}; it cannot be quantised") from None


def check_tied(head: Stored, embed: Stored, dtype: torch.dtype) -> None:
    """A tied model may store its head; it must be the embedding then."""
    if not torch.equal(*(tensor.to(dtype, copy=True) for tensor in read([head, embed]))):
        raise UserError(f"{head.path}: {head.name} differs from the embedding, but config.json ties the two")


def add_base(state: dict[str, Tensor], delta: Plan, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    """Delta weights: target = delta + base, in the delta's dtype; a base may have fewer rows of vocabulary."""
    decoder = {name: shape for name, shape in wanted.items() if name.startswith("decoder.")}
    for name in ("decoder.embed.weight", "decoder.head.weight"):
        stored = delta.source.get(name)
        if stored and name in decoder and stored.shape[0] <= decoder[name][0]:
            decoder[name] = (stored.shape[0], decoder[name][1])
    delta.check(where, decoder)
    for name, stored, tensor in read_named(delta.source):
        rows = state[name][: stored.shape[0]]
        rows += tensor.to(rows.device, rows.dtype)


def install(
    model: LLaVAModel, state: dict[str, Any], layers: Mapping[str, Quantized], dtype: torch.dtype
) -> LLaVAModel:
    """Put weights by our names, and layers in few bits by those of their weights, into a model that has none."""
    for name, layer in layers.items():
        path = name.removesuffix(".weight")
        bias = state.pop(f"{path}.bias", None)
        layer.bias, layer.dtype = None if bias is None else torch.nn.Parameter(bias, requires_grad=False), dtype
        model.set_submodule(path, layer)
        state |= {f"{path}.{key}": value for key, value in layer.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()
