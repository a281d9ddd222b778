"""ModelConfig out: the JSON files and chat template of the Hugging Face layout, which transformers and servers read."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.chat import TEMPLATES, around
from minillava.config import ChatConfig, ModelConfig, UserError, VisionConfig, nearest, to_dict
from minillava.hf_config import ONEVISION_15
from minillava.hf_layout import HF_CLASSES, WITH_VIDEO, hf_class
from minillava.hf_parts import ACTIVATIONS, DECODER_SIZES, VISION_SIZES, optional_json
from minillava.tokenizer import SPACE, Tokenizer, load_tokenizer


def to_hf(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of the Hugging Face layout, by name.

    What no class of transformers computes (`hf_class`), such as a projector of one layer, gets model_type "minillava",
    which it refuses instead of loading with a second layer of random numbers; `_read_hf` reads it back.
    """
    if config.vision.rotary:
        return _onevision_15(config, dtype)
    v, d, p, chat, S = config.vision, config.decoder, config.projector, config.chat, config.image.size
    if not v.class_token == v.pre_norm != v.patch_bias:
        raise UserError("the vision tower is neither CLIP's nor SigLIP's: it has no foreign name")
    to_act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    text, ids = _decoder(config, dtype)
    tower = dict(
        model_type="clip_vision_model" if v.class_token else "siglip_vision_model",
        **{theirs: getattr(v, ours) for ours, theirs in VISION_SIZES.items()},
        num_channels=3, hidden_act=to_act[v.activation], layer_norm_eps=v.norm_eps, dtype=dtype,
        **({} if v.class_token else {"vision_use_head": False}),
    )  # fmt: skip
    select, strategy = list(v.select_layers), "full" if v.keep_class_token or not v.class_token else "default"
    kind, layout = hf_class(config), config.layout
    name = HF_CLASSES[kind].name if kind in HF_CLASSES else "Llava"
    top: dict[str, Any] = dict(
        architectures=[f"{name}ForConditionalGeneration" if kind in HF_CLASSES else "MinillavaLLaVA"],
        model_type=kind, text_config=text, vision_config=tower,
        vision_feature_layer=select if len(select) > 1 else select[0], vision_feature_select_strategy=strategy,
        projector_hidden_act=to_act[p.activation], multimodal_projector_bias=p.bias,
        image_token_index=chat.image_token_id, image_seq_length=v.num_patches + v.keep_class_token,
        tie_word_embeddings=d.tie_embeddings, dtype=dtype, torch_dtype=dtype, pad_token_id=chat.pad_id,
        minillava={"projector_layers": p.layers, "chat": {k: x for k, x in to_dict(chat).items() if k != "jinja"},
                   "layout": to_dict(layout)},
    )  # fmt: skip
    if layout.grids:  # transformers reads pairs of (height, width)
        top["image_grid_pinpoints"] = [[rows * S, columns * S] for columns, rows in layout.grids]
    top |= {"vision_aspect_ratio": f"anyres_max_{layout.max_tiles}"} if kind == "llava_onevision" else {}
    top |= {"video_token_index": chat.video_token_id} if chat.video_token else {}
    if kind == "llava_next_video":
        top |= dict(spatial_pool_mode=layout.video_pool, spatial_pool_stride=layout.video_stride)
    square = config.image.fit == "squash" and kind not in ("llava_next", "llava_next_video")
    lone = "LlavaImageProcessor" if config.image.fit == "pad" else "CLIPImageProcessor"
    pixels: dict[str, Any] = dict(
        image_processor_type=f"{name.removesuffix('Video')}ImageProcessor" if layout.grids and kind in HF_CLASSES
        else "LlavaNextImageProcessor" if layout.grids else lone,
        do_convert_rgb=True, do_resize=True, size={"height": S, "width": S} if square else {"shortest_edge": S},
        resample=3, do_center_crop=not square, crop_size={"height": S, "width": S}, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, image_mean=list(config.image.mean), image_std=list(config.image.std),
        do_pad=config.image.fit == "pad" or bool(layout.grids),
    )  # fmt: skip
    processor: dict[str, Any] = dict(processor_class=f"{name}Processor", vision_feature_select_strategy=strategy,
                     image_token=chat.image_token)  # fmt: skip
    if kind == "llava_onevision":
        processor |= dict(
            num_image_tokens=v.num_patches + v.class_token, vision_aspect_ratio=top["vision_aspect_ratio"]
        )
    else:
        processor |= dict(patch_size=v.patch_size, num_additional_image_tokens=int(v.class_token))
    files: dict[str, dict[str, Any]] = {
        "config.json": top,
        "preprocessor_config.json": pixels | {"processor_class": f"{name}Processor"},
        "processor_config.json": processor,
        "generation_config.json": {k: i for k, i in ids.items() if i is not None},
    }
    if layout.grids:
        pixels["image_grid_pinpoints"] = top["image_grid_pinpoints"]
        files["preprocessor_config.json"] |= pixels
    if kind in WITH_VIDEO:
        processor["video_token"] = chat.video_token
        frames = {
            k: x for k, x in pixels.items() if k not in ("image_processor_type", "image_grid_pinpoints", "do_pad")
        }
        files["video_preprocessor_config.json"] = frames | dict(
            video_processor_type=f"{name}VideoProcessor", do_sample_frames=False, processor_class=f"{name}Processor"
        )
    return files


def _decoder(config: ModelConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text_config, and the special ids, which are also generation_config.json's."""
    d, chat = config.decoder, config.chat
    traits = (d.qkv_bias, d.qk_norm, d.num_experts > 0)
    if traits != (d.model_type == "qwen2", d.model_type.startswith("qwen3"), d.model_type == "qwen3_moe"):
        raise UserError(
            f"a decoder of type {d.model_type} with qkv_bias {d.qkv_bias}, qk_norm {d.qk_norm} has no foreign name"
        )
    eos: Any = list(chat.eos_ids) if len(chat.eos_ids) > 1 else next(iter(chat.eos_ids), None)
    ids = {"bos_token_id": chat.bos_id, "eos_token_id": eos, "pad_token_id": chat.pad_id}
    text = dict(
        model_type=d.model_type, **{theirs: getattr(d, ours) for ours, theirs in DECODER_SIZES.items()},
        num_key_value_heads=d.num_kv_heads,
        head_dim=d.head_dim, hidden_act="silu", rms_norm_eps=d.norm_eps, max_position_embeddings=d.max_positions,
        rope_theta=d.rope_theta, rope_parameters={"rope_theta": d.rope_theta, "rope_type": "default"},
        tie_word_embeddings=d.tie_embeddings, sliding_window=None, dtype=dtype, **ids,
    )  # fmt: skip
    if scaling := d.rope_scaling:
        text["rope_parameters"] |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "linear":
            text["max_position_embeddings"] = round(d.max_positions / scaling.factor)
        else:
            text["rope_parameters"] |= dict(
                low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_positions,
            )  # fmt: skip
    if d.num_experts:
        text |= dict(
            num_experts=d.num_experts, num_local_experts=d.num_experts, num_experts_per_tok=d.experts_per_token,
            moe_intermediate_size=d.expert_size, norm_topk_prob=d.norm_expert_weights,
        )  # fmt: skip
    return text, ids


def to_original(config: ModelConfig, tower: str, language_model: str) -> dict[str, Any] | None:
    """config.json of haotian-liu/LLaVA for a model like LLaVA-1.5, which loads its tower and language model by name.

    None where it has no such name or no such model (tiles, SigLIP, other decoders).
    """
    v, d, p = config.vision, config.decoder, config.projector
    tower = tower or ("openai/clip-vit-large-patch14-336" if v == VisionConfig() else "")
    alike = v.class_token and len(v.select_layers) == 1 and d.model_type == "llama" and not config.layout.grids
    if not tower or not alike or p.merge > 1 or p.activation != "gelu" or not p.bias:
        return None
    return _decoder(config, "bfloat16")[0] | dict(
        model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], _name_or_path=language_model,
        mm_vision_tower=tower, mm_hidden_size=v.hidden_size, mm_vision_select_layer=v.select_layers[0],
        mm_vision_select_feature="cls_patch" if v.keep_class_token else "patch", use_mm_proj=True,
        mm_projector_type=f"mlp{p.layers}x_gelu" if p.layers > 1 else "linear", mm_use_im_patch_token=False,
        mm_use_im_start_end=config.chat.image_start_end, tokenizer_padding_side="right",
        image_aspect_ratio="pad" if config.image.fit == "pad" else "square",
        tokenizer_model_max_length=min(2048, d.max_positions),
    )  # fmt: skip


def _onevision_15(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """As its own files are. The code that they name for transformers is not in them: get it from the original."""
    v, chat, image = config.vision, config.chat, config.image
    text, ids = _decoder(config, dtype)
    to_act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    tower = dict(
        model_type="rice_vit", depth=v.num_layers, embed_dim=v.hidden_size, hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size, num_heads=v.num_heads, hidden_act=to_act[v.activation], in_channels=3,
        patch_size=v.patch_size, spatial_merge_size=config.projector.merge, temporal_patch_size=1,
        layer_norm_eps=v.norm_eps, text_hidden_size=config.decoder.hidden_size,
    )  # fmt: skip
    ours = {"strip_slip": v.strip_slip, "chat": {k: x for k, x in to_dict(chat).items() if k != "jinja"}}
    top = dict(
        architectures=["LLaVAOneVision1_5_ForConditionalGeneration"], model_type=ONEVISION_15,
        text_config=text | {"model_type": "LLaVAOneVision1_5_text"}, vision_config=tower, torch_dtype=dtype,
        image_token_id=chat.image_token_id, video_token_id=chat.video_token_id, minillava=ours,
    )  # fmt: skip
    pixels = dict(
        image_processor_type="Qwen2VLImageProcessor", do_convert_rgb=True, do_resize=True, do_rescale=True,
        do_normalize=True, rescale_factor=1 / 255, resample=3, image_mean=list(image.mean), image_std=list(image.std),
        size={"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}, min_pixels=image.min_pixels,
        max_pixels=image.max_pixels, patch_size=v.patch_size, merge_size=config.projector.merge, temporal_patch_size=1,
    )  # fmt: skip
    return {
        "config.json": top,
        "preprocessor_config.json": pixels | {"processor_class": "Qwen2_5_VLProcessor"},
        "generation_config.json": {k: i for k, i in ids.items() if i is not None},
    }


def jinja_of(chat: ChatConfig) -> str:
    """The chat template for other engines: the checkpoint's own, or a built-in one as Jinja, with the same strings.

    It ends where the model is to write; `add_generation_prompt` makes no difference to it.
    """
    if chat.template == "jinja":
        return chat.jinja
    if chat.template not in TEMPLATES:
        raise UserError(f"chat template '{chat.template}' is unknown{nearest(chat.template, [*TEMPLATES, 'jinja'])}")
    template, image = TEMPLATES[chat.template], json.dumps(chat.image_token)
    names = {"{text}": "ns.text", "{system}": "ns.system", "{images}": f"({image} * ns.text.count({image}))"}

    def put(layout: str) -> str:
        parts = [p for p in re.split(r"(\{\w+\})", layout) if p]
        return "{{- " + (" ~ ".join(names.get(p) or json.dumps(p) for p in parts) or '""') + " -}}"

    marked, (before, behind) = "", around(chat, template)
    count = " + ".join(f"ns.text.count({json.dumps(marker)})" for marker in chat.markers)
    for marker in () if template.one_turn else map(json.dumps, chat.markers):
        first = f'({marker} ~ "\\n" ~ ns.text.replace({marker}, "").strip()).strip()'  # one picture goes in front
        alone = f"ns.text.count({marker}) == 1 and {count} == 1"
        marked += f"{{%- if {alone} -%}}{{%- set ns.text = {first} -%}}{{%- endif -%}}"
        if template.around:
            marked += f'{{%- set ns.text = ns.text.replace({marker} ~ "\\n", {marker}) -%}}'
        if before:
            wrapped = f"{json.dumps(before)} ~ {marker} ~ {json.dumps(behind)}"
            marked += f"{{%- set ns.text = ns.text.replace({marker}, {wrapped}) -%}}"
    kinds = {"image": chat.image_token, "video": chat.video_token or chat.image_token}
    part = f"{json.dumps(kinds)}[part['type']] if part['type'] != 'text' else part['text']"
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
        "{%- else -%}" + marked,
        "{%- if ns.opened -%}" + put(template.user) + "{%- else -%}" + put(template.first) + "{%- endif -%}",
        "{%- set ns.opened = true -%}{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines) + "\n"


def add_image_token(config: ModelConfig, state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> ModelConfig:
    """Give <image>, and <video> where the class wants it, an id and a row of the embedding where a model has none.

    Original LLaVA has none, transformers needs them. `state` (our names) and tokenizer_config.json in `folder` are
    changed. New rows are the mean of the old; their number is rounded up to 64, as transformers' own conversion does.
    Nothing else about the prompt changes.
    """
    chat, rows, size = config.chat, config.decoder.vocab_size, tokenizer.vocab_size
    tokens = {"image": (chat.image_token, chat.image_token_id)}
    if hf_class(config) in WITH_VIDEO:
        tokens["video"] = (chat.video_token or "<video>", chat.video_token_id if chat.video_token else -1)
    added, ids = {}, dict[str, Any]()
    for kind, (token, index) in tokens.items():
        if 0 <= index < rows:
            continue
        found = tokenizer.token_id(token)
        if found is None:
            found, size = size, size + 1
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            added[str(found)] = flags | {"content": token, "special": True}
        ids |= {f"{kind}_token": token, f"{kind}_token_id": found}
    chat = dataclasses.replace(chat, **ids)
    if added:
        path = folder / "tokenizer_config.json"
        values = optional_json(path)
        added = (values.get("added_tokens_decoder") or {}) | added
        path.write_text(json.dumps(values | {"added_tokens_decoder": added}, indent=2, ensure_ascii=False) + "\n")
    most = max(chat.markers.values())
    if most >= rows:
        rows = -(-(most + 1) // 64) * 64
        for name in {"decoder.embed.weight", "decoder.head.weight"} & state.keys():
            old = state[name]
            new = old.float().mean(0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
            state[name] = torch.cat([old, new])
    decoder = dataclasses.replace(config.decoder, vocab_size=rows)
    return dataclasses.replace(config, decoder=decoder, chat=chat)


def write_tokenizer_json(folder: Path) -> None:
    """Put tokenizer.json beside a lone tokenizer.model, as original LLaVA has it, with the same ids.

    transformers 5 reads a LLaVA's tokenizer.model without the space in front of a text. A BPE of SentencePiece is a
    list of pieces by rank; its merges are all ways to make a piece of two others, best-ranked piece first.
    """
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    path, tokenizer = folder / "tokenizer.model", load_tokenizer(folder)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    plain = [i for i in vocab.values() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    if any(sp.get_score(i) != int(sp.get_score(i)) for i in plain):  # log-probabilities: a unigram model
        raise UserError(f"{path}: only a BPE can be written as tokenizer.json; put one beside it")
    merges = []
    for piece in map(sp.id_to_piece, sorted(plain, key=lambda i: -sp.get_score(i))):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = sp.id_to_piece(sp.unk_id())
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    prefixed = tokenizer.encode("a", True) != tokenizer.encode("a", False)
    if prefixed and tokenizer.prefix_after_special:
        spaces.insert(0, normalizers.Prepend(SPACE))
    elif prefixed:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    backend.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for id in sorted(tokenizer.added_ids):
        special = id in tokenizer.special_ids
        token = AddedToken(tokenizer.token_bytes(id).decode(), special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    said = {**tokenizer.special_tokens, "add_bos_token": tokenizer.adds_bos}
    values = said | optional_json(config) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
