#!/usr/bin/env bash
# trl 1.16.0: SFT on chats about pictures trains the model to say the image placeholders; they are most of its loss.
#
# A picture stands in the ids as one placeholder for each visual token (576 for LLaVA-1.5). They are never generated, and every LLaVA
# recipe leaves them out of the loss; so does TRL's own collator for rows with prompt and completion. For rows with `messages` (or
# `text`), the usual form, SFTTrainer makes labels of all ids but padding, placeholders included, and the model's loss takes them.
# With LLaVA-1.5 and 100 other tokens, 85 % of what the loss is a mean of are then placeholders: it falls near zero within a few steps,
# which looks like fast learning, and each word weighs a seventh of what it would alone. `assistant_only_loss=True` avoids it where the chat
# template marks the answers.
#
# Seen with torch 2.13.0, transformers 5.24.0 and trl 1.16.0 (a picture of 36 visual tokens, five words):
#   messages:          41 ids, 41 supervised, 36 of them <image>
#   prompt, completion:41 ids, 2 supervised, 0 of them <image>
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 pillow==12.0.0 jinja2
cat > "$folder/show.py" <<'PY'
import sys

import datasets
import trl
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

words = ["</s>", "<unk>", "<image>", "USER", "Which", "?", "ASSISTANT", "red"]
plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.add_special_tokens(words[:3])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
template = ("{% for m in messages %}{{ m.role | upper }} {% for part in m.content %}"
            "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}")  # fmt: skip
pictures = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
processor = LlavaProcessor(pictures, tokenizer, 8, "default", template, "<image>", num_additional_image_tokens=1)
size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=48, patch_size=8, **size),
                     text_config=LlamaConfig(vocab_size=8, **size),
                     image_token_index=2, vision_feature_layer=-1)  # fmt: skip
folder = f"{sys.argv[1]}/model"
LlavaForConditionalGeneration(config).save_pretrained(folder)
arguments = trl.SFTConfig(output_dir=sys.argv[1], report_to=[], use_cpu=True, bf16=False, max_length=None)
asked, said = ({"role": role, "content": text} for role, text in (("user", "Which ?"), ("assistant", "red")))
for name, row in (
    ("messages", {"messages": [asked, said]}),
    ("prompt, completion", {"prompt": [asked], "completion": [said]}),
):
    data = datasets.Dataset.from_list([row | {"images": [Image.new("RGB", (48, 48))]}])
    made = trl.SFTTrainer(folder, args=arguments, train_dataset=data, processing_class=processor)
    batch = made.data_collator([made.train_dataset[0]])
    ids, learned = batch["input_ids"][0], batch["labels"][0] >= 0
    print(f"{name + ':':19}{len(ids)} ids, {learned.sum()} supervised, {(ids[learned] == 2).sum()} of them <image>")
PY
diff <(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/out" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
messages:          41 ids, 41 supervised, 36 of them <image>
prompt, completion:41 ids, 2 supervised, 0 of them <image>
SEEN
echo "as seen"
