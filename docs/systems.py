"""Writes docs/systems.md: the eight systems side by side, every figure from a ModelConfig. `python docs/systems.py`"""

from dataclasses import dataclass
from pathlib import Path

from minillava.chat.templates import TEMPLATES
from minillava.config import (
    ChatConfig,
    DecoderConfig,
    ImageConfig,
    LayoutConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from minillava.visual_tokens import clip_span, image_span

SIZES = ((336, 336), (1000, 500), (1920, 1080))
FRAMES = 16


@dataclass(frozen=True)
class System:
    name: str
    paper: str
    config: ModelConfig
    tower: str
    decoders: str
    new: str  # against the line above
    code: str  # where


CLIP_224, CLIP_336 = VisionConfig(image_size=224), VisionConfig()
SIGLIP = VisionConfig(1152, 4304, 26, 16, 384, 14, "gelu_tanh", 1e-6, False, False, True, (-1,))
RICE = VisionConfig(image_size=14, activation="gelu", select_layers=(-1,), rotary=True)
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
HD = tuple((w, h) for w in range(1, 7) for h in range(1, 7) if w * h <= 6)
NEXT = LayoutConfig(grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), merge="unpad")
ENCODER = VisionConfig(
    image_size=14, activation="gelu", norm_eps=1e-6, class_token=False, select_layers=(-1,), rotary=True,
    rotary_shares=(4, 6, 6), rotary_pairs=True, window=4,
)  # fmt: skip
ONEVISION = LayoutConfig(
    grids=tuple((w, h) for w in range(1, 7) for h in range(1, 7)), merge="unpad", max_tiles=9, several="pad",
    video_pool="bilinear", video_newline="one_token",
)  # fmt: skip
QWEN2 = DecoderConfig(152064, 3584, 18944, 28, 28, 4, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_positions=32768)
QWEN3_2 = DecoderConfig(
    151936, 4096, 12288, 36, 32, 8, qk_norm=True, rope_theta=8e6, norm_eps=1e-6, max_positions=262144
)
QWEN3 = DecoderConfig(151936, 4096, 12288, 36, 32, 8, qk_norm=True, rope_theta=1e6, norm_eps=1e-6, max_positions=40960)

SYSTEMS = (
    System(
        "LLaVA v1", "2304.08485",
        ModelConfig(CLIP_224, ProjectorConfig(1), image=ImageConfig(224, "crop"), chat=ChatConfig("llava_v1")),
        "CLIP ViT-L/14", "Vicuna (LLaMA) 7B, 13B",
        "a tower, one linear layer, a decoder; features of the second to last block, without the class token",
        "`llava.py`: the whole forward",
    ),
    System(
        "LLaVA-1.5", "2310.03744", ModelConfig(CLIP_336, image=ImageConfig(336)), "CLIP ViT-L/14", "Vicuna 1.5 7B, 13B",
        "336 pixels, padded to a square; two layers with GELU", "`projector.py`: `Projector`; `media/image.py`: `_pad`",
    ),
    System(
        "LLaVA-1.5-HD", "2310.03744",
        ModelConfig(CLIP_224, image=ImageConfig(224), layout=LayoutConfig(grids=HD, merge="unpad")),
        "CLIP ViT-L/14", "Vicuna 1.5 13B",
        "up to six tiles behind a squashed base view, without their padding, a newline behind each row",
        "`visual_tokens.py`: `image_span`; `projector.py`: `arrange`",
    ),
    System(
        "LLaVA-NeXT", "llava-vl.github.io", ModelConfig(CLIP_336, image=ImageConfig(336), layout=NEXT),
        "CLIP ViT-L/14, trained", "Vicuna, Mistral, Yi, LLaMA-3, Qwen1.5 up to 110B",
        "tiles of 336 pixels; the tower is trained and stored with the rest; other decoders",
        "`decoder.py`: biases, grouped heads, rotary scaling; `chat/templates.py`",
    ),
    System(
        "LLaVA-NeXT-Video", "llava-vl.github.io",
        ModelConfig(CLIP_336, image=ImageConfig(336), layout=NEXT),
        "CLIP ViT-L/14, trained", "Vicuna 7B, Yi-34B, Qwen1.5-32B",
        "frames, each pooled 2 x 2; a context stretched by linear rotary scaling",
        "`projector.py`: `pool`; `media/video.py`; `layers/rotary.py`",
    ),
    System(
        "LLaVA-OneVision", "2408.03326",
        ModelConfig(SIGLIP, decoder=QWEN2, image=ImageConfig(384, "squash", **HALF), layout=ONEVISION,
                    chat=ChatConfig("qwen_1_5")),
        "SigLIP so400m/14, trained", "Qwen2 0.5B, 7B, 72B",
        "up to 36 tiles whose map is shrunk beyond nine; several pictures as one padded view each; one newline a clip",
        "`visual_tokens.py`: `max_tiles`, `several`; `vit.py`: no class token, no norm in front",
    ),
    System(
        "LLaVA-OneVision-1.5", "2509.23661",
        ModelConfig(RICE, ProjectorConfig(merge=2), QWEN3, ImageConfig(14, "native"), chat=ChatConfig("onevision_1_5")),
        "RICE ViT-L/14", "Qwen3 4B, 8B, 30B-A3B (routed experts)",
        "pictures at their own size, 2D rotary embedding, a class token for each frame; 2 x 2 patches become one token",
        "`vit.py`: `segments`; `visual_tokens.py`: `native_span`; `projector.py`: `merge`; `decoder.py`: `Experts`",
    ),
    System(
        "LLaVA-OneVision-2", "2605.25979",
        ModelConfig(ENCODER, ProjectorConfig(merge=2, norm_eps=1e-6), QWEN3_2,
                    ImageConfig(14, "native", max_pixels=4_000_000),
                    LayoutConfig(video_sampling="rounded", max_frames=384, time_tags=True),
                    ChatConfig("onevision_1_5")),
        "OneVision-Encoder L/14", "Qwen3 2B, 4B, 8B, 30B-A3B (routed experts)",
        "3D rotary positions (time, row, column), no class token; each frame a picture behind `<1.5 seconds>`; frames "
        "or codec canvases of one row see each other four at a time",
        "`layers/rotary.py`: `cos_sin`; `visual_tokens.py`: `patch_positions`; `media/canvases.py`; `processor.py`: "
        "`with_tags`",
    ),
)  # fmt: skip


def _resolution(config: ModelConfig) -> str:
    if config.image.fit == "native":
        return f"any, {config.image.min_pixels:,} to {config.image.max_pixels:,} pixels"
    side, tiles = config.vision.image_size, max((w * h for w, h in config.layout.grids), default=0)
    return f"{side} x {side}, " + (f"up to {tiles} tiles" if tiles else config.image.fit)


def _projector(config: ModelConfig) -> str:
    widths = "2 x 2 patches, " if config.projector.merge == 2 else ""
    return f"{widths}{config.projector.layers} layer{'s' * (config.projector.layers > 1)}"


def _clip(system: System) -> str:
    takes = system.config.image.fit == "native" or "Video" in system.name or system.name == "LLaVA-OneVision"
    return f"{clip_span(system.config, FRAMES, 640, 480).tokens:,}" if takes else "-"


def render() -> str:
    """The page."""
    head = ["system", "tower", "projector", "decoders", "resolution"]
    head += [f"{w} x {h}" for w, h in SIZES] + [f"{FRAMES} frames, 640 x 480", "prompt"]
    lines = [
        "# The eight systems side by side",
        "",
        "Written by `python docs/systems.py` from the configurations in that file; a test keeps it up to date. The",
        "columns under sizes are visual tokens, counted by `minillava.visual_tokens` as the original code counts them.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for s in SYSTEMS:
        counts = [f"{image_span(s.config, *size).tokens:,}" for size in SIZES]
        vision = f"{s.tower}, {s.config.vision.layers_run} of {s.config.vision.num_layers} blocks"
        row = [s.name, vision, _projector(s.config), s.decoders, _resolution(s.config), *counts, _clip(s)]
        lines.append(f"| {' | '.join([*row, f'`{s.config.chat.template}`'])} |")
    lines += ["", "What is new in each, and where it is in the code (`minillava/`):", ""]
    lines += ["| system | paper | new | code |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.paper} | {s.new} | {s.code} |" for s in SYSTEMS]
    lines += ["", "The prompts, `Q` for a question about one picture:", ""]
    for name in dict.fromkeys(s.config.chat.template for s in SYSTEMS):
        t = TEMPLATES[name]
        picture = "<image>".join(t.around) if t.around else "<image>\n"
        lines += [f"`{name}`", "", "```", t.first.format(system=t.system, text=f"{picture}Q", images=""), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("systems.md").write_text(render(), encoding="utf-8")
