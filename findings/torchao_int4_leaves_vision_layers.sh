#!/usr/bin/env bash
# torchao 0.18.0: asked for int4, `quantize_` leaves a third of a SigLIP tower's weights in bf16 and says nothing.
#
# Four bits come in groups of 256, 128, 64 or 32 inputs that share a scale. Inputs of a language model's layers are multiples of all of
# them, but the MLP of SigLIP so400m (LLaVA-OneVision, PaliGemma, Gemma 3) is 4,304 wide, a multiple of 16 only. One would guess an error
# for its fc2, as torchao's own IntxWeightOnlyConfig raises for the same layer, or a last group that is padded, or a warning.
# Int4WeightOnlyConfig returns the weight as it was, with a line of level INFO, which Python does not show unless told to; so does
# PrototypeInt4WeightOnlyConfig, its sister for CPUs. No group size helps: 32 is the smallest, and one that is not among the choices (48)
# is taken too, and leaves everything. In groups of 128 such a tower takes 8.1 bits a weight and not 4.25, and whoever gives memory, speed
# or loss of quality of "int4" measured a mixture. After quantize_, list the Linear layers whose weight is still a plain tensor;
# Int8WeightOnlyConfig takes them.
#
# Seen with torch 2.13.0 (CPU), the six matrices of one layer of each tower:
#   CLIP L/14,     groups of 128   left: nothing               0 % of the weights   Intx quantises
#   SigLIP so400m, groups of 128   left: fc2                  33 % of the weights   Intx raises
#   SigLIP so400m, groups of  32   left: fc2                  33 % of the weights   Intx raises
#   CLIP L/14,     groups of  48   left: q k v out fc1 fc2   100 % of the weights   Intx raises
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 torchao==0.18.0
cat > "$folder/show.py" <<'PY'
import torch
from torch.nn import Linear, ModuleDict
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_


def tower(width, middle):
    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width)) | {"fc1": (width, middle), "fc2": (middle, width)}
    return ModuleDict({name: Linear(*shape, bias=False, dtype=torch.bfloat16) for name, shape in shapes.items()})


def left(layers):
    return [name for name, layer in layers.items() if type(layer.weight.data) is torch.Tensor]


def count(layers, names):
    return sum(layers[name].weight.numel() for name in names)


def show(name, width, middle, group):
    layers = tower(width, middle)
    quantize_(layers, PrototypeInt4WeightOnlyConfig(group_size=group))
    found = left(layers)
    for layer in found:  # left by the config for GPUs too, which needs a GPU's kernels for the others
        alone = ModuleDict({layer: tower(width, middle)[layer]})
        quantize_(alone, Int4WeightOnlyConfig(group_size=group))
        assert left(alone) == [layer]
    share = round(100 * count(layers, found) / count(layers, layers))
    try:
        quantize_(tower(width, middle), IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))
        other = "quantises"
    except AssertionError:
        other = "raises"
    named = " ".join(found) or "nothing"
    print(f"{name + ',':14} groups of {group:3}   left: {named:18}  {share:3} % of the weights   Intx {other}")


show("CLIP L/14", 1024, 4096, 128)
show("SigLIP so400m", 1152, 4304, 128)
show("SigLIP so400m", 1152, 4304, 32)
show("CLIP L/14", 1024, 4096, 48)
PY
diff <("$folder/venv/bin/python" "$folder/show.py" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
CLIP L/14,     groups of 128   left: nothing               0 % of the weights   Intx quantises
SigLIP so400m, groups of 128   left: fc2                  33 % of the weights   Intx raises
SigLIP so400m, groups of  32   left: fc2                  33 % of the weights   Intx raises
CLIP L/14,     groups of  48   left: q k v out fc1 fc2   100 % of the weights   Intx raises
SEEN
echo "as seen"
