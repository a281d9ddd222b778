"""Whether a template can hold a sample, found before a run starts: its texts alone, no picture is opened for it."""

from __future__ import annotations

import re

from minillava.chat.messages import split_at_markers
from minillava.chat.prompt import render
from minillava.chat.templates import TEMPLATES
from minillava.chat.tokenizer import Tokenizer
from minillava.config import ChatConfig
from minillava.data.llava_json import Check, Sample, markers
from minillava.errors import UserError
from minillava.processor import markers_in


def prompt_check(chat: ChatConfig, tokenizer: Tokenizer) -> Check:
    """What raises UserError for a sample whose prompt would not be the conversation: the template fails on it or leaves
    a text out, a text spells out a special token or a marker, or nothing is left to learn."""
    specials = {tokenizer.decode([id], skip_special=False) for id in tokenizer.special_ids} | set(chat.markers)
    written = sorted(filter(str.strip, specials), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, written)) or "(?!)")
    template = TEMPLATES.get(chat.template)

    def check(sample: Sample) -> None:
        ours = markers(bool(sample.videos))
        for message in sample.messages:
            text = ours.sub("\0", message.text)
            if found := special.search(text):
                raise UserError(
                    f"a text holds {found[0]!r}, which is a special token here and no text; write it otherwise, or "
                    'leave such samples out with bad = "skip"'
                )
        messages = sample.written_for(chat)
        pieces = render(chat, tokenizer, messages, generate=False)
        prompt = "".join(text for text, _ in pieces)
        if len(markers_in(chat, [prompt])) != len(sample.media):
            raise UserError(f"the template leaves out pictures or videos of {len(sample.media)}; use a built-in one")
        for number, message in enumerate(messages, 1):
            if template is not None and template.one_turn and message.role == "user":
                continue  # LLaVA's captions are learned without their question
            for text in split_at_markers(chat, message.text)[::2]:
                if text.strip() not in prompt:
                    raise UserError(
                        f"the template leaves out text of message {number}, {text.strip()[:40]!r}; use a built-in one"
                    )
        if not any(text.strip() for text, supervised in pieces if supervised):
            raise UserError("has no token to learn; remove the sample")

    return check
