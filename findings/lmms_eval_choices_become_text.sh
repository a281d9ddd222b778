#!/usr/bin/env bash
# lmms-eval 0.7.3: tasks that compare choices fail for every model that returns what the interface asks for.
#
# A model's `loglikelihood` returns pairs (number, is_greedy), says lmms_eval/api/model.py. The evaluator puts every result of
# every request type through `unwrap_generation_output`, which is made for answers: a pair of numbers becomes the *text* of the
# pair, "(0.7, True)". The task then takes the texts apart with zip, and the evaluation ends with "too many values to unpack" (the
# command still with exit status 0). A pair inside a GenerationResult comes through as it is, so a model can return that.
# And the choice is where the number is smallest (argmin): it has to be a loss, though the docstring says log-probability.
#
# Seen with lmms-eval 0.7.3:
#   a pair becomes '(0.7, True)', then ValueError: too many values to unpack (expected 2)
#   inside a GenerationResult it stays (0.7, True)
#   the choice: pred = np.argmin(lls)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps lmms-eval==0.7.3
cat > "$folder/show.py" <<'PY'
import re
from pathlib import Path

import lmms_eval.api.instance as instance

evaluator = (Path(instance.__file__).parents[1] / "evaluator.py").read_text()
every = re.search(r"resps = getattr\(lm, reqtype\)\(cloned_reqs\).*?unwrap_generation_output\(x\)", evaluator, re.S)
assert every and "loglikelihood" not in every[0]  # of all request types alike

found = [instance.unwrap_generation_output(pair)[0] for pair in ((0.7, True), (2.3, False))]
try:
    losses, greedy = zip(*found)
except ValueError as error:
    print(f"a pair becomes {found[0]!r}, then ValueError: {error}")
kept = instance.unwrap_generation_output(instance.GenerationResult((0.7, True)))[0]
print(f"inside a GenerationResult it stays {kept!r}")
task = (Path(instance.__file__).parent / "task.py").read_text()
print("the choice:", re.search(r"pred = .*", task)[0])
PY
diff <("$folder/venv/bin/python" "$folder/show.py") - <<'SEEN'
a pair becomes '(0.7, True)', then ValueError: too many values to unpack (expected 2)
inside a GenerationResult it stays (0.7, True)
the choice: pred = np.argmin(lls)
SEEN
echo "as seen"
