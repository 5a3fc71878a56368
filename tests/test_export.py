"""What is saved is what was trained: the export, opened without this package, gives the live model's logits."""

import json
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from trainer.config import Config
from trainer.models.modeling_qwen import QWenLMHeadModel

READER = """
import sys
sys.modules["trainer"] = None          # `import trainer` now fails
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, out = map(Path, sys.argv[1:])
inputs = load_file(out / "inputs.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(**inputs).logits
model.language_model.save_pretrained(out / "plain-qwen")
save_file({"logits": logits}, out / "logits.safetensors")
"""


def train_and_keep_logits(world, config_file: str, out: str, stage: str) -> None:
    """Trains a few steps, saves, and keeps the live model's logits on one batch."""
    from trainer.data.order import MicroBatch, Slot
    from trainer.setup import setup
    from trainer.train import train

    settings = [f"run.output_dir={out}/run", f"deepspeed=ds_configs/{stage}.json", "train.max_steps=3"]
    state = setup(Config.load(config_file, settings, world.world_size), world)
    train(state)
    batch = state.train_data.batch(MicroBatch([[Slot(0, i)] for i in range(5)], is_last=True))
    inputs = {name: tensor for name, tensor in state.inputs(batch).items() if name != "labels"}
    state.engine.eval()
    with torch.no_grad():
        logits = state.engine(**inputs).logits
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, f"{out}/inputs.safetensors")
        save_file({"logits": logits}, f"{out}/live.safetensors")
    state.engine.destroy()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_export_opens_without_this_package_and_gives_the_live_logits(tiny_run, tmp_path, stage):
    run_ranks(train_and_keep_logits, 2, str(tiny_run), str(tmp_path), stage)
    export = tmp_path / "run" / "checkpoint-000003" / "hf"
    done = subprocess.run(
        [sys.executable, "-c", READER, str(export), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    live = load_file(tmp_path / "live.safetensors")["logits"]
    read = load_file(tmp_path / "logits.safetensors")["logits"]
    assert (live - read).abs().max() < 1e-5

    # The language model alone is a plain Qwen folder, with the original's names.
    names = set(load_file(tmp_path / "plain-qwen" / "model.safetensors"))
    layer = ("ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
             "mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight")  # fmt: skip
    expected = {f"transformer.h.{i}.{name}" for i in range(2) for name in layer}
    assert names == expected | {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert json.loads((tmp_path / "plain-qwen" / "config.json").read_text())["model_type"] == "qwen"
    model = QWenLMHeadModel.from_pretrained(tmp_path / "plain-qwen").eval()
    text = load_file(tmp_path / "inputs.safetensors")["input_ids"][3:4]  # the sample without a picture
    with torch.no_grad():
        assert (model(text).logits - live[3:4]).abs().max() < 1e-5
