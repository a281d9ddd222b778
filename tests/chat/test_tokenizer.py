"""Ids equal to transformers' for every kind of vocabulary; parts that join up; streaming that equals decoding."""

import io
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from helpers import REAL
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from minillava.chat import token_files
from minillava.chat.tokenizer import JsonTokenizer, SentencePieceTokenizer, StreamDecoder, load_tokenizer
from minillava.errors import UserError
from minillava.synthetic.train_tokenizer import train_small_tokenizer

LLAVA_FILES = REAL / "llava"
SPECIALS = ["<s>", "</s>", "<pad>", "<image>"]
CORPUS = [
    "USER: What color is the circle? ASSISTANT: The circle is red.",
    "USER: How many squares are there?\nASSISTANT: There are 3 squares, 12 in all.",
    "A small blue triangle is left of the large green circle; it isn't yellow.",
] * 20
TEXTS = [
    "USER: What color is the circle? ASSISTANT:",
    "The  circle   is\n\nred.\n",
    "naïve 世界 🙂🏽 \t x=1_000",
    "USER: hi</s>USER: why?</s>",
    "USER: <image>\nWhat? ASSISTANT: red.</s>USER: is it?",
    "<image>\nWhat",
    "",
]


def sentencepiece_model(folder: Path, **config) -> Path:
    """A tiny model with LLaMA's settings, and its tokenizer_config.json."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=buffer,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    return folder


def llama(folder: Path, legacy: bool) -> Path:
    added = {"400": {"content": "<image>", "special": True}, "401": {"content": "<pad>", "special": True}}
    return sentencepiece_model(folder, legacy=legacy, add_bos_token=True, pad_token="<pad>", added_tokens_decoder=added)


def metaspace(folder: Path, legacy: bool) -> Path:
    """tokenizer.json as transformers 5 writes it for a LLaMA tokenizer."""
    LlamaTokenizer.from_pretrained(llama(folder / "source", legacy)).save_pretrained(folder)
    return folder


def prepend(folder: Path) -> Path:
    """tokenizer.json as transformers 4 wrote it, and as llava-hf's checkpoints carry it: a Prepend normalizer."""
    metaspace(folder, legacy=True)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "pre_tokenizer": None}))
    return folder


def qwen(folder: Path) -> Path:
    """Byte-level BPE with Qwen2's normalizer and pre-tokenizer; no BOS."""
    blank = Qwen2Tokenizer()._tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blank.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    blank.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def small(folder: Path) -> Path:
    train_small_tokenizer(CORPUS, folder, SPECIALS)
    return folder


KINDS = {
    "sentencepiece-legacy": lambda folder: llama(folder, legacy=True),
    "sentencepiece": lambda folder: llama(folder, legacy=False),
    "metaspace-legacy": lambda folder: metaspace(folder, legacy=True),
    "metaspace": lambda folder: metaspace(folder, legacy=False),
    "prepend": prepend,
    "qwen": qwen,
    "small": small,
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)
    # A LLaVA's config.json beside it: transformers then takes tokenizer.json as it stands.
    if (path / "tokenizer.json").is_file():
        (path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return path


def oracle(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(folder, text):
    ours, theirs = load_tokenizer(folder), oracle(folder)
    ids = ours.encode(text, first=True)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ([ours.bos_id] if ours.adds_bos else []) + ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_named_tokens_equal_transformers(folder):
    ours, theirs = load_tokenizer(folder), oracle(folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert ours.special_tokens.get(name) == getattr(theirs, name)
    assert ours.token_id("<image>") == theirs.convert_tokens_to_ids("<image>")
    assert ours.token_id("no such token") is None


@pytest.mark.parametrize(
    "parts",
    [
        ["USER: What color is it? ASSISTANT:", " red.</s>", "USER: why? ASSISTANT:", " it is.</s>"],
        ["USER: <image>\nWhat? ASSISTANT:", " red and <image> blue</s>", "USER: <image>", " "],
        ["<image>", "", "circle is red.\n"],
        ["The", " </s>", "A", "  two"],
    ],
)
def test_parts_join_to_the_ids_of_the_whole(folder, parts):
    """The borders here are ones that no token of these vocabularies crosses."""
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer.encode_parts(parts)
    assert [*itertools.chain(*encoded)] == tokenizer.encode("".join(parts), first=True)
    assert len(encoded) == len(parts)


def test_a_tokenizer_without_a_prefix_space_is_not_taken_apart(tmp_path, monkeypatch):
    """That would write and parse all of Qwen's 7 MB once more."""
    path = qwen(tmp_path / "qwen")
    monkeypatch.delattr(token_files, "without_prefix")
    assert load_tokenizer(path).encode("a b", first=False)


def test_streaming_equals_decoding(folder):
    tokenizer = load_tokenizer(folder)
    rng = random.Random(0)
    samples = [tokenizer.encode(text, first=bool(rng.getrandbits(1))) for text in TEXTS]
    samples += [[rng.randrange(-1, tokenizer.vocab_size + 3) for _ in range(60)] for _ in range(30)]
    for ids in samples:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.push(None) == tokenizer.decode(ids)


def test_streaming_never_prints_half_a_character(folder):
    tokenizer = load_tokenizer(folder)
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("é 世界 🙂", first=True)
    printed = [stream.push(id) for id in ids]
    assert "".join(printed) == "é 世界 🙂" and stream.push(None) == "" and len(ids) > 7
    cut = StreamDecoder(tokenizer)
    assert "".join(cut.push(id) for id in ids[:-1]) == "é 世界 "
    assert cut.push(None) == "\ufffd"


def test_saving_copies_what_was_read(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    text = "USER: <image>\nWhat?</s>USER: 世"
    assert again.encode(text, True) == load_tokenizer(folder).encode(text, True)
    load_tokenizer(folder).save(folder)  # onto itself: nothing to do


def test_the_legacy_flag_decides_on_the_blank_behind_a_special_token(tmp_path):
    legacy = load_tokenizer(llama(tmp_path / "legacy", legacy=True))
    new = load_tokenizer(llama(tmp_path / "new", legacy=False))
    silent = load_tokenizer(sentencepiece_model(tmp_path / "silent"))
    blank, plain = legacy.encode("USER", first=True), legacy.encode("USER", first=False)
    assert blank != plain
    assert legacy.encode("</s>USER", first=False) == [2, *blank] == silent.encode("</s>USER", first=False)
    assert new.encode("</s>USER", first=False) == [2, *plain]


@pytest.mark.skipif(
    not (LLAVA_FILES / "llama_tokenizer.model").is_file(), reason="real/llava/llama_tokenizer.model is not there"
)
@pytest.mark.parametrize("legacy", [True, False])
def test_the_real_llama_vocabulary(tmp_path, legacy):
    shutil.copyfile(LLAVA_FILES / "llama_tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "add_bos_token": True}))
    ours, theirs = load_tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    texts = (LLAVA_FILES / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    texts += [text for text in TEXTS if "<image>" not in text]
    texts = [re.sub("  +", " ", text) for text in texts]  # transformers ranks the merges of blanks wrongly, see below
    for text in texts:
        ids = ours.encode(text, first=True)
        assert [1, *ids] == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.skipif(
    not (LLAVA_FILES / "llama_tokenizer.model").is_file(), reason="real/llava/llama_tokenizer.model is not there"
)
def test_runs_of_blanks_are_sentencepieces_not_transformers(tmp_path):
    """Pieces of blanks alone have score -1e9, so a word takes its blank first; transformers 5, which makes the merges
    anew from a tokenizer.model, gives "Hello", two blanks, "world" without one."""
    shutil.copyfile(LLAVA_FILES / "llama_tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello  world", first=True) == [15043, 29871, 3186]
    assert tokenizer.encode("  two", first=False) == [29871, 1023]
    assert tokenizer.encode(" two", first=True) == [29871, 1023]


def test_tokens_of_old_files_are_added_at_their_ids(tmp_path):
    """added_tokens.json and special_tokens_map.json, without a word about them in tokenizer_config.json."""
    path = sentencepiece_model(tmp_path)
    (path / "tokenizer_config.json").unlink()
    (path / "added_tokens.json").write_text(json.dumps({"<im": 400, "<im_start>": 401, "<im_end>": 402}))
    (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "eos_token": "</s>"}))
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode("<im_start><im_end>[PAD]</s>", first=True) == [401, 402, 403, 2]
    assert tokenizer.encode("<im<im_start>", first=True) == [400, 401]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 403, 404)
    assert tokenizer.decode([401, 402, 403]) == ""
    assert tokenizer.decode([401, 402], skip_special=False) == "<im_start><im_end>"


def test_tokens_beside_tokenizer_json_are_added_and_must_agree(tmp_path):
    train_small_tokenizer(CORPUS, tmp_path, ["<s>", "</s>"])
    size = load_tokenizer(tmp_path).vocab_size
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    entry = {"content": "<image>", "special": True, "lstrip": False}
    for id, extra in ((size, "<video>"), (size + 5, None)):
        more = {"added_tokens_decoder": {str(id): entry}, "additional_special_tokens": [extra] if extra else []}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        if id == size:
            assert load_tokenizer(tmp_path).encode("<image><video>", first=True) == [size, size + 1]
            assert AutoTokenizer.from_pretrained(tmp_path).encode("<image><video>")[1:] == [size, size + 1]
        else:
            with pytest.raises(UserError, match=f"'<image>' is id {size}, but {size + 5} in the files beside it"):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_decides_on_bos(tmp_path, said, adds):
    """As in transformers 5, which ignores add_bos_token beside a tokenizer.json."""
    path = small(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps(config if said is None else {**config, "add_bos_token": said})
    )
    if not adds:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        backend.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).adds_bos is adds
    assert (AutoTokenizer.from_pretrained(path).encode("a")[0] == 0) is adds
    (path / "tokenizer_config.json").unlink()
    assert load_tokenizer(path).adds_bos is adds
    assert load_tokenizer(path).bos_id == (0 if adds else None)


@pytest.mark.parametrize("said, adds", [(True, True), (False, False), (None, True)])
def test_sentencepiece_opens_with_bos_unless_told_not_to(tmp_path, said, adds):
    config = {} if said is None else {"add_bos_token": said}
    assert load_tokenizer(sentencepiece_model(tmp_path, **config)).adds_bos is adds


def test_small_tokenizer_gives_one_token_a_word(tmp_path):
    tokenizer = load_tokenizer(small(tmp_path / "a"))
    assert isinstance(tokenizer, JsonTokenizer)
    for word in " circle", " squares", "USER:", " ASSISTANT:", " 3", "?", ":", "\n":
        assert len(tokenizer.encode(word, first=False)) == 1, word
    assert [tokenizer.token_id(token) for token in SPECIALS] == [0, 1, 2, 3]
    assert tokenizer.vocab_size < 700
    unknown = "Zwölf Boxkämpfer 🥊 jagen"
    assert tokenizer.decode(tokenizer.encode(unknown, first=True)) == unknown
    train_small_tokenizer((text.replace(" is", " <image>is") for text in CORPUS), tmp_path / "b", SPECIALS)
    assert load_tokenizer(tmp_path / "b").token_id("Ġ<") is None, "special tokens in a text are no words"
    assert (small(tmp_path / "c") / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.model", b"\x00\x01garbage", "not a SentencePiece model"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b'{"version": "1.0", "model"', "cannot be read as JSON"),
        ("tokenizer.json", b'{"version": "1.0"}', "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8 text"),
        ("tokenizer.json", b'{"a":' * 99_999, "cannot be read as JSON .brackets in brackets"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 16777217}}}', "'b' has the id 16777217, expected"),
        ("tokenizer.json", b'{"added_tokens": [{"content": "<b>", "id": 16777216}]}', "'<b>' has the id 16777216"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}', "'a' has the id -1"),
        ("added_tokens.json", b'{"<b>": 16777216}', "'<b>' has the id 16777216"),
        ("added_tokens.json", b'{"<b>": NaN}', "'<b>' has the id nan"),
        ("added_tokens.json", b'{"<b>": [1]}', "'<b>' has the id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "expected an object of tokens by id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "<b>"}}}', "'<b>' has the id 'x'"),
        ("tokenizer_config.json", b'{"additional_special_tokens": "<b>"}', "additional_special_tokens is '<b>'"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5}', "extra_special_tokens is 5, expected a list"),
        ("tokenizer_config.json", b"{", "cannot be read as JSON"),
        ("tokenizer_config.json", b"[]", "holds a list, expected an object"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"7": {}}}',
            r"added_tokens_decoder\['7'\] has no 'content'",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_panic_of_the_library_is_one_line(tmp_path, monkeypatch):
    """As Oniguruma's of a pattern that runs away: it stops after ten million steps, by what is no Exception."""

    class PanicException(BaseException):
        """As pyo3 calls it."""

    def panic(*_, **__):
        raise PanicException("Onig: Regex search error: retry-limit-in-match over\nmore")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    tokenizer = load_tokenizer(small(tmp_path))
    monkeypatch.setattr(tokenizer, "_full", SimpleNamespace(encode=panic))
    with pytest.raises(UserError, match="retry-limit-in-match over more") as error:
        tokenizer.encode("a", first=True)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: ") and "\n" not in str(error.value)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer, "_full", SimpleNamespace(encode=interrupt))
        tokenizer.encode("a", first=True)


def test_a_folder_without_tokenizer_and_an_unknown_decoder(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)
