"""Attention over pictures: the weights are transformers', and lie where the patches are."""

import dataclasses

import numpy as np
import onevision
import pytest
import torch
from helpers import tiny_pair
from PIL import Image
from safetensors.torch import load_file

from minillava.chat.messages import Message
from minillava.config import ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.errors import UserError
from minillava.generation import look
from minillava.generation.look import Look, WatchingCache, _maps, attention_over_pictures, draw
from minillava.media.image import prepare_views
from minillava.media.visual import Visual, media
from minillava.processor import user_message
from minillava.projector import arrange

ANSWER = "the circle is red, not blue"


@pytest.fixture(scope="module", params=["qwen2", "mistral", "llama"])
def pair(request, tiny_tokenizer, tmp_path_factory):
    return tiny_pair(request.param, tiny_tokenizer, tmp_path_factory.mktemp("look"))


@pytest.mark.parametrize("layer,heads", [(None, "mean"), (0, "max"), (-1, "mean")])
def test_weights_are_transformers_own(pair, layer, heads):
    """Of "red", which is several tokens, on two pictures."""
    theirs, engine = pair
    given = media([Image.effect_noise((40, 30), 50 + i).convert("RGB") for i in range(2)])
    messages = [user_message(engine.config.chat, "what?", given), Message("assistant", ANSWER)]
    at = ANSWER.index("red")
    found = attention_over_pictures(engine, messages, given, (at, at + 3), layer, heads)

    example = engine.processor(messages, given)
    ids, pixels = torch.tensor(example.ids), torch.cat([visual.pixels_NCHW for visual in example.visuals])
    with torch.no_grad():
        out = theirs(input_ids=ids[None], pixel_values=pixels, output_attentions=True)
    texts = [engine.tokenizer.decode(example.ids[:n]) for n in range(len(ids) + 1)]
    start = texts[-1].rindex(ANSWER) + at
    inside = [n for n in range(len(ids)) if len(texts[n]) < start + 3 and len(texts[n + 1]) > start]
    chosen = out.attentions if layer is None else [out.attentions[layer]]
    weights = [a[0].mean(0) if heads == "mean" else a[0].amax(0) for a in chosen]
    wanted_S = torch.stack(weights).mean(0)[[n - 1 for n in inside]].mean(0)
    wanted_T = wanted_S[ids == engine.config.chat.image_token_id]
    assert len(found) == 2 and (torch.cat([look.weights_T for look in found]) - wanted_T).abs().max() < 1e-5
    assert all(torch.equal(look.maps[0][0].flatten(), look.weights_T) for look in found)


def test_of_a_long_answer_a_number_a_token_and_layer_is_kept(pair, monkeypatch):
    engine, made = pair[1], []
    monkeypatch.setattr(look, "WatchingCache", lambda *args: made.append(WatchingCache(*args)) or made[-1])
    given = media([Image.effect_noise((40, 30), 50).convert("RGB")])
    messages = [user_message(engine.config.chat, "what?", given), Message("assistant", ANSWER * 3)]
    attention_over_pictures(engine, messages, given, (0, len(ANSWER) * 3))
    (cache,) = made
    assert sum(w.untyped_storage().nbytes() for w in cache.weights) == 4 * cache.capacity * len(cache.weights)


# ---- towers that take pictures of any size ----

RICE = VisionConfig(32, 48, 3, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,))
NATIVE = {"OneVision-1.5": {"vision": RICE, "layout": LayoutConfig()}, "OneVision-2": {}}


@pytest.fixture(scope="module", params=list(NATIVE))
def native(request, tmp_path_factory):
    """A tiny model and its folder."""
    folder = tmp_path_factory.mktemp("native")
    return onevision.make_model(folder, **NATIVE[request.param]), folder / "saved"


@pytest.mark.parametrize("layer,heads", [(None, "mean"), (0, "max")])
def test_weights_of_native_sizes_are_those_of_transformers_qwen3(native, layer, heads):
    """In float64, on the visual tokens: what tower and merger make of the pixels has tests of its own."""
    transformers = pytest.importorskip("transformers")
    ours, folder = native
    engine, c = ours.engine, ours.config.decoder
    given = media([onevision.drawn(90, 60), onevision.drawn(57, 130, seed=1)])
    messages = [user_message(ours.config.chat, "What happens?", given), Message("assistant", "seconds, user")]
    found = attention_over_pictures(engine, messages, given, (0, 7), layer, heads)

    example = engine.processor(messages, given)
    engine.see(example.visuals)
    ids = torch.tensor(example.ids)
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, rms_norm_eps=c.norm_eps, rope_parameters={"rope_theta": c.rope_theta,
        "rope_type": "default"}, max_position_embeddings=c.max_positions, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval().double()
    saved = {name.replace("language_model.", ""): p for name, p in load_file(folder / "model.safetensors").items()}
    theirs.load_state_dict({name: saved[name] for name in theirs.state_dict()})
    x_TD = theirs.model.embed_tokens.weight.detach()[ids]
    is_picture_T = torch.isin(ids, torch.tensor(list(ours.config.chat.markers.values())))
    x_TD[is_picture_T] = torch.cat([visual.visual_TD for visual in example.visuals]).double()
    with torch.no_grad():
        out = theirs(inputs_embeds=x_TD[None], output_attentions=True)
    texts = [engine.tokenizer.decode(example.ids[:n]) for n in range(len(ids) + 1)]
    start = len(texts[len(engine.processor(messages[:1], given, generate=True).ids)])
    inside = [n for n in range(len(ids)) if len(texts[n]) < start + 7 and len(texts[n + 1]) > start]
    chosen = out.attentions if layer is None else [out.attentions[layer]]
    weights = [a[0].mean(0) if heads == "mean" else a[0].amax(0) for a in chosen]
    wanted_S = torch.stack(weights).mean(0)[[n - 1 for n in inside]].mean(0)
    assert inside and (torch.cat([look.weights_T for look in found]) - wanted_S[is_picture_T]).abs().max() < 1e-5
    shapes = [tuple(look.maps[0][0].shape) for look in found]
    assert shapes == [(v.span.height // 2, v.span.width // 2) for v in example.visuals] and len({*shapes}) == 2


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64)])
def test_native_maps_lie_over_what_the_patches_show(size):
    """As below: a token's four patches have the colours of the place that the map gives it."""
    config = onevision.config()
    across, down = np.meshgrid(*((np.arange(side) + 0.5) / side for side in size))
    picture = Image.fromarray((255 * np.stack([across, down, across], -1)).round().astype(np.uint8))
    pixels_PCSS, span = prepare_views(picture, config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image.mean, config.image.std))
    colours_TC = (pixels_PCSS * std + mean).mean((2, 3)).unflatten(0, (-1, 4)).mean(1)
    visual = Visual(pixels_PCSS, span)
    ((x_HW, box),), ((y_HW, _),) = (_maps(colours_TC[:, c], visual, config, size, False) for c in range(2))
    rows, columns = x_HW.shape
    assert box == (0, 0, 1, 1) and rows * columns == span.tokens
    assert (x_HW - ((torch.arange(columns) + 0.5) / columns)[None]).abs().max() < 0.3 / columns
    assert (y_HW - ((torch.arange(rows) + 0.5) / rows)[:, None]).abs().max() < 0.3 / rows


# ---- drawn ----


def test_the_brightest_place_is_the_one_that_is_attended_to():
    """In a map of the whole picture and in one that reaches beyond it, on the larger of two pictures."""
    weights_HW = torch.full((4, 4), 0.01)
    weights_HW[1, 2] = 0.2  # x from 0.5 to 0.75, y from 0.25 to 0.5
    padded_HW = torch.zeros(4, 4)
    padded_HW[1, 0] = 0.1  # above a picture half as high as wide is padding: this patch is x 0 to 0.25, y 0 to 0.5
    looks = [
        Look(weights_HW.flatten(), [(weights_HW, (0.0, 0.0, 1.0, 1.0))], Image.new("RGB", (80, 40))),
        Look(padded_HW.flatten(), [(padded_HW, (0.0, -0.5, 1.0, 1.5))], Image.new("RGB", (80, 40))),
    ]
    first, second = (np.asarray(picture, int).sum(-1) for picture in draw(looks))
    assert first.shape == second.shape == (40, 80)
    assert np.unravel_index(first.argmax(), first.shape)[0] in range(10, 20) and first[15, 50] == first.max()
    assert first[35, 10] < first.max() / 2 and second[10, 5] == second.max() and second[35, 70] == 0
    # Each patch of the second covers twice as much of its picture, and has half the weight: a quarter of the light.
    assert second.max() == pytest.approx(first.max() / 2, rel=0.06)  # between patches the light fades


def test_what_cannot_be_looked_at_is_refused(pair):
    _, engine = pair
    given = media([Image.new("RGB", (8, 8))])
    asked = [user_message(engine.config.chat, "what?", given), Message("assistant", "red")]
    for messages, shown, word, more, error in (
        (asked, given, (3, 9), {}, "no characters 3 to 9"),
        (asked, given, (0, 1), {"layer": 2}, "layer 2 is not there; the decoder has 2"),
        (asked[:1], given, (0, 1), {}, "has to be the model's answer"),
        ([Message("user", "what?"), asked[1]], [], (0, 1), {}, "no picture"),
    ):
        with pytest.raises(UserError, match=error):
            attention_over_pictures(engine, messages, shown, word, **more)


GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1))
LAYOUTS = {
    "unpad": dict(grids=GRIDS, merge="unpad"),
    "shrunk": dict(grids=GRIDS, merge="unpad", max_tiles=1),
    "flat": dict(grids=GRIDS),
    "spatial": dict(grids=GRIDS, merge="spatial"),
    "one": {},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64)])
def test_maps_lie_over_what_the_patches_show(layout, size):
    """A picture whose colours say where one is: each patch's mean colour, arranged as its visual tokens are, agrees
    with the place on the picture that the map gives this token."""
    fit = "squash" if layout != "one" else "pad"
    config = ModelConfig(VisionConfig(image_size=32, patch_size=4), image=ImageConfig(32, fit=fit))
    config = dataclasses.replace(config, layout=LayoutConfig(**LAYOUTS[layout]))
    width, height = size
    picture = Image.new("RGB", size)
    for x in range(width):
        for y in range(height):
            picture.putpixel((x, y), (round(255 * (x + 0.5) / width), round(255 * (y + 0.5) / height), 255))
    pixels_NCHW, span = prepare_views(picture, config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image.mean, config.image.std))
    patches_NPC = torch.nn.functional.avg_pool2d(pixels_NCHW * std + mean, 4).flatten(2).transpose(1, 2)
    colours_TC = arrange(patches_NPC, span, config.layout, torch.full((3,), float("nan")))
    visual = Visual(pixels_NCHW, span)
    assert len(colours_TC) == span.tokens
    channels = [_maps(colours_TC[:, c], visual, config, size, False) for c in range(3)]
    for (x_HW, box), (y_HW, _), (inside_HW, _) in zip(*channels):
        rows, columns = x_HW.shape
        left, top, right, bottom = box
        wanted_x = left + (right - left) * (torch.arange(columns) + 0.5) / columns
        wanted_y = top + (bottom - top) * (torch.arange(rows) + 0.5) / rows
        shown = inside_HW > 0.98  # padding has another colour
        assert shown.float().mean() > 0.2
        off_x, off_y = (x_HW - wanted_x[None])[shown].abs(), (y_HW - wanted_y[:, None])[shown].abs()
        assert off_x.max() < 1 / columns and off_y.max() < 1 / rows, (box, off_x.max(), off_y.max())
