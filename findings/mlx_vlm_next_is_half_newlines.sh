#!/usr/bin/env bash
# mlx-vlm 0.7.10: half of what its LLaVA-NeXT reads of a picture is one vector, copied; tiles are neither merged nor unpadded.
#
# LLaVA-NeXT lays the tiles of a picture side by side, cuts off the padding and puts the learned `image_newline` behind each row:
# 576 + 48 * 49 = 2,928 positions for a 672 x 672 picture of llava-v1.6 (2 x 2 tiles of 336), and mlx-vlm's own processor makes as many
# placeholders. Its model (models/llava_next) instead broadcasts the newline to the shape of all features and appends that as five more
# pictures; each of the ten then takes the place of ONE placeholder with all of its 576 positions, and the placeholders behind the tenth
# are dropped. The decoder sees 5,760 positions in tile order, 2,880 of them equal. No error, no line; answers are merely worse.
# Its LLaVA-OneVision (models/llava_onevision, same version) merges and unpads as the paper does.
#
# Seen with mlx-vlm 0.7.10, mlx 0.32.4 (Linux, CPU), random weights of width 8:
#   placeholders 2928, visual positions 5760, equal to image_newline 2880
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-vlm==0.7.10 transformers==5.24.0
cat > "$folder/show.py" <<'PY'
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_vlm.models.llava_next import Model, ModelConfig
from mlx_vlm.models.llava_next.config import TextConfig, VisionConfig
from mlx_vlm.models.llava_next.processing_llava_next import LlavaNextProcessor

IMAGE = 99
small = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
model = Model(
    ModelConfig(
        text_config=TextConfig(model_type="llama", vocab_size=100, num_key_value_heads=2, **small),
        vision_config=VisionConfig(model_type="clip_vision_model", **small),  # 336 pixels, patches of 14
        model_type="llava_next",
        image_token_index=IMAGE,
    )
)
processor = SimpleNamespace(
    patch_size=14,
    num_additional_image_tokens=1,  # the class token, which "default" leaves out again
    image_processor=SimpleNamespace(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
    _get_unpadded_features=LlavaNextProcessor._get_unpadded_features.__get__(object()),
)
placeholders = LlavaNextProcessor._get_number_of_features(processor, 672, 672, 336, 336) - 1
ids = mx.array([[1, 2, *[IMAGE] * placeholders, 3]])
pixels = mx.random.normal((1, 5, 3, 336, 336))  # the whole picture, then 2 x 2 tiles
embeds = np.array(model.get_input_embeddings(ids, pixels).inputs_embeds[0])
newlines = (np.abs(embeds - np.array(model.image_newline)).max(-1) < 1e-6).sum()
print(f"placeholders {placeholders}, visual positions {len(embeds) - 3}, equal to image_newline {newlines}")
PY
diff <("$folder/venv/bin/python" "$folder/show.py" 2> /dev/null) - <<'SEEN'
placeholders 2928, visual positions 5760, equal to image_newline 2880
SEEN
echo "as seen"
