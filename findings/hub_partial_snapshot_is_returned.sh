#!/usr/bin/env bash
# huggingface_hub 2.4.0: with no network `snapshot_download` returns a model that was fetched by half as if it were whole.
#
# A download that is interrupted leaves the files that had arrived under snapshots/<commit>/ and an .incomplete file among the blobs.
# Asked again where the hub cannot be reached (or with local_files_only=True), snapshot_download does not look which files belong to
# the commit: it returns that folder, without an error or a warning, also when not one file fits `allow_patterns`. Whoever takes the
# path as "it is all there" reads a sharded checkpoint without its last shards; a loader has to compare with the index itself.
#
# Seen with huggingface_hub 2.4.0, a cache with one of two shards that the index names, and an endpoint where nobody listens:
#   returned: config.json model-00001-of-00002.safetensors model.safetensors.index.json
#   local_files_only: the same folder
#   allow_patterns of the missing shard: the same folder
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cat > "$folder/show.py" <<'PY'
from pathlib import Path

from huggingface_hub import constants, snapshot_download

commit, cache = "a" * 40, Path(constants.HF_HUB_CACHE) / "models--some--model"
snapshot = cache / "snapshots" / commit
for part in (snapshot, cache / "refs", cache / "blobs"):
    part.mkdir(parents=True)
(cache / "refs" / "main").write_text(commit)
(cache / "blobs" / ("b" * 64 + ".incomplete")).write_text("the start of the second shard")
shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
(snapshot / "config.json").write_text("{}")
(snapshot / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{shards[0]}", "b": "{shards[1]}"}}}}')
(snapshot / shards[0]).write_text("the first shard")

found = snapshot_download("some/model")
print("returned:", *sorted(path.name for path in Path(found).iterdir()))
for name, options in {"local_files_only": {"local_files_only": True},
                      "allow_patterns of the missing shard": {"allow_patterns": [shards[1]]}}.items():  # fmt: skip
    print(f"{name}: {'the same folder' if snapshot_download('some/model', **options) == found else 'another'}")
PY
diff <(HF_HOME="$folder/home" HF_ENDPOINT=http://127.0.0.1:9 "$folder/venv/bin/python" "$folder/show.py" 2>&1) - <<'SEEN'
returned: config.json model-00001-of-00002.safetensors model.safetensors.index.json
local_files_only: the same folder
allow_patterns of the missing shard: the same folder
SEEN
echo "as seen"
