"""The same numbers as transformers (LLaVA-1.5), and as a plain float64 reimplementation (LLaVA v1, which it lacks).

Tiny random models are built by transformers with a processor, saved as it saves, and loaded here.
Letters: T tokens, N images, P patches, V vocabulary, D width, H heads.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import load_model
from PIL import Image
from safetensors.torch import load_file, save_file

from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.save import save_model
from minillava.generation.engine import Engine, Request
from minillava.media.visual import media
from minillava.processor import user_message
from minillava.synthetic.train_tokenizer import train_small_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = (
    "USER ASSISTANT A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. What is in this picture, and in that one? "
)
# How llava-hf/llava-1.5-7b-hf writes a conversation: pictures first, then the text and a blank, in upper-cased roles.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIZES = [(50, 30), (31, 97), (42, 42)]  # of the pictures, wide, tall and square


def pictures(count):
    generator = torch.Generator().manual_seed(count)
    images = []
    for width, height in SIZES[:count]:
        pixels_HWC = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(pixels_HWC.numpy()).resize((width, height), Image.Resampling.BILINEAR))
    return images


def llama_tokenizer():
    """A vocabulary built as LLaMA's is: BPE over '▁' with byte fallback, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<image>", "<pad>"]
    backend.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # The byte tokens were only special to get the ids that LLaMA gives them.
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(pad):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = dict(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    return transformers.LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, **square) if pad else CLIPImageProcessorPil(**square),
        llama_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def foreign_model(kv_heads, image_token_id, vocab_size):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=42, patch_size=14
    )
    text = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, rms_norm_eps=1e-5, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token_id)
    torch.manual_seed(kv_heads)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:  # ten times the usual spread: answers that depend on the whole prompt
                p.normal_(0, 0.2)
            elif "norm" not in name:
                p.normal_(0, 0.1)
    return model


def rekey(folder, tree):
    """Give the saved tensors the names of one of the two module trees that have been on the hub."""
    path = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        part = next(p for p in ("vision_tower.", "multi_modal_projector.", "language_model.", "lm_head.") if p in name)
        rest = name.split(part, 1)[1].removeprefix("model.").removeprefix("vision_model.")
        if rest.startswith("lm_head."):
            part, rest = "lm_head.", rest.removeprefix("lm_head.")
        old = {"vision_tower.": "vision_tower.vision_model.", "lm_head.": "language_model.lm_head."}
        old |= {"language_model.": "language_model.model.", "multi_modal_projector.": "multi_modal_projector."}
        new = {part: f"model.{part}", "vision_tower.": "model.vision_tower.vision_model.", "lm_head.": "lm_head."}
        state[(old if tree == "old" else new)[part] + rest] = tensor
    save_file(state, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=[("mha", "old", "crop"), ("gqa", "new", "pad")], ids=["mha-old", "gqa-new"])
def pair(request, tmp_path_factory):
    """(transformers' model, its processor, our engine, the folder)."""
    heads, tree, fit = request.param
    folder = tmp_path_factory.mktemp("hf")
    theirs = processor(pad=fit == "pad")
    image_token_id = theirs.tokenizer.convert_tokens_to_ids("<image>")
    model = foreign_model(4 if heads == "mha" else 2, image_token_id, len(theirs.tokenizer) + 7)
    model.save_pretrained(folder)
    theirs.save_pretrained(folder)
    rekey(folder, tree)
    engine = Engine(load_model(folder, torch.float32), load_tokenizer(folder))
    return model, theirs, engine, folder


def foreign_inputs(theirs, question, images):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return theirs(images=images, text=text, return_tensors="pt")


@pytest.mark.parametrize("count", [1, 3])
def test_llava_15_equals_transformers(pair, count):
    model, theirs, engine, _ = pair
    images, question = pictures(count), "What is in this picture, and in that one?"
    inputs = foreign_inputs(theirs, question, images)
    request = Request([user_message(engine.config.chat, question, media(images))], media(images), max_new_tokens=32)

    row = engine.row(0, request, {})
    assert row.ids == inputs["input_ids"][0].tolist()
    pixels_NCHW = torch.cat([picture.pixels_NCHW for picture in row.pictures])
    assert torch.equal(pixels_NCHW, inputs["pixel_values"])

    with torch.no_grad():
        theirs_TV = model(**inputs).logits[0]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact_TV = model.double()(**wide).logits[0]
        model.float()
        ours_TV = engine.model(inputs["input_ids"], images=inputs["pixel_values"])
    ours, plain = ((logits_TV - exact_TV).abs().max().item() for logits_TV in (ours_TV, theirs_TV))
    assert ours <= 2 * plain, (ours, plain)

    (answer,) = engine.generate([request])
    expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, len(row.ids) :].tolist()
    assert answer.token_ids == expected and len(expected) == 32 and len(set(expected)) > 4
    assert answer.image_tokens == 9 * count and answer.prompt_tokens == len(row.ids)


def test_a_conversation_has_the_same_ids(pair):
    _, theirs, engine, _ = pair
    turns = [("user", "What is it?"), ("assistant", "a picture"), ("user", "Is it?")]
    content = [[{"type": "text", "text": text}] for _, text in turns]
    content[0].insert(0, {"type": "image"})
    conversation = [{"role": role, "content": c} for (role, _), c in zip(turns, content)]
    text = theirs.apply_chat_template(conversation, add_generation_prompt=True)
    expected = theirs(images=pictures(1), text=text)["input_ids"][0]
    messages = [Message(role, text) for role, text in turns]
    messages[0] = user_message(engine.config.chat, turns[0][1], media(pictures(1)))
    assert engine.row(0, Request(messages, media(pictures(1))), {}).ids == expected


def test_what_we_save_is_what_transformers_loads(pair, tmp_path):
    model, _, engine, _ = pair
    save_model(engine.model, tmp_path / "saved", engine.tokenizer)
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", use_fast=False)
    inputs = foreign_inputs(theirs, "What is in this picture?", pictures(1))
    assert inputs["input_ids"].equal(foreign_inputs(pair[1], "What is in this picture?", pictures(1))["input_ids"])
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


# ---- LLaVA v1: CLIP, one linear layer, LLaMA ----


def plain_v1(tower, language, ids, pixels_NCHW, heads, dtype):
    """Logits [T, V] from the facts alone: CLIP's layer -2 without class token -> Linear -> LLaMA, id -200 spliced."""
    tower, language = ({k: v.to(dtype) for k, v in state.items()} for state in (tower, language))

    def linear(x, state, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * tower[f"{name}.weight"] + tower[f"{name}.bias"]

    def rms_norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * language[f"{name}.weight"]

    def attend(q, k, v, mask):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)

    # Vision tower: 3 layers, of which layer -2 is the output of block 1 counted from 0.
    e = "vision_model.embeddings"
    patch = tower[f"{e}.patch_embedding.weight"]
    size = patch.shape[-1]
    cols = pixels_NCHW.to(dtype).unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = cols.flatten(1, 2) @ patch.flatten(1).T
    x = torch.cat([tower[f"{e}.class_embedding"].expand(len(x), 1, -1), x], 1) + tower[f"{e}.position_embedding.weight"]
    x = layer_norm(x, "vision_model.pre_layrnorm")
    for n in range(2):
        b = f"vision_model.encoder.layers.{n}"
        y = layer_norm(x, f"{b}.layer_norm1")
        q, k, v = (linear(y, tower, f"{b}.self_attn.{p}_proj") for p in "qkv")
        x = x + linear(attend(q, k, v, 0), tower, f"{b}.self_attn.out_proj")
        y = linear(layer_norm(x, f"{b}.layer_norm2"), tower, f"{b}.mlp.fc1")
        x = x + linear(y * (1.702 * y).sigmoid(), tower, f"{b}.mlp.fc2")
    visual = linear(x[:, 1:], language, "model.mm_projector")

    # Each -200 is a picture, replaced by its features.
    pieces, images = [], iter(visual)
    for id in ids:
        pieces.append(next(images) if id == -200 else language["model.embed_tokens.weight"][id][None])
    x = torch.cat(pieces)
    T, K = len(x), x.shape[-1] // heads
    inverse_K = 1 / 10000 ** (torch.arange(0, K, 2).float() / K)
    angles_TK = torch.outer(torch.arange(T).float(), inverse_K).repeat(1, 2)  # in float32, as LLaMA has it
    cos, sin = angles_TK.cos().to(dtype)[:, None], angles_TK.sin().to(dtype)[:, None]
    mask = torch.full((T, T), float("-inf"), dtype=dtype).triu(1)

    def rope(x):
        x = x.unflatten(-1, (heads, -1))
        return (x * cos + torch.cat([-x[..., K // 2 :], x[..., : K // 2]], -1) * sin).flatten(-2)

    for n in range(2):
        b = f"model.layers.{n}"
        y = rms_norm(x, f"{b}.input_layernorm")
        q, k, v = (linear(y, language, f"{b}.self_attn.{p}_proj") for p in "qkv")
        x = x + linear(attend(rope(q), rope(k), v, mask), language, f"{b}.self_attn.o_proj")
        y = rms_norm(x, f"{b}.post_attention_layernorm")
        y = F.silu(linear(y, language, f"{b}.mlp.gate_proj")) * linear(y, language, f"{b}.mlp.up_proj")
        x = x + linear(y, language, f"{b}.mlp.down_proj")
    return linear(rms_norm(x, "model.norm"), language, "lm_head")


def write_v1(folder: Path):
    """A tiny LLaVA v1 in its original layout: projector inside, vision tower in a folder of its own."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    train_small_tokenizer([WORDS] * 3, folder, special_tokens=("<unk>", "<s>", "</s>"), vocab_size=400)
    D, inner, V, tower_D, tower_inner = 64, 96, load_tokenizer(folder).vocab_size, 32, 48
    (folder / "tower").mkdir(parents=True)
    tower = {
        "vision_model.embeddings.class_embedding": random(tower_D),
        "vision_model.embeddings.patch_embedding.weight": random(tower_D, 3, 14, 14) * 0.2,
        "vision_model.embeddings.position_embedding.weight": random(10, tower_D),
    }
    norms = ["pre_layrnorm", "post_layernorm"] + [f"encoder.layers.{n}.layer_norm{i}" for n in range(3) for i in (1, 2)]
    for name in norms:
        tower |= {f"vision_model.{name}.weight": 1 + random(tower_D), f"vision_model.{name}.bias": random(tower_D)}
    linears = {f"self_attn.{p}_proj": (tower_D, tower_D) for p in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (tower_inner, tower_D), "mlp.fc2": (tower_D, tower_inner)}
    for n in range(3):
        for name, (o, i) in linears.items():
            key = f"vision_model.encoder.layers.{n}.{name}"
            tower |= {f"{key}.weight": random(o, i), f"{key}.bias": random(o)}
    language = {
        "model.embed_tokens.weight": random(V, D) * 5,
        "model.norm.weight": 1 + random(D),
        "lm_head.weight": random(V, D),
        "model.mm_projector.weight": random(D, tower_D),
        "model.mm_projector.bias": random(D),
    }
    for n in range(2):
        b = f"model.layers.{n}"
        language |= {f"{b}.{name}.weight": 1 + random(D) for name in ("input_layernorm", "post_attention_layernorm")}
        language |= {f"{b}.self_attn.{p}_proj.weight": random(D, D) for p in "qkvo"}
        language |= {f"{b}.mlp.{p}_proj.weight": random(inner, D) for p in ("gate", "up")}
        language[f"{b}.mlp.down_proj.weight"] = random(D, inner)
    save_file(tower, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
    save_file(language, folder / "model.safetensors", metadata={"format": "pt"})
    vision = dict(
        hidden_size=tower_D, intermediate_size=tower_inner, num_hidden_layers=3, num_attention_heads=4,
        image_size=42, patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    (folder / "tower" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"} | vision))
    crop = dict(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}, do_center_crop=True)
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(crop))
    config = dict(
        model_type="llava", hidden_size=D, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, vocab_size=V, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        mm_vision_tower="tower", mm_vision_select_layer=-2, mm_hidden_size=tower_D, mm_use_im_start_end=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tower, language


def test_llava_v1_equals_a_plain_reimplementation(tmp_path):
    tower, language = write_v1(tmp_path)
    engine = Engine(load_model(tmp_path, torch.float32), load_tokenizer(tmp_path))
    assert len(engine.model.projector.linears) == 1
    images = pictures(2)
    question = "What is in this picture, and in that one?"
    request = Request([user_message(engine.config.chat, question, media(images))], media(images))
    row = engine.row(0, request, {})
    pixels_NCHW = torch.cat([picture.pixels_NCHW for picture in row.pictures])
    # Back to one -200 a picture, as the original writes prompts.
    ids = [id for at, id in enumerate(row.ids) if id != -200 or row.ids[:at].count(-200) % 9 == 0]
    assert ids.count(-200) == 2 and len(row.ids) == len(ids) + 16

    exact_TV = plain_v1(tower, language, ids, pixels_NCHW, 4, torch.float64)
    plain_TV = plain_v1(tower, language, ids, pixels_NCHW, 4, torch.float32)
    with torch.no_grad():
        ours_TV = engine.model(torch.tensor(row.ids), images=pixels_NCHW)
    ours, plain = ((logits_TV - exact_TV).abs().max().item() for logits_TV in (ours_TV, plain_TV))
    assert ours <= 2 * plain, (ours, plain)
    assert exact_TV.std() > 0.1
