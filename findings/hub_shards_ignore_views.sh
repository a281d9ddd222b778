#!/bin/bash
# huggingface_hub 2.4.0, split_torch_state_dict_into_shards (and what builds on it: save_torch_state_dict).
#
# Its text says that each shard is smaller than max_shard_size, unless one tensor alone is larger. Disjoint views of one
# storage do not count that way: rows of a stacked parameter (routed experts, say, or q, k and v cut from a joined
# weight) share a storage, so all of them go into ONE shard, however large, and the index is left out. The same
# values as clones are split. Seen: eight rows of 4,000 bytes with a limit of 8,000 give one file of 32,000 bytes as
# views, and four files of 8,000 as clones. A writer that cuts a stacked model apart for the hub gets shards above its
# limit without a word; clone() (or contiguous() on what is no longer a view) before splitting, or cut per storage.
#
# Exits 0 while this is so, non-zero when the behaviour has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy huggingface_hub==2.4.0
"$folder/venv/bin/python" - <<'PY'
import torch
from huggingface_hub import split_torch_state_dict_into_shards

stacked = torch.arange(8 * 1000, dtype=torch.float32).view(8, 1000)
views = {f"experts.{i}.weight": stacked[i] for i in range(8)}
clones = {name: tensor.clone() for name, tensor in views.items()}
sizes = {}
for kind, state in (("views", views), ("clones", clones)):
    split = split_torch_state_dict_into_shards(state, max_shard_size=8000)
    sizes[kind] = [sum(state[name].nbytes for name in names) for names in split.filename_to_tensors.values()]
    print(kind, "sharded:", split.is_sharded, "bytes a file:", sizes[kind])
assert sizes == {"views": [32000], "clones": [8000] * 4}, "the behaviour has changed"
PY
