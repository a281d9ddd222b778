#!/usr/bin/env bash
# transformers 5.24.0: llm_int8_skip_modules=["vision_tower"] quantises the vision tower all the same, and the output layer besides.
#
# Recipes keep the vision tower and the projector out of the 4 bits, by naming them in the list of modules that bitsandbytes is to leave
# alone. One would guess that a model has no more quantised layers with such a list than without. It has: a list, of whatever names,
# takes the place of the one that is made where none is given, and that one holds lm_head. And a name counts if it begins or ends a
# module's whole path (before transformers 5 it counted anywhere in it). Since 4.52 the tower's path is model.vision_tower..., while the
# tensors of LLaVA's checkpoints, and older recipes, still call it vision_tower...; such a name fits nothing, nothing is said, and
# config.json repeats the list as if it had been heeded. Qwen-VL's "visual" goes the same way. The model runs all the same.
# Write ["lm_head", "model.vision_tower", "model.multi_modal_projector"], and count the Linear4bit layers of what was loaded.
# Most other methods compare their lists by the same function.
#
# Seen with torch 2.13.0, transformers 5.24.0 and bitsandbytes 0.50.2 (layers in 4 bits):
#   no list                                                              tower 12 of 12  projector 2 of 2  lm_head 0 of 1
#   vision_tower                                                         tower 12 of 12  projector 2 of 2  lm_head 1 of 1
#   vision_tower, multi_modal_projector                                  tower 12 of 12  projector 2 of 2  lm_head 1 of 1
#   model.vision_tower, model.multi_modal_projector                      tower  0 of 12  projector 0 of 2  lm_head 1 of 1
#   lm_head, model.vision_tower, model.multi_modal_projector             tower  0 of 12  projector 0 of 2  lm_head 0 of 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2
cat > "$folder/show.py" <<'PY'
import sys

from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
vision, words = CLIPVisionConfig(image_size=16, patch_size=8, **size), LlamaConfig(vocab_size=64, **size)
config = LlavaConfig(vision_config=vision, text_config=words, image_token_index=3)
LlavaForConditionalGeneration(config).save_pretrained(sys.argv[1])
parts = {"tower": "model.vision_tower", "projector": "model.multi_modal_projector", "lm_head": "lm_head"}
for names in (
    None,
    ["vision_tower"],
    ["vision_tower", "multi_modal_projector"],
    ["model.vision_tower", "model.multi_modal_projector"],
    ["lm_head", "model.vision_tower", "model.multi_modal_projector"],
):
    how = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=names)
    model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], quantization_config=how)
    assert model.config.quantization_config.llm_int8_skip_modules == names
    line = f"{', '.join(names or ['no list']):68}"
    for part, path in parts.items():
        kinds = [type(layer).__name__ for layer in model.get_submodule(path).modules()]
        small, whole = kinds.count("Linear4bit"), kinds.count("Linear")
        line += f" {part} {small:{len(str(small + whole))}} of {small + whole} "
    print(line.rstrip())
PY
diff <(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/model" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
no list                                                              tower 12 of 12  projector 2 of 2  lm_head 0 of 1
vision_tower                                                         tower 12 of 12  projector 2 of 2  lm_head 1 of 1
vision_tower, multi_modal_projector                                  tower 12 of 12  projector 2 of 2  lm_head 1 of 1
model.vision_tower, model.multi_modal_projector                      tower  0 of 12  projector 0 of 2  lm_head 1 of 1
lm_head, model.vision_tower, model.multi_modal_projector             tower  0 of 12  projector 0 of 2  lm_head 0 of 1
SEEN
echo "as seen"
