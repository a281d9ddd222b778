"""Conversation to ids and labels, by one function for training and for inference.

A template turns messages into pieces of text, each supervised or not; ids and labels grow together, piece by piece,
and no token crosses from one piece into the next. So a prompt's ids are the first ids of the training sample it opens,
and text that a user writes, be it "</s>", "###" or "ASSISTANT:", cannot move a mask. The layouts follow
conversation.py of LLaVA, which its train.py masks by splitting the finished prompt and counting tokens instead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minillava.chat_jinja import checkpoint_segments
from minillava.config import ChatConfig, UserError, nearest
from minillava.tokenizer import Tokenizer

IGNORE = -100  # the label of a position without loss, as in PyTorch and transformers
Segment = tuple[str, bool]  # text, supervised


@dataclass(frozen=True)
class Message:
    """One turn. `text` holds ChatConfig.image_token wherever a picture goes, and video_token for a clip."""

    role: str  # user, assistant or system (first only, in place of the template's own)
    text: str


@dataclass(frozen=True)
class Template:
    """A prompt layout. {text} is the message, {system} the system text, {images} the picture markers alone."""

    first: str  # the first user turn, up to where the model starts writing
    user: str  # every later one
    answer: str  # what the model writes, its stop included: all of it is supervised, and nothing else
    system: str = ""
    tokens: tuple[str, ...] = ()  # special tokens that the layout writes: the vocabulary must have them; last the stop
    around: tuple[str, ...] = ()  # what goes in front of a picture's marker and behind it, and no line break
    stop_strings: tuple[str, ...] = ()  # where the stop is text and no token
    one_turn: bool = False  # a picture and its caption, no conversation


_POLITE = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_VICUNA = Template(
    system=_POLITE.format(who="user"),
    first="{system} USER: {text} ASSISTANT:",
    user="USER: {text} ASSISTANT:",
    answer=" {text}</s>",
    tokens=("</s>",),
)
_LLAMA_2 = Template(
    system="You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.",
    first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
    user="<s>[INST] {text} [/INST]",
    answer=" {text} </s>",
    tokens=("<s>", "</s>"),
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_LLAMA_3 = _HEADER.format("user") + "{text}<|eot_id|>" + _HEADER.format("assistant")


def _chatml(system: str, between: str = "\n") -> Template:
    """ChatML; `between` turns. It opens every turn but the first, so that no answer is taught to end with it."""
    turn = "<|im_start|>user\n{text}<|im_end|>" + between + "<|im_start|>assistant\n"
    return Template(
        system=system,
        first="<|im_start|>system\n{system}<|im_end|>" + between + turn,
        user=between + turn,
        answer="{text}<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    )


# The original trains v0 on "### Human: q\n### Assistant: a\n### " and asks it "###Human: q###Assistant:". Here both
# are the latter, with loss on the answer and the "###" that stops it (there also on headers, which nobody samples).
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _VICUNA,
    "llava_v1": Template(**{**vars(_VICUNA), "system": _POLITE.format(who="human")}),
    # What llava-1.5-hf's own chat template writes: Vicuna's turns without the system text. The nano model uses it.
    "vicuna_short": Template(**{**vars(_VICUNA), "system": "", "first": _VICUNA.user}),
    "llava_v0": Template(
        system=_POLITE.format(who="human"),
        first="{system}###Human: {text}###Assistant:",
        user="Human: {text}###Assistant:",
        answer=" {text}###",
        stop_strings=("###",),
    ),
    "llava_llama_2": _LLAMA_2,
    # LLaVA-NeXT with Mistral; its code writes earlier answers as Llama-2's template does.
    "mistral_instruct": Template(
        first="[INST] {text} [/INST]", user="[INST] {text} [/INST]", answer=" {text} </s>", tokens=("</s>",)
    ),
    # LLaVA-NeXT and NeXT-Video with Yi: ChatML without line breaks between turns.
    "chatml_direct": _chatml("Answer the questions.", between=""),
    "qwen_1_5": _chatml("You are a helpful assistant."),
    "llama_3": Template(
        system=_LLAMA_2.system,
        first=_HEADER.format("system") + "{system}<|eot_id|>" + _LLAMA_3,
        user=_LLAMA_3,
        answer="{text}<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Qwen2.5-VL's, with its default system text.
    "onevision_1_5": dataclasses.replace(
        _chatml("You are a helpful assistant."), around=("<|vision_start|>", "<|vision_end|>")
    ),
    "plain": Template(first="{images}", user="", answer="{text}\n", one_turn=True),
}


def segments(
    chat: ChatConfig, messages: Sequence[Message], generate: bool, special_tokens: Mapping[str, str] | None = None
) -> list[Segment]:
    """The conversation as pieces of text, supervised or not; joined they are the prompt.

    `generate` leaves off where the model is to answer; otherwise the last message is the assistant's.
    `special_tokens` (bos_token, ...) is for checkpoints' own templates, which may name them.
    Raises UserError for an unknown template, roles out of order, and conversations that a template cannot hold.
    """
    check_roles(messages, generate)
    if chat.template == "jinja":
        return checkpoint_segments(chat, messages, generate, special_tokens or {})
    if chat.template not in TEMPLATES:
        raise UserError(f"chat template '{chat.template}' is unknown{nearest(chat.template, [*TEMPLATES, 'jinja'])}")
    template = TEMPLATES[chat.template]
    system = template.system
    if messages[0].role == "system":
        if "{system}" not in template.first:
            raise UserError(f"template '{chat.template}' has no place for a system text; leave it out")
        system, messages = messages[0].text, messages[1:]
    if template.one_turn and (len(messages) > 2 or chat.image_token not in messages[0].text):
        raise UserError(
            f"template '{chat.template}' takes one {chat.image_token} and one caption; pick another template"
        )
    pieces: list[Segment] = []
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            pieces.append((template.answer.format(text=message.text), True))
            continue
        text = message.text
        alone = sum(map(text.count, chat.markers)) == 1
        for marker in chat.markers:
            text = image_first(text, marker) if alone else text
            text = text.replace(f"{marker}\n", marker) if template.around else text
            text = text.replace(marker, marker.join(around(chat, template)))
        images = chat.image_token * message.text.count(chat.image_token)
        layout = template.first if turn == 0 else template.user
        pieces.append((layout.format(system=system, text=text, images=images), False))
    return pieces


def around(chat: ChatConfig, template: Template) -> tuple[str, ...]:
    """What a template puts in front of a picture's marker and behind it."""
    return template.around or (("<im_start>", "<im_end>") if chat.image_start_end else ("", ""))


def stop_ids(chat: ChatConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of the checkpoint's files, and the one that its template writes behind one."""
    template = TEMPLATES.get(chat.template)
    stop = tokenizer.token_id(template.tokens[-1]) if template and template.tokens else None
    return frozenset(chat.eos_ids) | ({stop} if stop is not None else set())


def encode(
    chat: ChatConfig,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    image_tokens: Sequence[int],
    generate: bool,
    video_tokens: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Ids of the conversation, BOS included, and their labels (IGNORE where there is no loss), of equal length.

    `image_tokens`: visual tokens of each picture; its marker becomes that many `chat.image_token_id`. `video_tokens`:
    those of clips; where these have no marker of their own they follow the pictures.
    Special tokens that a message spells out become their ids, as in transformers. Raises UserError as `segments` does
    and where markers and pictures differ in number.
    """
    pieces = segments(chat, messages, generate, tokenizer.special_tokens)
    builtin = TEMPLATES.get(chat.template)
    wrapped = builtin is not None and not builtin.one_turn and chat.image_start_end and len(image_tokens) > 0
    for token in (*(builtin.tokens if builtin else ()), *(("<im_start>", "<im_end>") if wrapped else ())):
        if tokenizer.token_id(token) is None:
            raise UserError(
                f"template '{chat.template}' writes '{token}', which the tokenizer lacks; pick another template"
            )
    ids, labels = _encode_pieces(chat, tokenizer, pieces, image_tokens, video_tokens)
    # Some checkpoints' own templates (llava-1.5's) never close a turn. What is taught last is then to stop.
    if not generate and chat.template == "jinja" and ids[-1] not in tokenizer.added_ids and chat.eos_ids:
        ids.append(chat.eos_ids[0])
        labels.append(chat.eos_ids[0])
    return ids, labels


def encode_raw(
    chat: ChatConfig, tokenizer: Tokenizer, prompt: str, image_tokens: Sequence[int], video_tokens: Sequence[int] = ()
) -> list[int]:
    """Ids of a finished prompt, with BOS in front unless it is spelled out there, pictures expanded as in `encode`."""
    return _encode_pieces(chat, tokenizer, [(prompt, False)], image_tokens, video_tokens)[0]


def in_order(
    chat: ChatConfig, ids: Sequence[int], image_tokens: Sequence[int], video_tokens: Sequence[int]
) -> list[int]:
    """The pictures' indices, and the clips' behind them, by their place among the ids of a prompt."""
    count, tokens = len(image_tokens), [*image_tokens, *video_tokens]
    if not video_tokens or not chat.video_token or chat.video_token_id == chat.image_token_id:
        return list(range(len(tokens)))
    waiting = {chat.image_token_id: iter(range(count)), chat.video_token_id: iter(range(count, len(tokens)))}
    order, at = [], 0
    while at < len(ids):
        if ids[at] in waiting:
            order.append(next(waiting[ids[at]]))
        at += tokens[order[-1]] if ids[at] in waiting else 1
    return order


def tell_times(chat: ChatConfig, messages: Sequence[Message], pictures: int, told: Sequence[str]) -> list[Message]:
    """Behind the marker of each clip what is told of its times, on a line of its own (add_time_instruction)."""
    marker = chat.video_token or chat.image_token
    left = ["" for _ in range(0 if chat.video_token else pictures)] + list(told)
    changed = []
    for message in messages:
        head, *tails = message.text.split(marker)
        for tail in tails:
            text = left.pop(0) if left else ""
            head += marker + (f"\n{text}\n{tail.removeprefix(chr(10))}" if text else tail)
        changed.append(Message(message.role, head))
    return changed


def image_first(text: str, image_token: str) -> str:
    """The one picture of a message goes in front, on a line of its own; of several, each stays where it is.

    Half of LLaVA's data has the picture behind the question, and its train.py moves it (`preprocess_multimodal`), which
    drops all but one of several; LLaVA-NeXT's leaves those alone.
    """
    if text.count(image_token) != 1:
        return text
    return f"{image_token}\n{text.replace(image_token, '').strip()}".strip()


def check_roles(messages: Sequence[Message], generate: bool) -> None:
    """Raises UserError unless it is [system], user, assistant, user, ..., up to where the model writes or wrote."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            at = number + 1 + len(messages) - len(turns)
            raise UserError(
                f"message {at} is from '{message.role}', but it is the turn of '{expected}'; put them in order"
            )
    last = "user" if generate else "assistant"
    if not turns or turns[-1].role != last:
        found = f"ends with '{turns[-1].role}'" if turns else "is empty"
        raise UserError(f"the conversation {found}, but its last message has to be from '{last}'")


def _encode_pieces(
    chat: ChatConfig,
    tokenizer: Tokenizer,
    pieces: Sequence[Segment],
    image_tokens: Sequence[int],
    video_tokens: Sequence[int],
) -> tuple[list[int], list[int]]:
    markers = chat.markers
    given: dict[str, list[int]] = {marker: [] for marker in markers}
    given[chat.image_token] += image_tokens
    given[chat.video_token or chat.image_token] += video_tokens
    for marker, counts in given.items():
        found = sum(text.count(marker) for text, _ in pieces)
        if found != len(counts):
            kind = "video" if marker == chat.video_token else "picture"
            raise UserError(f"{found} '{marker}' in the text, but {len(counts)} {kind}s; give one {kind} for each")
        if found and tokenizer.token_id(marker) is None and not chat.split_at_image:
            raise UserError(
                f"the tokenizer has no token '{marker}'; set split_at_image, as for original LLaVA checkpoints"
            )
    # A run is text that is tokenised as one, in parts. Original LLaVA starts afresh behind every picture, which with
    # SentencePiece gives a lone blank there; in transformers the marker is one more token inside the text.
    either = re.compile("|".join(map(re.escape, markers)))
    runs: list[list[Segment]] = [[]]
    between: list[str] = []  # the markers that the runs were split at
    for text, supervised in pieces:
        between += either.findall(text) if chat.split_at_image else []
        for number, chunk in enumerate(either.split(text) if chat.split_at_image else [text]):
            if number:
                runs.append([])
            runs[-1].append((chunk, supervised))
    marker_of = {tokenizer.token_id(marker): marker for marker in markers if tokenizer.token_id(marker) is not None}

    ids: list[int] = []
    labels: list[int] = []
    counts_of = {marker: iter(counts) for marker, counts in given.items()}

    def put_image(marker: str) -> None:
        count = next(counts_of[marker])
        ids.extend([markers[marker]] * count)
        labels.extend([IGNORE] * count)

    for number, run in enumerate(runs):
        if number:
            put_image(between[number - 1])
        for (_, supervised), part in zip(run, tokenizer.encode_parts(text for text, _ in run)):
            for id in part:
                if id in marker_of:
                    put_image(marker_of[id])
                    continue
                ids.append(id)
                labels.append(id if supervised else IGNORE)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
        labels.insert(0, IGNORE)
    return ids, labels
