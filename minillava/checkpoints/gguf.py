"""A LLaVA for llama.cpp: the decoder and its vocabulary as one GGUF file, tower and projector (mmproj) as another.

Names and metadata are those of llama.cpp's converter and of its tools/mtmd/clip.cpp (projector type "mlp"). Matrices
are in the form asked for, the mmproj's in F16; vectors are in float32. A tensor is read, changed and written by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillava.chat.tokenizer import Tokenizer
from minillava.checkpoints.chat_files import jinja_of
from minillava.checkpoints.gguf_vocab import read_vocabulary, write_vocabulary
from minillava.config import DecoderConfig, ModelConfig
from minillava.decoder import Decoder
from minillava.errors import UserError
from minillava.files import named
from minillava.layers.linear import Fused, dense_weight
from minillava.layers.rotary import angles
from minillava.llava import LLaVAModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

FORMS = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # of the decoder's matrices; llama.cpp's number of a whole file
PAD_COLOR = (122, 116, 104)  # clip.cpp's, CLIP's mean
F16_MAX = 65504
Part = tuple[str, Callable[[], Tensor], str]  # name, what gives the values, form


def check(config: ModelConfig) -> None:
    """Raises UserError for a model that llama.cpp has no graph for."""
    v, p, d = config.vision, config.projector, config.decoder
    layers = [layer % (v.num_layers + 1) for layer in v.select_layers]
    arch, scaling = architecture(d), d.rope_scaling.kind if d.rope_scaling else ""
    reasons = {
        "a tower of native size": v.rotary,
        "RMS norms, or the last norm, in the tower": v.norm != "layer" or v.final_norm,
        "the class token as a visual token": v.keep_class_token,
        f"hidden states {layers} in this order": any(a >= b for a, b in pairwise(layers)) or min(layers) < 1,
        "a projector that merges patches": p.merge > 1,
        f"a projector of {p.layers} layers": p.layers > 2,
        "experts behind a LLaVA": d.num_experts > 0,
        # Its graphs of both (src/models/qwen2.cpp and qwen3.cpp) have these shapes, and no other turning.
        f"{d.num_heads} heads of {d.head_dim} in a Qwen2 of width {d.hidden_size}": (
            arch == "qwen2" and d.num_heads * d.head_dim != d.hidden_size
        ),
        "a decoder with both biases and norms on q and k": d.qkv_bias and d.qk_norm,
        "LLaMA-3's rope scaling in a Qwen": arch != "llama" and scaling == "llama3",
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(
            f"llama.cpp does not run {found}; it knows CLIP and SigLIP towers, one or two linear layers, and the "
            "decoders LLaMA, Mistral, Qwen2 and Qwen3"
        )


def differences(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp does otherwise than this package with the files of such a model, a line each."""
    image, layout, chat = config.image, config.layout, config.chat
    found = []
    if config.vision.class_token:
        found.append(
            "since May 2025 llama.cpp puts a CLIP tower's class token behind the patches (its issue 25814): each patch "
            "has its neighbour's position and the first is lost; with its pull request 25844 it is right"
        )
    if layout.grids:
        found.append("no tiles: a picture is one view, without newlines")
        found.append("the view of a picture that is not square is padded there and squashed here")
    elif fit := {"crop": "cropped", "squash": "squashed"}.get(image.fit):
        found.append(f"pictures that are not square are padded there and {fit} here")
    if tuple(int(255 * x) for x in image.mean) != PAD_COLOR:
        found.append(f"padding has CLIP's mean colour {PAD_COLOR}")
    found.append("no videos")
    if chat.stop_strings:
        found.append(f"the text {chat.stop_strings[0]!r} ends an answer only with --reverse-prompt")
    prefixed = tokenizer.encode("a", True) != tokenizer.encode("a", False)
    if prefixed and not tokenizer.prefix_after_special and not chat.split_at_image:
        found.append("a blank is put in front of the text behind a picture")
    return found


def export(model: LLaVAModel, tokenizer: Tokenizer, folder: Path, name: str, form: str) -> tuple[Path, Path]:
    """Write NAME-FORM.gguf and mmproj-NAME-F16.gguf; both paths. A file is there whole or not at all.

    Raises UserError for what llama.cpp cannot run, and for values that F16 does not hold.
    """
    check(model.config)
    vocabulary = read_vocabulary(tokenizer, model.config.decoder.vocab_size)
    template = jinja_of(model.config.chat, for_llama_cpp=True)
    folder.mkdir(parents=True, exist_ok=True)
    decoder, mmproj = folder / f"{name}-{form}.gguf", folder / f"mmproj-{name}-F16.gguf"

    def describe(file: GGUFWriter) -> None:
        describe_decoder(file, model.config.decoder)
        write_vocabulary(file, vocabulary, tokenizer, model.config.chat, template)

    arch = architecture(model.config.decoder)
    with named(decoder):
        write(decoder, arch, name, FORMS[form], describe, list(decoder_parts(model.decoder, form)))
    with named(mmproj):
        write(mmproj, "clip", name, 1, lambda file: describe_tower(file, model.config), list(tower_parts(model)))
    return decoder, mmproj


def write(
    path: Path, arch: str, name: str, kind: int, describe: Callable[[GGUFWriter], None], parts: list[Part]
) -> None:
    """One GGUF file: metadata, then the tensors one by one."""
    import gguf
    import numpy as np

    partial = path.with_name(path.name + ".part")
    file = gguf.GGUFWriter(partial, arch)
    file.add_name(name)
    file.add_file_type(kind)
    describe(file)
    try:
        for part, values, form in parts:
            shape, type = values().shape, gguf.GGMLQuantizationType[form]
            block, size = gguf.GGML_QUANT_SIZES[type]
            plain = {"F32": np.float32, "F16": np.float16}.get(form)
            stored = shape if plain else (*shape[:-1], shape[-1] // block * size)
            file.add_tensor_info(part, stored, np.dtype(plain or np.uint8), shape.numel() // block * size, type)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for part, values, form in parts:
            tensor = values().float()
            if form == "F16" and tensor.abs().max() > F16_MAX:
                raise UserError(f"{path}: {part} has values past what F16 holds, {F16_MAX}; llama.cpp would see inf")
            file.write_tensor_data(gguf.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[form]))
        file.close()
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # the disk is full
            file.close()
        partial.unlink(missing_ok=True)


# ---- decoder ----


def architecture(config: DecoderConfig) -> str:
    """What llama.cpp calls it: biases and norms of heads are Qwen's, all else LLaMA's."""
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def describe_decoder(file: GGUFWriter, c: DecoderConfig) -> None:
    """Sizes, as metadata."""
    import gguf

    file.add_context_length(c.max_positions)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_heads)
    file.add_head_count_kv(c.num_kv_heads)
    file.add_key_length(c.head_dim)
    file.add_value_length(c.head_dim)
    file.add_rope_dimension_count(c.head_dim)
    file.add_rope_freq_base(c.rope_theta)
    file.add_layer_norm_rms_eps(c.norm_eps)
    file.add_vocab_size(c.vocab_size)
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(c.rope_scaling.factor)


def decoder_parts(decoder: Decoder, form: str) -> Iterator[Part]:
    """The decoder's tensors by llama.cpp's names; `form` is one of gguf's types for matrices.

    In LLaMA's files neighbouring channels turn together, so the rows of q and k are put in that order.
    """
    c = decoder.config
    fine = "Q8_0" if form == "Q4_0" else form  # of the first and last matrix, as llama.cpp's own tool gives more bits

    def matrix(name: str, layer: Any, form: str = form) -> Part:
        turned = architecture(c) == "llama" and name.endswith(("attn_q.weight", "attn_k.weight"))

        def values() -> Tensor:
            w = layer if isinstance(layer, Tensor) else dense_weight(layer)
            w = w.detach()
            return w.view(-1, 2, c.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape) if turned else w

        columns = layer.shape[1] if isinstance(layer, Tensor) else layer.in_features
        return name, values, "F16" if form[0] == "Q" and columns % 32 else form

    def vector(name: str, p: Tensor) -> Part:
        return name, p.detach, "F32"

    yield matrix("token_embd.weight", decoder.embed.weight, fine)
    if c.rope_scaling is not None and c.rope_scaling.kind == "llama3":
        plain = DecoderConfig(head_dim=c.head_dim, rope_theta=c.rope_theta)
        slower = [angles(torch.ones(1), config)[0] for config in (plain, c)]
        yield vector("rope_freqs.weight", slower[0] / slower[1])
    blocks: Any = decoder.blocks
    for i, block in enumerate(blocks):
        attn, mlp = block.attn, block.mlp
        layers = dict(zip(("attn_q", "attn_k", "attn_v"), _apart(attn.qkv) or (attn.q, attn.k, attn.v)))
        layers |= dict(zip(("ffn_gate", "ffn_up"), _apart(mlp.gate_up) or (mlp.gate, mlp.up)))
        layers |= {"attn_output": attn.out, "ffn_down": mlp.down}
        yield vector(f"blk.{i}.attn_norm.weight", block.attn_norm.weight)
        yield vector(f"blk.{i}.ffn_norm.weight", block.mlp_norm.weight)
        for name, layer in layers.items():
            yield matrix(f"blk.{i}.{name}.weight", layer)
            if getattr(layer, "bias", None) is not None:
                yield vector(f"blk.{i}.{name}.bias", layer.bias)
        if c.qk_norm:
            yield vector(f"blk.{i}.attn_q_norm.weight", attn.q_norm.weight)
            yield vector(f"blk.{i}.attn_k_norm.weight", attn.k_norm.weight)
    yield vector("output_norm.weight", decoder.norm.weight)
    if not c.tie_embeddings:
        yield matrix("output.weight", decoder.head, fine)


def _apart(fused: Fused | None) -> list[Any]:
    """The layers of a fused one."""
    return [] if fused is None else [layer for _, layer in fused.parts()]


# ---- tower and projector ----


def describe_tower(file: GGUFWriter, config: ModelConfig) -> None:
    """What clip.cpp reads, and three keys that those of 2024 and early 2025 want besides."""
    v = config.vision
    file.add_bool("clip.has_text_encoder", False)
    file.add_bool("clip.has_llava_projector", True)
    file.add_description("tower and projector of a LLaVA")
    file.add_bool("clip.has_vision_encoder", True)
    file.add_string("clip.projector_type", "mlp")
    file.add_bool("clip.use_gelu", v.activation != "quick_gelu")
    for name, value in {
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "embedding_length": v.hidden_size,
        "feed_forward_length": v.intermediate_size,
        "projection_dim": config.decoder.hidden_size,
        "attention.head_count": v.num_heads,
        "block_count": v.layers_run,
    }.items():
        file.add_uint32(f"clip.vision.{name}", value)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", v.norm_eps)
    file.add_array("clip.vision.feature_layer", [layer % (v.num_layers + 1) for layer in v.select_layers])
    file.add_array("clip.vision.image_mean", list(config.image.mean))
    file.add_array("clip.vision.image_std", list(config.image.std))


def tower_parts(model: LLaVAModel) -> Iterator[Part]:
    """Tensors of tower and projector by clip.cpp's names."""
    tower, v = model.vision, model.config.vision
    blocks: Any = tower.blocks

    def affine(name: str, module: Any) -> Iterator[Part]:
        if hasattr(module, "in_features"):
            yield f"{name}.weight", lambda: dense_weight(module).detach(), "F16"
        else:
            yield f"{name}.weight", module.weight.detach, "F32"
        if module.bias is not None:
            yield f"{name}.bias", module.bias.detach, "F32"

    if v.class_token:
        yield "v.class_embd", tower.class_embedding.detach, "F32"
    yield "v.patch_embd.weight", tower.patch_embedding.weight.detach, "F16"
    if (bias := tower.patch_embedding.bias) is not None:
        yield "v.patch_embd.bias", bias.detach, "F32"
    yield "v.position_embd.weight", tower.position_embedding.weight.detach, "F32"
    if v.pre_norm:
        yield from affine("v.pre_ln", tower.pre_norm)
    for i, block in enumerate(blocks[: v.layers_run]):
        at, attn, mlp = f"v.blk.{i}", block.attn, block.mlp
        # In files of LLaVA the first matrix of an MLP is "down"; clip.cpp knows, and older ones expect it.
        layers = {"attn_q": attn.q, "attn_k": attn.k, "attn_v": attn.v, "attn_out": attn.out}
        layers |= {"ln1": block.norm1, "ln2": block.norm2, "ffn_down": mlp.fc1, "ffn_up": mlp.fc2}
        for name, layer in layers.items():
            yield from affine(f"{at}.{name}", layer)
    yield from _projector_parts(model)


def _projector_parts(model: LLaVAModel) -> Iterator[Part]:
    """Two linear layers with GELU between them, always.

    clip.cpp runs a GELU behind a lone linear layer as well. LLaVA v1's single one is written as two,
    gelu(y) - gelu(-y) = y.
    """
    linears: Any = model.projector.linears
    weights = [linear.weight.detach() for linear in linears]
    D = model.config.decoder.hidden_size
    biases = [
        w.new_zeros(len(w)) if linear.bias is None else linear.bias.detach() for w, linear in zip(weights, linears)
    ]
    if len(weights) == 1:
        eye = torch.eye(D, dtype=weights[0].dtype)
        weights = [torch.cat([weights[0], -weights[0]]), torch.cat([eye, -eye], 1)]
        biases = [torch.cat([biases[0], -biases[0]]), torch.zeros(D)]
    for number, weight, bias in zip((0, 2), weights, biases):
        yield f"mm.{number}.weight", weight.detach, "F16"
        yield f"mm.{number}.bias", bias.detach, "F32"
