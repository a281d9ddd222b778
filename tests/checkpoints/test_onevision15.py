"""OneVision-1.5: RICE tower, merger and Qwen3, against transformers' MLCD, the facts in float64, and the golden files.

Letters: N views, P patches, T tokens, D width, H heads, K head size, V vocabulary.
"""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import REAL
from PIL import Image
from safetensors.torch import load_file, save_file

from minillava import LLaVA
from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.errors import UserError
from minillava.generation.engine import Request
from minillava.llava import LLaVAModel
from minillava.media.image import prepare_clip, prepare_views
from minillava.media.visual import media
from minillava.processor import user_message
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.visual_tokens import Span, image_span, patch_positions
from minillava.vit import VisionTower

RICE = VisionConfig(
    32, 48, 3, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,)
)  # heads of 8: two frequencies an axis


def positions(rows, columns, frames=1):
    """Frame, row and column of each patch, block by block."""
    return patch_positions(Span(0, frames * rows * columns, height=rows, width=columns, times=(*range(frames),)), 2)


def places(rows, columns):
    return positions(rows, columns)[:, 1:]


def look(ours, pixels_PCSS, grids):
    """Through the tower: (frames, rows, columns) of each picture; frames do not see each other."""
    windows = [h * w for f, h, w in grids for _ in range(f)]
    return ours(pixels_PCSS, torch.cat([positions(h, w, f) for f, h, w in grids]), windows)


def cut(pixels_CHW):
    """Patches [P, 3, 14, 14] of a picture, in the order that the tower takes."""
    rows, columns = pixels_CHW.shape[1] // 14, pixels_CHW.shape[2] // 14
    return torch.stack([pixels_CHW[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r, c in places(rows, columns)])


def tower(config=RICE, seed=0):
    made = VisionTower(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight")))
    return made


def test_patches_come_in_blocks():
    where = places(4, 6).tolist()
    assert where[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]] and where[12:14] == [[2, 0], [2, 1]]
    assert sorted(where) == [[r, c] for r in range(4) for c in range(6)]


def test_the_trunk_is_mlcd_up_to_order():
    """transformers' MLCD (RICE's origin) goes row by row, and knows one size of square: 4 x 4 patches."""
    transformers = pytest.importorskip("transformers")
    ours = tower().double()
    config = transformers.MLCDVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        num_key_value_groups=1, hidden_act="gelu",
    )  # fmt: skip
    theirs = transformers.MLCDVisionModel(config).eval().double()
    names = dict(class_embedding="embeddings.class_embedding", class_angles="class_pos_emb", pre_norm="pre_layrnorm")
    state = {}
    for name, p in ours.state_dict().items():
        name = name.replace("patch_embedding", "embeddings.patch_embedding").replace("blocks", "encoder.layers")
        name = name.replace("norm1", "layer_norm1").replace("norm2", "layer_norm2").replace(".attn.", ".self_attn.")
        for p_ in "qkv":
            name = name.replace(f"attn.{p_}.", f"attn.{p_}_proj.")
        name = name.replace("attn.out.", "attn.out_proj.")
        head = name.split(".")[0]
        state[names.get(head, head) + name.removeprefix(head)] = p
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    missing, extra = theirs.load_state_dict({prefix + k: v for k, v in state.items()}, strict=False)
    assert not extra and all("post_layernorm" in k or "position_ids" in k for k in missing)
    pixels_NCHW = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        states = theirs(pixels_NCHW, output_hidden_states=True).hidden_states
        for layer in range(4):
            config = dataclasses.replace(RICE, select_layers=(layer,))
            ours.config = config
            for expected_TD, pixels_CHW in zip(states[layer], pixels_NCHW):
                found_PD = look(ours, cut(pixels_CHW), [(1, 4, 4)])[:, 0]
                order = places(4, 4) @ torch.tensor([4, 1])
                torch.testing.assert_close(
                    found_PD, expected_TD[1:][order], rtol=1e-5, atol=1e-5
                )  # MLCD's rotation is float32


def test_frames_do_not_see_each_other():
    """Two pictures and a clip of two frames together are what each is alone; the slip of the reference is its own."""
    ours = tower().double()
    grids = [(1, 2, 4), (2, 4, 2), (1, 2, 2)]
    pixels = [torch.randn(f * h * w, 3, 14, 14, dtype=torch.float64) for f, h, w in grids]
    with torch.no_grad():
        together = look(ours, torch.cat(pixels), grids).squeeze(1)
        frames = [*pixels[:1], *pixels[1].chunk(2), *pixels[2:]]
        sizes = [(2, 4), (4, 2), (4, 2), (2, 2)]
        alone = [look(ours, p, [(1, h, w)]).squeeze(1) for p, (h, w) in zip(frames, sizes)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)

        ours.config = dataclasses.replace(RICE, strip_slip=True)
        slipped = look(ours, torch.cat(pixels), grids).squeeze(1)
    assert torch.equal(slipped[:8], together[:8])  # the first is right
    # Of frame 1 the file takes the class token and all patches but the last; of frame 2 it begins with frame 1's last.
    assert torch.equal(slipped[9:16], together[8:15]) and torch.equal(slipped[16], together[15])
    assert not any(torch.allclose(slipped[8], row) for row in together)


# ---- against the facts, in float64 ----

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip
DENSE = DecoderConfig(0, 32, 48, 2, 4, 2, 16, rope_theta=5e6, norm_eps=1e-6, max_positions=4096, qk_norm=True,
                      model_type="qwen3")  # fmt: skip
MOE = dataclasses.replace(DENSE, num_experts=6, experts_per_token=2, expert_size=24, model_type="qwen3_moe")


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request, tmp_path_factory):
    """A tiny OneVision-1.5, saved in its own layout and loaded from there."""
    folder = tmp_path_factory.mktemp(request.param)
    train_small_tokenizer(["What is unusual here? a red circle and a blue square, system user assistant\n"] * 3, folder,
                          SPECIALS)  # fmt: skip
    tokenizer = load_tokenizer(folder)
    decoder = dataclasses.replace(DENSE if request.param == "dense" else MOE, vocab_size=tokenizer.vocab_size)
    chat = ChatConfig("onevision_1_5", "", False, False, "<|image_pad|>", 5, "<|video_pad|>", 6, None, (2,))
    config = ModelConfig(
        RICE, ProjectorConfig(merge=2), decoder, ImageConfig(14, "native", min_pixels=3136, max_pixels=20000), chat=chat
    )
    network = LLaVAModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight")))
    LLaVA(network, tokenizer).save_pretrained(folder / "saved")
    return LLaVA.from_pretrained(folder / "saved", dtype="float32"), folder / "saved"


def exact(folder, ids, pictures, slip=False):
    """Logits [T, V] from the saved files alone: `pictures` are lists of frames, pixels [3, H, W] each."""
    w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rms_norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def turn(x, angles_TK):  # x [T, H, K]
        half = x.shape[-1] // 2
        cos, sin = angles_TK.cos()[:, None], angles_TK.sin()[:, None]
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attend(q, k, v, mask):  # [T, H, K]
        scores = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5 + mask
        return torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1)

    vision, text = config["vision_config"], config["text_config"]
    heads, size = vision["num_heads"], vision["embed_dim"] // vision["num_heads"]
    segments = []  # (embedded frame with its class token, angles)
    for frames in pictures:
        for pixels_CHW in frames:
            rows, columns = pixels_CHW.shape[1] // 14, pixels_CHW.shape[2] // 14
            order = [(2 * r + a, 2 * c + b) for r in range(rows // 2) for c in range(columns // 2)
                     for a in (0, 1) for b in (0, 1)]  # fmt: skip
            patches = torch.stack(
                [pixels_CHW[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].flatten() for r, c in order]
            )
            x = patches.double() @ w["visual.patch_embed.proj.weight"].flatten(1).T
            x = torch.cat([w["visual.class_embedding"][None], x])
            inverse = 1 / 10000 ** (torch.arange(0, size // 2, 2).float() / (size // 2))
            angles = torch.tensor(order).float()[:, :, None] * inverse
            angles = torch.cat([w["visual.class_pos_emb"], angles.flatten(1).double()])
            segments.append((layer_norm(x, "visual.pre_layernorm"), angles.repeat(1, 2)))
    out = []
    for x, angles in segments:
        for n in range(vision["depth"]):
            b = f"visual.blocks.{n}"
            q, k, v = linear(layer_norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(1, (3, heads, size)).unbind(1)
            x = x + linear(attend(turn(q, angles), turn(k, angles), v, 0), f"{b}.attn.proj")
            x = x + linear(F.gelu(linear(layer_norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        out.append(x)
    packed, count = torch.cat(out), sum(len(x) - 1 for x in out)
    features = packed[1 : count + 1] if slip else torch.cat([x[1:] for x in out])
    x = layer_norm(features, "visual.merger.ln_q").view(count // 4, -1)
    visual = linear(F.gelu(linear(x, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    x = w["model.embed_tokens.weight"][ids]
    x[torch.isin(ids, torch.tensor([5, 6]))] = visual
    T, K, heads, groups = len(x), text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    inverse = 1 / text["rope_theta"] ** (torch.arange(0, K, 2).float() / K)
    angles = torch.outer(torch.arange(T).float(), inverse).repeat(1, 2).double()
    mask = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)
    for n in range(text["num_hidden_layers"]):
        b = f"model.layers.{n}"
        y = rms_norm(x, f"{b}.input_layernorm")
        q, k, v = (linear(y, f"{b}.self_attn.{p}_proj").unflatten(1, (-1, K)) for p in "qkv")
        q, k = turn(rms_norm(q, f"{b}.self_attn.q_norm"), angles), turn(rms_norm(k, f"{b}.self_attn.k_norm"), angles)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        x = x + linear(attend(q, k, v, mask), f"{b}.self_attn.o_proj")
        y = rms_norm(x, f"{b}.post_attention_layernorm")

        def swiglu(y, at):
            return linear(F.silu(linear(y, f"{at}.gate_proj")) * linear(y, f"{at}.up_proj"), f"{at}.down_proj")

        if text.get("num_experts"):
            chances = linear(y, f"{b}.mlp.gate").softmax(-1)
            top, which = chances.topk(text["num_experts_per_tok"])
            top = top / top.sum(-1, keepdim=True)
            mixed = [sum(g * swiglu(y[t : t + 1], f"{b}.mlp.experts.{e}") for g, e in zip(top[t], which[t].tolist()))
                     for t in range(T)]  # fmt: skip
            x = x + torch.cat(mixed)
        else:
            x = x + swiglu(y, f"{b}.mlp")
    return linear(rms_norm(x, "model.norm"), "lm_head")


def drawn(width, height, seed=0):
    pixels_HWC = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels_HWC.to(torch.uint8).numpy())


CASES = {
    "one": ([(90, 60)], []),
    "two of unequal sizes": ([(60, 130), (57, 84)], []),
    "video of three frames": ([], [(70, 84)] * 3),
    "picture and video": ([(56, 84)], [(84, 56)] * 2),
}


@pytest.mark.parametrize("case", list(CASES))
def test_logits_and_tokens_equal_the_facts(model, case):
    """The logits to float32's rounding, and 16 greedy tokens; the prompt is the template's."""
    ours, folder = model
    pictures = [drawn(*size, seed=i) for i, size in enumerate(CASES[case][0])]
    frames = [drawn(*size, seed=9 + i) for i, size in enumerate(CASES[case][1])]
    question = "What is unusual here?"
    given = media(pictures, [frames] if frames else [])
    request = Request([user_message(ours.config.chat, question, given)], given, max_new_tokens=16)
    row = ours.engine.row(0, request, {})
    seen = [prepare_views(picture, ours.config, len(pictures) > 1) for picture in pictures]
    clip = [prepare_clip(frames, ours.config)] if frames else []
    ids = torch.tensor(row.ids)
    whole = [[_whole(pixels, span)] for pixels, span in seen] + [
        [_whole(part, span) for part in pixels.chunk(len(frames))] for pixels, span in clip
    ]
    assert [p.span.tokens for p in row.pictures] == [span.tokens for _, span in seen + clip]
    expected_TV = exact(folder, ids, whole)
    with torch.no_grad():
        pixels, spans = torch.cat([p for p, _ in seen + clip]), [span for _, span in seen + clip]
        found_TV = ours.model(ids, pixels, spans=spans)
    scale = expected_TV.abs().max()
    assert (found_TV - expected_TV).abs().max() < 2e-5 * scale
    (answer,) = ours.engine.generate([request])
    for _ in range(16):
        ids = torch.cat([ids, exact(folder, ids, whole)[-1].argmax()[None]])
    assert answer.token_ids == ids[len(row.ids) :].tolist()
    text = ours.tokenizer.decode([i for i in row.ids if i not in (5, 6)], skip_special=False)
    pads = ("<|vision_start|><|vision_end|>") * (len(pictures) + bool(frames))
    assert text == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{pads}What is unusual here?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def _whole(patches_PCSS, span):
    """The picture that these patches were cut from, [3, H, W]."""
    picture = torch.empty(3, 14 * span.height, 14 * span.width)
    for (r, c), patch in zip(places(span.height, span.width).tolist(), patches_PCSS):
        picture[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] = patch
    return picture


def test_the_switch_reproduces_the_slip_of_the_reference(model, tmp_path):
    """config.json's {"minillava": {"strip_slip": true}}; it goes where the checkpoint goes."""
    ours, folder = model
    shutil.copytree(folder, tmp_path / "slip")
    raw = json.loads((tmp_path / "slip/config.json").read_text())
    raw["minillava"]["strip_slip"] = True
    (tmp_path / "slip/config.json").write_text(json.dumps(raw))
    slipped = LLaVA.from_pretrained(tmp_path / "slip", dtype="float32")
    pictures = [drawn(60, 130), drawn(57, 84, 1)]
    given = media(pictures)
    row = slipped.engine.row(0, Request([user_message(ours.config.chat, "What?", given)], given), {})
    seen = [prepare_views(picture, ours.config, True) for picture in pictures]
    pixels, spans = torch.cat([p for p, _ in seen]), [span for _, span in seen]
    ids, whole = torch.tensor(row.ids), [[_whole(*one)] for one in seen]
    expected_TV = exact(folder, ids, whole, slip=True)
    with torch.no_grad():
        found_TV, right_TV = (m.model(ids, pixels, spans=spans) for m in (slipped, ours))
    assert (found_TV - expected_TV).abs().max() < 2e-5 * expected_TV.abs().max() < (found_TV - right_TV).abs().max()
    slipped.save_pretrained(tmp_path / "again")
    assert LLaVA.from_pretrained(tmp_path / "again").config.vision.strip_slip


def test_saved_in_both_trees_and_loaded_to_the_bit(model, tmp_path):
    ours, folder = model
    state = load_file(folder / "model.safetensors")
    assert state["visual.blocks.0.attn.qkv.weight"].shape == (96, 32) and "visual.class_pos_emb" in state
    assert torch.equal(state["visual.blocks.1.attn.qkv.bias"][32:64], ours.model.vision.blocks[1].attn.k.bias)
    shutil.copytree(folder, tmp_path / "tree")
    moved = {
        k.replace("visual.", "model.visual.") if k.startswith("visual.") else
        k.replace("model.", "model.language_model.", 1): v for k, v in state.items()
    }  # fmt: skip
    save_file(moved, tmp_path / "tree/model.safetensors", metadata={"format": "pt"})
    back = LLaVA.from_pretrained(tmp_path / "tree", dtype="float32").model.state_dict()
    assert all(torch.equal(t, back[name]) for name, t in ours.model.state_dict().items())
    del moved["model.visual.blocks.0.attn.qkv.weight"]
    save_file(moved, tmp_path / "tree/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: .*blocks.0.attn.k.weight"):
        LLaVA.from_pretrained(tmp_path / "tree")


# ---- sizes ----

COUNTS = [  # reference/models.md, table C3: size -> grid within 2,560,000 pixels; tokens there and for other bounds
    ((20, 20), (4, 4), 4, 4, 4, 4),
    ((336, 336), (24, 24), 144, 144, 144, 144),
    ((1000, 500), (36, 72), 648, 648, 648, 648),
    ((640, 480), (34, 46), 391, 391, 391, 391),
    ((1920, 1080), (78, 138), 2691, 2691, 1222, 2691),
    ((1600, 1600), (114, 114), 3249, 3249, 1225, 3249),
    ((3000, 2000), (92, 138), 3174, 4056, 1247, 7597),
    ((4000, 3000), (98, 130), 3185, 4070, 1230, 15301),
    ((28, 5000), (358, 2), 179, 179, 179, 179),
]


def native(max_pixels=2_560_000):
    image = ImageConfig(14, "native", max_pixels=max_pixels)
    return ModelConfig(VisionConfig(image_size=14, rotary=True), ProjectorConfig(merge=2), DENSE, image)


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: "x".join(map(str, case[0])))
def test_published_counts(case):
    size, grid, *tokens = case
    span = image_span(native(), *size)
    assert (span.height, span.width) == grid
    limits = (2_560_000, 3_240_000, 1_003_520, 12_845_056)
    assert [image_span(native(limit), *size).tokens for limit in limits] == tokens


def test_sizes_and_pixels_equal_transformers():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(15, 4000, (5000, 2), generator=generator).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        span = image_span(native(), width, height)
        assert smart_resize(height, width, 28, 3136, 2_560_000) == (14 * span.height, 14 * span.width), (width, height)
    config = native(40_000)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=1, min_pixels=3136, max_pixels=40_000,
        image_mean=list(config.image.mean), image_std=list(config.image.std),
    )  # fmt: skip
    for size in ((90, 60), (31, 200), (500, 333), (20, 20)):
        image = drawn(*size)
        pixels, span = prepare_views(image, config)
        out = theirs(images=[image], return_tensors="pt")
        assert out["image_grid_thw"].tolist() == [[1, span.height, span.width]]
        assert torch.equal(pixels.flatten(1), out["pixel_values"])


def test_strips_are_refused():
    with pytest.raises(UserError, match="21 x 5000 pixels: one side is over 200 times the other"):
        image_span(native(), 21, 5000)


# ---- what the reference code answered ----

GOLDEN = REAL / "onevision-1.5-golden"


@pytest.mark.skipif(not (GOLDEN / "exam.json").is_file(), reason="real/onevision-1.5-golden is not there")
def test_golden_files():
    """Made with the reference code: ids, first logits to 1e-4, every greedy token; from messages the same ids."""
    ours = LLaVA.from_pretrained(GOLDEN, dtype="float32")
    for case in json.loads((GOLDEN / "exam.json").read_text()):
        images = [REAL / "llava" / name for name in case["images"]]
        request = Request(raw=case["prompt"], media=media(images), max_new_tokens=len(case["greedy"]))
        row = ours.engine.row(0, request, {})
        assert row.ids == case["prompt_ids_expanded"]
        assert [[*p.span.frames] for p in row.pictures] == case["grid_thw"]
        pixels, spans = torch.cat([p.pixels_NCHW for p in row.pictures]), [p.span for p in row.pictures]
        with torch.no_grad():
            logits_V = ours.model(torch.tensor(row.ids), pixels, spans=spans, last_only=True)[0]
        assert (logits_V - torch.tensor(case["first_logits"])).abs().max() < 1e-4
        (answer,) = ours.engine.generate([request])
        assert answer.token_ids == case["greedy"]
        question = case["prompt"].split("<|vision_end|>")[1].split("<|im_end|>")[0]
        asked = Request([Message("user", f"<|image_pad|>\n{question}")], media(images))
        assert ours.engine.row(0, asked, {}).ids == row.ids
