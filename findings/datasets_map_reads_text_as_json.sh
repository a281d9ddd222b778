#!/usr/bin/env bash
# datasets 5.2.0: `map` turns texts into numbers, booleans and nulls where a column mixes strings and lists.
#
# Chat data does: a turn's content is a string, or a list of parts where a picture is shown (the layout of TRL and of every
# chat template). `from_list` refuses the mix; `map` makes the column Json without a word, and so does
# from_list(..., on_mixed_types="use_json"). One would guess that Json keeps what it is given. But a string that can be read as JSON
# is taken for JSON (Json.encode_example): the answer "3" comes back as the integer 3, "007" as 7, "true" as True, "null" as None,
# while "red" stays a string, also behind to_parquet. With strings alone in the column all are kept, so whether the answer to
# "How many?" is a text depends on other rows. What fails is a template far behind (str + int), or nothing: a null is an
# empty answer. Make all contents lists of parts, or all strings, before they go into a data set.
#
# Seen with datasets 5.2.0 and pyarrow 26.0.1:
#   map, strings and lists:       [3, 7, True, None, 'red', [{'type': 'image'}]]
#   from_list, strings and lists: [3, 7, True, None, 'red', [{'type': 'image'}]]
#   map, strings alone:           ['3', '007', 'true', 'null', 'red']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/show.py" <<'PY'
import sys

from datasets import Dataset, disable_progress_bars, load_dataset

disable_progress_bars()
texts = ["3", "007", "true", "null", "red"]


def through_map(contents):
    """What is read from the parquet that `map` made of rows whose messages have these contents."""
    rows = Dataset.from_list([{"number": number} for number in range(len(contents))])
    mapped = rows.map(lambda row: {"messages": [{"role": "assistant", "content": contents[row["number"]]}]})
    mapped.to_parquet(f"{sys.argv[1]}/rows.parquet")
    again = load_dataset("parquet", data_files=f"{sys.argv[1]}/rows.parquet", cache_dir=sys.argv[1], split="train")
    found = [[row["messages"][0]["content"] for row in data] for data in (mapped, again)]
    assert found[0] == found[1]
    return found[0]


everything = [*texts, [{"type": "image"}]]
mapped, alone = through_map(everything), through_map(texts)
listed = [row["content"] for row in Dataset.from_list([{"content": c} for c in everything], on_mixed_types="use_json")]
print("map, strings and lists:      ", mapped)
print("from_list, strings and lists:", listed)
print("map, strings alone:          ", alone)
sys.exit(0 if mapped == listed == [3, 7, True, None, "red", [{"type": "image"}]] and alone == texts else 1)
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder"
