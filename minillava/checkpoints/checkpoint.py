"""Checkpoints: a folder in any layout of `checkpoints.names`, resolved, read and understood once.

The network is built without memory (on the meta device) and filled a few megabytes at a time, so that loading peaks at
about one copy of the weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.chat.tokenizer import Tokenizer, load_tokenizer
from minillava.checkpoints import inspection, loading
from minillava.checkpoints.adapters import Adapters, read_adapters
from minillava.checkpoints.chat_files import generation_notes
from minillava.checkpoints.config_json import read_config, write_config
from minillava.checkpoints.hub import find, resolve
from minillava.checkpoints.names import OPTIONAL, WHOLE, Plan, kinds, layout_of, unstack
from minillava.checkpoints.original_llava import is_original, tower_folder
from minillava.checkpoints.tensor_files import Stored, inspect, inspect_folder, read
from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.layers import tensor_parallel
from minillava.layers.linear import Unallocated
from minillava.layers.quantize import chosen_layers
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.schema import optional_json, read_json


class Checkpoint:
    """A folder with a model, or with what becomes one over a base; `open` one, then ask for its parts."""

    def __init__(self, folder: Path, base: Path | None = None):
        self.folder, self.base = folder, base

    @cached_property
    def raw(self) -> dict[str, Any]:
        """config.json; that of the base where a folder holds adapters and none of its own."""
        return optional_json(self._home / "config.json")

    @property
    def _home(self) -> Path:
        """The folder whose config.json and files say what the model is."""
        own = (self.folder / "config.json").is_file() or self.adapters is None
        return self.folder if own else self._language_model

    @property
    def _vocabulary(self) -> Path:
        """The folder whose tokenizer it is: this one, else that of its base."""
        own = any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return self.folder if own else self._language_model

    @classmethod
    def open(cls, source: Path | str, base: Path | str | None = None) -> Checkpoint:
        """The checkpoint in a folder, or of a hub id ('owner/name'), which is downloaded or taken from the cache.

        `base` completes those of original LLaVA that are no whole model: a delta is added to it, a lone
        mm_projector.bin put on top, adapters are merged into it (by default into the one that their config names).
        Raises UserError where there is no such folder.
        """
        return cls(resolve(source), None if base is None else resolve(base))

    @cached_property
    def config(self) -> ModelConfig:
        """config.json with the processor's, tokenizer's and tower's files. Raises UserError for what is unsupported."""
        raw = self.raw or read_json(self._home / "config.json")
        return read_config(raw, self._home, self._vocabulary, find)

    @cached_property
    def adapters(self) -> Adapters | None:
        """LoRA adapters, where the folder holds those."""
        return read_adapters(self.folder) if (self.folder / "adapter_config.json").is_file() else None

    @property
    def notes(self) -> list[str]:
        """Lines about what generation_config.json asks for and answers here do without."""
        return generation_notes(self._home)

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return sum(p.numel() for p in self._network.parameters())

    def tokenizer(self) -> Tokenizer:
        """That of the folder, else of its base."""
        return load_tokenizer(self._vocabulary)

    def describe(self) -> Iterator[str]:
        """Lines of text: what the folder is, its parts, and what would not be used."""
        return inspection.describe(self)

    def check(self) -> None:
        """Raise the UserError that loading would end with, as far as can be known without reading the weights."""
        self._plan  # noqa: B018 finds the files of all weights, or raises

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: Scheme | None = None,
        sink: loading.Sink | None = None,
        share: tensor_parallel.Share | None = None,
    ) -> LLaVAModel:
        """The model in `dtype` (None: that of its embeddings in the file).

        Weights that are stored in four bits stay as they are; `quantize` makes others so, one after another on
        `device`: the 16-bit model is never in memory. With a `sink` every tensor goes there as it is read, and the
        model that is returned has none (it is on meta). With a `share` the decoder is this process's part alone.
        Raises UserError for whatever is missing, left over, misshapen or unreadable.
        """
        plan, model = self._plan, self._network
        del self._network  # another call builds another
        empty = model.state_dict()
        if dtype is None:
            dtype = next(read([plan.source["decoder.embed.weight"]])).dtype
        to_quantize = {f"{layer}.weight" for layer in chosen_layers(model, quantize)} if quantize else set()
        if self._is_sum and sink is not None:
            raise UserError(
                f"{self.folder}: a delta or adapters; load it on one device and save the whole, then use that"
            )
        cut = self._cut(model, share, bool(plan.companions or to_quantize)) if share else None

        # Weights in four bits first: those that the files have so, and those to be quantised while they are read. What
        # several files add up to is quantised when it is whole.
        at_once = plan.companions.keys() | (set() if self._is_sum else to_quantize)
        small = [name for name in plan.source if name in at_once]
        layers = loading.take_quantized(plan, small, quantize, device)

        # All others, in the model's dtype; a delta stays in its own until its base is added.
        plain = {name: stored for name, stored in plan.source.items() if name not in layers}
        state = loading.take(plain, empty, None if plan.delta else dtype, device, sink, None if self._is_sum else cut)
        if plan.head is not None:
            loading.check_tied(plan.head, plan.source["decoder.embed.weight"], state["decoder.embed.weight"].dtype)
        if self._is_sum:
            layers |= self._add_up(state, empty, dtype, quantize, to_quantize)
            state = state if cut is None else {name: cut(name, tensor).clone() for name, tensor in state.items()}

        # What checkpoints may leave out has the value of an untrained norm.
        for name in (OPTIONAL.keys() & empty.keys()) - state.keys():
            state[name] = torch.full(empty[name].shape, OPTIONAL[name], dtype=dtype, device=device)
            if sink is not None:
                sink(name, state[name])
        return loading.install(model, state, layers, dtype)

    def _cut(self, model: LLaVAModel, share: tensor_parallel.Share, few_bits: bool) -> loading.Cut:
        """Make the model one of parts of its decoder; what a process keeps of each weight."""
        if few_bits:
            raise UserError("layers in few bits run in one process; leave out torchrun")
        model.config = replace(model.config, decoder=tensor_parallel.split(model.decoder, share))
        return partial(tensor_parallel.part, share=share)

    # ---- which tensor goes where ----

    @cached_property
    def _network(self) -> LLaVAModel:
        return without_memory(self.config)

    @cached_property
    def _plan(self) -> Plan:
        """The files of all weights. Raises UserError for all that is wrong and can be known without reading them."""
        wanted = _shapes(self._network.state_dict())
        plan = self._match()
        if self.config.decoder.tie_embeddings:
            plan.head = plan.source.pop("decoder.head.weight", None)
        if plan.layout.get("vision") in kinds("tower") and not self.config.vision.class_token:
            spare = f"vision.blocks.{self.config.vision.num_layers}."  # a stock SigLIP has one more than LLaVA keeps
            plan.source = {name: stored for name, stored in plan.source.items() if not name.startswith(spare)}
        plan.check(str(self.folder), wanted)
        if self.adapters is not None:
            plain = {name: shape for name, shape in wanted.items() if name not in plan.companions}
            self.adapters.check(plain, self.config.decoder.tie_embeddings)
        return plan

    def _match(self) -> Plan:
        """Match the tensors of a folder, and of tower, projector file and base, with parameters."""
        adapters, original = self.adapters, is_original(self.raw)
        tensors = inspect_folder(self.folder) if adapters is None else _tensors(self._language_model, "base")
        if not tensors and not (original and self._projector.is_file()):
            raise UserError(
                f"{self.folder}: no weights (model.safetensors or pytorch_model.bin, or their .index.json); fetch them"
            )
        plan = Plan()
        plan.add(tensors, layout_of(tensors, kinds("original") if original else WHOLE))
        if adapters is not None:
            plan.add(adapters.whole, adapters.layout, override=True)
        if not original:
            if self.base is not None and adapters is None:
                raise UserError(
                    f"{self.folder}: is complete in itself; a base is for adapters, and for deltas and projectors of "
                    "original LLaVA"
                )
            return plan
        if adapters is None:
            if self.base is not None and plan.has("decoder."):
                plan.delta = Plan()
                plan.delta.add(_tensors(self.base, "base"), "original")
            self._add_projector(plan)
        if not plan.has("vision."):
            found = _tensors(tower_folder(self.raw, self._home, find), "vision tower")
            plan.add(found, layout_of(found, kinds("tower")))
        return plan

    def _add_projector(self, plan: Plan) -> None:
        """mm_projector.bin, over the base where the folder holds nothing else; beside a full model it is stage 1's."""
        if plan.has("projector.") or not self._projector.is_file():
            return
        if not plan.has("decoder."):
            plan.add(_tensors(self._language_model, "base"), "original")
        plan.add(inspect(self._projector), "original", override=True)  # may carry embeddings trained with it

    @property
    def _projector(self) -> Path:
        return self.folder / "mm_projector.bin"

    @property
    def _is_sum(self) -> bool:
        """Whether the weights are whole only when all files are read."""
        return self._plan.delta is not None or self.adapters is not None

    @cached_property
    def _language_model(self) -> Path:
        """The folder of the language model that this one belongs to: itself, unless it holds adapters or a projector
        alone."""
        if self.base is not None:
            return self.base
        if self.adapters is not None:
            what, key, name = "adapters", "base_model_name_or_path", self.adapters.base
        elif self._projector.is_file() and not inspect_folder(self.folder):
            what, key, name = "a projector", "_name_or_path", str(self.raw.get("_name_or_path") or "")
        else:
            return self.folder
        if not name:
            raise UserError(f"{self.folder}: holds {what} only; say which language model it belongs to (base)")
        return find(name, self.folder, f"the base ({key})")

    def _add_up(
        self, state: dict[str, Tensor], empty: dict[str, Tensor], dtype: torch.dtype, scheme: Scheme | None,
        to_quantize: set[str],
    ) -> dict[str, loading.Quantized]:  # fmt: skip
        """Add a delta's base and adapters to weights, in place; then give these their dtype, or few bits."""
        if self._plan.delta is not None:
            loading.add_base(state, self._plan.delta, _shapes(empty), str(self.base))
        if self.adapters is not None:
            for name, values in self.adapters.changed(state):
                state[name] = values.to(state[name].dtype)
        few_bits = [name for name in state if name in to_quantize]
        layers = {name: loading.quantized(state.pop(name), scheme, name, name) for name in few_bits}
        for name in state:
            state[name] = state[name].to(dtype)
        return layers


def check_export(config: ModelConfig) -> None:
    """Write the files that say what a model is and read them. Raises UserError for what could not be loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        for name, values in write_config(config, "float32").items():
            (Path(folder) / name).write_text(json.dumps(values), encoding="utf-8")
        try:
            Checkpoint(Path(folder)).config  # noqa: B018 reads it
        except UserError as error:
            reason = str(error).replace(f"{folder}{os.sep}", "")
            raise UserError(f"model: what comes out could not be loaded ({reason}); correct [model]") from None


def without_memory(config: ModelConfig) -> LLaVAModel:
    """A model whose weights are on the meta device."""
    with Unallocated():
        return LLaVAModel(config)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of every parameter by our name, as files hold them: routed experts one by one."""
    return {name: tuple(t.shape) for name, t in unstack(state).items()}


def _tensors(folder: Path, what: str) -> dict[str, Stored]:
    tensors = inspect_folder(folder)
    if not tensors:
        raise UserError(f"{folder}: no weights of the {what} (model.safetensors or pytorch_model.bin); fetch it again")
    return tensors
