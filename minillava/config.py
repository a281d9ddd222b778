"""ModelConfig: what the weights need, and nothing about training.

A family is a value of `ModelConfig`, not a class: LLaVA v1 and 1.5 differ in `projector.layers`, CLIP and SigLIP in
five fields of `VisionConfig`. `minillava.checkpoints` reads a ModelConfig out of any family's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

from minillava.errors import UserError

IGNORE = -100  # label of a position that is not supervised, as in PyTorch and transformers

# Types of numbers, with the interval that a recipe's have to be in (`recipe.check_ranges`).
Integer = Annotated[int, "(-inf, inf)"]
Count = Annotated[int, "[0, inf)"]
Size = Annotated[int, "[1, inf)"]
Finite = Annotated[float, "(-inf, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Positive = Annotated[float, "(0, inf)"]
Share = Annotated[float, "[0, 1]"]
Fraction = Annotated[float, "[0, 1)"]


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. The defaults are CLIP ViT-L/14 at 336 pixels, the tower of LLaVA-1.5."""

    hidden_size: Size = 1024  # width of a patch feature
    intermediate_size: Size = 4096  # width inside the MLP
    num_layers: Size = 24  # blocks in the checkpoint; those behind the last selected layer are not run
    num_heads: Size = 16
    image_size: Size = 336  # pixels a side, of the square that the tower sees
    patch_size: Size = 14  # pixels a side
    activation: Literal["quick_gelu", "gelu_tanh", "gelu"] = "quick_gelu"  # of CLIP, SigLIP and RICE
    norm_eps: Positive = 1e-5  # of every norm
    class_token: bool = True  # a learned token in front of the patches
    pre_norm: bool = True  # a LayerNorm before block 0
    patch_bias: bool = False  # a bias in the patch convolution
    select_layers: tuple[Integer, ...] = (-2,)  # hidden states used, counted as in transformers; several: concatenated
    keep_class_token: bool = False  # "cls_patch"/"full": hand the class token to the projector too
    rotary: bool = False  # rotary embedding in place of a position table: pictures of any size, of which a view is one
    # patch (image_size == patch_size), and the class token, where there is one, in front of each frame (RICE)
    strip_slip: bool = False  # rotary: drop the class tokens of several frames as OneVision-1.5's own file does, which
    # takes one wrong row more for each frame behind the first; its training code and the default here do not
    rotary_shares: tuple[Count, Count, Count] = (0, 1, 1)  # rotary: of the frequencies, to time, row and column
    rotary_pairs: bool = False  # rotary: channels 2i and 2i + 1 turn by the angles of halves (OneVision-Encoder)
    rotary_theta: Positive = 10000.0
    window: Count = 1  # rotary: frames of one row that see each other; 0: all
    norm: Literal["layer", "rms"] = "layer"
    final_norm: bool = False  # run the norm behind the last block too (OneVision-Encoder's use_head)

    @cached_property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @cached_property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def layers_run(self) -> int:
        """Blocks needed for the deepest selected hidden state: state i is the output of block i, state 0 the input."""
        return max(layer % (self.num_layers + 1) for layer in self.select_layers)


@dataclass(frozen=True)
class ProjectorConfig:
    """Vision features to word embeddings: `layers` linear layers with GELU (erf) between them."""

    layers: Annotated[int, "[1, 8]"] = 2  # 1 is LLaVA v1's single linear layer, 2 is mlp2x_gelu of LLaVA-1.5
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # gelu is the exact one (erf)
    bias: bool = True
    merge: Size = 1  # patches a side that become one token, behind a LayerNorm; the hidden layer has all their width (2
    # in OneVision-1.5's merger)
    norm_eps: Positive = 1e-5  # of that LayerNorm


@dataclass(frozen=True)
class RopeScaling:
    """A rotary embedding stretched over a longer context than it was trained for; `layers.rotary.angles`."""

    kind: Literal["linear", "llama3"] = "linear"  # linear: all frequencies over `factor`; llama3: only the slow ones
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0  # llama3: slower than this many turns in the old context is slow
    high_freq_factor: Positive = 4.0  # llama3: faster than this many is left alone; in between it is blended
    original_positions: Annotated[int, "(0, inf)"] = 8192  # llama3: the context before


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder. The defaults are Vicuna-7B v1.5."""

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_layers: Size = 32
    num_heads: Size = 32
    num_kv_heads: Size = 32  # fewer than num_heads: grouped-query attention
    head_dim: Size = 128
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Positive = 1e-5
    max_positions: Size = 4096  # the context: prompt (visual tokens included) plus answer
    qkv_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # RMSNorm on q and k per head (Qwen3)
    num_experts: Count = 0  # 0: one MLP a block; else so many, of which each token takes a few (Qwen3-MoE)
    experts_per_token: Size = 8
    expert_size: Size = 768  # width inside an expert
    norm_expert_weights: bool = True  # the weights of a token's experts add up to 1
    tie_embeddings: bool = False  # the head is the embedding matrix
    model_type: str = "llama"  # what transformers calls it; written at export, never decided on


@dataclass(frozen=True)
class ImageConfig:
    """How pixels are prepared for the tower."""

    size: Size = 336  # pixels a side that come out
    fit: str = "pad"  # pad: to a square of the mean colour; crop: shortest edge + centre crop; squash: ignore aspect;
    # native: nearest size that is whole in blocks of patches, within these two bounds (its views are single patches)
    min_pixels: Size = 3136
    max_pixels: Size = 2_560_000
    mean: tuple[Finite, Finite, Finite] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LayoutConfig:
    """How a picture or clip becomes views of the tower's size, and their features visual tokens: `visual_tokens.py`.

    The defaults are LLaVA-1.5's: a picture is one view, and its features are the tokens.
    """

    grids: tuple[tuple[Size, Size], ...] = ()  # AnyRes: (columns, rows) of tiles; of equals the first; (): one view
    # flat: view after view; spatial: base view, then the tiles as one map; unpad (the original's spatial_unpad, and all
    # that transformers knows): that map without its padding, a learned newline behind each row
    merge: Literal["flat", "spatial", "unpad"] = "flat"
    max_tiles: Count = 0  # k of anyres_max_k: a map larger than that of k tiles is shrunk; 0: never
    round_unpad: bool = False  # round at 7 decimals before truncating, as transformers does and the original does not
    several: Literal["tiles", "pad"] = "tiles"  # each of several in a prompt is tiled as one alone, or a padded square
    video_fit: str = ""  # ImageConfig.fit for frames; "": as for pictures
    video_pool: Literal["average", "max", "bilinear"] = "average"  # of the patches of a frame
    video_stride: Size = 2  # patches a side that become one
    # where the newline goes: nowhere, once at the end, behind each frame, or behind each row of one
    video_newline: Literal["no_token", "one_token", "frame", "grid"] = "no_token"
    pool_first: bool = False  # pool before the projector (transformers' LLaVA-NeXT-Video), not behind it (the original)
    video_fps: NotNegative = 0.0  # frames a second that are looked at; 0: spread evenly over the clip
    max_frames: Size = 32  # of a clip; where there are more they are spread evenly
    time_instruction: bool = False  # tell the model the clip's length and when its frames are (LLaVA-Video)
    # which frames: spread evenly, positions truncated; rounded: those of OneVision-2, 8 or 16 of a short clip
    video_sampling: Literal["truncated", "rounded"] = "truncated"
    num_frames: Count = 0  # rounded: so many of any clip (video_fps wins); 0: by its length
    one_row: bool = False  # native: frames of a clip see each other within vision.window; else each is a picture
    time_tags: bool = False  # each frame is a picture of its own in the prompt, behind "<1.5 seconds>" (OneVision-2)
    time_decimals: Annotated[int, "[0, 9]"] = 1  # of these tags

    def __post_init__(self) -> None:
        if self.video_newline != "no_token" and self.merge != "unpad":
            raise UserError(f"video_newline {self.video_newline!r} goes with merge 'unpad'; set that, or 'no_token'")
        if self.max_tiles and self.merge != "unpad":
            raise UserError("max_tiles goes with merge 'unpad'; set that, or 0 tiles")
        if self.video_stride < 1 or self.max_frames < 1 or any(min(grid) < 1 for grid in self.grids):
            raise UserError("one of video_stride, max_frames and the sides of grids is 0 or less; use 1 or more")


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes ids, and where an answer stops. Stored in the checkpoint, never guessed from paths."""

    template: str = "vicuna_v1"  # a name of minillava.chat.templates.TEMPLATES, or "jinja" for the checkpoint's own
    jinja: str = ""  # the checkpoint's chat template, when template == "jinja"
    split_at_image: bool = True  # original LLaVA: tokenise the text on either side of <image> on its own
    image_start_end: bool = False  # wrap the image in <im_start> and <im_end> (LLaVA v1)
    image_token: str = "<image>"  # what stands for a picture in a prompt
    image_token_id: Integer = -200  # id that is repeated once per visual token; -200 where the vocabulary has none
    video_token: str = ""  # what stands for a clip; "": the same as for a picture, and the same id
    video_token_id: Integer = -200
    bos_id: Count | None = 1
    eos_ids: tuple[Count, ...] = (2,)  # any of them ends an answer
    pad_id: Integer | None = None
    stop_strings: tuple[str, ...] = ()  # texts that end an answer ("###" of llava_v0)
    repetition_penalty: Positive = 1.0  # of generation_config.json

    @cached_property
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


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the linear layers of one part (arXiv 2106.09685). The defaults are LLaVA-1.5's."""

    rank: Size = 128
    alpha: Positive = 256.0  # the update is scaled by alpha / rank
    dropout: Fraction = 0.05  # of what goes into an adapter
    targets: tuple[str, ...] = ()  # last words of the layers' names, such as q and v, never head; empty: all

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return self.alpha / self.rank
