"""LLaVA-NeXT, NeXT-Video and OneVision: the same pixels, ids, logits and answers as transformers; files in and out.

Tiny random models are built by transformers and saved as it saves. Its processors of clips want torchvision, so prompts
are expanded here with the counts of its processors, and frames go through its image processors on PIL.
Letters: T tokens, N views, V vocabulary.
"""

import functools
import json
import shutil
import types
from dataclasses import replace

import pytest
import torch
from helpers import REAL, load_model, read_config
from PIL import Image
from safetensors.torch import load_file, save_file

from minillava import decoder
from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.names import rename
from minillava.checkpoints.save import save_model
from minillava.cli import run_command
from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.generation.engine import Engine, Request
from minillava.generation.look import attention_over_pictures
from minillava.media.visual import media
from minillava.processor import user_message
from minillava.visual_tokens import clip_span

transformers = pytest.importorskip("transformers")

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil  # noqa: E402
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (  # noqa: E402
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

QUESTION = "What is in these?"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SHAPES = {  # pinpoints in tiles, (rows, columns) as transformers reads them
    "next": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
    "hd": [(i, j) for i in range(1, 7) for j in range(1, 7) if i * j <= 6],
    "all": [(i, j) for i in range(1, 4) for j in range(1, 4)],
}
# name: (class, decoder, tied head, pinpoints, tile side, module tree of the file)
CASES = {
    "next-llama": ("LlavaNext", "llama", False, "next", 56, "old"),
    "next-mistral": ("LlavaNext", "mistral", False, "next", 56, "new"),
    "next-qwen2": ("LlavaNext", "qwen2", True, "next", 56, "old"),
    "hd-llama": ("LlavaNext", "llama", False, "hd", 28, "new"),
    "video-llama": ("LlavaNextVideo", "llama", False, "next", 56, "new"),
    "onevision": ("LlavaOnevision", "qwen2", False, "all", 44, "new"),  # three patches a side, two pixels left over
    "onevision-tied": ("LlavaOnevision", "qwen2", True, "all", 44, "old"),
}
SIZES = [(90, 40), (31, 97), (56, 56), (200, 210), (300, 20)]


def picture(width, height):
    generator = torch.Generator().manual_seed(width * 1000 + height)
    pixels_HWC = torch.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels_HWC.numpy()).resize((width, height), Image.Resampling.BILINEAR)


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<image>", "<video>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([QUESTION + "USER: ASSISTANT:"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>", padding_side="left"
    )


class Foreign:
    """transformers' model and image processors, saved in `folder`."""

    def __init__(self, name, folder):
        self.kind, text, tied, shapes, S, tree = CASES[name]
        self.size, self.folder, self.tokenizer = S, folder, make_tokenizer()
        self.onevision = self.kind == "LlavaOnevision"
        grids = [[rows * S, columns * S] for rows, columns in SHAPES[shapes]]
        ids = {f"{t}_token_index": self.tokenizer.convert_tokens_to_ids(f"<{t}>") for t in ("image", "video")}
        ids = ids if self.kind != "LlavaNext" else {"image_token_index": ids["image_token_index"]}
        common = dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(self.tokenizer) + 7, max_position_embeddings=2048, tie_word_embeddings=tied,
            eos_token_id=0, bos_token_id=None, pad_token_id=3,
        )  # fmt: skip
        common |= {"sliding_window": None} if text == "mistral" else {}
        tower = dict(
            hidden_size=144, intermediate_size=100, num_hidden_layers=3, num_attention_heads=2, image_size=S,
            patch_size=14,
        )  # fmt: skip
        vision = SiglipVisionConfig(**tower, vision_use_head=False) if self.onevision else CLIPVisionConfig(**tower)
        more = {"vision_aspect_ratio": "anyres_max_2"} if self.onevision else {}
        more |= {"vision_feature_layer": [-3, -1]} if name == "next-llama" else {}
        config = getattr(transformers, f"{self.kind}Config")(
            vision_config=vision,
            text_config=TEXTS[text](**common),
            image_grid_pinpoints=grids,
            tie_word_embeddings=tied,
            **ids,
            **more,
        )
        torch.manual_seed(len(name))
        self.model_class = getattr(transformers, f"{self.kind}ForConditionalGeneration")
        self.model = self.model_class(config).eval()
        with torch.no_grad():
            for key, p in self.model.named_parameters():
                if p.ndim > 1:  # ten times the usual spread: answers that depend on the whole prompt
                    p.normal_(0, 0.2)
                elif "norm" not in key:
                    p.normal_(0, 0.1)
        square = {"height": S, "width": S}
        clip = dict(size={"shortest_edge": S}, crop_size=square)
        half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
        if self.onevision:
            self.images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=grids, **half)
            self.frames = SiglipImageProcessorPil(size=square)
        else:
            self.images = LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **clip)
            self.frames = CLIPImageProcessorPil(**clip)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        if tree == "new":
            to_new_tree(folder)
        self.engine = Engine(load_model(folder, torch.float32), load_tokenizer(folder))

    def counts(self, width, height, several):
        """Visual tokens of a picture by the rule of transformers' processor."""
        P = self.size // 14
        if self.onevision and several:
            return P * P + 1
        processor = types.SimpleNamespace(
            image_processor=self.images, num_image_tokens=P * P, vision_aspect_ratio="anyres_max_2", patch_size=14,
            num_additional_image_tokens=1,
        )  # fmt: skip
        cls = getattr(transformers, f"{self.kind}Processor")
        processor._get_unpadded_features = types.MethodType(cls._get_unpadded_features, processor)
        found = cls._get_number_of_features(processor, height, width, self.size, self.size)
        return found if self.onevision else found - 1

    def inputs(self, images=(), frames=(), question=QUESTION):
        """What transformers' model is called with for one prompt."""
        text = "USER: " + "".join("<image>" * self.counts(*image.size, len(images) > 1) + "\n" for image in images)
        inputs = {}
        if frames:
            pooled = -(-self.size // 14 // 2) if self.onevision else self.size // 14 // 2
            text += "<video>" * (len(frames) * pooled**2 + self.onevision) + "\n"
            pixels = self.frames(images=list(frames), return_tensors="pt")["pixel_values"]
            inputs["pixel_values_videos"] = pixels[None]
        if images:
            nested = [list(images)] if self.onevision else list(images)
            inputs |= dict(self.images(images=nested, return_tensors="pt"))
        inputs["input_ids"] = torch.tensor([self.tokenizer(text + question + " ASSISTANT:")["input_ids"]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def request(self, images=(), frames=(), **options):
        given = media(images, [frames] if frames else [])
        return Request([user_message(self.engine.config.chat, QUESTION, given)], given, **options)


def to_new_tree(folder):
    """Name the saved tensors after the module tree of transformers 4.52."""
    path = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        ours = rename(name, "hf", to_ours=True)
        assert ours is not None, name
        state[rename(ours, "hf_new", to_ours=False)] = tensor
    save_file(state, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=list(CASES))
def foreign(request, tmp_path_factory):
    return Foreign(request.param, tmp_path_factory.mktemp("hf"))


def logits(engine, row):
    pixels_NCHW, spans = torch.cat([p.pixels_NCHW for p in row.pictures]), [p.span for p in row.pictures]
    with torch.no_grad():
        return engine.model(torch.tensor(row.ids), images=pixels_NCHW, spans=spans)


def check(foreign, images=(), frames=(), answer=True):
    """Ids, pixels, logits, and the greedy answer of one prompt."""
    inputs, engine = foreign.inputs(images, frames), foreign.engine
    row = engine.row(0, foreign.request(images, frames), {})
    assert row.ids == inputs["input_ids"][0].tolist()
    stacks = list(inputs.get("pixel_values", ()))
    stacks += list(inputs.get("pixel_values_videos", ()))
    for picture, stack in zip(row.pictures, stacks, strict=True):
        assert torch.equal(picture.pixels_NCHW, stack[: picture.span.views])
        assert not stack[picture.span.views :].any()  # what fills up a batch
    with torch.no_grad():
        theirs_TV = foreign.model(**inputs).logits[0]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact_TV = foreign.model.double()(**wide).logits[0]
        foreign.model.float()
    # The root mean square: with weights this large one rounding grows a thousandfold, and where it falls is chance.
    ours, plain = ((x_TV - exact_TV).pow(2).mean().sqrt().item() for x_TV in (logits(engine, row), theirs_TV))
    assert ours <= 2 * plain, (ours, plain)
    if answer:
        (found,) = engine.generate([foreign.request(images, frames, max_new_tokens=32)])
        expected = foreign.model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, len(row.ids) :].tolist()
        assert found.token_ids == expected and len(expected) > 4 and len(set(expected)) > 3
        assert found.image_tokens == sum(picture.span.tokens for picture in row.pictures)
    return row


def test_one_picture(foreign):
    """Wide, tall, square, large (OneVision shrinks its map) and a strip."""
    shrunk = []
    for number, size in enumerate(SIZES):
        span = check(foreign, [picture(*size)], answer=number in (0, 3)).pictures[0].span
        side = foreign.size // 14
        shrunk.append(span.rows * side - 2 * span.top != span.height)
    assert any(shrunk) == foreign.onevision and not all(shrunk)


def test_attention_over_tiles_is_transformers_own(foreign):
    """Of a word of the answer to one picture in tiles, newlines and all: its eager attentions at the visual tokens."""
    config, image = foreign.engine.config, picture(*SIZES[0])
    plain = TEMPLATE.replace("': '", "':'").replace("' ASSISTANT:'", "'ASSISTANT:'")  # answers as they are asked for
    chat = replace(config.chat, jinja=plain)
    engine = Engine(foreign.engine.model.under(replace(config, chat=chat)), foreign.engine.tokenizer)
    given = media([image])
    messages = [user_message(engine.config.chat, QUESTION, given), Message("assistant", QUESTION)]
    at = QUESTION.index("these")
    (found,) = attention_over_pictures(engine, messages, given, (at, at + 5), layer=0)
    inputs, tokens = foreign.inputs([image]), len(foreign.tokenizer(" " + QUESTION)["input_ids"])
    example = engine.processor(messages, given, generate=False)
    ids = torch.tensor([example.ids])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = [foreign.tokenizer.decode(example.ids[:n]) for n in range(ids.shape[1] + 1)]
    start = texts[-1].rindex(QUESTION) + at
    inside = [n for n in range(ids.shape[1]) if len(texts[n]) < start + 5 and len(texts[n + 1]) > start]
    assert 1 <= len(inside) <= tokens
    foreign.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights_HTS = foreign.model(**inputs, output_attentions=True).attentions[0][0]
    foreign.model.set_attn_implementation("sdpa")
    wanted_T = weights_HTS.mean(0)[[n - 1 for n in inside]].mean(0)[ids[0] == engine.config.chat.image_token_id]
    assert len(found.weights_T) == len(wanted_T) and len(found.maps) > 1 and wanted_T.std() > 1e-4
    assert (found.weights_T - wanted_T).abs().max() < 1e-5


def test_several_pictures(foreign):
    row = check(foreign, [picture(*size) for size in SIZES[:3]])
    assert {picture.span.views for picture in row.pictures} == {1} if foreign.onevision else {1, 2, 3, 4, 5, 7}


def test_a_clip(foreign):
    if foreign.kind == "LlavaNext":
        pytest.skip("transformers' LlavaNext knows no clips")
    frames = [picture(70 + i, 50) for i in range(5)]
    (span,) = [picture.span for picture in check(foreign, frames=frames).pictures]
    assert span.clip and span.views == 5
    check(foreign, [picture(90, 40)], frames, answer=False)  # the template puts pictures first


def test_a_batch_of_unequal_pictures(foreign):
    """transformers pads tiles and prompts; here both rows are packed end to end."""
    requests, theirs = [], []
    for size in (SIZES[0], SIZES[2]):
        requests.append(foreign.request([picture(*size)], max_new_tokens=8))
        inputs = foreign.inputs([picture(*size)])
        theirs.append(
            foreign.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        )
    both = [foreign.inputs([picture(*size)]) for size in (SIZES[0], SIZES[2])]
    batch = foreign.tokenizer.pad({"input_ids": [i["input_ids"][0].tolist() for i in both]}, return_tensors="pt")
    nested = [[picture(*size)] for size in (SIZES[0], SIZES[2])]
    pixels = foreign.images(images=nested if foreign.onevision else [n[0] for n in nested], return_tensors="pt")
    with torch.no_grad():
        padded_BV = foreign.model(**batch, **pixels).logits[:, -1]
    rows = [foreign.engine.row(i, request, {}) for i, request in enumerate(requests)]
    cut = [0, len(rows[0].ids), len(rows[0].ids) + len(rows[1].ids)]
    pictures = [p for row in rows for p in row.pictures]
    with torch.no_grad():
        ours_BV = foreign.engine.model(
            torch.tensor(rows[0].ids + rows[1].ids), torch.cat([p.pixels_NCHW for p in pictures]),
            cu_seqlens=cut, last_only=True, spans=[p.span for p in pictures],
        )  # fmt: skip
    torch.testing.assert_close(ours_BV, padded_BV, rtol=1e-4, atol=1e-4)
    assert [a.token_ids for a in foreign.engine.generate(requests)] == [t.tolist() for t in theirs]


def test_saved_for_transformers_and_for_us(foreign, tmp_path):
    save_model(foreign.engine.model, tmp_path / "saved", foreign.engine.tokenizer)
    back = foreign.model_class.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    inputs = foreign.inputs([picture(*SIZES[3])])
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, foreign.model(**inputs).logits)
    assert back.config.to_dict()["image_grid_pinpoints"] == foreign.model.config.image_grid_pinpoints
    again, config = read_config(tmp_path / "saved"), foreign.engine.config
    assert again == replace(config, chat=replace(config.chat, jinja=again.chat.jinja))
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    assert type(images) is type(foreign.images)
    nested = [[picture(*SIZES[3])]] if foreign.onevision else [picture(*SIZES[3])]
    assert torch.equal(images(images=nested, return_tensors="pt")["pixel_values"], inputs["pixel_values"])


# ---- the original layout ----


def to_original(foreign, folder, **changed):
    """The same model as haotian-liu or lmms-lab would have stored it, tower included."""
    folder.mkdir()
    model, raw = foreign.engine.model, json.loads((foreign.folder / "config.json").read_text())
    state = {rename(name, "original", to_ours=False): t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    foreign.tokenizer.save_pretrained(folder)
    text, tower = raw["text_config"], raw["vision_config"]
    (folder / "tower").mkdir()
    if foreign.onevision:  # a stock SigLIP has one block more than the original keeps
        tower["num_hidden_layers"] += 1
    (folder / "tower" / "config.json").write_text(json.dumps(tower))
    size = {"height": foreign.size, "width": foreign.size}
    crop = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": foreign.size}, crop_size=size)
    squash = dict(image_processor_type="SiglipImageProcessor", size=size)
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(squash if foreign.onevision else crop))
    pinpoints = [pair[::-1] for pair in raw["image_grid_pinpoints"]]
    mm = dict(
        model_type="llava_qwen" if text["model_type"] == "qwen2" else f"llava_{text['model_type']}",
        mm_vision_tower="tower", mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="anyres_max_2" if foreign.onevision else "anyres", mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=str(pinpoints) if foreign.onevision else pinpoints,
        mm_spatial_pool_mode="bilinear" if foreign.onevision else "average",
        mm_resampler_type="spatial_pool" if foreign.kind == "LlavaNextVideo" else None,
    )  # fmt: skip
    ours = {"minillava": {"chat": {"template": "vicuna_v1"}}}  # which tokenizers of the hub tell by their turn markers
    (folder / "config.json").write_text(json.dumps(text | mm | ours | changed))
    return folder


@pytest.fixture(scope="module", params=["next-mistral", "video-llama", "onevision-tied"])
def stored(request, tmp_path_factory):
    return Foreign(request.param, tmp_path_factory.mktemp("hf"))


def test_the_original_layout_loads_and_exports(stored, tmp_path):
    """As transformers computes it: loaded as the original stores it, and after export back to transformers' layout."""
    folder = to_original(stored, tmp_path / "original")
    tokenizer = load_tokenizer(folder)
    engine = Engine(load_model(folder, torch.float32), tokenizer)
    frames = [picture(70 + i, 50) for i in range(5)] if stored.kind != "LlavaNext" else []
    raw = f"USER: <image>\n{QUESTION} ASSISTANT:"
    save_model(engine.model, tmp_path / "saved", tokenizer)
    back = stored.model_class.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    again = Engine(load_model(tmp_path / "saved", torch.float32), load_tokenizer(tmp_path / "saved"))
    for how in ({"images": [picture(*SIZES[3])]}, {"frames": frames})[: 1 + bool(frames)]:
        inputs = stored.inputs(**how)
        with torch.no_grad():
            theirs_TV = stored.model(**inputs).logits[0]
            assert torch.equal(back(**inputs).logits[0], theirs_TV)
        videos = [how["frames"]] if "frames" in how else []
        for ours, prompt in ((engine, raw), (again, raw.replace("<image>", "<video>") if videos else raw)):
            row = ours.row(0, Request(raw=prompt, media=media(how.get("images", ()), videos)), {})
            markers = {*ours.config.chat.markers.values()}
            theirs = {stored.engine.config.chat.image_token_id, stored.engine.config.chat.video_token_id}
            ids = inputs["input_ids"][0].tolist()
            assert [-1 if i in markers else i for i in row.ids] == [-1 if i in theirs else i for i in ids]
            torch.testing.assert_close(logits(ours, row), theirs_TV, rtol=1e-4, atol=1e-4)


def test_a_stock_siglip_beside_the_original_layout(stored, tmp_path):
    """As for a model whose tower was frozen: its last block is left out, and the rest is the same model."""
    if not stored.onevision:
        pytest.skip("CLIP keeps its blocks")
    folder = to_original(stored, tmp_path / "m")
    mine, tower, prefix = {}, {}, "model.vision_tower.vision_tower."
    for name, tensor in load_file(folder / "model.safetensors").items():
        (tower if name.startswith(prefix) else mine)[name.removeprefix(prefix)] = tensor
    first = {name: tensor for name, tensor in tower.items() if "layers.0." in name}
    assert first
    tower |= {name.replace("layers.0.", "layers.3."): tensor + 1 for name, tensor in first.items()}
    save_file(mine, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(tower, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
    assert "loads      yes" in Checkpoint.open(folder).describe()
    loaded = load_model(folder, torch.float32).state_dict()
    for name, tensor in stored.engine.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_original_reads_its_fields(stored, tmp_path):
    """Which way a tie goes, where the newline and the pooling are, what the frames are: all from config.json."""
    folder = to_original(
        stored, tmp_path / "a", mm_newline_position="grid", force_sample=True, add_time_instruction=True
    )
    layout = read_config(folder).layout
    assert layout.video_newline == "grid" and layout.time_instruction and layout.video_fps == 0
    assert layout.pool_first == (stored.kind == "LlavaNextVideo") and not layout.round_unpad
    assert layout.grids == read_config(stored.folder).layout.grids  # the list was turned around
    flat = read_config(to_original(stored, tmp_path / "b", mm_patch_merge_type="flat", mm_newline_position="grid"))
    assert flat.layout.merge == "flat" and flat.layout.video_newline == "no_token"
    for number, (pinpoints, message) in enumerate({
        "no list": "expected a list of",
        "[[1, 2, 3]]": "expected two multiples of",
        "(1x1),...,(60x60)": "more than 144 tiles",
        "__import__('os')": "expected a list of",
    }.items()):  # fmt: skip
        with pytest.raises(UserError, match=f"config.json: image_grid_pinpoints .*{message}"):
            read_config(to_original(stored, tmp_path / f"p{number}", image_grid_pinpoints=pinpoints))
    for number, (key, value) in enumerate({
        "image_aspect_ratio": "highres", "mm_patch_merge_type": "nobase", "mm_resampler_type": "perceiver",
        "mm_spatial_pool_mode": "conv", "add_faster_video": True,
    }.items()):  # fmt: skip
        with pytest.raises(UserError, match=f"config.json: {key} .* not supported"):
            read_config(to_original(stored, tmp_path / f"k{number}", **{key: value}))


def test_pinpoints_of_model_and_processor_must_agree(foreign):
    path = foreign.folder / "preprocessor_config.json"
    if not path.is_file():
        path = foreign.folder / "processor_config.json"
    said = path.read_text()
    values = json.loads(said)
    values["image_grid_pinpoints"] = values["image_grid_pinpoints"][1:]
    try:
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"image_grid_pinpoints differs from config\.json's"):
            read_config(foreign.folder)
    finally:
        path.write_text(said)


def test_too_many_pictures_and_clips(foreign):
    wrong = Request(raw="<image> and", media=media([picture(20, 20)] * 2))
    with pytest.raises(UserError, match="1 '<image>' in the text, but 2 pictures"):
        foreign.engine.generate([wrong])
    if foreign.engine.config.chat.video_token:
        with pytest.raises(UserError, match="0 '<video>' in the text, but 1 videos"):
            foreign.engine.generate([Request(raw="what?", media=media(videos=[[picture(20, 20)]]))])


def test_defaults_of_the_classes_are_transformers_own():
    """What a config.json may leave out: written by transformers with all its values, and without any."""
    from minillava.checkpoints.hf_llava import HF_CLASSES

    for kind, known in HF_CLASSES.items():
        full = getattr(transformers, f"{known.name}Config")().to_dict()
        for key, value in known.defaults.items():
            if isinstance(value, dict):
                assert {k: full[key][k] for k in value} == value, kind
            else:
                assert full[key] == value, (kind, key)
        assert full["text_config"]["model_type"] == known.text
    assert ModelConfig().layout.grids == ()


# ---- the command line, and what the original code answered ----


@pytest.fixture
def real():
    if not (REAL / "llava" / "clip.mp4").is_file():
        pytest.skip(f"{REAL}/llava/clip.mp4 is not there")
    return REAL


def run(capsys, *arguments):
    status = run_command("ask", [str(a) for a in (*arguments, "--json", "--max-new-tokens", 6)])
    out, err = capsys.readouterr()
    assert status == 0, err
    answer = json.loads(out)
    return answer["token_ids"], answer["image_tokens"]


def test_real_pictures_and_clip_on_the_command_line(foreign, real, tmp_path, capsys):
    """A picture, two, and a clip; the folder by another name answers the same."""
    pytest.importorskip("av")
    moved = tmp_path / "v1.6-34b-mistral-lora"  # the original would take this for another model
    shutil.copytree(foreign.folder, moved)
    first, second, clip = (real / "llava" / name for name in ("waterview.jpg", "dog.jpg", "clip.mp4"))
    asked = [["--image", first], ["--image", first, "--image", second], ["--video", clip, "--frames", 3]]
    for arguments in asked:
        answers = [run(capsys, "--model", m, *arguments, "--prompt", "What is it?") for m in (foreign.folder, moved)]
        assert answers[0] == answers[1]
    span = clip_span(foreign.engine.config, 3)
    assert answers[0][1] == span.tokens


@pytest.mark.parametrize("name", ["next-original", "onevision-original"])
def test_answers_of_the_original_code(name, real, monkeypatch):
    """Length, first logits and 24 greedy tokens of LLaVA-NeXT's own code: a picture, two pictures, video.

    The Qwen2 of its transformers 4.40 applied sliding_window = 4096 (that is, 4097 positions) on the eager path though
    use_sliding_window is false; later versions do not. One prompt is longer than that, and is given the same window.
    """
    folder = real / "originals-golden" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    engine = Engine(load_model(folder, torch.float32), load_tokenizer(folder))
    for case in json.loads((folder / "exam.json").read_text()):
        pictures = [real / "llava" / image for image in case["images"]]
        given = media(videos=[pictures]) if case["modality"] == "video" else media(pictures)
        request = Request(raw=case["prompt"], media=given, max_new_tokens=24)
        row = engine.row(0, request, {})
        ids = [id for at, id in enumerate(row.ids) if id != -200 or row.ids[at - 1] != -200 or at == 0]
        expected = [id for at, id in enumerate(case["prompt_ids"]) if id != -200 or case["prompt_ids"][at - 1] != -200]
        assert ids == expected or ids.count(-200) < case["prompt_ids"].count(-200)
        assert len(row.ids) == case["prompt_tokens"]
        with monkeypatch.context() as patch:
            if len(row.ids) > 4097 and engine.config.decoder.model_type == "qwen2":
                patch.setattr(decoder, "attention", functools.partial(decoder.attention, window=4097))
            first_V = logits(engine, row)[-1]
        torch.testing.assert_close(first_V, torch.tensor(case["first_logits"]), rtol=0, atol=1e-4)
        assert engine.generate([request])[0].token_ids == case["greedy"]
