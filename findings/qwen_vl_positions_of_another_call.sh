#!/usr/bin/env bash
# transformers 5.24.0: a Qwen-VL conversation continued from its cache takes its positions from whichever call came last.
#
# A cache (past_key_values) is what a conversation needs to go on, one would guess, so that several can be kept and continued in turn,
# as with another model. In Qwen2-VL, Qwen2.5-VL and Qwen3-VL a picture takes fewer positions than tokens, and the difference is not in
# the cache: it is an attribute of the model, `rope_deltas`, which every call with a picture overwrites, and which a generate without one
# sets to 0. A question about another picture, or plain text, in between moves all further tokens of the first conversation. Shapes fit,
# so nothing warns, and the answer is merely worse; a server that keeps caches, or a benchmark that asks several questions of one prefix,
# meets it. Keep model.model.rope_deltas with each cache, and put it back.
#
# Seen with torch 2.13.0 and transformers 5.24.0, small models with random weights; logits of the next token against those without a cache:
#   Qwen2VL     continued at once: equal   another text in between: other   with rope_deltas put back: equal
#   Qwen2_5_VL  continued at once: equal   another text in between: other   with rope_deltas put back: equal
#   Qwen3VL     continued at once: equal   another text in between: other   with rope_deltas put back: equal
#   Llava       continued at once: equal   another text in between: equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0
cat > "$folder/show.py" <<'PY'
import copy

import torch
import transformers

size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
text = dict(vocab_size=64, num_key_value_heads=2, bos_token_id=0, eos_token_id=None, pad_token_id=2, **size)
rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
seen = dict(depth=2, num_heads=2, hidden_size=32, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
visions = {"Qwen2VL": seen | {"embed_dim": 32, "mlp_ratio": 1},
           "Qwen2_5_VL": seen | {"out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
           "Qwen3VL": seen | {"out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16,
                              "deepstack_visual_indexes": [0]}}  # fmt: skip
ask = dict(do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, suppress_tokens=[3, 4, 5])


def build(family):
    """A model with weights large enough that positions matter, and a picture of 16 placeholders for it."""
    torch.manual_seed(0)
    if family == "Llava":
        vision = transformers.CLIPVisionConfig(image_size=16, patch_size=4, **size)
        config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=3)
        picture = {"pixel_values": torch.randn(1, 3, 16, 16)}
    else:
        words = text | {"rope_parameters": rope} | ({"head_dim": 16} if family == "Qwen3VL" else {})
        make = getattr(transformers, f"{family}Config")
        config = make(vision_config=visions[family], text_config=words, image_token_id=3, video_token_id=4, vision_start_token_id=5)
        picture = {"pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5
    return model, picture


def next_logits(model, ids, **more):
    kinds = {} if "Llava" in type(model).__name__ else {"mm_token_type_ids": (ids == 3).int()}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **more, **ask)


for family in (*visions, "Llava"):
    model, picture = build(family)
    first = next_logits(model, torch.tensor([[0, 5, *[3] * 16, 20, 21]]), **picture)
    asked = torch.cat([first.sequences, torch.tensor([[30, 31, 32]])], 1)  # the next question about the same picture
    cache = first.past_key_values if "past_key_values" in first else first.cache
    name = "past_key_values" if "past_key_values" in first else "cache"
    deltas = getattr(model.model, "rope_deltas", None)
    found = {"continued at once": next_logits(model, asked, **{name: copy.deepcopy(cache)})}
    next_logits(model, torch.tensor([[0, 40, 41, 42]]))
    found["another text in between"] = next_logits(model, asked, **{name: copy.deepcopy(cache)})
    if deltas is not None:
        model.model.rope_deltas = deltas
        found["with rope_deltas put back"] = next_logits(model, asked, **{name: copy.deepcopy(cache)})
    whole = next_logits(model, asked, **picture).logits[0]
    away = {name: (result.logits[0] - whole).abs().max().item() for name, result in found.items()}
    print(f"{family:11}", "   ".join(f"{name}: {'equal' if much < 1e-4 else 'other'}" for name, much in away.items()))
PY
diff <(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
Qwen2VL     continued at once: equal   another text in between: other   with rope_deltas put back: equal
Qwen2_5_VL  continued at once: equal   another text in between: other   with rope_deltas put back: equal
Qwen3VL     continued at once: equal   another text in between: other   with rope_deltas put back: equal
Llava       continued at once: equal   another text in between: equal
SEEN
echo "as seen"
