#!/usr/bin/env bash
# trl 1.16.0: answers about pictures are trained without an end token where the same answers without pictures get one.
#
# Rows of plain strings (prompt and completion for SFT; prompt, chosen and rejected for DPO) get the tokenizer's end token behind each
# answer, and its start token in front, so one would guess that a column of pictures beside them changes nothing of that.
# It does: with pictures the rows are tokenised by the data collator, which adds neither, and nothing is said. The losses fall as
# they should; the model that comes out has not learned to stop, and has not seen its start token. Chats (lists of messages)
# have what their template writes. Write the end token into the answers, and the start token into the prompts, of such rows.
#
# Seen with torch 2.13.0, transformers 5.24.0 and trl 1.16.0:
#   SFT, text:     <s> Which ? red </s>          supervised: red </s>
#   SFT, pictures: <image> Which ? red           supervised: red
#   DPO, text:     <s> Which ? red </s>          compared: red </s>
#   DPO, pictures: <image> Which ? red           compared: red
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 pillow==12.0.0
cat > "$folder/show.py" <<'PY'
import sys

import datasets
import trl
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

words = ["<s>", "</s>", "<unk>", "<image>", "Which", "?", "red", "blue"]
plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.add_special_tokens(words[:4])
plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])  # as Llama's
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
tokenizer.pad_token = "<unk>"
pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
processor = LlavaProcessor(pictures, tokenizer, 16, "default", image_token="<image>", num_additional_image_tokens=1)
size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=16, patch_size=16, **size),
                     text_config=LlamaConfig(vocab_size=8, **size),
                     image_token_index=3, vision_feature_layer=-1)
folder = f"{sys.argv[1]}/model"
LlavaForConditionalGeneration(config).save_pretrained(folder)
common = dict(output_dir=sys.argv[1], report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True)
found = {}
for kind, trainer, arguments, answers in (
    ("SFT", trl.SFTTrainer, trl.SFTConfig(**common), {"completion": "red"}),
    ("DPO", trl.DPOTrainer, trl.DPOConfig(**common), {"chosen": "red", "rejected": "blue"}),
):
    for shown in ("text", "pictures"):
        row = {"prompt": "Which ? "} | answers
        if shown == "pictures":
            row |= {"prompt": "<image> Which ? ", "images": [Image.new("RGB", (16, 16))]}
        data = datasets.Dataset.from_list([row])
        made = trainer(folder, args=arguments, train_dataset=data, processing_class=processor)
        batch = made.data_collator([made.train_dataset[0]])
        ids = batch["input_ids"][0]
        learned = batch["labels"][0] >= 0 if kind == "SFT" else batch["completion_mask"][0].bool()
        whole, answer = (" ".join(tokenizer.convert_ids_to_tokens(some)) for some in (ids, ids[learned]))
        found[kind, shown] = whole, answer
        print(f"{kind}, {shown + ':':10}{whole:30}{'supervised' if kind == 'SFT' else 'compared'}: {answer}")
text, picture = ("<s> Which ? red </s>", "red </s>"), ("<image> Which ? red", "red")
sys.exit(0 if all(found[kind, "text"] == text and found[kind, "pictures"] == picture for kind in ("SFT", "DPO")) else 1)
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/out" 2> "$folder/errors" || { tail -3 "$folder/errors"; exit 1; }
