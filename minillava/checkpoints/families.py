"""The registry: one entry for every family of vision towers and of decoders, by the model_type in its config.json.

An entry says which keys a config.json has and what it leaves out (files on the hub leave out what equalled the class
default of their day: transformers 5.23), which of our fields the family decides, and what its tensors are called. A new
family is an entry here and what is new in its arithmetic; differences are data.
"""

from dataclasses import dataclass, field
from typing import Any

from minillava.checkpoints.config_keys import ACTIVATION, FLAG, LAYERS, NUMBER, Key, Kind, choice, integer
from minillava.config import ModelConfig, RopeScaling, VisionConfig
from minillava.errors import UserError
from minillava.schema import Fields

# (foreign name, our name). <n> is a number, <p> is "weight" or "bias", <a|b> a choice: the same on either side. [x] is
# left out by some writers.
Row = tuple[str, str]


@dataclass(frozen=True)
class Family:
    """A kind of vision tower, or of decoder."""

    defaults: dict[str, Any]  # what config.json may leave out
    keys: tuple[Key, ...]
    tensors: tuple[Row, ...]
    decides: dict[str, Any] = field(default_factory=dict)  # fields of ours that follow from the family
    written: dict[str, Any] = field(default_factory=dict)  # further keys of what we write, for other readers
    unused: str = ""  # tensors of its files that LLaVA runs without: a pattern of their foreign names
    whole: str = "llava"  # towers: the format of a whole model that has one, a name of `config_json.FORMATS`
    alone: tuple[Row, ...] = ()  # towers: what the tensors are called where it stands alone, if otherwise
    max_pixels: int = 0  # towers that take pictures of any size: of one, in a model that is made with this tower


# ---- vision towers ----

CLIP_KEYS = (
    Key("hidden_size", "vision.hidden_size"),
    Key("intermediate_size", "vision.intermediate_size"),
    Key("num_hidden_layers", "vision.num_layers", LAYERS),
    Key("num_attention_heads", "vision.num_heads"),
    Key("image_size", "vision.image_size"),
    Key("patch_size", "vision.patch_size"),
    Key("num_channels", only=3),
    Key("hidden_act", "vision.activation", ACTIVATION),
    Key("layer_norm_eps", "vision.norm_eps", NUMBER),
)
CLIP_TENSORS: tuple[Row, ...] = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.<p>", "patch_embedding.<p>"),
    ("embeddings.position_embedding.weight", "position_embedding.weight"),
    ("pre_layrnorm.<p>", "pre_norm.<p>"),  # that misspelling is the real name
    ("encoder.layers.<n>.layer_norm<1|2>.<p>", "blocks.<n>.norm<1|2>.<p>"),
    ("encoder.layers.<n>.self_attn.<q|k|v|out>_proj.<p>", "blocks.<n>.attn.<q|k|v|out>.<p>"),
    ("encoder.layers.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
    ("post_layernorm.<p>", "post_norm.<p>"),
)
_CLIP: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224
)
RICE_KEYS = (
    Key("depth", "vision.num_layers", LAYERS),
    Key("embed_dim", "vision.hidden_size", optional=True),
    Key("hidden_size", "vision.hidden_size"),
    Key("intermediate_size", "vision.intermediate_size"),
    Key("num_heads", "vision.num_heads"),
    Key("hidden_act", "vision.activation", ACTIVATION),
    Key("in_channels", only=3),
    Key("patch_size", "vision.patch_size"),
    Key("spatial_merge_size", "projector.merge", integer(8)),
    Key("temporal_patch_size", only=1),
    Key("layer_norm_eps", only=1e-5),
    Key("text_hidden_size", "decoder.hidden_size", Kind(None)),
)
RICE_TENSORS: tuple[Row, ...] = (
    ("class_embedding", "class_embedding"),
    ("class_pos_emb", "class_angles"),
    ("patch_embed.proj.weight", "patch_embedding.weight"),
    ("pre_layernorm.<p>", "pre_norm.<p>"),
    ("blocks.<n>.norm<1|2>.<p>", "blocks.<n>.norm<1|2>.<p>"),
    ("blocks.<n>.attn.qkv.<p>", "blocks.<n>.attn.qkv.<p>"),  # three of ours: names.JOINED
    ("blocks.<n>.attn.proj.<p>", "blocks.<n>.attn.out.<p>"),
    ("blocks.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
)
_RICE: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=4096, depth=24, num_heads=16, patch_size=14, hidden_act="gelu",
    spatial_merge_size=2,
)  # fmt: skip
NATIVE_RICE_KEYS = (  # as transformers' open pull request 48896 has them
    *(key for key in RICE_KEYS if key.theirs not in ("embed_dim", "temporal_patch_size", "text_hidden_size")),
    Key("out_hidden_size", "decoder.hidden_size", Kind(None)),
)
MLCD_KEYS = tuple(key for key in CLIP_KEYS if key.theirs != "image_size")
MLCD_TENSORS: tuple[Row, ...] = tuple(
    (f"[vision_model.]{theirs}", ours) for theirs, ours in (*CLIP_TENSORS, ("class_pos_emb", "class_angles"))
)
ENCODER_KEYS = (
    *MLCD_KEYS,
    Key("layer_norm_eps", "projector.norm_eps", NUMBER),
    Key("layer_norm_type", "vision.norm", choice({"layer_norm": "layer", "rms_norm": "rms"})),
    Key("rope_theta", "vision.rotary_theta", NUMBER),
    Key("use_head", "vision.final_norm", FLAG),
    Key("spatial_merge_size", "projector.merge", integer(8)),
    Key("temporal_patch_size", only=1),
    Key("frame_windows_size", "vision.window", integer(1 << 24, least=0)),
    Key("use_patch_position_encoding", only=False),
    Key("out_hidden_size", "decoder.hidden_size", Kind(None)),
    Key("text_hidden_size", "decoder.hidden_size", Kind(None)),
)
ENCODER_TENSORS: tuple[Row, ...] = (
    ("embeddings.patch_embedding.<p>", "patch_embedding.<p>"),
    ("layernorm_pre.<p>", "pre_norm.<p>"),
    ("encoder.layers.<n>.layer_norm<1|2>.<p>", "blocks.<n>.norm<1|2>.<p>"),
    ("encoder.layers.<n>.self_attn.qkv.<p>", "blocks.<n>.attn.qkv.<p>"),
    ("encoder.layers.<n>.self_attn.proj.<p>", "blocks.<n>.attn.out.<p>"),
    ("encoder.layers.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
    ("layernorm_post.<p>", "post_norm.<p>"),
)
ENCODER_ALONE: tuple[Row, ...] = (  # q, k and v stand apart
    *ENCODER_TENSORS[:3],
    ("encoder.layers.<n>.self_attn.<q|k|v|out>_proj.<p>", "blocks.<n>.attn.<q|k|v|out>.<p>"),
    ("encoder.layers.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
)
_ENCODER: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
    hidden_act="gelu", layer_norm_eps=1e-6, layer_norm_type="layer_norm", rope_theta=10000.0, use_head=False,
    spatial_merge_size=3, frame_windows_size=4,
)  # fmt: skip
_RICE_DECIDES: dict[str, Any] = dict(class_token=True, pre_norm=True, patch_bias=False, rotary=True)
TOWERS: dict[str, Family] = {
    "clip_vision_model": Family(
        _CLIP | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5), CLIP_KEYS, CLIP_TENSORS,
        dict(class_token=True, pre_norm=True, patch_bias=False, rotary=False),
    ),
    "siglip_vision_model": Family(
        _CLIP | dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6), CLIP_KEYS, CLIP_TENSORS,
        dict(class_token=False, pre_norm=False, patch_bias=True, rotary=False), dict(vision_use_head=False),
        unused=r"head\.(probe|attention|layernorm|mlp)\b.*",  # its pooling head
    ),
    "rice_vit": Family(
        _RICE, RICE_KEYS, RICE_TENSORS, _RICE_DECIDES, whole="onevision_1_5", max_pixels=1600**2,
    ),
    "onevision_encoder": Family(
        _ENCODER, ENCODER_KEYS, ENCODER_TENSORS,
        _RICE_DECIDES | dict(class_token=False, rotary_shares=(4, 6, 6), rotary_pairs=True),
        unused=r"(layernorm_post|head)\..*|.*inv_freq\w*",  # its end and buffers, where it stands alone
        whole="onevision_2", alone=ENCODER_ALONE, max_pixels=2000**2,
    ),
}  # fmt: skip
# Those that take pictures of any size, also by what they are called where they stand alone.
NATIVE_TOWERS = {name: family for name, family in TOWERS.items() if family.decides["rotary"]} | {
    "mlcd_vision_model": Family(  # RICE, which is of MLCD's class in transformers
        _CLIP | dict(hidden_act="gelu", patch_size=14, layer_norm_eps=1e-5), MLCD_KEYS, MLCD_TENSORS, _RICE_DECIDES,
        whole="onevision_1_5", max_pixels=1600**2,
    ),
}  # fmt: skip


def tower_type(vision: VisionConfig) -> str:
    """The family of a tower, by what it decides. Raises UserError for one that no file could be of."""
    for model_type, family in TOWERS.items():
        if all(getattr(vision, name) == value for name, value in family.decides.items()):
            return model_type
    raise UserError("the vision tower is neither CLIP's nor SigLIP's: it has no foreign name")


# ---- decoders ----


def _read_rope(f: Fields, key: str, default: Any) -> RopeScaling | None:
    """rope_parameters, or rope_scaling as it was called before transformers 5."""
    f = Fields(f.values[key], f"{f.where}: {key}")
    kind = f.one_of("rope_type", f.values.get("type", "default"), ["default", "linear", "llama3"])
    if kind == "default" or (kind == "linear" and f.number("factor") == 1):
        return None
    if kind == "linear":
        return RopeScaling(factor=f.number("factor"))
    low, high = f.number("low_freq_factor"), f.number("high_freq_factor")
    if low >= high:
        raise UserError(f"{f.where}: low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeScaling("llama3", f.number("factor"), low, high, f.integer("original_max_position_embeddings"))


def _write_rope(scaling: RopeScaling | None, config: ModelConfig) -> dict[str, Any]:
    plain = {"rope_theta": config.decoder.rope_theta, "rope_type": "default"}
    if scaling is None:
        return plain
    values = plain | {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    bounds = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return values | bounds | {"original_max_position_embeddings": scaling.original_positions}


def _write_positions(value: int, config: ModelConfig) -> int:
    """Of linear scaling files keep the context from before."""
    scaling = config.decoder.rope_scaling
    return round(value / scaling.factor) if scaling is not None and scaling.kind == "linear" else value


POSITIONS = Kind(lambda f, key, default: f.integer(key, default, 1 << 30), _write_positions)
LLAMA_KEYS = (
    Key("hidden_size", "decoder.hidden_size"),
    Key("intermediate_size", "decoder.intermediate_size"),
    Key("num_hidden_layers", "decoder.num_layers", LAYERS),
    Key("num_attention_heads", "decoder.num_heads"),
    Key("vocab_size", "decoder.vocab_size"),
    Key("num_key_value_heads", "decoder.num_kv_heads", default=lambda d: d["decoder.num_heads"]),
    Key("head_dim", "decoder.head_dim", default=lambda d: max(1, d["decoder.hidden_size"] // d["decoder.num_heads"])),
    Key("hidden_act", only="silu"),
    Key("rms_norm_eps", "decoder.norm_eps", NUMBER),
    Key("max_position_embeddings", "decoder.max_positions", POSITIONS),
    Key("rope_theta", "decoder.rope_theta", NUMBER),
    Key("rope_parameters", "decoder.rope_scaling", Kind(_read_rope, _write_rope)),
    Key("tie_word_embeddings", "decoder.tie_embeddings", FLAG),
)
EXPERT_KEYS = (
    Key("num_experts", "decoder.num_experts", optional=True),
    Key("num_local_experts", "decoder.num_experts"),
    Key("num_experts_per_tok", "decoder.experts_per_token"),
    Key("moe_intermediate_size", "decoder.expert_size"),
    Key("norm_topk_prob", "decoder.norm_expert_weights", FLAG),
)
LLAMA_TENSORS: tuple[Row, ...] = (
    ("embed_tokens.weight", "embed.weight"),
    ("layers.<n>.input_layernorm.weight", "blocks.<n>.attn_norm.weight"),
    ("layers.<n>.post_attention_layernorm.weight", "blocks.<n>.mlp_norm.weight"),
    ("layers.<n>.self_attn.<q|k|v>_proj.<p>", "blocks.<n>.attn.<q|k|v>.<p>"),
    ("layers.<n>.self_attn.o_proj.weight", "blocks.<n>.attn.out.weight"),
    ("layers.<n>.self_attn.<q|k>_norm.weight", "blocks.<n>.attn.<q|k>_norm.weight"),
    ("layers.<n>.mlp.<gate|up|down>_proj.weight", "blocks.<n>.mlp.<gate|up|down>.weight"),
    ("layers.<n>.mlp.gate.weight", "blocks.<n>.mlp.router.weight"),
    ("layers.<n>.mlp.experts.<n>.<gate|up|down>_proj.weight", "blocks.<n>.mlp.experts.<n>.<gate|up|down>"),
    ("norm.weight", "norm.weight"),
)
_LLAMA: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MISTRAL = _LLAMA | dict(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096
)
_QWEN = _LLAMA | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
_QWEN_MOE = _QWEN | dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4, num_local_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False,
)  # fmt: skip
_PLAIN = dict(qkv_bias=False, qk_norm=False)
DECODERS: dict[str, Family] = {
    "llama": Family(_LLAMA, LLAMA_KEYS, LLAMA_TENSORS, _PLAIN),
    "mistral": Family(_MISTRAL, LLAMA_KEYS, LLAMA_TENSORS, _PLAIN),
    "qwen2": Family(_QWEN, LLAMA_KEYS, LLAMA_TENSORS, dict(qkv_bias=True, qk_norm=False)),
    "qwen3": Family(_QWEN | dict(head_dim=128), LLAMA_KEYS, LLAMA_TENSORS, dict(qkv_bias=False, qk_norm=True)),
    "qwen3_moe": Family(_QWEN_MOE, LLAMA_KEYS + EXPERT_KEYS, LLAMA_TENSORS, dict(qkv_bias=False, qk_norm=True)),
}  # fmt: skip
