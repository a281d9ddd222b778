"""The prompt of a checkpoint: its chat template, placeholders and special ids, which stand in up to six files."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.chat.prompt import around
from minillava.chat.templates import TEMPLATES
from minillava.chat.token_files import MAX_ID, TokenizerFiles
from minillava.checkpoints.families import DECODERS
from minillava.config import ChatConfig, DecoderConfig, ModelConfig
from minillava.errors import UserError, nearest
from minillava.files import read_text
from minillava.schema import from_dict, optional_json, to_dict


def read_chat(
    folder: Path, raw: dict[str, Any], text: dict[str, Any], decoder: DecoderConfig,
    fallback: Callable[[TokenizerFiles], str], **placeholders: Any,
) -> ChatConfig:  # fmt: skip
    """The chat of a checkpoint with a Jinja template, or with the built-in `fallback` where there is none."""
    jinja, files = _read_jinja(folder), TokenizerFiles(folder)
    chat = ChatConfig(
        template="jinja" if jinja else fallback(files),
        jinja=jinja,
        split_at_image=False,
        **placeholders,
        **read_special_ids(folder, files, raw, text, decoder),
    )
    return overridden(chat, raw, folder)


def _read_jinja(folder: Path) -> str:
    """The chat template in the four places where it has lived, newest first; '' if there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    names = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    files = [optional_json(folder / name) for name in names]
    found = next((f["chat_template"] for f in files if f.get("chat_template")), "")
    if isinstance(found, list):  # several, by name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), "")
    if not isinstance(found, str):
        raise UserError(f"{folder}: chat_template is {found!r:.40}, expected text; remove it, or get the files again")
    return found


def read_special_ids(
    folder: Path, files: TokenizerFiles, raw: dict[str, Any], text: dict[str, Any], decoder: DecoderConfig
) -> dict[str, Any]:
    """Special ids of generation_config.json, else the decoder's config, else the tokenizer; what repetition costs."""
    generation, defaults = optional_json(folder / "generation_config.json"), DECODERS[decoder.model_type].defaults

    def find(key: str) -> Any:
        for values in (generation, text, raw, defaults):
            if values.get(f"{key}_token_id") is not None:
                return values[f"{key}_token_id"]
        return files.added_id(files.named.get(f"{key}_token"))

    eos = find("eos")
    eos_ids = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    written = files.added_id(files.named.get("eos_token"))  # Qwen's config.json may name another than this
    eos_ids += [] if written is None or written in eos_ids else [written]
    ids: dict[str, Any] = {"bos_id": find("bos"), "eos_ids": tuple(eos_ids), "pad_id": find("pad")}
    for key, value in (("bos", ids["bos_id"]), ("pad", ids["pad_id"]), *(("eos", value) for value in eos_ids)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value >= MAX_ID):
            raise UserError(f"{folder}: {key}_token_id is {value!r:.40}, expected an integer; correct its JSON files")
    return ids | {"repetition_penalty": generation.get("repetition_penalty") or 1.0}


SAMPLED = ("temperature", "top_p", "top_k", "min_p")
# Keys of generation_config.json that would change answers, and the values that do not.
NEUTRAL: tuple[tuple[str, tuple], ...] = (
    ("typical_p top_h guidance_scale encoder_repetition_penalty", (None, 1, 1.0)),
    ("epsilon_cutoff eta_cutoff no_repeat_ngram_size encoder_no_repeat_ngram_size", (None, 0)),
    ("min_length min_new_tokens penalty_alpha diversity_penalty", (None, 0)),
    ("bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias", (None, [], {})),
    ("forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty", (None,)),
    ("stop_strings watermarking_config", (None, [])),
    ("num_beams", (None, 1)),
)
NOT_APPLIED = {key: neutral for keys, neutral in NEUTRAL for key in keys.split()}


def generation_notes(folder: Path) -> list[str]:
    """A line for each thing that generation_config.json asks for and that is left to the user, or not done."""
    found = optional_json(folder / "generation_config.json")
    lines = []
    if found.get("do_sample"):
        how = ", ".join(f"{key} {found[key]}" for key in SAMPLED if found.get(key) is not None)
        lines.append(f"the checkpoint's generation_config.json samples{f' ({how})' if how else ''}; here it is greedy "
                     "where no temperature is asked for")  # fmt: skip
    ignored = [f"{key} {found[key]}" for key, neutral in NOT_APPLIED.items() if found.get(key) not in neutral]
    if ignored:
        lines.append(f"of the checkpoint's generation_config.json not applied: {', '.join(ignored)}")
    return lines


def guess_template(files: TokenizerFiles, decoder: str, layers: int) -> str:
    """The prompt where the files bring none: there by the model's name, here by what its tokenizer marks turns with."""
    if files.added_id("<|start_header_id|>") is not None:
        return "llama_3"
    if files.added_id("<|im_start|>") is not None:
        return "qwen_1_5" if decoder.startswith("qwen") else "chatml_direct"
    return "mistral_instruct" if decoder == "mistral" else "vicuna_v1" if layers > 1 else "llava_v1"


# ---- what config.json says to this package alone ----


def own_values(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What we add to a config.json, and transformers passes over: single values, and objects chat and layout."""
    ours = raw.get("minillava", {})
    if not isinstance(ours, dict) or not all(isinstance(ours.get(key, {}), dict) for key in ("chat", "layout")):
        raise UserError(
            f"{folder / 'config.json'}: minillava is {ours!r}, expected an object, and objects as its 'chat' and "
            "'layout'"
        )
    return ours


def overridden(chat: ChatConfig, raw: dict[str, Any], folder: Path) -> ChatConfig:
    """`chat` with the values of config.json's "minillava": {"chat": {...}}: our saves have all but the jinja."""
    where = f"{folder / 'config.json'}: minillava.chat"
    chat = from_dict(ChatConfig, to_dict(chat) | own_values(raw, folder).get("chat", {}), where)
    return chat if chat.template == "jinja" else dataclasses.replace(chat, jinja="")


def own_chat(config: ModelConfig) -> dict[str, Any]:
    """The object chat that `overridden` reads; the Jinja has a file of its own, repetition generation_config.json."""
    return {key: value for key, value in to_dict(config.chat).items() if key not in ("jinja", "repetition_penalty")}


# ---- Jinja for other engines ----


# llama.cpp puts "<__media__>", or "<__media_SOMETHING__>", where pictures are: it goes where the placeholder goes.
_MEDIA = """{%- set found = ns.text.split("<__media") -%}
{%- set ns.media = "<__media" ~ found[1].split("__>")[0] ~ "__>" if found | length > 1 else "" -%}
{%- if ns.media -%}{%- set ns.text = ns.text.replace(ns.media, IMAGE) -%}{%- endif -%}
"""
_MEDIA_AGAIN = "{%- if ns.media -%}{%- set ns.text = ns.text.replace(IMAGE, ns.media) -%}{%- endif -%}\n"


def jinja_of(chat: ChatConfig, for_llama_cpp: bool = False) -> str:
    """The chat template for other engines: the checkpoint's own, or a built-in one as Jinja, with the same strings.

    It ends where the model is to write, whatever `add_generation_prompt`. llama.cpp has its own marker for pictures.
    """
    if chat.template == "jinja":
        return chat.jinja
    if chat.template not in TEMPLATES:
        raise UserError(f"chat template '{chat.template}' is unknown{nearest(chat.template, [*TEMPLATES, 'jinja'])}")
    template, image = TEMPLATES[chat.template], json.dumps(chat.image_token)
    names = {"{text}": "ns.text", "{system}": "ns.system", "{images}": f"({image} * {_count(image)})"}

    def put(layout: str) -> str:
        parts = [p for p in re.split(r"(\{\w+\})", layout) if p]
        return "{{- " + (" ~ ".join(names.get(p) or json.dumps(p) for p in parts) or '""') + " -}}"

    kinds = {"image": chat.image_token, "video": chat.video_token or chat.image_token}
    part = f"{json.dumps(kinds)}[part['type']] if part['type'] != 'text' else part['text']"
    before, behind = (text.replace("IMAGE", image) for text in (_MEDIA, _MEDIA_AGAIN))
    lines = [
        f'{{%- set ns = namespace(system={json.dumps(template.system)}, text="", opened=false) -%}}',
        "{%- for message in messages -%}",
        "{%- set content = message['content'] -%}",
        "{%- set ns.text = content if content is string else '' -%}",
        "{%- if content is not string -%}{%- for part in content -%}",
        f"{{%- set ns.text = ns.text ~ ({part}) -%}}",
        "{%- endfor -%}{%- endif -%}",
        "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.text -%}",
        "{%- elif message['role'] == 'assistant' -%}" + put(template.answer),
        "{%- else -%}" + (before + _jinja_of_markers(chat) + behind if for_llama_cpp else _jinja_of_markers(chat)),
        "{%- if ns.opened -%}" + put(template.user) + "{%- else -%}" + put(template.first) + "{%- endif -%}",
        "{%- set ns.opened = true -%}{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines) + "\n"


def _jinja_of_markers(chat: ChatConfig) -> str:
    """Statements that put a user's placeholders where the template wants them."""
    template = TEMPLATES[chat.template]
    marked, (before, behind) = "", around(chat, template)
    count = " + ".join(_count(json.dumps(marker)) for marker in chat.markers)
    for marker in () if template.one_turn else map(json.dumps, chat.markers):
        first = f'({marker} ~ "\\n" ~ ns.text.replace({marker}, "").strip()).strip()'  # one picture goes in front
        alone = f"{_count(marker)} == 1 and {count} == 1"
        marked += f"{{%- if {alone} -%}}{{%- set ns.text = {first} -%}}{{%- endif -%}}"
        if template.around:
            marked += f'{{%- set ns.text = ns.text.replace({marker} ~ "\\n", {marker}) -%}}'
        if before:
            wrapped = f"{json.dumps(before)} ~ {marker} ~ {json.dumps(behind)}"
            marked += f"{{%- set ns.text = ns.text.replace({marker}, {wrapped}) -%}}"
    return marked


def _count(marker: str) -> str:
    """How often a text has a marker; llama.cpp's Jinja has no str.count."""
    return f"(ns.text.split({marker})|length - 1)"
