"""Masks exact to the token, prompts that open their training samples, and ids equal to transformers' chat templates."""

import io
import json
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from helpers import REAL, encode, pieces
from transformers import AutoTokenizer

from minillava.chat import jinja, prompt
from minillava.chat.messages import Message
from minillava.chat.prompt import place_markers, render, stop_ids
from minillava.chat.templates import TEMPLATES
from minillava.chat.token_files import TokenizerFiles
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.chat_files import guess_template
from minillava.config import IGNORE, ChatConfig
from minillava.errors import UserError
from minillava.synthetic.train_tokenizer import train_small_tokenizer

LLAVA_FILES = REAL / "llava"
needs_real = pytest.mark.skipif(
    not (LLAVA_FILES / "llama_tokenizer.model").is_file(), reason="real/llava/llama_tokenizer.model is not there"
)
BUILT_IN = [name for name, template in TEMPLATES.items() if not template.one_turn]
SPECIALS = ["<image>", "<im_start>", "<im_end>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = ["USER: What color is it? ASSISTANT: It is red. Human: [INST] Assistant: <<SYS>> ### a b c 1 2 3\n"] * 9

# The chat template of llava-hf/llava-1.5-7b-hf, after its description in the facts sheet: pictures first, no system
# text, a blank behind every text, and no end of turn.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# pictures first #}{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDED = "{{ bos_token + ('' if tools is none else tools | length) }}" + LLAVA_HF  # fails where these are not there
STRINGS = (  # wants strings, names BOS, and uses what transformers puts into a template's hands
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 40 %}{% break %}{% endif %}"
    "{% if m.role == 'system' and not m.content %}{{ raise_exception('empty system') }}{% endif %}"
    "[{{ m.role }}|{{ m.content | trim }}]{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{{ strftime_now('') }}{{ {'a<b': 1} | tojson if false else '' }}"
    "{% if add_generation_prompt %}[assistant|{% endif %}"
)


def turns(*texts: str, system: str | None = None) -> list[Message]:
    head = [] if system is None else [Message("system", system)]
    return head + [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def sentencepiece_folder(folder: Path, legacy: bool) -> Path:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    added = {str(330 + i): {"content": t, "special": True} for i, t in enumerate(SPECIALS)}
    config = {"legacy": legacy, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    return folder


def real_tokenizer(folder: Path, legacy: bool, specials=()):
    shutil.copyfile(LLAVA_FILES / "llama_tokenizer.model", folder / "tokenizer.model")
    added = {str(32000 + i): {"content": t, "special": True} for i, t in enumerate(specials)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "added_tokens_decoder": added}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["sentencepiece-legacy", "sentencepiece", "small"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "small":
        train_small_tokenizer(CORPUS, path, ["<s>", "</s>", "<pad>", *SPECIALS])
        return path
    return sentencepiece_folder(path, legacy=request.param.endswith("legacy"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def text_of(tokenizer, ids) -> str:
    """What ids say, byte by byte, special tokens and first blank included."""
    return b"".join(tokenizer.token_bytes(id) for id in ids).decode()


# ---- the label-mask vectors of the real LLaMA vocabulary (facts sheet, training 5.7)

BUS = turns("<image>\nWhat color is the bus?", "Red.", "Why?", "Because it is painted.")
SUPERVISED = [4367, 29889, 2, 7311, 372, 338, 23139, 29889, 2]


@needs_real
def test_vicuna_vectors(tmp_path):
    ids, labels = encode(ChatConfig(), real_tokenizer(tmp_path, legacy=False), BUS, [1], generate=False)
    tail = [319, 1799, 9047, 13566, 29901, 4367, 29889, 2, 11889, 29901, 3750, 29973, 319, 1799, 9047, 13566, 29901]
    assert len(ids) == len(labels) == 67
    assert ids[-23:] == [*tail, 7311, 372, 338, 23139, 29889, 2]
    assert ids[0] == 1
    at = ids.index(-200)
    assert ids[at - 4 : at + 4] == [3148, 1001, 29901, 29871, -200, 29871, 13, 5618]
    assert [label for label in labels if label != IGNORE] == SUPERVISED
    assert all(label in (IGNORE, id) for id, label in zip(ids, labels))
    assert [i for i, label in enumerate(labels) if label != IGNORE] == [49, 50, 51, 61, 62, 63, 64, 65, 66]
    ids, labels = encode(ChatConfig(), real_tokenizer(tmp_path, legacy=True), BUS, [1], generate=False)
    assert len(ids) == 68
    assert ids[51:55] == [2, 3148, 1001, 29901]
    assert [label for label in labels if label != IGNORE] == SUPERVISED


@needs_real
@pytest.mark.parametrize("legacy", [True, False])
def test_plain_vector(tmp_path, legacy):
    chat = ChatConfig(template="plain")
    messages = turns("<image>\nDescribe the picture.", "a dog on grass.")
    ids, labels = encode(chat, real_tokenizer(tmp_path, legacy), messages, [1], generate=False)
    assert ids == [1, -200, 263, 11203, 373, 17455, 29889, 13]
    assert labels == [IGNORE, IGNORE, 263, 11203, 373, 17455, 29889, 13]


@needs_real
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "answer, first",
    [("7", 29871), ("\nx", 29871), ("世界", 29871), ("  two", 259), ("x ", 921), ("", 29871), ("two", 1023)],
)
def test_awkward_answers(tmp_path, legacy, answer, first):
    tokenizer = real_tokenizer(tmp_path, legacy)
    _, labels = encode(ChatConfig(), tokenizer, turns("Why?", answer, "So?", answer), [], generate=False)
    kept = [label for label in labels if label != IGNORE]
    half = len(kept) // 2
    assert kept[:half] == kept[half:] and kept[0] == first and kept[half - 1] == 2
    assert text_of(tokenizer, kept[:half]) == f" {answer}</s>"


@needs_real
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", [*BUILT_IN, "plain"])
def test_pieces_give_the_ids_of_the_whole_text(tmp_path, template, legacy):
    """The original tokenises each stretch between pictures as one; piece by piece the ids are the same."""
    tokenizer = real_tokenizer(tmp_path, legacy, SPECIALS[1:])
    chat = ChatConfig(template=template)
    lines = (LLAVA_FILES / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    texts = [line for line in lines if "###" not in line]
    for i in range(0, len(texts) - 4, 4):
        messages = (
            turns(f"{texts[i]}\n<image>", *texts[i + 1 : i + 4]) if template != "plain" else turns("<image>", texts[i])
        )
        prompt = "".join(text for text, _ in pieces(chat, messages, generate=False))
        expected = [1]
        for number, chunk in enumerate(prompt.split("<image>")):
            expected += [-200] * min(number, 1) + tokenizer.encode(chunk, first=True)
        assert encode(chat, tokenizer, messages, [1], generate=False)[0] == expected


# ---- layouts

USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = USER_SYSTEM.replace("user", "human")
LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@pytest.mark.parametrize(
    "template, expected",
    [
        ("vicuna_v1", [f"{USER_SYSTEM} USER: <image>\nQ1 ASSISTANT:", " A1</s>", "USER: Q2 ASSISTANT:", " A2</s>"]),
        ("llava_v1", [f"{HUMAN_SYSTEM} USER: <image>\nQ1 ASSISTANT:", " A1</s>", "USER: Q2 ASSISTANT:", " A2</s>"]),
        ("llava_v0",
         [f"{HUMAN_SYSTEM}###Human: <image>\nQ1###Assistant:", " A1###", "Human: Q2###Assistant:", " A2###"]),
        ("llava_llama_2",
         [f"[INST] <<SYS>>\n{LLAMA_SYSTEM}\n<</SYS>>\n\n<image>\nQ1 [/INST]", " A1 </s>", "<s>[INST] Q2 [/INST]",
          " A2 </s>"]),
        ("mistral_instruct", ["[INST] <image>\nQ1 [/INST]", " A1 </s>", "[INST] Q2 [/INST]", " A2 </s>"]),
        ("chatml_direct",
         ["<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
          "<|im_start|>assistant\n",
          "A1<|im_end|>",
          "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
          "A2<|im_end|>"]),
        ("qwen_1_5",
         ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ1<|im_end|>\n"
          "<|im_start|>assistant\n",
          "A1<|im_end|>",
          "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
          "A2<|im_end|>"]),
        ("onevision_1_5",
         ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
          "<|vision_start|><image><|vision_end|>Q1<|im_end|>\n<|im_start|>assistant\n",
          "A1<|im_end|>",
          "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
          "A2<|im_end|>"]),
        ("llama_3",
         [f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA_SYSTEM}<|eot_id|><|start_header_id|>user"
          "<|end_header_id|>\n\n<image>\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
          "A1<|eot_id|>",
          "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant"
          "<|end_header_id|>\n\n",
          "A2<|eot_id|>"]),
    ],
)  # fmt: skip
def test_layouts(template, expected):
    chat = ChatConfig(template=template)
    messages = turns("Q1\n<image>", "A1", "Q2", "A2")
    assert pieces(chat, messages, generate=False) == list(zip(expected, [False, True, False, True]))
    assert pieces(chat, messages[:3], generate=True) == list(zip(expected[:3], [False, True, False]))
    if not TEMPLATES[template].system:
        with pytest.raises(UserError, match=f"'{template}' has no place for a system text"):
            pieces(chat, [Message("system", "Be brief."), *messages], generate=False)
        return
    told = pieces(chat, [Message("system", "Be brief."), *messages], generate=False)
    assert "Be brief." in told[0][0] and told[1:] == pieces(chat, messages, generate=False)[1:]
    assert TEMPLATES[template].system not in told[0][0]


def test_plain_is_picture_and_caption():
    chat, expected = ChatConfig(template="plain"), [("<image>", False), ("A cat.\n", True)]
    assert pieces(chat, turns("Describe.\n<image>", "A cat."), generate=False) == expected
    assert pieces(chat, turns("<image>"), generate=True) == [("<image>", False)]
    for messages in (turns("no picture", "A cat."), turns("<image>", "A", "B", "C")):
        with pytest.raises(UserError, match="template 'plain' takes one <image> and one caption"):
            pieces(chat, messages, generate=False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("<image>What is it? ", "<image>\nWhat is it?"),
        ("a <image> b", "<image>\na  b"),
        ("<image>", "<image>"),
        ("no picture ", "no picture "),
        ("left <image> right <image>?", "left <image> right <image>?"),
    ],
)
def test_a_single_picture_goes_first_and_several_stay(text, expected):
    assert place_markers(ChatConfig(), TEMPLATES["vicuna_v1"], text) == expected


# ---- properties, for every vocabulary and template

WORDS = ["red", " ", "  ", "\n", "What", "世界", "é", "🙂", "###", "USER:"]
WORDS += [" ASSISTANT: ", "[/INST] ", "{text}", "1", "."]


def conversation(rng: random.Random, specials: list[str]) -> tuple[list[Message], int]:
    texts = []
    for turn in range(2 * rng.randint(1, 4)):
        words = WORDS + (specials if turn % 2 == 0 else [])
        texts.append("".join(rng.choice(words) for _ in range(rng.randint(0, 8))))
    return turns(*texts), sum(text.count("<image>") for text in texts)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("template", BUILT_IN)
def test_any_conversation(tokenizer, template, split):
    """Loss on the answers and their stops, to the byte; a prompt is the first part of the sample it opens."""
    chat = ChatConfig(template=template, split_at_image=split)
    written = {"llava_v0": " {}###", "llava_llama_2": " {} </s>", "mistral_instruct": " {} </s>"}
    written |= dict.fromkeys(("chatml_direct", "qwen_1_5", "onevision_1_5"), "{}<|im_end|>")
    answer = (written | {"llama_3": "{}<|eot_id|>"}).get(template, " {}</s>")
    rng = random.Random(template)
    for _ in range(60):
        messages, pictures = conversation(rng, ["<image>", "</s>", "<s>", "<im_start>", "<|im_end|>", "<|eot_id|>"])
        image_tokens = [rng.randint(1, 5) for _ in range(pictures)]
        ids, labels = encode(chat, tokenizer, messages, image_tokens, generate=False)
        assert len(ids) == len(labels) and ids.count(chat.image_token_id) == sum(image_tokens)
        assert all(label in (IGNORE, id) for id, label in zip(ids, labels))
        answers = [answer.replace("{}", m.text) for m in messages if m.role == "assistant"]
        assert text_of(tokenizer, [label for label in labels if label != IGNORE]) == "".join(answers)
        for turn in range(1, len(messages), 2):
            opening = messages[:turn]
            used = sum(message.text.count("<image>") for message in opening)
            opened, _ = encode(chat, tokenizer, opening, image_tokens[:used], generate=True)
            assert ids[: len(opened)] == opened
            assert labels[len(opened)] == ids[len(opened)]


def test_specials_in_a_message_become_their_ids_as_in_transformers(tokenizer, folder):
    """Whoever wants them as text has to escape them; the mask holds either way (test_any_conversation)."""
    ids, labels = encode(ChatConfig(), tokenizer, turns("a </s>b", "c"), [], generate=False)
    assert ids.count(tokenizer.eos_id) == 2
    assert labels.count(tokenizer.eos_id) == 1
    text = "".join(text for text, _ in pieces(ChatConfig(), turns("a </s>b", "c"), generate=False))
    assert ids[1:] == AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("split", [True, False])
def test_pictures_become_their_tokens_in_order(tokenizer, split):
    chat = ChatConfig(split_at_image=split, image_token_id=7777)
    ids, _ = encode(chat, tokenizer, turns("a <image> b <image><image>"), [2, 3, 1], generate=True)
    runs = "".join("x" if id == 7777 else "." for id in ids).strip(".").split(".")
    # With SentencePiece, each empty text between two pictures adds nothing.
    assert [len(run) for run in runs if run] == [2, 4]
    plain, _ = prompt.encode(chat, tokenizer, [("a <image> b <image><image>", False)], [2, 3, 1])
    assert plain.count(7777) == 6 and plain[0] == tokenizer.bos_id and len(plain) < len(ids)


def test_im_start_and_im_end_wrap_each_picture(tokenizer):
    chat = ChatConfig(template="llava_v1", image_start_end=True)
    ids, _ = encode(chat, tokenizer, turns("Why?\n<image>"), [3], generate=True)
    at = ids.index(-200)
    assert [ids[at - 1], ids[at + 3]] == [tokenizer.token_id("<im_start>"), tokenizer.token_id("<im_end>")]
    assert "<im_start><image><im_end>\nWhy?" in pieces(chat, turns("Why?\n<image>"), True)[0][0]
    assert pieces(replace(chat, template="plain"), turns("<image>", "A"), False)[0] == ("<image>", False)


def test_bos_is_written_once(tokenizer):
    chat = ChatConfig()
    assert prompt.encode(chat, tokenizer, [("a b", False)], [])[0][0] == tokenizer.bos_id
    once, _ = prompt.encode(chat, tokenizer, [("<s>a b", False)], [])
    assert once.count(tokenizer.bos_id) == 1 and once[0] == tokenizer.bos_id


# ---- checkpoints' own templates

CHATS = [
    turns("<image>\nWhat color is it?"),
    turns("What color is it?\n<image>", "It is red.", "Why?"),
    turns("<image><image>\nWhich?", "Both.", "Why? <image>"),
    turns("What?", "It is.", "Why?", system="Be kind."),
]


def as_lists(messages):
    """The same conversation as a user of transformers writes it."""
    result = []
    for message in messages:
        text = message.text.replace("\n<image>", "<image>").replace("<image>\n", "<image>")
        parts = []
        for number, chunk in enumerate(text.split("<image>")):
            parts += [{"type": "image"}] * min(number, 1) + ([{"type": "text", "text": chunk}] if chunk else [])
        result.append({"role": message.role, "content": parts})
    return result


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("jinja, lists", [(LLAVA_HF, True), (ADDED, True), (CHATML, True), (STRINGS, False)])
def test_prompts_equal_transformers(folder, tokenizer, messages, jinja, lists):
    theirs = AutoTokenizer.from_pretrained(folder)
    chat = ChatConfig(template="jinja", jinja=jinja, split_at_image=False, image_token_id=tokenizer.token_id("<image>"))
    count = sum(message.text.count("<image>") for message in messages)
    ids, _ = encode(chat, tokenizer, messages, [4] * count, generate=True)
    conversation = as_lists(messages) if lists else [vars(message) | {"content": message.text} for message in messages]
    text = theirs.apply_chat_template(conversation, chat_template=jinja, add_generation_prompt=True, tokenize=False)
    # What LlavaProcessor does: repeat the marker in the text, then tokenise, with BOS unless the template wrote it.
    text = text.replace("<image>", "<image>" * 4)
    assert ids == theirs.encode(text, add_special_tokens=not text.startswith(theirs.bos_token))
    assert "".join(t for t, _ in render(chat, tokenizer, messages, True)) == text.replace("<image>" * 4, "<image>")


def test_llava_hf_template_teaches_to_stop_only_at_the_end(tokenizer):
    """It never closes a turn, so only behind the last answer is there room for a stop that no prompt contradicts."""
    chat = ChatConfig(template="jinja", jinja=LLAVA_HF, split_at_image=False, eos_ids=(tokenizer.eos_id,))
    messages = turns("<image>\nWhat?", "It is red.", "Why?", "It is.")
    ids, labels = encode(chat, tokenizer, messages, [3], generate=False)
    assert text_of(tokenizer, [label for label in labels if label != IGNORE]) == " It is red. It is.</s>"
    assert ids[-1] == tokenizer.eos_id
    for turn in (1, 3):
        opened, _ = encode(chat, tokenizer, messages[:turn], [3], generate=True)
        assert ids[: len(opened)] == opened and labels[len(opened)] == ids[len(opened)]


def test_chatml_loss_is_on_the_answer_and_its_end(tmp_path):
    train_small_tokenizer(CORPUS, tmp_path, ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"])
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.token_id("<|im_end|>")
    chat = ChatConfig(template="jinja", jinja=CHATML, split_at_image=False, eos_ids=(end,))
    rng = random.Random(5)
    for _ in range(40):
        messages, pictures = conversation(rng, ["<image>", "<|im_end|>", "<|im_start|>"])
        ids, labels = encode(chat, tokenizer, messages, [2] * pictures, generate=False)
        answers = [f"{message.text}<|im_end|>" for message in messages if message.role == "assistant"]
        assert text_of(tokenizer, [label for label in labels if label != IGNORE]) == "".join(answers)
        assert ids[-1] == labels[-1] == end
        opened, _ = encode(chat, tokenizer, messages[:-1], [2] * pictures, generate=True)
        assert ids[: len(opened)] == opened


def test_templates_that_fail_or_contradict_themselves(tokenizer):
    def chat(template):
        return ChatConfig(template="jinja", jinja=template, split_at_image=False)

    with pytest.raises(UserError, match="cannot be read"):
        pieces(chat("{% for %}"), turns("a"), True)
    with pytest.raises(UserError, match="fails: no pictures here"):
        pieces(chat("{{ raise_exception('no pictures here') }}"), turns("a"), True)
    with pytest.raises(UserError, match="fails: access to attribute"):
        pieces(chat("{{ messages.__class__.__mro__ }}"), turns("a"), True)
    drops_history = "{% for m in messages %}{{ m.role }}:{{ '' if m.role == 'assistant' else m.content }};{% endfor %}"
    drops_history += "{% if add_generation_prompt %}assistant> {% endif %}"
    expected = [("user:a;assistant:;user:c;assistant> ", False)]
    assert pieces(chat(drops_history), turns("a", "b", "c"), True) == expected
    with pytest.raises(UserError, match="renders message 2 differently from its generation prompt"):
        pieces(chat(drops_history), turns("a", "b"), False)


@pytest.fixture
def bounds(monkeypatch):
    """Small ones, in a process of this test."""
    jinja._renderer.cache_clear()
    monkeypatch.setattr(jinja, "MAX_CHARS", 1000)
    monkeypatch.setattr(jinja, "MEMORY", 200 << 20)
    jinja._takes_lists.cache_clear()
    yield monkeypatch
    jinja._renderer(os.getpid()).end()


ENDLESS = "{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"  # some tenths of a second


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 1001 }}", "fails: it writes more than 1,000 characters"),
        ("{% for i in range(501) %}ab{% endfor %}", "fails: it writes more than 1,000 characters"),
        ("{% set x = 'x'.center(300000000) %}", "fails: MemoryError"),
        ("{{ 'x' * 300000000 }}", "fails: MemoryError"),
        ("{% set ns = namespace(s='x' * 999) %}{% for i in range(25) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
         "fails: MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ '{}'.format() }}", "fails: IndexError"),
        ("{{ '%d' % 'x' }}", "fails: TypeError"),
        ("{% include 'x' %}", "fails: TypeError: no loader"),
        ("{{ range(1000000) | list }}", "fails: OverflowError: Range too big"),
        ("{{ messages.x.y }}", "fails: 'list object' has no attribute 'x'"),
        ("{{ nowhere() }}", "fails: 'nowhere' is undefined"),
        ("{{ 'x' | nothing }}", "cannot be read: No filter named 'nothing'"),
        ("{{ raise_exception('two\nlines') }}", "fails: two lines"),
        (ENDLESS, "takes more than 0.05 s"),
    ],
)  # fmt: skip
def test_a_template_has_bounds_and_fails_in_one_line(bounds, template, reason):
    if template == ENDLESS:
        pieces(ChatConfig(template="jinja", jinja="warm"), turns("a"), True)
        bounds.setattr(jinja, "RENDER_S", 0.05)
    with pytest.raises(UserError, match=re.escape(f"the checkpoint's chat template {reason}")) as caught:
        pieces(ChatConfig(template="jinja", jinja=template), turns("a"), True)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("train or ask with a built-in template")
    bounds.setattr(jinja, "RENDER_S", 10.0)
    assert pieces(ChatConfig(template="jinja", jinja="{{ messages[0].content }}"), turns("a"), True) == [("a", False)]


def test_an_interrupted_rendering_is_not_the_next_ones_answer(bounds):
    def interrupt(*_):
        raise KeyboardInterrupt

    chat = ChatConfig(template="jinja", jinja="{{ messages[0].content }}")
    pieces(chat, turns("a"), True)
    with bounds.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jinja._renderer(os.getpid()).process.stdout, "readline", interrupt, raising=False)
        pieces(chat, turns("b"), True)
    assert pieces(chat, turns("c"), True) == [("c", False)]


def test_a_forked_worker_and_threads_have_answers_of_their_own(bounds):
    chat = ChatConfig(template="jinja", jinja="{{ messages[0].content }}")

    def ask(number):
        return pieces(chat, turns(str(number)), True) == [(str(number), False)]

    assert ask(0)
    child = os.fork()
    if not child:
        os._exit(0 if ask(1) and ask(2) else 1)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(100)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    jinja._renderer(os.getpid()).end()  # as one that took too long
    assert ask(3)
    jinja._renderer(os.getpid()).process.kill()  # as the system does where memory is short
    jinja._renderer(os.getpid()).process.wait()
    assert ask(4)


def test_a_template_that_rewrites_earlier_answers_can_be_asked_but_not_trained(tokenizer):
    jinja = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('|')[-1] }}{% endfor %}"
    )
    jinja += "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = ChatConfig(template="jinja", jinja=jinja)
    messages = turns("a", "hm|b", "c", "hm|d")
    assert pieces(chat, messages[:2], False) == [("<user>a<assistant>", False), ("hm|b", True)]
    assert pieces(chat, messages[:3], True) == [("<user>a<assistant>b<user>c<assistant>", False)]
    with pytest.raises(UserError, match="renders message 2 differently"):
        pieces(chat, messages, False)


# ---- bad input


@pytest.mark.parametrize(
    "messages, generate, expected",
    [
        ([], True, "the conversation is empty, but its last message has to be from 'user'"),
        ([Message("system", "x")], True, "the conversation is empty"),
        (turns("a"), False, "the conversation ends with 'user', but its last message has to be from 'assistant'"),
        (turns("a", "b"), True, "the conversation ends with 'assistant', but its last message has to be from 'user'"),
        ([Message("assistant", "a")], False, "message 1 is from 'assistant', but it is the turn of 'user'"),
        ([*turns("a"), Message("user", "b")], True, "message 2 is from 'user', but it is the turn of 'assistant'"),
        (
            [*turns("a", "b", system="x"), Message("system", "b")],
            True,
            "message 4 is from 'system', but it is the turn",
        ),
        ([Message("human", "a")], True, "message 1 is from 'human', but it is the turn of 'user'"),
    ],
)
@pytest.mark.parametrize("template", ["vicuna_v1", "jinja"])
def test_roles_out_of_order(messages, generate, expected, template):
    with pytest.raises(UserError, match=expected):
        pieces(ChatConfig(template=template, jinja=CHATML), messages, generate)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match=r"half a surrogate pair behind '.*a red '"):
        encode(ChatConfig(), tokenizer, turns("a red \ud83d"), [], generate=True)


def test_unknown_template_and_missing_tokens(tmp_path):
    with pytest.raises(UserError, match=r"'vicuna_v2' is unknown \(did you mean 'vicuna_v1'\?\)"):
        pieces(ChatConfig(template="vicuna_v2"), turns("a"), True)
    train_small_tokenizer(CORPUS, tmp_path, ["<s>"])
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="template 'vicuna_v1' writes '</s>', which the tokenizer lacks"):
        encode(ChatConfig(), tokenizer, turns("a"), [], True)
    with pytest.raises(UserError, match="template 'llava_v0' writes '<im_start>', which the tokenizer lacks"):
        encode(ChatConfig(template="llava_v0", image_start_end=True), tokenizer, turns("<image>"), [1], True)
    train_small_tokenizer(CORPUS, tmp_path / "qwen", ["<s>", "<|im_start|>", "<|im_end|>"])
    qwen, wrapped = load_tokenizer(tmp_path / "qwen"), ChatConfig(template="onevision_1_5")
    assert encode(wrapped, qwen, turns("a"), [], True)
    with pytest.raises(UserError, match=r"writes '<\|vision_start\|>', which the tokenizer lacks"):
        encode(wrapped, qwen, turns("<image>"), [1], True)
    with pytest.raises(UserError, match="the tokenizer has no token '<image>'; set split_at_image"):
        encode(ChatConfig(template="llava_v0", split_at_image=False), tokenizer, turns("<image>"), [1], True)


# ---- where an answer stops, and the template where the files bring none


def test_the_stop_of_a_template_ends_answers_whatever_the_files_say(tokenizer):
    """LLaMA-3's config.json names 128001, and its turns end with another token."""
    end, turn = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|eot_id|>")
    assert stop_ids(ChatConfig(template="llama_3", eos_ids=(7,)), tokenizer) == {7, turn}
    assert stop_ids(ChatConfig(template="qwen_1_5", eos_ids=(7, end)), tokenizer) == {7, end}
    assert stop_ids(ChatConfig(template="llava_v0", eos_ids=(7,)), tokenizer) == {7}
    assert stop_ids(ChatConfig(template="jinja", jinja=CHATML, eos_ids=(7,)), tokenizer) == {7}


@pytest.mark.parametrize(
    "tokens, decoder, layers, expected",
    [
        (["<|start_header_id|>", "<|eot_id|>"], "llama", 2, "llama_3"),
        (["<|im_start|>", "<|im_end|>"], "qwen2", 2, "qwen_1_5"),
        (["<|im_start|>", "<|im_end|>"], "llama", 2, "chatml_direct"),
        ([], "mistral", 2, "mistral_instruct"),
        ([], "llama", 2, "vicuna_v1"),
        ([], "llama", 1, "llava_v1"),
    ],
)
def test_the_family_is_told_by_the_tokens_that_mark_its_turns(tmp_path, tokens, decoder, layers, expected):
    added = {str(i): {"content": token} for i, token in enumerate(tokens)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert guess_template(TokenizerFiles(tmp_path), decoder, layers) == expected
