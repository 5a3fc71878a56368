"""Newer language models and SigLIP through both stages, and out again."""

import json
import subprocess
import sys

import pytest
import torch
from newer import write_language_model, write_tower
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.config import Config

READER = """
import sys
sys.modules["trainer"] = None          # `import trainer` now fails
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor
folder, out = map(Path, sys.argv[1:])
inputs = load_file(out / "inputs.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(**inputs).logits
answers = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
save_file({"logits": logits, "answers": answers}, out / "read.safetensors")
model.language_model.save_pretrained(out / "language-model")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print("processor", processor.image_processor.image_mean[0], int(processor.image_processor.resample))
print(processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]))
"""


def both_stages(world, config_file: str, out: str, settings: list[str]) -> None:
    """Trains either stage for two steps, goes on for a third, and keeps the live model's logits and answers."""
    from trainer.data.order import MicroBatch, Slot
    from trainer.setup import setup
    from trainer.train import train

    parts = ["model.language_model=null", "model.vision_tower=null", f"model.init_from={out}/stage1"]
    second = ["data.packing=true", "train.global_batch_size=4", *parts]
    stages = [
        ("stage1", 2, ["freeze=[vision_tower, language_model]"]),
        ("stage2", 2, second),
        ("stage2", 3, [*second, "deepspeed=ds_configs/zero2.json"]),  # goes on, converted if it was of another stage
    ]
    for stage, steps, own in stages:
        run = [f"run.output_dir={out}/{stage}", f"train.max_steps={steps}", "checkpoint.keep_last=1"]
        state = setup(Config.load(config_file, [*settings, *run, *own], world.world_size), world)
        before = {name: p.detach().clone() for name, p in state.engine.module.named_parameters() if p.requires_grad}
        train(state)
        still = [n for n, p in state.engine.module.named_parameters() if n in before and torch.equal(p, before[n])]
        assert state.engine.zero_optimization_stage() == 3 or not still, still
        if steps == 3:
            keep(state, state.eval_data.batch(MicroBatch([[Slot(0, i)] for i in range(4)], is_last=True)), world, out)
        state.engine.destroy()


def keep(state, batch, world, out: str) -> None:
    inputs = {name: tensor for name, tensor in state.inputs(batch).items() if name != "labels"}
    state.engine.eval()
    with torch.no_grad():
        logits = state.engine(**inputs).logits
        answers = state.engine.module.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, f"{out}/inputs.safetensors")
        save_file({"logits": logits, "answers": answers}, f"{out}/live.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(
    ("language_model", "tower", "zero"), [("qwen2", "siglip", "zero3"), ("qwen3", "clip", "zero2")]
)
def test_both_stages_train_and_their_export_answers_without_this_package(
    tiny_run, tmp_path, language_model, tower, zero
):
    write_language_model(tmp_path / "lm", language_model)
    write_tower(tmp_path / "tower", tower)
    shards = f"{tiny_run.parent}/shards/tiny-0*.tar"
    settings = [
        f"model.language_model={tmp_path}/lm", f"model.vision_tower={tmp_path}/tower",
        f"deepspeed=ds_configs/{zero}.json", "freeze=[]",
        f"data.eval=[{{name: held out, shards: '{shards}'}}]",
    ]  # fmt: skip
    run_ranks(both_stages, 2, str(tiny_run), str(tmp_path), settings)
    run = tmp_path / "stage2"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["grad_norm"] < 100 for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(run / "checkpoint-000003" / "hf"), str(tmp_path)], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    live, read = load_file(tmp_path / "live.safetensors"), load_file(tmp_path / "read.safetensors")
    assert (live["logits"] - read["logits"]).abs().max() < 1e-5
    assert torch.equal(live["answers"], read["answers"])
    assert ("processor 0.5 2" if tower == "siglip" else "processor 0.48145466 3") in done.stdout  # 2: bilinear
    assert "<|im_start|>user\n<|image_pad|><|im_end|>" in done.stdout

    # The language model alone is a folder of Transformers' own, with its names; a tied head is not written twice.
    weights = load_file(tmp_path / "language-model" / "model.safetensors")
    assert ("lm_head.weight" in weights) is (language_model == "qwen3")
    alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / "language-model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert alone.config.model_type == language_model
