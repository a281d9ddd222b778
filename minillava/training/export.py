"""What comes out of a stage: the model in Hugging Face's layout, and adapters in PEFT's files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from minillava.checkpoints import original_llava
from minillava.checkpoints.adapters import save_peft
from minillava.checkpoints.checkpoint import without_memory
from minillava.checkpoints.save import save_model
from minillava.config import LoRAConfig
from minillava.layers import lora
from minillava.training import parallel
from minillava.training.task import Run


def export(run: Run, folder: Path) -> None:
    """The run's model as a Hugging Face folder, all of it in one dtype (masters are float32 while they are trained)."""
    # Every rank goes through all weights, because it holds its part of each; the first keeps and writes them.
    tensors = ((name, t.to("cpu", run.save_dtype)) for name, t in lora.merged_weights(run.model))
    state = {name: tensor for name, tensor in tensors if parallel.is_main()}
    if parallel.is_main():
        model = without_memory(run.config)
        model.load_state_dict(state, assign=True)
        save_model(model, folder, run.tokenizer)


def export_adapters(run: Run, folder: Path, trained: dict[str, Tensor], configs: dict[str, LoRAConfig]) -> None:
    """What was trained beside the run's base in PEFT's files, and in the original repository's where that has them."""
    wanted = run.recipe.model
    original = original_llava.write(run.config, wanted.vision_from, wanted.decoder_from)
    save_peft(folder, trained, configs, wanted.base, original)
