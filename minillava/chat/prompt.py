"""Conversation to text pieces, and text pieces to ids and labels, by the same functions for training and for asking.

A template writes messages as pieces of text, each supervised or not; ids and labels grow together, piece by piece,
and no token crosses from one piece into the next. So a prompt's ids are the first ids of the training sample it opens,
and text that a user writes, be it "</s>", "###" or "ASSISTANT:", cannot move a mask. LLaVA's train.py masks by
splitting the finished prompt and counting tokens instead.
"""

from collections.abc import Iterator, Sequence

from minillava.chat.jinja import render_jinja
from minillava.chat.messages import Message, check_roles, split_at_markers
from minillava.chat.templates import TEMPLATES, Template
from minillava.chat.tokenizer import Tokenizer
from minillava.config import IGNORE, ChatConfig
from minillava.errors import UserError, nearest

Piece = tuple[str, bool]  # text, supervised


def render(chat: ChatConfig, tokenizer: Tokenizer, messages: Sequence[Message], generate: bool) -> list[Piece]:
    """The conversation as pieces of text, supervised or not; joined they are the prompt.

    `generate` leaves off where the model is to answer; otherwise the last message is the assistant's.
    Raises UserError for an unknown template, roles out of order, conversations that a template cannot hold, and a
    vocabulary that lacks a token which the template writes.
    """
    check_roles(messages, generate)
    if chat.template == "jinja":
        return render_jinja(chat, messages, generate, tokenizer.special_tokens)
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
    pieces: list[Piece] = []
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            pieces.append((template.answer.format(text=message.text), True))
            continue
        text = place_markers(chat, template, message.text)
        images = chat.image_token * message.text.count(chat.image_token)
        pattern = template.first if turn == 0 else template.user
        pieces.append((pattern.format(system=system, text=text, images=images), False))
    _check_tokens(chat, tokenizer, pieces)
    return pieces


def place_markers(chat: ChatConfig, template: Template, text: str) -> str:
    """A user's text with its only marker in front, and with what the template writes around every marker.

    Half of LLaVA's data has the picture behind the question, and its train.py moves it to a line of its own in front
    (`preprocess_multimodal`), which drops all but one of several; LLaVA-NeXT's leaves those alone, as is done here.
    """
    alone = sum(map(text.count, chat.markers)) == 1
    for marker in chat.markers:
        if alone and marker in text:
            text = f"{marker}\n{text.replace(marker, '').strip()}".strip()
        text = text.replace(f"{marker}\n", marker) if template.around else text
        text = text.replace(marker, marker.join(around(chat, template)))
    return text


def around(chat: ChatConfig, template: Template) -> tuple[str, ...]:
    """What a template puts in front of a picture's marker and behind it."""
    return template.around or (("<im_start>", "<im_end>") if chat.image_start_end else ("", ""))


def stop_ids(chat: ChatConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of the checkpoint's files, and the one that its template writes behind one."""
    template = TEMPLATES.get(chat.template)
    stop = tokenizer.token_id(template.tokens[-1]) if template and template.tokens else None
    return frozenset(chat.eos_ids) | ({stop} if stop is not None else set())


def encode(
    chat: ChatConfig, tokenizer: Tokenizer, pieces: Sequence[Piece], visual_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of the pieces, BOS included, and their labels (IGNORE where there is no loss), of equal length.

    The n-th marker becomes visual_tokens[n] copies of its placeholder. Special tokens that a text spells out become
    their ids, as in transformers. Raises UserError for a marker that the vocabulary lacks where it has to be a token.
    """
    for marker in () if chat.split_at_image else chat.markers:
        if tokenizer.token_id(marker) is None and any(marker in text for text, _ in pieces):
            raise UserError(
                f"the tokenizer has no token '{marker}'; set split_at_image, as for original LLaVA checkpoints"
            )
    counts = iter(visual_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for tokens, supervised in _tokenize(chat, tokenizer, pieces):
        if isinstance(tokens, str):  # a marker
            tokens = [chat.markers[tokens]] * next(counts)
        ids += tokens
        labels += tokens if supervised else [IGNORE] * len(tokens)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
        labels.insert(0, IGNORE)
    # Some checkpoints' own templates (llava-1.5's) never close a turn. What is taught last is then to stop.
    if pieces[-1][1] and chat.template == "jinja" and ids[-1] not in tokenizer.added_ids and chat.eos_ids:
        ids.append(chat.eos_ids[0])
        labels.append(chat.eos_ids[0])
    return ids, labels


def _tokenize(
    chat: ChatConfig, tokenizer: Tokenizer, pieces: Sequence[Piece]
) -> Iterator[tuple[list[int] | str, bool]]:
    """The ids of the pieces and whether they are supervised; a marker comes by itself, as its text.

    Original LLaVA tokenizes the text behind every picture afresh, which with SentencePiece gives a lone blank there; in
    transformers the marker is one more token inside the text.
    """
    stretches: list[tuple[str, list[Piece]]] = [("", [])]  # a marker or none, and what follows up to the next one
    for text, supervised in pieces:
        head, *rest = split_at_markers(chat, text) if chat.split_at_image else [text]
        stretches[-1][1].append((head, supervised))
        stretches += [(marker, [(tail, supervised)]) for marker, tail in zip(rest[::2], rest[1::2])]
    marker_of = {tokenizer.token_id(marker): marker for marker in chat.markers}
    for marker, stretch in stretches:
        if marker:
            yield marker, False
        for (_, supervised), ids in zip(stretch, tokenizer.encode_parts(text for text, _ in stretch)):
            if marker_of.keys().isdisjoint(ids):
                yield ids, supervised
            else:
                yield from ((marker_of[id], False) if id in marker_of else ([id], supervised) for id in ids)


def _check_tokens(chat: ChatConfig, tokenizer: Tokenizer, pieces: Sequence[Piece]) -> None:
    """Raises UserError if the vocabulary lacks a special token that the template has written."""
    template = TEMPLATES[chat.template]
    tokens = list(template.tokens)
    if not template.one_turn and any(marker in text for text, _ in pieces for marker in chat.markers):
        tokens += filter(None, around(chat, template))
    for token in tokens:
        if tokenizer.token_id(token) is None:
            raise UserError(
                f"template '{chat.template}' writes '{token}', which the tokenizer lacks; pick another template"
            )
