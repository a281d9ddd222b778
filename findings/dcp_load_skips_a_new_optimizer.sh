#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint loads {"model": model, "optim": optim} without the optimizer's moments, and says nothing.
#
# `save` and `load` take whatever has a state_dict and a load_state_dict, so one would guess that a run goes on where it was saved
# if the same two objects are handed to both, as it does with torch.save. The file has the moments. But `load` reads into the tensors
# that it is given: it asks each object for its state_dict first, and that of an optimizer which has not stepped names no moments. They
# are skipped; the learning rate and its like are read, so that a look at the optimizer shows the saved run. The planner's strictness
# (allow_partial_load=False) minds only what is asked for and not in the file. AdamW then starts its moments and step count at zero
# at a learning rate that is past its warmup: a run goes on with steps of full size, each weight's by the sign of one gradient.
# Save and load get_state_dict(model, optim), which makes the moments first (if no gradient is held), and set_state_dict what was loaded.
#
# Seen with torch 2.13.0 (AdamW, two steps, saved and loaded into new objects; then one more step, as without the break):
#   torch.save and torch.load   weights: the same  rate: the same  parameters with moments: 2 of 2  next step: the same
#   dcp of model and optim      weights: the same  rate: the same  parameters with moments: 0 of 2  next step: another
#   dcp of get_state_dict       weights: the same  rate: the same  parameters with moments: 2 of 2  next step: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
cat > "$folder/show.py" <<'PY'
import copy
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.simplefilter("error")  # so that nothing is said unheard
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process shows it as well
features = torch.linspace(-1, 1, 12).reshape(3, 4)


def new():
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, optim, scale):
    (model(features * scale) - 1).square().sum().backward()
    optim.step()
    optim.zero_grad()


model, optim = new()
for scale in (1, -2):
    step(model, optim, scale)
optim.param_groups[0]["lr"] = 0.5
for name in ("torch.save and torch.load", "dcp of model and optim", "dcp of get_state_dict"):
    place = f"{sys.argv[1]}/{name.replace(' ', '_')}"
    loaded, its_optim = new()
    if name.startswith("torch"):
        torch.save({"model": model.state_dict(), "optim": optim.state_dict()}, place)
        states = torch.load(place)
        loaded.load_state_dict(states["model"])
        its_optim.load_state_dict(states["optim"])
    elif name.endswith("optim"):
        dcp.save({"model": model, "optim": optim}, checkpoint_id=place)
        dcp.load({"model": loaded, "optim": its_optim}, checkpoint_id=place)
    else:
        dcp.save(dict(zip(("model", "optim"), get_state_dict(model, optim))), checkpoint_id=place)
        states = dict(zip(("model", "optim"), get_state_dict(loaded, its_optim)))
        dcp.load(states, checkpoint_id=place)
        set_state_dict(loaded, its_optim, model_state_dict=states["model"], optim_state_dict=states["optim"])
    same = [torch.equal(loaded.weight, model.weight), its_optim.param_groups[0]["lr"] == 0.5]
    moments = sum("exp_avg" in state for state in its_optim.state.values())
    went_on, its_own = copy.deepcopy((model, optim))
    for pair in ((went_on, its_own), (loaded, its_optim)):
        step(*pair, 3)
    same.append(torch.allclose(loaded.weight, went_on.weight))
    weights, rate, after = ("the same" if one else "another" for one in same)
    print(f"{name:27} weights: {weights}  rate: {rate}  parameters with moments: {moments} of 2  next step: {after}")
PY
diff <("$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
torch.save and torch.load   weights: the same  rate: the same  parameters with moments: 2 of 2  next step: the same
dcp of model and optim      weights: the same  rate: the same  parameters with moments: 0 of 2  next step: another
dcp of get_state_dict       weights: the same  rate: the same  parameters with moments: 2 of 2  next step: the same
SEEN
echo "as seen"
