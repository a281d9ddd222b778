#!/usr/bin/env bash
# transformers 5.24.0 gives a LLaMA tokenizer.model other ids than transformers 4.57 did, if its files do not say `legacy`.
#
# tokenizer_config.json of checkpoints from before the flag (LLaMA, Vicuna, the first LLaVAs) has no `legacy`. One would guess that a
# major version reads an old folder as the version before, which took true and warned. It takes false, and says nothing: text behind a
# special token has no space in front any more. A prompt of several turns, "...</s>USER: ...", has other ids than the model was trained on.
# With "legacy": true in the file both agree.
#
# Seen with transformers 4.57.6 and 5.24.0, a small model trained here by sentencepiece 0.2.1:
#   4.57.6  not said: </s> ▁USER : ▁What    true: </s> ▁USER : ▁What
#   5.24.0  not said: </s> US ER : ▁What    true: </s> ▁USER : ▁What
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.24.0; do
    "${PYTHON:-python3}" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version" sentencepiece==0.2.1 protobuf numpy
done
cat > "$folder/show.py" <<'PY'
import io
import json
import logging
import sys
from pathlib import Path

import sentencepiece
import transformers

logging.disable(logging.WARNING)
file = io.BytesIO()
words = iter(["USER: What is it? ASSISTANT: It is red. It is green."] * 20)
options = dict(vocab_size=60, model_type="bpe", minloglevel=2, hard_vocab_limit=False)
sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=file, **options)
shown = []
for said in ({}, {"legacy": True}):
    place = Path(sys.argv[1]) / f"{transformers.__version__}-{len(said)}-files"
    place.mkdir()
    (place / "tokenizer.model").write_bytes(file.getvalue())
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **said}))
    tokenizer = transformers.LlamaTokenizer.from_pretrained(place)
    ids = tokenizer("</s>USER: What", add_special_tokens=False).input_ids
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    shown.append(" ".join(model.id_to_piece(ids)))
print(f"{transformers.__version__}  not said: {shown[0]}    true: {shown[1]}")
PY
diff <(for version in 4.57.6 5.24.0; do "$folder/$version/bin/python" "$folder/show.py" "$folder" 2> /dev/null; done) - <<'SEEN'
4.57.6  not said: </s> ▁USER : ▁What    true: </s> ▁USER : ▁What
5.24.0  not said: </s> US ER : ▁What    true: </s> ▁USER : ▁What
SEEN
echo "as seen"
