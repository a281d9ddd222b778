"""`from minillava import LLaVA`: a checkpoint and all that belongs to it, ready to answer or to be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from minillava import llava
from minillava.chat.messages import Message
from minillava.chat.tokenizer import Tokenizer
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.save import save_model
from minillava.device import multiplies_bf16, pick_device
from minillava.errors import UserError, nearest
from minillava.generation.answer import Answer
from minillava.generation.conversation import Conversation
from minillava.generation.engine import Engine
from minillava.generation.look import Look, attention_over_pictures
from minillava.generation.prompts import Prompt, is_batch, requests_of
from minillava.generation.request import Request, Row
from minillava.generation.sampling import Sampling
from minillava.generation.score import Choice, score
from minillava.kernels.cpu.library import library
from minillava.layers.scheme import Scheme
from minillava.layers.tensor_parallel import is_shared
from minillava.media.sources import OwnSources, one_or_more
from minillava.visual_tokens import frame_limit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 300_000_000  # parameters up to which a CPU computes in float32


class LLaVA:
    """`model` is the network (`minillava.llava.LLaVAModel`); `engine` answers batches of requests with it."""

    def __init__(self, model: llava.LLaVAModel, tokenizer: Tokenizer, notes: Sequence[str] = ()):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.engine = Engine(model, tokenizer)
        self.notes = notes  # what the checkpoint's generation_config.json asks for and is not done

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        base: str | Path | None = None,
        share: tuple[int, int] | None = None,
    ) -> LLaVA:
        """A checkpoint folder or hub id, in any layout that `minillava.checkpoints` reads.

        base: what a delta, a lone projector or adapters belong to. share: this process's number and how many share the
        decoder (`layers.tensor_parallel`), each with its part of the weights; torch.distributed has to be there then.

        device: the GPU if there is one, else the CPU. dtype: see `default_dtype`. quantize: "nf4" puts the decoder's
        linear layers in four bits while they are read; more in `minillava.layers.scheme`. Raises UserError for
        whatever is missing, damaged or not supported.
        """
        scheme = None if quantize is None else Scheme.parse(quantize)
        checkpoint = Checkpoint.open(source, base)
        place = pick_device(device or "auto")
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f"dtype '{dtype}' is unknown{nearest(dtype, DTYPES)}")
            dtype = DTYPES[dtype]
        chosen = dtype or default_dtype(checkpoint, place)
        model = checkpoint.load(chosen, place, scheme, share=share)
        if chosen.itemsize == 2:  # float32 is for exactness: its products stay those of the checkpoint
            model.decoder.fuse()
        return cls(model, checkpoint.tokenizer(), checkpoint.notes)

    @overload
    def generate(self, prompt: Prompt, images: Any = ..., *args: Any, **how: Any) -> Answer: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[Any]], images: Any = ..., *args: Any, **how: Any
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: Any,
        images: Any = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
        videos: Any = (),
        stop: str | Sequence[str] = (),
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        fetch: Sequence[str] = (),
    ) -> Answer | list[Answer]:
        """Answer a prompt, or each of a list of prompts, together; `str` of an answer is its text.

        A prompt is a user's message (with `raw` the whole prompt), or messages: dicts as OpenAI's or Hugging Face's, or
        Message. Pictures stand where a text says "<image>" and videos where it says "<video>" (the checkpoint's
        placeholders, which may be one for both: pictures first), or where a message has such a part; in front where
        nothing is said. Of several prompts each has an entry in `images`, or all are about one picture.

        A picture is a file, bytes, an open file, a PIL image, a numpy array [H, W, 3] of uint8, a data: URL, or one on
        a host that `fetch` names; a video a file, a folder of frames, or a list of pictures. `on_text` gets the text of
        one prompt piece by piece as it comes. repetition_penalty: None is as the checkpoint says. Several prompts
        sample with seed, seed + 1, ... Raises UserError for whatever cannot be read, fitted or understood.
        """
        how: dict[str, Any] = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, min_p=min_p)
        how |= dict(repetition_penalty=repetition_penalty)
        requests = self._requests(prompt, images, videos, raw, fetch, stop, max_new_tokens, **how)
        if not is_batch(prompt):
            return self.engine.generate(requests, None if on_text is None else lambda _, piece: on_text(piece))[0]
        if on_text is not None:
            raise UserError("on_text is for one prompt; leave it out for a list of them")
        return self.engine.generate(requests)

    def stream(self, prompt: Prompt, images: Any = (), **how: Any) -> Generator[str, None, Answer]:
        """Yields the text of one answer piece by piece, as it comes; the generator's value is the Answer.

        Takes what `generate` takes, but `on_text`, and raises as it does.
        """
        if is_batch(prompt):
            raise UserError("a stream is of one prompt; use generate for a list of them")

        def pieces(row: Row) -> Generator[str, None, Answer]:
            for _, piece in self.engine.stream([row]):
                yield piece
            return self.engine.answer(row)

        (request,) = self._requests(prompt, images, **how)
        return pieces(self.engine.row(0, request, {}))

    def score(
        self,
        prompt: Prompt,
        images: Any = (),
        choices: Sequence[str] = (),
        videos: Any = (),
        raw: bool = False,
        fetch: Sequence[str] = (),
    ) -> list[Choice]:
        """How likely each choice is as the answer: `logprob`, and that of each of its tokens; the prompt is computed
        once. Takes prompts and pictures as `generate` does; see `generation.score.score`."""
        (request,) = self._requests(prompt, images, videos, raw, fetch)
        return score(self.engine, request, one_or_more(choices))

    def look(
        self,
        prompt: Prompt,
        images: Any,
        answer: str | Answer,
        word: str | tuple[int, int],
        layer: int | None = None,
        heads: Literal["mean", "max"] = "mean",
        fetch: Sequence[str] = (),
    ) -> list[Look]:
        """Attention from a word of an answer to each picture, which is no explanation; `generation.look.draw` draws it.

        word: a text, where the answer first has it, or its first character and the one behind its last. layer and
        heads: see `generation.look.attention_over_pictures`. Raises UserError where there is no such word or picture.
        """
        if is_batch(prompt):
            raise UserError("a look is at one prompt; leave out the list")
        (request,), text = self._requests(prompt, images, fetch=fetch), str(answer)
        if isinstance(word, str):
            at = text.find(word) if word else -1
            if at < 0:
                raise UserError(f"the answer has no {word!r}")
            word = at, at + len(word)
        messages = [*request.messages, Message("assistant", text)]
        return attention_over_pictures(self.engine, messages, request.media, word, layer, heads)

    def _requests(
        self,
        prompt: Any,
        images: Any = (),
        videos: Any = (),
        raw: bool = False,
        fetch: Sequence[str] = (),
        stop: str | Sequence[str] = (),
        max_new_tokens: int = 512,
        **sampling: Any,
    ) -> list[Request]:
        """A request for each prompt."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        how = Request(raw="" if raw else None, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling), stop=stops)
        return requests_of(self.config.chat, prompt, images, videos, OwnSources(one_or_more(fetch)), how)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    def to(self, *args: Any, **how: Any) -> LLaVA:
        """The same model, moved as `torch.nn.Module.to` does; weights in 4 or 8 bits change their device alone."""
        self.model.to(*args, **how)
        return self

    def eval(self) -> LLaVA:
        """As `torch.nn.Module.eval`; a model that was loaded is so already."""
        self.model.eval()
        return self

    def with_frames(self, frames: int | None = None, fps: float | None = None) -> LLaVA:
        """The same model, which sees up to so many frames of a video, so many a second (0: spread evenly). None is as
        the checkpoint says. Raises UserError for more frames than fit the context.
        """
        if (frames is not None and frames < 1) or not 0 <= (fps or 0) < math.inf:
            raise UserError(f"frames {frames}, fps {fps}: use 1 frame or more, and 0 or more a second")
        layout = self.config.layout
        layout = replace(layout, max_frames=frames or layout.max_frames, num_frames=frames or layout.num_frames)
        layout = replace(layout, video_fps=layout.video_fps if fps is None else fps)
        config = replace(self.config, layout=layout)
        if frames is not None and layout.video_sampling != "rounded" and frame_limit(config) < frames:
            raise UserError(f"{frames} frames of a video do not fit the context; take {frame_limit(config)} or fewer")
        return LLaVA(self.model.under(config), self.tokenizer, self.notes)

    def conversation(self, images: Any = (), videos: Any = (), fetch: Sequence[str] = ()) -> Conversation:
        """Turns about pictures and videos that stay; see `Conversation.ask`."""
        (request,) = self._requests("", images, videos, fetch=fetch)
        return Conversation(self.engine, request.media)

    def __call__(
        self, input_ids: Tensor, images: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Logits, or the summed loss with labels: `minillava.llava.LLaVAModel.forward`."""
        return self.model(input_ids, images=images, labels=labels, **more)

    def save_pretrained(self, folder: str | Path, form: str = "") -> None:
        """Write a folder that this package and transformers (or vLLM) load; `form` names another layout than the
        family's own: "onevision_1_5_native" is OneVision-1.5 as transformers is to have it."""
        if is_shared(self.model.decoder):
            raise UserError("this process has a part of the decoder; save the model in one process")
        save_model(self.model, folder, self.tokenizer, form=form)


def default_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it (else float16). On a CPU float32 for models of up to SMALL parameters, bfloat16 for
    larger ones where the CPU multiplies it or C code of ours does; else float32."""
    if device.type != "cpu":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float16
    fast = multiplies_bf16(device) or library() is not None
    return torch.bfloat16 if checkpoint.parameters > SMALL and fast else torch.float32
