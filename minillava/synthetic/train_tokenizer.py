"""Tokenizers that are trained here: of the built-in world, and of a recipe's own data."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minillava.chat.messages import Message
from minillava.data.llava_json import MARKER
from minillava.data.mixture import read_data
from minillava.errors import UserError
from minillava.files import write_whole
from minillava.recipe import Recipe
from minillava.synthetic import shapes


def of_shapes(folder: Path, recipe: Recipe | None = None) -> None:
    """The tokenizer of the built-in world: every word of it is one token, other text falls back to bytes."""
    rng = random.Random(0)
    texts = []
    for scene in itertools.islice(shapes.scenes(0, "train"), 2000):
        words = shapes.caption(scene, rng)
        texts.append(f"<image>{words}\n")
        for opening in (words, "<image>"):
            texts += map(_written, shapes.conversation(scene, rng, 12, opening))
    train_small_tokenizer(texts, folder, vocab_size=512)


def of_data(folder: Path, recipe: Recipe) -> None:
    """A tokenizer trained on the words of all data of a recipe."""
    files = {(file.path, file.images): file for stage in recipe.stage for file in stage.data}
    if not files:
        raise UserError('model: tokenizer = "data" needs a stage with data')
    texts = []
    for file in files.values():
        for sample in read_data([file]):
            texts += [*map(_written, sample.messages), f"{MARKER}{sample.messages[-1].text}\n"]
    train_small_tokenizer(texts, folder)


def _written(message: Message) -> str:
    return f"USER: {message.text} ASSISTANT:" if message.role == "user" else f" {message.text}</s>"


def train_small_tokenizer(
    texts: Iterable[str],
    folder: Path,
    special_tokens: Sequence[str] = ("<s>", "</s>", "<pad>", "<image>"),
    vocab_size: int = 4096,
) -> None:
    """Train a byte-level BPE until every word that occurs twice is one token (its blank included), and write it.

    `texts` should look like what the model will read: "What" behind a newline and " What" are two tokens, and each
    has to occur. Special tokens in them only part the text. Writes tokenizer.json and tokenizer_config.json, which
    transformers' AutoTokenizer loads too. Ids of `special_tokens` come first; <s>, </s> and <pad> among them become
    BOS (put in front of a prompt), EOS and padding.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    # Units that BPE cannot cross: a word with its blank (and its hyphens, and its colon: "USER:"), a digit, a
    # punctuation mark, blanks.
    words = pre_tokenizers.Split(Regex(r" ?\p{L}[\p{L}-]*:?| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    specials = re.compile("|".join(map(re.escape, special_tokens)) or "(?!)")
    backend.train_from_iterator((piece for text in texts for piece in specials.split(text)), trainer)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config |= {name: token for name, token in roles.items() if token in special_tokens}
    if "<image>" in special_tokens:
        config["extra_special_tokens"] = {"image_token": "<image>"}
    if "bos_token" in config:
        bos_id = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")  # the last file: it is complete
