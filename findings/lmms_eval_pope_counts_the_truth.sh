#!/usr/bin/env bash
# lmms-eval 0.7.3: POPE's yes ratio is the share of yes among the *right* answers; no model can change it.
#
# POPE asks whether things are in a picture, and half of them are not. Its share of questions that a model says yes to tells a model
# that sees from one that agrees to everything. lmms-eval reports it as pope_yes_ratio, but counts `ground_truth`: a model that says
# yes to everything has 0.5, and so has one that says no, or nothing. A reply counts only as the bare word: "Yes." with a full stop
# is wrong, yet recall leaves it out, so recall is 1 in the third line below. LLaVA's own eval_pope.py counts what the model said
# in its first sentence, and takes for yes what has neither "no" nor "not" in it.
#
# Seen with lmms-eval 0.7.3, 100 questions:
#   always "yes"                         accuracy 0.5, recall 1.0, yes ratio 0.5
#   always "no"                          accuracy 0.5, recall 0.0, yes ratio 0.5
#   right, all but two with a full stop  accuracy 0.02, recall 1.0, yes ratio 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --no-deps lmms-eval==0.7.3
cat > "$folder/show.py" <<'PY'
import importlib.util
from pathlib import Path

path = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks" / "pope" / "utils.py"
spec = importlib.util.spec_from_file_location("pope", path)
spec.loader.exec_module(pope := importlib.util.module_from_spec(spec))
truth = [{"question_id": number, "answer": "yes" if number % 2 else "no"} for number in range(100)]
models = {'always "yes"': lambda row: "Yes",
          'always "no"': lambda row: "No",
          "right, all but two with a full stop": lambda row: row["answer"] + "." * (row["question_id"] > 1)}  # fmt: skip
for name, model in models.items():
    scored = [pope.pope_process_results(row, [model(row)]) for row in truth]
    found = {n: getattr(pope, f"pope_aggregate_{n}")([s[f"pope_{n}"] for s in scored]) for n in ("accuracy", "recall", "yes_ratio")}
    print(f"{name:36} accuracy {found['accuracy']}, recall {found['recall']}, yes ratio {found['yes_ratio']}")
PY
diff <("$folder/venv/bin/python" "$folder/show.py") - <<'SEEN'
always "yes"                         accuracy 0.5, recall 1.0, yes ratio 0.5
always "no"                          accuracy 0.5, recall 0.0, yes ratio 0.5
right, all but two with a full stop  accuracy 0.02, recall 1.0, yes ratio 0.5
SEEN
echo "as seen"
