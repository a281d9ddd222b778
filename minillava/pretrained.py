"""`from minillava import LLaVA`: a checkpoint and all that belongs to it, ready to answer or to be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillava import llava
from minillava.answer import Answer
from minillava.chat import Message
from minillava.config import ModelConfig, UserError, nearest
from minillava.conversation import Conversation
from minillava.decoder import Unallocated
from minillava.device import multiplies_bf16, pick_device
from minillava.engine import Engine, Request, user_message
from minillava.hub import resolve
from minillava.layout import frame_limit
from minillava.quantize import Linear4bit, Scheme
from minillava.sampling import Sampling
from minillava.tokenizer import Tokenizer, load_tokenizer
from minillava.weights import base_of, load_model, read_config, save_model

if TYPE_CHECKING:
    from minillava.engine import ImageSource
    from minillava.video import VideoSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 300_000_000  # parameters up to which a CPU computes in float32


class LLaVA:
    """`model` is the network (an nn.Module: `minillava.llava.LLaVA`); `engine` answers batches of requests with it."""

    def __init__(self, model: llava.LLaVA, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.engine = Engine(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        base: str | Path | None = None,
    ) -> LLaVA:
        """A checkpoint folder or hub id, in any layout that `minillava.weights` reads.

        base: what a delta, a lone projector or adapters belong to.

        device: the GPU if there is one, else the CPU. dtype: see `default_dtype`. quantize: "nf4" puts the decoder's
        linear layers in four bits while they are read; more in `minillava.quantize.Scheme.parse`. Raises UserError for
        whatever is missing, damaged or not supported.
        """
        scheme = None if quantize is None else Scheme.parse(quantize)
        folder = resolve(source)
        place = pick_device(device or "auto")
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f"dtype '{dtype}' is unknown{nearest(dtype, DTYPES)}")
            dtype = DTYPES[dtype]
        chosen = dtype or default_dtype(read_config(folder), place)
        model = load_model(folder, chosen, place, base, scheme)
        # float32 is for exactness: its products stay those of the checkpoint. On a CPU joining 4-bit layers buys
        # nothing and scatters the memory that it frees: 2 GB at 7B.
        small = place.type == "cpu" and any(isinstance(m, Linear4bit) for m in model.modules())
        if chosen.itemsize == 2 and not small:
            model.decoder.fuse()
        own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return cls(model, load_tokenizer(folder if own else resolve(base) if base else base_of(folder)))

    def generate(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
        videos: Sequence[VideoSource] = (),
    ) -> Answer:
        """Answer one prompt; `str` of the result is its text. `on_text` gets the text piece by piece as it comes.

        A text is a user's message, or with `raw` the whole prompt. Pictures stand where it says "<image>" and videos
        where it says "<video>" (the checkpoint's placeholders, which may be one for both: pictures first), in front of
        it where it says nothing. Messages hold their placeholders themselves. A video is a file, a folder of frames, or
        a list of pictures.
        """
        how: dict[str, Any] = {"images": images, "max_new_tokens": max_new_tokens, "videos": videos}
        how["sampling"] = Sampling(temperature, top_p, top_k, seed)
        if raw:
            if not isinstance(prompt, str):
                raise UserError("a raw prompt is one text; leave raw out for messages")
            request = Request(raw=prompt, **how)
        else:
            chat, counts = self.config.chat, (len(images), len(videos))
            if isinstance(prompt, str):
                prompt = [user_message(prompt, counts[0], chat.image_token, counts[1], chat.video_token)]
            request = Request(prompt, **how)
        hear = None if on_text is None else lambda _, piece: on_text(piece)
        return self.engine.generate([request], hear)[0]

    def look(self, frames: int | None = None, fps: float | None = None) -> None:
        """Look at up to so many frames of a video, so many a second (0: spread evenly); None: as the checkpoint says.

        Raises UserError for more frames than fit the context.
        """
        layout = self.config.layout
        layout = replace(layout, max_frames=frames or layout.max_frames)
        layout = replace(layout, video_fps=layout.video_fps if fps is None else fps)
        config = replace(self.config, layout=layout)
        if frames is not None and frame_limit(config) < frames:
            raise UserError(f"{frames} frames of a video do not fit the context; take {frame_limit(config)} or fewer")
        self.config = self.model.config = self.engine.config = config

    def conversation(self, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> Conversation:
        """Turns about pictures and videos that stay; see `Conversation.ask`."""
        return Conversation(self.engine, images, videos)

    def __call__(
        self, input_ids: Tensor, images: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Logits, or the summed loss with labels: `minillava.llava.LLaVA.forward`."""
        return self.model(input_ids, images=images, labels=labels, **more)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this package and transformers load."""
        save_model(self.model, folder, self.tokenizer)


def default_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it (else float16). On a CPU float32 for models of up to SMALL parameters, bfloat16 for
    larger ones where the CPU multiplies it (AVX512-BF16 or AMX), and float32 where it does not."""
    if device.type != "cpu":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float16
    with Unallocated():
        parameters = sum(p.numel() for p in llava.LLaVA(config).parameters())
    return torch.bfloat16 if parameters > SMALL and multiplies_bf16(device) else torch.float32
