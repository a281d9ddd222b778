"""The visual-token count, against the published counts (reference: one square view an image)."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from PIL import Image

from minillava.config import DecoderConfig, ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.media.image import prepare_views
from minillava.projector import arrange, pool
from minillava.schema import from_dict
from minillava.visual_tokens import clip_span, frame_limit, image_span

SIZES = [(336, 336), (1000, 500), (640, 480), (1, 9000)]


def image_tokens(config, width, height, several=False):
    return image_span(config, width, height, several).tokens


@pytest.mark.parametrize("width,height", SIZES)
def test_published_counts(width, height):
    assert image_tokens(ModelConfig(), width, height) == 576  # LLaVA-1.5
    v1 = ModelConfig(vision=VisionConfig(image_size=224), image=ImageConfig(size=224, fit="crop"))
    assert image_tokens(v1, width, height) == 256  # LLaVA v1 at 224
    kept = dataclasses.replace(v1, vision=VisionConfig(image_size=224, keep_class_token=True))
    assert image_tokens(kept, width, height) == 257
    siglip = VisionConfig(image_size=384, keep_class_token=True, class_token=False)
    assert image_tokens(ModelConfig(vision=siglip, image=ImageConfig(size=384)), width, height) == 27 * 27


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(UserError, match="0 x 5 pixels has no area"):
        image_tokens(ModelConfig(), 0, 5)
    with pytest.raises(UserError, match=r"224 pixels a side but the vision tower sees 336"):
        image_tokens(ModelConfig(image=ImageConfig(size=224)), 10, 10)


# ---- AnyRes ----

NEXT = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))  # pinpoints of LLaVA-NeXT as transformers reads them: (columns, rows)
SIX = tuple((i, j) for i in range(1, 7) for j in range(1, 7))
SIGLIP = VisionConfig(1152, 4304, 26, 16, 384, 14, "gelu_tanh", 1e-6, False, False, True, (-1,))


def tiled(side, grids, rounds, **more):
    vision = SIGLIP if side == 384 else VisionConfig(image_size=side)
    layout = LayoutConfig(grids=grids, merge="unpad", round_unpad=rounds, **more)
    return ModelConfig(vision=vision, image=ImageConfig(size=side, fit="squash"), layout=layout)


HF_NEXT, NEXT_ORIGINAL = tiled(336, NEXT, True), tiled(336, tuple(grid[::-1] for grid in NEXT), False)
HF_OV, OV_ORIGINAL = (tiled(384, SIX, rounds, max_tiles=9, several="pad", video_pool="bilinear",
                            video_newline="one_token") for rounds in (True, False))  # fmt: skip
HD = tiled(224, tuple(grid for grid in SIX if grid[0] * grid[1] <= 6), False)

# Width, height, tokens in transformers, tokens in the original code: facts sheet, tables C1 and C2.
C1 = """100 100 1176 1176; 336 300 1224 1126; 336 336 1176 1176; 300 200 1464 976; 384 384 2928 2928; 640 480
2340 2340; 480 640 2352 2352; 1000 500 1752 1752; 500 1000 1776 1776; 672 672 2928 2928; 1008 336 2328
2328; 336 1008 2376 2376; 1024 899 2634 2634; 1500 1500 2928 2928; 1920 1080 1948 1948; 1080 1920 1968
1968; 2000 300 1306 1306; 300 2000 1368 1368; 3000 2000 2144 2144"""
C2 = """100 100 1485 1485; 336 300 1429 1429; 336 336 1485 1485; 300 200 1261 1261; 384 384 1485 1485; 640 480
2929 2929; 480 640 2943 2943; 1000 500 4009 4009; 500 1000 4050 4050; 672 672 3699 3699; 1008 336 2943
2943; 336 1008 2997 2997; 1024 899 6551 6551; 1500 1500 7371 7371; 1920 1080 7269 7269; 1080 1920 7317
7317; 2000 300 4804 4804; 300 2000 4941 4941; 3000 2000 7329 7329; 4000 100 1544 1544; 2214 820 7246
7209; 952 1160 8765 8765"""


@pytest.mark.parametrize("table,theirs,original", [(C1, HF_NEXT, NEXT_ORIGINAL), (C2, HF_OV, OV_ORIGINAL)])
def test_published_counts_of_tiled_pictures(table, theirs, original):
    for row in table.split(";"):
        width, height, *expected = map(int, row.split())
        assert [image_tokens(config, width, height) for config in (theirs, original)] == expected, row


def test_counts_of_15_hd():
    sizes = [(224, 224), (336, 336), (448, 448), (1000, 500), (640, 480), (480, 640), (1920, 1080)]
    assert [image_tokens(HD, *size) for size in sizes] == [528, 1312, 1312, 1432, 1632, 1642, 1628]


def test_several_pictures_and_clips():
    assert image_tokens(HF_OV, 1920, 1080, several=True) == 730
    assert image_tokens(HF_NEXT, 1920, 1080, several=True) == 1948
    assert [clip_span(HF_OV, frames).tokens for frames in (1, 8, 16, 32)] == [197, 1569, 3137, 6273]
    for newline, tokens in {"no_token": 4608, "frame": 4640, "grid": 4992, "one_token": 4609}.items():
        config = dataclasses.replace(NEXT_ORIGINAL, layout=LayoutConfig(merge="unpad", video_newline=newline))
        assert clip_span(config, 32).tokens == tokens
    average = dataclasses.replace(OV_ORIGINAL, layout=LayoutConfig(merge="unpad", video_pool="average"))
    assert clip_span(average, 1).tokens == 13 * 13  # of 27; bilinear gives 14
    with pytest.raises(UserError, match="without frames"):
        clip_span(HF_OV, 0)


def test_frames_are_bounded_by_the_context():
    assert frame_limit(ModelConfig()) == (4096 - 1024) // 144
    long = dataclasses.replace(ModelConfig(), decoder=DecoderConfig(max_positions=32768))
    assert frame_limit(long) == 32
    for context, frames in ((1024, 768 // 144), (2048, 1536 // 144), (100, 1)):  # a short one has room for some too
        short = dataclasses.replace(ModelConfig(), decoder=DecoderConfig(max_positions=context))
        assert frame_limit(short) == frames


@pytest.mark.parametrize("merge,tokens", [("flat", 5 * 576), ("spatial", 5 * 576), ("unpad", 2340)])
def test_how_tiles_are_merged(merge, tokens):
    config = dataclasses.replace(NEXT_ORIGINAL, layout=LayoutConfig(grids=NEXT, merge=merge))
    assert image_tokens(config, 640, 480) == tokens


def test_layouts_that_make_no_sense_are_refused():
    for values, message in (
        ({"merge": "best"}, r"merge is 'best' \(known: flat, spatial, unpad\)"),
        ({"video_newline": "grid"}, "video_newline 'grid' goes with merge 'unpad'; set that, or 'no_token'"),
        ({"max_tiles": 9}, "max_tiles goes with merge 'unpad'"),
        ({"grids": ((0, 1),)}, "use 1 or more"),
        ({"max_frames": 0}, "use 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict(LayoutConfig, values, "x")


@pytest.mark.parametrize("config,name", [(HF_NEXT, "LlavaNext"), (HF_OV, "LlavaOnevision")])
def test_counts_equal_transformers_own(config, name):
    """50,000 random sizes each, from slivers to 8,000 pixels: the counts of its processors."""
    transformers = pytest.importorskip("transformers")
    cls, side, P = getattr(transformers, f"{name}Processor"), config.image.size, config.vision.patches_per_side
    pinpoints = [(rows * side, columns * side) for columns, rows in config.layout.grids]
    processor = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=pinpoints), num_image_tokens=P * P, patch_size=14,
        vision_aspect_ratio="anyres_max_9", num_additional_image_tokens=0,
    )  # fmt: skip
    processor._get_unpadded_features = types.MethodType(cls._get_unpadded_features, processor)
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(8000), (50_000, 2))).astype(int)
    wrong = [
        (w, h)
        for w, h in sizes.tolist()
        if image_tokens(config, w, h) != cls._get_number_of_features(processor, h, w, side, side)
    ]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("config", [HF_NEXT, HF_OV, HD])
def test_pixels_and_counts_agree_for_every_shape(config):
    """What `prepare_views` and `arrange` make of a picture has the views and the tokens that the span says."""
    layout, P = dataclasses.replace(config.layout, max_tiles=1 if config.layout.max_tiles else 0), 3
    vision = VisionConfig(image_size=6, patch_size=2)
    config = ModelConfig(vision=vision, image=ImageConfig(6, "squash"), layout=layout)
    for width, height in [(1, 5000), (5000, 1), (1, 1), (7, 6), (50, 20), (20, 50), (64, 63), (300, 1)]:
        pixels_NCHW, span = prepare_views(Image.new("RGB", (width, height)), config)
        assert pixels_NCHW.shape == (span.views, 3, 6, 6)
        x_NPD = torch.randn(span.views, P * P, 4)
        assert arrange(x_NPD, span, layout, torch.zeros(4)).shape == (span.tokens, 4), (width, height)


@pytest.mark.parametrize("newline", ["no_token", "one_token", "frame", "grid"])
def test_where_the_newlines_of_a_clip_go(newline):
    """Against the places written out: two frames of four patches, each a row of its own number, newline is -1."""
    layout = LayoutConfig(merge="unpad", video_newline=newline, video_stride=1)
    config = dataclasses.replace(ModelConfig(), vision=VisionConfig(image_size=28), layout=layout)
    span = clip_span(config, 2)
    x_NPD = torch.arange(8.0).view(2, 4, 1)
    expected = {
        "no_token": [0, 1, 2, 3, 4, 5, 6, 7],
        "one_token": [0, 1, 2, 3, 4, 5, 6, 7, -1],
        "frame": [0, 1, 2, 3, -1, 4, 5, 6, 7, -1],
        "grid": [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1],
    }[newline]
    assert arrange(x_NPD, span, layout, torch.tensor([-1.0])).squeeze(1).tolist() == expected
    assert span.tokens == len(expected)


def test_how_frames_are_pooled():
    """Against loops: averages and maxima of 2 x 2 patches, what is left over at the edge dropped; bilinear keeps it."""
    x_NPC = torch.randn(2, 25, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    map_NHWC = x_NPC.view(2, 5, 5, 3)
    for kind, reduce in (("average", torch.mean), ("max", torch.amax)):
        found = pool(x_NPC, LayoutConfig(video_pool=kind))
        expected = [reduce(map_NHWC[:, r : r + 2, c : c + 2], (1, 2)) for r in (0, 2) for c in (0, 2)]
        torch.testing.assert_close(found, torch.stack(expected, 1))
    found = pool(x_NPC, LayoutConfig(video_pool="bilinear"))  # 3 of 5: centres at 1/3, 2 and 11/3
    row = torch.tensor([[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found, torch.einsum("ah,bw,nhwc->nabc", row, row, map_NHWC).flatten(1, 2))


@pytest.mark.parametrize("first", [True, False])
def test_whether_clips_are_pooled_before_the_projector(first):
    """The two do not commute; pictures of the same pass are pooled neither way."""
    layout = LayoutConfig(pool_first=first)
    decoder = DecoderConfig(50, 16, 16, 1, 2, 2, 8)
    config = ModelConfig(VisionConfig(16, 16, 2, 2, 8, 2), decoder=decoder, image=ImageConfig(8), layout=layout)
    model = LLaVAModel(config)
    model.init_weights(0)
    pixels_NCHW = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        clip_TD, picture_TD = model.see(pixels_NCHW, [clip_span(config, 2), image_span(config, 9, 9)])
        features_NPC = model.vision(pixels_NCHW)
        before_NPD = model.projector(pool(features_NPC[:2], layout))
        behind_NPD = pool(model.projector(features_NPC[:2]), layout)
        torch.testing.assert_close(clip_TD, (before_NPD if first else behind_NPD).flatten(0, 1))
        torch.testing.assert_close(picture_TD, model.projector(features_NPC[2]))
    assert (before_NPD - behind_NPD).abs().max() > 1e-6 and len(clip_TD) == 8 and len(picture_TD) == 16
