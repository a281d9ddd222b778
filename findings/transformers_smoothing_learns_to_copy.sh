#!/usr/bin/env bash
# transformers 5.24.0: with label smoothing its Trainer teaches a vision language model to repeat the token it has just read.
#
# One would guess that label_smoothing_factor softens the targets and leaves alone which token is the target. But with it the Trainer
# computes the loss in the model's place, and moves the labels by one only for classes named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
# Language models are there, and Gemma 3 and 4; LLaVA, Qwen-VL, InternVL and most others that see are not. Their prediction at each
# position is compared with the token at that position, which they are shown: nothing is said, the training loss falls as it should
# (eval_loss is computed the same way and falls with it), and the model that comes out answers with the last word of the question.
# PEFT's wrapper changes nothing of it. Leave the factor at 0 for such models, and smooth in a compute_loss_func that compares
# logits[:, :-1] with labels[:, 1:]. TRL's SFTTrainer moves the labels for every class.
#
# Seen with torch 2.13.0, transformers 5.24.0 and accelerate 1.15.0 (trained to count from 1 to 7 and over again):
#   LlamaForCausalLM               factor 0.0  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
#   LlamaForCausalLM               factor 0.1  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
#   LlavaForConditionalGeneration  factor 0.0  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
#   LlavaForConditionalGeneration  factor 0.1  loss fell: True  goes on from 3 with: 3 3 3 3 3 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/show.py" <<'PY'
import sys

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
words = LlamaConfig(vocab_size=8, bos_token_id=None, eos_token_id=None, **size)
vision = CLIPVisionConfig(image_size=16, patch_size=16, **size)
both = LlavaConfig(vision_config=vision, text_config=words, image_token_index=0)
counts = [(torch.arange(9) + start) % 7 + 1 for start in range(7)]
rows = [{"input_ids": count, "labels": count} for count in counts] * 32
for kind, config in ((LlamaForCausalLM, words), (LlavaForConditionalGeneration, both)):
    for factor in (0.0, 0.1):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=sys.argv[1], report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=10,
            learning_rate=1e-2, max_steps=60, per_device_train_batch_size=7, label_smoothing_factor=factor,
        )  # fmt: skip
        trainer = Trainer(kind(config), arguments, train_dataset=rows)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        model = trainer.model.eval()
        text = torch.tensor([[3]])
        with torch.no_grad():
            for _ in range(6):
                text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
        said = " ".join(map(str, text[0, 1:].tolist()))
        fell = losses[-1] < losses[0] / 2
        print(f"{kind.__name__:30} factor {factor}  loss fell: {fell}  goes on from 3 with: {said}")
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/out" > "$folder/log" 2> "$folder/errors" || { tail -3 "$folder/errors"; exit 1; }
diff <(grep "goes on" "$folder/log") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
LlamaForCausalLM               factor 0.0  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
LlamaForCausalLM               factor 0.1  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
LlavaForConditionalGeneration  factor 0.0  loss fell: True  goes on from 3 with: 4 5 6 7 1 2
LlavaForConditionalGeneration  factor 0.1  loss fell: True  goes on from 3 with: 3 3 3 3 3 3
SEEN
echo "as seen"
