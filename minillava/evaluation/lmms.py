"""lmms-eval's model `minillava`: its tasks ask a checkpoint of ours, with pictures and videos, in batches.

Written for lmms-eval 0.7.3, which is no dependency: it alone imports this module, by pyproject.toml's entry point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from minillava import LLaVA
from minillava.errors import UserError
from minillava.generation.prompts import request_of
from minillava.generation.request import Request
from minillava.generation.sampling import Sampling
from minillava.generation.score import score
from minillava.media.sources import OwnSources
from minillava.media.video import FRAME_SUFFIXES

MAX_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own LLaVA


def manifest() -> ModelManifest:
    return ModelManifest("minillava", f"{__name__}.MiniLLaVA")


class MiniLLaVA(lmms):
    """`--model minillava --model_args pretrained=DIR[,dtype=...,quantize=nf4,base=...,max_frames=...]`.

    Answers are greedy unless a task sets a temperature, and end at a task's `until`. Of several processes each takes a
    GPU of its own (run with processes on a CPU only).
    """

    def __init__(
        self, pretrained: str, dtype: str | None = None, device: str | None = None, quantize: str | None = None,
        base: str | None = None, batch_size: int | str = 1, max_frames: int | None = None, max_batch_size: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: the model minillava takes a number of 1 or more")
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.llava = LLaVA.from_pretrained(pretrained, dtype=dtype, device=device, quantize=quantize, base=base)
        if max_frames is not None:
            self.llava = self.llava.with_frames(int(max_frames))
        self.batch_size, self.device = int(batch_size), self.llava.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, in order, `batch_size` at a time."""
        found: list[GenerationResult] = []
        with self._progress(requests) as progress:
            for start in range(0, len(requests), self.batch_size):
                some = requests[start : start + self.batch_size]
                for instance, answer in zip(some, self.llava.engine.generate([*map(self._asked, some)])):
                    self.cache_hook.add_partial("generate_until", instance.args[:2], answer.text)
                    counts = TokenCounts(answer.prompt_tokens, len(answer.token_ids))
                    found.append(GenerationResult(answer.text, counts))
                progress.update(len(some))
        return found

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The mean loss of each given answer in nats a token, and whether it is the greedy one, as the `text`.

        It is the loss and not the likelihood because lmms-eval picks the choice where this is smallest, and in a
        GenerationResult because it makes a string of a bare pair. Choices of one question are scored behind one
        computation of its prompt.
        """
        found: list[GenerationResult] = []
        with self._progress(requests) as progress:
            for _, group in groupby(requests, _question):
                some = [*group]
                choices = [_choice(self._document(one.args), one.args[1]) for one in some]
                asked = self._request(some[0].args, Request())
                scored = score(self.llava.engine, asked, choices)
                longest = max(len(choice.token_ids) for choice in scored)
                (greedy,) = self.llava.engine.generate([replace(asked, max_new_tokens=longest)])
                for ids, loss in ((c.token_ids, -c.logprob / len(c.token_ids)) for c in scored):
                    found.append(GenerationResult((loss, tuple(greedy.token_ids[: len(ids)]) == ids), TokenCounts()))
                progress.update(len(some))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError: tasks of several rounds are not supported."""
        raise NotImplementedError("the model minillava answers tasks of one round")

    def _asked(self, instance: Instance) -> Request:
        how = instance.args[1]
        until = how.get("until") or ()
        warm = float(how.get("temperature") or 0) if how.get("do_sample", True) else 0.0
        if (beams := how.get("num_beams") or 1) != 1:
            raise UserError(f"task {instance.task_name}: num_beams is {beams}; the model minillava has no beam search")
        sampling = Sampling(temperature=warm, top_p=how.get("top_p") or 1.0, top_k=how.get("top_k") or 0)
        length = how.get("max_new_tokens") or MAX_NEW_TOKENS
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        return self._request(instance.args, Request(max_new_tokens=length, sampling=sampling, stop=stop))

    def _request(self, args: tuple[Any, ...], how: Request) -> Request:
        context, _, visuals_of, number, task, split = args
        name = f"{task}, {split} {number}"
        pictures, videos = [], []
        for visual in _flat(visuals_of(self._document(args))):
            if isinstance(visual, Image.Image) or (isinstance(visual, str) and visual.lower().endswith(FRAME_SUFFIXES)):
                pictures.append(visual)
            elif isinstance(visual, str):
                videos.append(visual)
            else:
                raise UserError(f"{name}: shows a {type(visual).__name__}; want PIL images and paths of files")
        return request_of(self.llava.config.chat, context, pictures, videos, OwnSources(()), replace(how, name=name))

    def _document(self, args: tuple[Any, ...]) -> Any:
        _, _, _, number, task, split = args
        return self.task_dict[task][split][number]

    def _progress(self, requests: Sequence[Instance]) -> tqdm:
        return tqdm(total=len(requests), disable=self.rank != 0, desc="minillava", unit="request")


def _question(instance: Instance) -> tuple[Any, ...]:
    """What the choices of one question share. Raises UserError for a likelihood without a question."""
    if len(instance.args) != 6:
        raise UserError(f"task {instance.task_name}: acc_mutual_info wants answers to no question; leave it out")
    return instance.args[0], *instance.args[3:]


def _choice(document: Any, target: Any) -> str:
    """The text of an answer; tasks may give a function of the document in its place."""
    return str(target(document) if callable(target) else target).strip()


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, list | tuple):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals
