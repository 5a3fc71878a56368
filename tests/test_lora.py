"""LoRA: adapters train, the language model under them does not move, and PEFT opens what is saved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import TIMINGS, run_ranks
from safetensors.torch import load_file, save_file
from shapes import batch_of, small_model

from trainer import lora
from trainer.checkpoint import existing
from trainer.config import Config, LoraConfig
from trainer.engine import checkpoint_activations
from trainer.errors import CheckpointError, ConfigError
from trainer.freeze import describe_trained, freeze, part_of, table
from trainer.load import check_handover, load_model, load_trained
from trainer.manifest import check_whole, read
from trainer.tokenizer import load_tokenizer

SETTINGS = ["lora={r: 4, alpha: 8, dropout: 0.1, target_modules: c_attn|w1|w2}", "freeze=[vision_tower]"]
STEPS = 4


# --- In a model ---


def adapted(**settings) -> torch.nn.Module:
    model = small_model()
    lora.add_adapter(model, LoraConfig(**{"r": 4, **settings}), seed=0)
    return model


def names_of(model) -> set[str]:
    return {name for name, _ in model.named_parameters() if lora.is_adapter(name)}


def test_adapters_are_beside_the_named_layers_of_the_language_model_alone():
    model = adapted(target_modules="c_proj | w1")
    expected = {
        f"language_model.transformer.h.{layer}.{module}.lora_{half}.default.weight"
        for layer in range(4) for module in ("attn.c_proj", "mlp.c_proj", "mlp.w1") for half in "AB"
    }  # fmt: skip
    assert names_of(model) == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("language_model.")} == expected
    # What stands elsewhere is for `freeze` to say.
    assert {part_of(name) for name in trained} == {"lora", "projector", "vision_tower"}


def test_layers_of_the_tower_with_the_same_name_stay_as_they_are():
    model = small_model()
    for block in model.language_model.transformer.h:  # as the layers of newer language models are called
        block.attn.q_proj = torch.nn.Linear(8, 8)
    lora.add_adapter(model, LoraConfig(target_modules="q_proj"), seed=0)
    assert len(names_of(model)) == 2 * 4
    assert all(name.startswith("language_model.") for name in names_of(model))


@pytest.mark.parametrize("targets", ["c_attn|q_proj", "lm_head", "attn", "wte", "c_at"])
def test_a_name_of_no_linear_layer_is_refused_with_those_there_are(targets):
    with pytest.raises(ConfigError) as raised:
        adapted(target_modules=targets)
    assert f"{targets.split('|')[-1]!r} names no linear layer" in str(raised.value)
    assert "it has c_attn, c_proj, w1, w2, to be given" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_begins_as_its_seed_says_and_changes_nothing(dtype):
    model, plain = small_model(dtype), small_model(dtype)
    inputs, _ = batch_of(model, packed=False)
    torch.manual_seed(5)  # whatever ran before
    lora.add_adapter(model, LoraConfig(r=4, dropout=0.0), seed=3)
    again = small_model(dtype)
    lora.add_adapter(again, LoraConfig(r=4), seed=3)
    weights, others = dict(model.named_parameters()), dict(again.named_parameters())
    for name in names_of(model):
        assert weights[name].dtype == dtype
        assert torch.equal(weights[name], others[name]), name
        assert bool(weights[name].any()) == (".lora_A." in name)
    a = weights["language_model.transformer.h.0.attn.c_attn.lora_A.default.weight"].detach().float()
    # Uniform within 1/sqrt(256 inputs) = 1/16, as PEFT's: a deviation of 1/16/sqrt(3).
    assert a.abs().max() <= 1 / 16
    assert a.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.1)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    lora.add_adapter(again := small_model(dtype), LoraConfig(r=4), seed=4)
    assert not torch.equal(again.language_model.transformer.h[0].attn.c_attn.lora_A["default"].weight.float(), a)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_gradients_reach_the_lowest_layer_under_frozen_embeddings(every):
    model = adapted(dropout=0.0)
    freeze(model, ["vision_tower", "projector"])  # nothing below the first adapter trains
    checkpoint_activations(model, every)
    inputs, _ = batch_of(model, packed=False)
    model(**inputs, loss_only=True, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        elif not lora.is_adapter(name):
            assert parameter.grad is None, name


def test_gradients_are_those_of_the_loss_of_all_logits():
    model = adapted(target_modules="c_attn|c_proj|w1|w2", dropout=0.0)
    freeze(model, ["vision_tower"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    inputs, _ = batch_of(model, packed=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = [model(**inputs, loss_only=loss_only, use_cache=False).loss for loss_only in (True, False)]
    torch.testing.assert_close(losses[0], losses[1])
    found, expected = (torch.autograd.grad(loss, trained) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_freeze_names_weights_as_they_are_without_lora_and_no_adapter():
    model = adapted()
    # The language model is frozen anyway, which may be said of it as a whole; adapters are in each of the others.
    freeze(model, ["vision_tower", "language_model", r"h\.0\.attn\.c_attn\.weight$|linear_1\.bias", "w1|linear_2"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not lora.is_adapter(name)}
    assert trained == {"multi_modal_projector.linear_1.weight"}
    assert all(p.requires_grad for name, p in model.named_parameters() if lora.is_adapter(name))
    with pytest.raises(ConfigError, match="'lora_A' matches no parameter"):
        freeze(model, ["lora_A"])


@pytest.mark.parametrize("pattern", [r"transformer\.h\.[01]\.", r"c_attn\.weight$", "language_model.layers.0-1"])
def test_a_pattern_that_would_freeze_some_of_a_frozen_language_model_is_refused(pattern):
    with pytest.raises(ConfigError) as raised:
        freeze(adapted(), ["vision_tower", pattern])
    # Whoever writes it wants layers that do not change, and with adapters every one does.
    assert str(raised.value).startswith("freeze: with lora all of the language model's own weights are frozen")
    assert f"leave '{pattern}' out" in str(raised.value)
    freeze(small_model(), ["vision_tower", pattern])  # without LoRA it is as good as any


def test_the_table_counts_adapters_apart_and_their_scale_is_part_of_what_trains():
    model = adapted()
    freeze(model, ["vision_tower"])
    rows = {line.split()[0]: line.split()[1:] for line in table(model).splitlines()}
    # A layer: c_attn 4 x (256 + 768), w1 and w2 4 x (256 + 688) each; 4 layers.
    assert rows["lora"] == ["46,592", "46,592"]
    assert rows["language_model"][1] == "0"
    alphas = [describe_trained(adapted(alpha=alpha)) for alpha in (8, 16)]
    assert alphas[0] != alphas[1]
    assert describe_trained(adapted(alpha=8, dropout=0.5)) == alphas[0]


# --- Through training ---


def run(
    world,
    config_file: str,
    out: str,
    stage: str,
    resume: str,
    until: int | None = None,
    logits: bool = False,
    keep: int = 1,
):
    from trainer.data.order import MicroBatch, Slot
    from trainer.engine import full_weights
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}", f"deepspeed=ds_configs/{stage}.json", f"train.max_steps={STEPS}",
        "checkpoint.save_steps=2", f"checkpoint.keep_last={keep}", "data.num_workers=0", "logging.sample_keys=true",
        *SETTINGS,
    ]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, resume)
    first = full_weights(state.engine, trained=True)
    train(state, until)
    if logits:
        batch = state.train_data.batch(MicroBatch([[Slot(0, i)] for i in range(5)], is_last=True))
        inputs = {name: tensor for name, tensor in state.inputs(batch).items() if name != "labels"}
        state.engine.eval()
        with torch.no_grad():
            found = state.engine(**inputs).logits
        if world.is_main:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, f"{out}/inputs.safetensors")
            save_file({"logits": found}, f"{out}/live.safetensors")
            save_file(first, f"{out}/first.safetensors")
    state.engine.destroy()


def straight_and_resumed(world, config_file: str, out: str) -> None:
    for stage in ("zero2", "zero3"):
        run(world, config_file, f"{out}/{stage}", stage, "none", logits=True, keep=0)
        run(world, config_file, f"{out}/{stage}-resumed", stage, "none", until=2)
        run(world, config_file, f"{out}/{stage}-resumed", stage, "auto")


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> Path:
    """LoRA runs on two ranks, with activation checkpointing and dropout; zero2 and zero3, each also resumed."""
    out = tmp_path_factory.mktemp("lora")
    run_ranks(straight_and_resumed, 2, str(tiny_run), str(out))
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found]


STAGES = pytest.mark.parametrize("stage", ["zero2", "zero3"])


@STAGES
def test_a_resumed_run_equals_the_straight_one_bitwise(runs, stage):
    straight, resumed = runs / stage, runs / f"{stage}-resumed"
    assert [line["step"] for line in lines(straight)] == list(range(1, STEPS + 1))
    assert lines(resumed) == lines(straight)
    # The checkpoint whose frozen files it shared is gone.
    assert [path.name for path in existing(resumed)] == ["checkpoint-000004"]
    check_whole(resumed / "checkpoint-000004")
    for folder in ("base", "hf"):
        one, other = (weights(run / "checkpoint-000004" / folder) for run in (straight, resumed))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


@STAGES
def test_the_language_model_stays_bitwise_and_adapter_and_projector_move(runs, tiny_run, stage):
    checkpoint = runs / stage / "checkpoint-000004"
    before, base = load_file(runs / stage / "first.safetensors"), weights(checkpoint / "base")
    for part, folder in (("language_model", "tiny-qwen"), ("vision_tower", "tiny-clip")):
        original = weights(tiny_run.parent / folder)
        assert {f"{part}.{name.removeprefix('vision_model.')}" for name in original} == {
            name for name in base if name.startswith(part)
        }
        for name, tensor in original.items():
            assert torch.equal(tensor, base[f"{part}.{name.removeprefix('vision_model.')}"]), name
    for name, tensor in weights(checkpoint / "hf").items():
        live = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert not torch.equal(tensor, before[live]), name
    assert not torch.equal(
        base["multi_modal_projector.linear_1.weight"], before["multi_modal_projector.linear_1.weight"]
    )
    # Frozen files are on the disk once a run.
    frozen = [runs / stage / f"checkpoint-00000{n}" / "base" / "model-frozen.safetensors" for n in (2, 4)]
    assert frozen[0].stat().st_ino == frozen[1].stat().st_ino
    for saved in (runs / stage).glob("checkpoint-*"):
        check_whole(saved)
        on_disk = {str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()}
        assert read(saved).keys() == on_disk - {"manifest.json"}


def test_adapters_begin_alike_under_both_stages_and_train_at_the_rate_outside_the_projector(runs):
    one, other = (load_file(runs / stage / "first.safetensors") for stage in ("zero2", "zero3"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    rates = lines(runs / "zero2")[0]["learning_rate"]
    assert rates == pytest.approx({"projector": 5e-3, "lora": 2e-3})


READER = """
import sys
sys.modules["trainer"] = None          # `import trainer` now fails
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
checkpoint, run, out = map(Path, sys.argv[1:])
inputs = load_file(run / "inputs.safetensors")
base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", trust_remote_code=True)
model = PeftModel.from_pretrained(base, checkpoint / "hf").eval()
assert len(AutoTokenizer.from_pretrained(checkpoint / "hf")) == len(AutoTokenizer.from_pretrained(checkpoint / "base"))
found = AutoPeftModelForCausalLM.from_pretrained(checkpoint / "hf", trust_remote_code=True).eval()
with torch.no_grad():
    logits = {"adapter": model(**inputs).logits, "by its base's name": found(**inputs).logits}
    logits["base"] = model.unload()(**inputs).logits
    logits["merged"] = found.merge_and_unload()(**inputs).logits
save_file(logits, out / "logits.safetensors")
"""


@STAGES
def test_peft_opens_the_adapter_in_a_fresh_process_and_gives_the_live_logits(runs, stage, tmp_path):
    checkpoint = runs / stage / "checkpoint-000004"
    done = subprocess.run(
        [sys.executable, "-c", READER, str(checkpoint), str(runs / stage), str(tmp_path)], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    live, read = load_file(runs / stage / "live.safetensors")["logits"], load_file(tmp_path / "logits.safetensors")
    for name in ("adapter", "by its base's name", "merged"):
        assert (read[name] - live).abs().max() < 1e-5, name
    assert (read["base"] - live).abs().max() > 1e-3  # without its adapter it says something else


# --- The next stage, and folders that are not whole ---


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """A copy of the ZeRO-2 run's last checkpoint."""
    return Path(shutil.copytree(runs / "zero2" / "checkpoint-000004", tmp_path / "checkpoint-000004"))


def logits(model, runs: Path) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**load_file(runs / "zero2" / "inputs.safetensors")).logits


def test_a_lora_run_starts_the_next_stage_merged_with_or_without_a_new_adapter(runs, tiny_run):
    live = load_file(runs / "zero2" / "live.safetensors")["logits"]
    for settings in ([], SETTINGS):
        start = [f"model.init_from={runs / 'zero2'}", "model.language_model=null", "model.vision_tower=null"]
        config = Config.load(tiny_run, [*start, *settings])
        check_handover(config.model)
        model = load_model(config, load_tokenizer(config.model))
        assert bool(names_of(model)) == bool(settings)
        assert (logits(model, runs) - live).abs().max() < 1e-5


def test_an_adapter_takes_the_base_beside_it_then_the_one_it_names_and_misses_none_in_silence(runs, copy, tmp_path):
    live = load_file(runs / "zero2" / "live.safetensors")["logits"]
    away = Path(shutil.copytree(copy / "hf", tmp_path / "away" / "adapter"))
    named = json.loads((away / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert lora.base_of(copy / "hf") == copy / "base"
    assert str(lora.base_of(away)) == named == str((runs / "zero2" / "checkpoint-000004" / "base").resolve())
    assert (logits(load_trained(away), runs) - live).abs().max() < 1e-5
    lora.set_base(away, tmp_path / "gone")
    with pytest.raises(CheckpointError) as raised:
        load_trained(away)
    assert f"{away}: a LoRA adapter whose base is gone: no model in {away.parent / 'base'}" in str(raised.value)
    assert str(tmp_path / "gone") in str(raised.value)


def cut_weights(hf: Path) -> str:
    file = hf / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "cannot be opened beside its base"


def drop_a_weight(hf: Path) -> str:
    found = load_file(hf / "adapter_model.safetensors")
    del found["base_model.model.language_model.transformer.h.1.mlp.w2.lora_B.weight"]
    save_file(found, hf / "adapter_model.safetensors")
    return "it lacks base_model.model.language_model.transformer.h.1.mlp.w2.lora_B.weight"


def another_rank(hf: Path) -> str:
    file = hf / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 3}))
    return "size mismatch"


def another_kind(hf: Path) -> str:
    (hf / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    return "an adapter of type 'IA3', expected 'LORA'"


@pytest.mark.parametrize("damage", [cut_weights, drop_a_weight, another_rank, another_kind])
def test_an_adapter_that_is_not_whole_is_refused_by_name(copy, damage):
    said = damage(copy / "hf")
    with pytest.raises(CheckpointError) as raised:
        load_trained(copy)
    assert said in str(raised.value)


@pytest.mark.parametrize("file", ["base/model-frozen.safetensors", "hf/adapter_model.safetensors"])
def test_a_changed_byte_is_named_before_the_next_stage(copy, file):
    content = bytearray((copy / file).read_bytes())
    content[-5] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not whole: {file} has other bytes"):
        check_handover(SimpleNamespace(init_from=str(copy), tokenizer=None))
    with pytest.raises(CheckpointError, match=f"not whole: {file} has other bytes"):
        check_whole(copy)
