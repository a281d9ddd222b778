"""What a model is judged against by `evaluation.verify`: our own code as plain PyTorch, or transformers'.

A reference runs the same pass twice: exactly (float64, or float32 for a model in 16 bits), and in the dtype of the
model that is judged, which says what that dtype allows. Letters: N views, S side in pixels, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillava.checkpoints.checkpoint import Checkpoint
from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.evaluation.trace import Trace, our_stages, plain_in, record
from minillava.layers.cache import KVCache
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.processor import Example
from minillava.schema import optional_json


@dataclass
class Prompt:
    """A question as ours made it: the text, the picture behind its marker, and what became of them."""

    text: str
    image: Any  # a PIL picture
    example: Example


def by_steps(model: LLaVAModel, example: Example, pixels_NCHW: Tensor, answer: Sequence[int]) -> Tensor:
    """Logits [N, V] of the end of the prompt and of each id of the answer but the last, one decode step each."""
    device, like = pixels_NCHW.device, model.decoder.embed.weight
    with torch.no_grad():
        cache = KVCache(model.config.decoder, 1, len(example.ids) + len(answer), device, like.dtype)
        ids_T = torch.tensor(example.ids, device=device)
        logits = [model(ids_T, pixels_NCHW, cache=cache, last_only=True, spans=example.spans)]
        logits += [model(torch.tensor([[id]], device=device), cache=cache) for id in answer[:-1]]
    return torch.cat(logits).to("cpu", torch.float64)


def rounded(pixels: Tensor, dtype: torch.dtype, draw: int) -> Tensor:
    """Pixels, each up or down by what the dtype may round off: all roundings behind it come out otherwise too."""
    signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(draw)) * 2 - 1
    return pixels * (1 + signs * torch.finfo(dtype).eps / 2) if draw else pixels


class Own:
    """A checkpoint in float32 on the CPU, run by our modules as plain PyTorch, a block at a time in any dtype.

    Weights in few bits are what their codes say: what quantising cost is no part of this.
    """

    reads = False  # whether it makes ids and pixels of its own

    def __init__(
        self, source: Path | str, base: Path | str | None = None, quantize: str | None = None, rounds: bool = True
    ):
        """`rounds`: CPUs round inputs of layers in few bits to bytes, and are allowed what that costs."""
        self.name, self.rounds = f"our plain code, {source}", rounds
        scheme = Scheme.parse(quantize) if quantize else None
        self.model = Checkpoint.open(source, base).load(torch.float32, "cpu", scheme)

    def read(self, prompt: Prompt) -> tuple[list[int], Tensor]:
        """Its own ids [T] and pixels [N, 3, S, S]; ours where it has none."""
        assert prompt.example.pixels_NCHW is not None
        self.example, self.pixels_NCHW = prompt.example, prompt.example.pixels_NCHW
        return self.example.ids, self.pixels_NCHW

    def run(self, dtype: torch.dtype, answer: Sequence[int] = (), fed: Trace | None = None) -> Trace:
        """A pass over what was read last, with these ids behind it."""
        ids_T, spans = torch.tensor([*self.example.ids, *answer]), self.example.spans
        with plain_in(self.model, dtype, self.rounds):
            return record(our_stages(self.model), lambda: self.model(ids_T, self.pixels_NCHW, spans=spans), fed)

    def steps(self, dtype: torch.dtype, answer: Sequence[int], draw: int = 0) -> Tensor:
        """Logits [N, V] that choose an answer of N ids, by decode steps; a `draw` but 0 rounds pixels otherwise."""
        with plain_in(self.model, dtype, self.rounds):
            return by_steps(self.model, self.example, rounded(self.pixels_NCHW, dtype, draw), answer)


class Transformers:
    """As `Own`: transformers' model of the folder, with its own tokenizer and picture processor. A picture a prompt."""

    reads = True

    def __init__(self, folder: Path, config: ModelConfig):
        try:
            import transformers
        except ModuleNotFoundError:
            raise UserError("--against transformers needs transformers; pip install transformers") from None
        if "quantization_config" in optional_json(folder / "config.json"):
            raise UserError(f"{folder}: its weights are in few bits, which transformers multiplies in bf16 at best; "
                            "leave --against transformers out")  # fmt: skip
        self.name, self.config = f"transformers {transformers.__version__}", config
        transformers.utils.logging.disable_progress_bar()
        self.model = functools.cache(functools.partial(_load, folder, config))
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.images = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
            self.model(torch.float32)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder}: transformers cannot load it ({reason}); leave --against out") from None

    def read(self, prompt: Prompt) -> tuple[list[int], Tensor]:
        self.inputs = dict(self.images(images=[prompt.image], return_tensors="pt"))
        marker = self.config.chat.image_token_id
        ids: list[int] = self.tokenizer(prompt.text)["input_ids"]
        with torch.no_grad():
            seen = self.model(torch.float32).get_image_features(**self.inputs)
        seen = getattr(seen, "pooler_output", seen)
        count = sum(x.flatten(0, -2).shape[0] for x in seen)
        self.ids = [id for each in ids for id in [each] * (count if each == marker else 1)]
        return self.ids, self.inputs["pixel_values"].flatten(0, -4)

    def run(self, dtype: torch.dtype, answer: Sequence[int] = (), fed: Trace | None = None) -> Trace:
        model, inputs = self.model(dtype), self._inputs(dtype, answer)
        return record(self._stages(model), lambda: model(**inputs, use_cache=False).logits, fed)

    def steps(self, dtype: torch.dtype, answer: Sequence[int], draw: int = 0) -> Tensor:
        model, logits = self.model(dtype), list[Tensor]()
        inputs = self._inputs(dtype, (), draw)
        with torch.no_grad():
            for id in answer:
                out = model(**inputs, use_cache=True)
                logits.append(out.logits[0, -1:])
                inputs = {"input_ids": torch.tensor([[id]]), "past_key_values": out.past_key_values}
        return torch.cat(logits).double()

    def _inputs(self, dtype: torch.dtype, answer: Sequence[int], draw: int = 0) -> dict[str, Any]:
        pixels = rounded(self.inputs["pixel_values"], dtype, draw).to(dtype)
        return self.inputs | {"pixel_values": pixels, "input_ids": torch.tensor([[*self.ids, *answer]])}

    def _stages(self, model: Any) -> dict[str, nn.Module]:
        inner = model.model
        tower = next(m for name, m in inner.vision_tower.named_modules() if name.rpartition(".")[2] == "layers")
        stages = {f"vision layer {i}": layer for i, layer in enumerate(tower[: self.config.vision.layers_run])}
        stages["projector"] = inner.multi_modal_projector
        stages |= {f"decoder layer {i}": layer for i, layer in enumerate(inner.language_model.layers)}
        return stages | {"logits": inner.language_model.norm}


def _load(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' model in a dtype; no more than two are asked for: the exact one and that of the model judged."""
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    model = load(folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False).eval()
    if config.decoder.num_experts:
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model


Reference = Own | Transformers
