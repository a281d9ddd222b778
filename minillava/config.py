"""ModelConfig: what the weights need, and nothing about training.

A family is a value of `ModelConfig`, not a class: LLaVA v1 and 1.5 differ in `projector.layers`, CLIP and SigLIP in
five fields of `VisionConfig`. `minillava.weights` reads a ModelConfig out of any family's config.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the input that its owner can mend: one line that names the file or sample and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. The defaults are CLIP ViT-L/14 at 336 pixels, the tower of LLaVA-1.5."""

    hidden_size: int = 1024  # width of a patch feature
    intermediate_size: int = 4096  # width inside the MLP
    num_layers: int = 24  # blocks in the checkpoint; those behind the last selected layer are not run
    num_heads: int = 16
    image_size: int = 336  # pixels a side, of the square that the tower sees
    patch_size: int = 14  # pixels a side
    activation: Literal["quick_gelu", "gelu_tanh", "gelu"] = "quick_gelu"  # of CLIP, SigLIP and RICE
    norm_eps: float = 1e-5  # of every LayerNorm
    class_token: bool = True  # a learned token in front of the patches
    pre_norm: bool = True  # a LayerNorm before block 0
    patch_bias: bool = False  # a bias in the patch convolution
    select_layers: tuple[int, ...] = (-2,)  # hidden states used, counted as transformers does; several are concatenated
    keep_class_token: bool = False  # "cls_patch"/"full": hand the class token to the projector too
    rotary: bool = False  # 2D rotary embedding in place of a position table: pictures of any size, of which a view is
    # one patch (image_size == patch_size), and a class token in front of each frame (RICE)
    strip_slip: bool = False  # rotary: drop the class tokens of several frames as OneVision-1.5's own file does, which
    # takes one wrong row more for each frame behind the first; its training code and the default here do not

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def feature_size(self) -> int:
        """Width of what the projector receives."""
        return self.hidden_size * len(self.select_layers)

    @property
    def layers_run(self) -> int:
        """Blocks needed for the deepest selected hidden state: state i is the output of block i, state 0 the input."""
        return max(layer % (self.num_layers + 1) for layer in self.select_layers)


@dataclass(frozen=True)
class ProjectorConfig:
    """Vision features to word embeddings: `layers` linear layers with GELU (erf) between them."""

    layers: int = 2  # 1 is LLaVA v1's single linear layer, 2 is mlp2x_gelu of LLaVA-1.5
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # gelu is the exact one (erf)
    bias: bool = True
    merge: int = 1  # patches a side that become one token, behind a LayerNorm; the hidden layer has all their width (2
    # in OneVision-1.5's merger)
    norm_eps: float = 1e-5  # of that LayerNorm


@dataclass(frozen=True)
class RopeScaling:
    """A rotary embedding stretched over a longer context than it was trained for; `minillava.decoder.frequencies`."""

    kind: Literal["linear", "llama3"] = "linear"  # linear: all frequencies over `factor`; llama3: only the slow ones
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: slower than this many turns in the old context is slow
    high_freq_factor: float = 4.0  # llama3: faster than this many is left alone; in between it is blended
    original_positions: int = 8192  # llama3: the context before


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder. The defaults are Vicuna-7B v1.5."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32  # fewer than num_heads: grouped-query attention
    head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_positions: int = 4096  # the context: prompt (visual tokens included) plus answer
    qkv_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # RMSNorm on q and k per head (Qwen3)
    num_experts: int = 0  # 0: one MLP a block; else so many, of which each token takes a few (Qwen3-MoE)
    experts_per_token: int = 8
    expert_size: int = 768  # width inside an expert
    norm_expert_weights: bool = True  # the weights of a token's experts add up to 1
    tie_embeddings: bool = False  # the head is the embedding matrix
    model_type: str = "llama"  # what transformers calls it; written at export, never decided on


@dataclass(frozen=True)
class ImageConfig:
    """How pixels are prepared for the tower."""

    size: int = 336  # pixels a side that come out
    fit: str = "pad"  # pad: to a square of the mean colour; crop: shortest edge + centre crop; squash: ignore aspect;
    # native: nearest size that is whole in blocks of patches, within these two bounds (its views are single patches)
    min_pixels: int = 3136
    max_pixels: int = 2_560_000
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LayoutConfig:
    """How a picture or clip becomes views of the tower's size, and their features visual tokens: `minillava.layout`.

    The defaults are LLaVA-1.5's: a picture is one view, and its features are the tokens.
    """

    grids: tuple[tuple[int, int], ...] = ()  # AnyRes: (columns, rows) of tiles; of equals the first wins; (): one view
    # flat: view after view; spatial: base view, then the tiles as one map; unpad (the original's spatial_unpad, and all
    # that transformers knows): that map without its padding, a learned newline behind each row
    merge: Literal["flat", "spatial", "unpad"] = "flat"
    max_tiles: int = 0  # k of anyres_max_k: a map larger than that of k tiles is shrunk; 0: never
    round_unpad: bool = False  # round at 7 decimals before truncating, as transformers does and the original does not
    several: Literal["tiles", "pad"] = "tiles"  # each of several in a prompt is tiled as one alone, or a padded square
    video_fit: str = ""  # ImageConfig.fit for frames; "": as for pictures
    video_pool: Literal["average", "max", "bilinear"] = "average"  # of the patches of a frame
    video_stride: int = 2  # patches a side that become one
    # where the newline goes: nowhere, once at the end, behind each frame, or behind each row of one
    video_newline: Literal["no_token", "one_token", "frame", "grid"] = "no_token"
    pool_first: bool = False  # pool before the projector (transformers' LLaVA-NeXT-Video), not behind it (the original)
    video_fps: float = 0.0  # frames a second that are looked at; 0: spread evenly over the clip
    max_frames: int = 32  # of a clip; where there are more they are spread evenly
    time_instruction: bool = False  # tell the model the clip's length and when its frames are (LLaVA-Video)

    def __post_init__(self) -> None:
        if self.video_newline != "no_token" and self.merge != "unpad":
            raise UserError(
                f"layout.video_newline {self.video_newline!r} goes with merge 'unpad'; set that, or 'no_token'"
            )
        if self.max_tiles and self.merge != "unpad":
            raise UserError("layout.max_tiles goes with merge 'unpad'; set that, or 0 tiles")
        if self.video_stride < 1 or self.max_frames < 1 or any(min(grid) < 1 for grid in self.grids):
            raise UserError("layout: video_stride, max_frames and the sides of grids must be 1 or more")


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes ids, and where an answer stops. Stored in the checkpoint, never guessed from paths."""

    template: str = "vicuna_v1"  # a name of minillava.chat.TEMPLATES, or "jinja" for the checkpoint's own
    jinja: str = ""  # the checkpoint's chat template, when template == "jinja"
    split_at_image: bool = True  # original LLaVA: tokenise the text on either side of <image> on its own
    image_start_end: bool = False  # wrap the image in <im_start> and <im_end> (LLaVA v1)
    image_token: str = "<image>"  # what stands for a picture in a prompt
    image_token_id: int = -200  # id that is repeated once per visual token; -200 where the vocabulary has none
    video_token: str = ""  # what stands for a clip; "": the same as for a picture, and the same id
    video_token_id: int = -200
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)  # any of them ends an answer
    pad_id: int | None = None
    stop_strings: tuple[str, ...] = ()  # texts that end an answer ("###" of llava_v0)

    @property
    def markers(self) -> dict[str, int]:
        """What stands for a picture and for a clip in a prompt, and the id that it becomes: one entry or two."""
        clip = {self.video_token: self.video_token_id} if self.video_token else {}
        return {self.image_token: self.image_token_id} | clip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the weights and the prompt of one checkpoint need."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)


def nearest(name: str, known: Any) -> str:
    """' (did you mean ...?)' for a mistyped name, or the list of the known ones."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(sorted(known))})"


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a (nested) frozen dataclass from plain JSON or TOML values.

    Raises UserError for an unknown key (naming the nearest known one) and for a value of the wrong type.
    `where` names the file for the message.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, fields)}")
        kwargs[key] = _convert(hints[key], value, f"{where}: {key}")
    try:
        return cls(**kwargs)
    except UserError as error:  # of a class that checks its values
        raise UserError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config, for JSON: tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a field's type; turn lists into tuples and dicts into dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}{nearest(str(value), args)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise UserError(f"{where}: expected {len(inner)} values, got {len(value)}")
        names = (f" '{v['name']}'" if isinstance(v, dict) and "name" in v else "" for v in value)
        return tuple(_convert(h, v, where + name) for h, v, name in zip(inner, value, names))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (
        isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
