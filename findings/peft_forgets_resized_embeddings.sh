#!/usr/bin/env bash
# peft 0.21.2: an adapter of a LLaVA whose vocabulary was enlarged is saved without the new rows; a LLaMA's is saved with them.
#
# New words (<box>, <point>) get rows by resize_token_embeddings, which draws them at random around the old ones' mean. PEFT knows
# that an adapter is of no use without them: save_embedding_layers is "auto", and a resized language model's embeddings go into the
# file, with a warning. One would guess the same of a model with a vision tower. But "auto" compares config.vocab_size, which LLaVA's
# configuration has only in its text_config: it takes the vocabulary for unchanged, saves the LoRA weights alone, and says nothing. Who
# loads base and adapter and resizes again has other rows, drawn anew, in place of those that the adapter was trained on.
# Pass save_embedding_layers=True to save_pretrained (a Trainer does not), or name the rows in trainable_token_indices.
#
# Seen with torch 2.13.0, transformers 5.24.0 and peft 0.21.2:
#   LlamaForCausalLM               embeddings in the adapter: 2  warned: True   answers after loading: the same
#   LlavaForConditionalGeneration  embeddings in the adapter: 0  warned: False  answers after loading: others
#   ... save_embedding_layers=True embeddings in the adapter: 2  warned: False  answers after loading: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
words = LlamaConfig(vocab_size=32, **size)
vision = CLIPVisionConfig(image_size=16, patch_size=8, **size)
both = LlavaConfig(vision_config=vision, text_config=words, image_token_index=3)
base, saved = f"{sys.argv[1]}/base", f"{sys.argv[1]}/adapter"
new_word = torch.tensor([[1, 5, 33, 6]])


def resized(kind):
    """The base model as it lies on disk, with room for four more words."""
    model = kind.from_pretrained(base)
    model.resize_token_embeddings(36)
    return model


for kind, config, options in (
    (LlamaForCausalLM, words, {}),
    (LlavaForConditionalGeneration, both, {}),
    (LlavaForConditionalGeneration, both, {"save_embedding_layers": True}),
):
    kind(config).save_pretrained(base)
    adapted = get_peft_model(resized(kind), LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted.save_pretrained(saved, **options)
    kept = [name for name in load_file(f"{saved}/adapter_model.safetensors") if "lora" not in name]
    warned = any("embedding" in str(warning.message) for warning in said)
    loaded = PeftModel.from_pretrained(resized(kind), saved).eval()
    with torch.no_grad():
        same = torch.equal(adapted(input_ids=new_word).logits, loaded(input_ids=new_word).logits)
    name = "... save_embedding_layers=True" if options else kind.__name__
    after = "the same" if same else "others"
    print(f"{name:30} embeddings in the adapter: {len(kept)}  warned: {warned!s:5}  answers after loading: {after}")
PY
diff <(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
LlamaForCausalLM               embeddings in the adapter: 2  warned: True   answers after loading: the same
LlavaForConditionalGeneration  embeddings in the adapter: 0  warned: False  answers after loading: others
... save_embedding_layers=True embeddings in the adapter: 2  warned: False  answers after loading: the same
SEEN
echo "as seen"
