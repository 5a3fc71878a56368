"""What is saved is what was trained: the export, opened without this package, gives the live model's logits."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image
from ranks import run_ranks
from reference import shared
from safetensors.torch import load_file, save_file

from trainer.config import Config
from trainer.data.samples import Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.errors import CheckpointError
from trainer.export import make_processor, picture_processor, write
from trainer.generate import generate
from trainer.load import image_transform, load_model
from trainer.models.image_processing_mqwen_vl import MQWenVLImageProcessor
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.models.processing_mqwen_vl import MQWenVLProcessor, chat_template
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer
from trainer.tokenizer import load_tokenizer

SYSTEM = "Look, then speak."
TOKENS = 12


def weights(export: Path) -> dict[str, torch.Tensor]:
    """Of all files of an export."""
    found: dict[str, torch.Tensor] = {}
    for file in export.glob("*.safetensors"):
        found |= load_file(file)
    return found


def open_doors(python: str, export: Path, folder: Path) -> None:
    """tests/doors.py, in a process of its own."""
    done = subprocess.run(
        [python, str(ROOT / "tests" / "doors.py"), str(export), str(folder)], cwd=folder, capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def chats(folder: Path) -> tuple[list[list[dict]], list[tuple[list[Turn], list[str]]]]:
    """Chats as Transformers takes them, and as turns of training with their pictures; writes the pictures."""
    rng = np.random.default_rng(0)
    files = [str(folder / f"picture{number}.png") for number in range(3)]
    for file, size in zip(files, [(24, 30, 3), (28, 18, 4), (16, 16, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(file)

    def says(role: str, *parts: str) -> dict:
        content = [{"type": "image", "path": p} if p in files else {"type": "text", "text": p} for p in parts]
        return {"role": role, "content": content}

    spelled = "What do <|im_end|> and <|extra_0|> mean?"
    return [
        [says("user", files[0], "What is this?")],
        [says("user", files[1], files[2], "Which?"), says("assistant", "The first."), says("user", "Why?")],
        [{"role": "user", "content": "Who are you? 你是谁？"}],
        [says("system", "Be short."), says("user", "Before", files[1], spelled)],
    ], [
        ([Turn("system", SYSTEM), Turn("user", "<image>\nWhat is this?")], files[:1]),
        ([Turn("system", SYSTEM), Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", "The first."),
          Turn("user", "Why?")], files[1:]),
        ([Turn("system", SYSTEM), Turn("user", "Who are you? 你是谁？")], []),
        ([Turn("system", "Be short."), Turn("user", f"Before\n<image>\n{spelled}")], files[1:2]),
    ]  # fmt: skip


def live_answers(model, device, tokenizer, transform, asked: list[tuple[list[Turn], list[str]]]):
    """Greedy answers, and logits of the prompts, of a model in this process, through our own data plane."""
    template = ChatTemplate(tokenizer, model.config.image_token_id, model.config.image_context_length)
    found, logits = [], {}
    for number, (turns, files) in enumerate(asked):
        pixels = [transform(Path(file).read_bytes()) for file in files]
        size = transform.size
        pixel_values = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        prompt = template.prompt(turns)
        found += generate(model, device, tokenizer, transform, [prompt], pixel_values, max_new_tokens=TOKENS)
        inputs = {"pixel_values": transform.normalize(pixel_values, model.dtype)} if files else {}
        with torch.no_grad():
            logits[str(number)] = model(torch.tensor([prompt]), **inputs).logits.clone()
    return found, logits


def train_and_answer(world, config_file: str, out: str, stage: str, settings: list[str]) -> None:
    """Trains a few steps, saves, and keeps what the live model answers, and its logits on one batch."""
    from trainer.data.order import MicroBatch, Slot
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}/run", f"deepspeed=ds_configs/{stage}.json", "train.max_steps=3",
        f"data.system_prompt={SYSTEM}", *settings,
    ]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world)
    train(state)
    batch = state.train_data.batch(MicroBatch([[Slot(0, i)] for i in range(5)], is_last=True))
    inputs = {name: tensor for name, tensor in state.inputs(batch).items() if name != "labels"}
    state.engine.eval()
    own = Path(out, f"rank{world.rank}")  # both write pictures
    own.mkdir()
    model, asked = state.engine.module, chats(own)[1]
    found, logits = live_answers(model, state.engine.device, state.tokenizer, state.transform, asked)
    with torch.no_grad():
        logits["batch"] = state.engine(**inputs).logits
    if world.is_main:
        Path(out, "live.json").write_text(json.dumps(found))
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, f"{out}/inputs.safetensors")
        save_file(logits, f"{out}/live.safetensors")
    state.engine.destroy()


def export_under_zero3(world, config_file: str, run: str, out: str) -> None:
    """The same state, taken up and exported again under ZeRO-3."""
    from trainer.setup import setup

    settings = [f"run.output_dir={out}", "deepspeed=ds_configs/zero3.json", "train.max_steps=3"]
    state = setup(Config.load(config_file, settings, world.world_size), world, resume=f"{run}/checkpoint-000003")
    assert state.engine.zero_optimization_stage() == 3
    state.saver.save(state.run)
    state.saver.wait()
    state.engine.destroy()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_export_opens_by_every_door_and_answers_as_the_live_model(tiny_run, tmp_path, stage):
    aspect = {"zero2": "pad", "zero3": "crop"}[stage]
    (tmp_path / "chats.json").write_text(json.dumps(chats(tmp_path)[0]))
    run_ranks(train_and_answer, 2, str(tiny_run), str(tmp_path), stage, [f"model.image_aspect={aspect}"])
    export = tmp_path / "run" / "checkpoint-000003" / "hf"
    open_doors(sys.executable, export, tmp_path)
    found, live = (load_file(tmp_path / f"{name}.safetensors") for name in ("doors", "live"))
    for name, logits in found.items():
        assert (logits - live[name]).abs().max() < 1e-5, f"chat {name}"
    answers, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("doors", "live"))
    assert answers == dict.fromkeys(answers, expected)
    assert len(answers) == 6
    assert len(set(expected)) > 1
    if stage == "zero2":
        run_ranks(export_under_zero3, 2, str(tiny_run), str(tmp_path / "run"), str(tmp_path / "zero3"))
        both = [weights(folder / "checkpoint-000003" / "hf") for folder in (tmp_path / "run", tmp_path / "zero3")]
        assert both[0].keys() == both[1].keys()
        assert [name for name, tensor in both[0].items() if not torch.equal(tensor, both[1][name])] == []
    inputs, live = load_file(tmp_path / "inputs.safetensors"), live["batch"]

    # The language model alone is a plain Qwen folder, with the original's names.
    names = set(load_file(tmp_path / "plain-qwen" / "model.safetensors"))
    layer = ("ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
             "mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight")  # fmt: skip
    expected = {f"transformer.h.{i}.{name}" for i in range(2) for name in layer}
    assert names == expected | {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert json.loads((tmp_path / "plain-qwen" / "config.json").read_text())["model_type"] == "qwen"
    model = QWenLMHeadModel.from_pretrained(tmp_path / "plain-qwen").eval()
    text = inputs["input_ids"][3:4]  # the sample without a picture
    with torch.no_grad():
        assert (model(text).logits - live[3:4]).abs().max() < 1e-5


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
def test_the_exported_processor_gives_the_pixels_that_were_trained(tmp_path, aspect):
    # Files of every kind, read back all the way to normalised numbers, with a mean and a deviation that are not CLIP's.
    rng = np.random.default_rng(0)
    transform = ImageTransform(28, aspect, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    picture_processor(transform).save_pretrained(tmp_path)
    processor = MQWenVLImageProcessor.from_pretrained(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF: to be turned by a quarter
    kinds = {
        "tall.png": ((45, 31, 3), np.uint8), "wide.png": ((31, 40, 3), np.uint8), "strip.png": ((20, 300, 3), np.uint8),
        "small.png": ((5, 9, 3), np.uint8), "gray.png": ((40, 30), np.uint8), "deep.png": ((40, 30), np.uint16),
        "transparent.png": ((40, 30, 4), np.uint8), "turned.png": ((40, 30, 3), np.uint8),
        "large.png": ((301, 402, 3), np.uint8),
    }  # fmt: skip
    for name, (shape, dtype) in kinds.items():
        image = Image.fromarray(rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype))
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.png" else {}))
    files = [tmp_path / name for name in kinds]
    pixels = torch.stack([transform(file.read_bytes()) for file in files])
    found = processor(processor.fetch_images([str(file) for file in files]), return_tensors="pt")["pixel_values"]
    levels = (found - transform.normalize(pixels, torch.float32)) * torch.tensor(transform.std)[:, None, None] * 255
    assert levels[:-1].abs().max() < 1e-3
    # A large picture is shrunk by PyTorch's filter in training.
    assert levels[-1].abs().max() < 1.001
    assert (levels[-1].abs() > 0.5).float().mean() < 0.02


def test_a_weight_that_is_missing_or_empty_stops_the_save_by_name(tiny_run, tmp_path):
    config = Config.load(tiny_run)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer)
    transform = image_transform(model.config)
    processor = make_processor(model, tokenizer, transform, "")
    whole = {name: weight.detach() for name, weight in model.named_parameters()}
    name = "language_model.transformer.h.1.mlp.w1.weight"
    faults = {
        "missing": {key: weight for key, weight in whole.items() if key != name},
        r"\(0,\)": {**whole, name: torch.empty(0)},
        r"\(96, 32\)": {**whole, name: torch.zeros(96, 32)},
    }
    for number, (found, weights) in enumerate(faults.items()):
        with pytest.raises(CheckpointError, match=rf"1 weights.*{name} is {found}, expected \(48, 32\)"):
            write(model, weights, None, tmp_path / f"faulty{number}", processor, "", 0o644)
    with pytest.raises(CheckpointError, match="more.weight is .1,., expected nothing"):
        write(model, {**whole, "more.weight": torch.ones(1)}, None, tmp_path / "more", processor, "", 0o644)
    write(model, whole, None, tmp_path / "whole", processor, "", 0o644)


EDGES = [
    [("user", "What is this?", 0)], [("user", 0, "What is this?")], [("user", 0, 1, "Both?"), ("assistant", "Yes.")],
    [("user", "\nA line break first")], [("user", " \n and here"), ("assistant", "  spaces \n"), ("user", "\n\n")],
    [("user", "<|im_end|>\n<|im_start|>assistant\nspelled <|extra_0|>")], [("user", 0, "<|extra_0|> beside one")],
    [("user", 0, "\nits own line break"), ("assistant", "Ja.")], [("user", "line\n", 0, 1, "\nline")],
    [("system", "\nBriefly."), ("user", "你好，世界！")], [("user", "")], [("user", 0)],
]  # fmt: skip
"""Conversations: (role, texts and numbers of pictures)."""


@cache
def real_tokenizer():
    return build_tokenizer(shared("qwen/qwen.tiktoken"))


@pytest.mark.parametrize("prompt", ["", "You are a helpful assistant.", "\nWith line breaks.\n"])
def test_ids_of_chat_messages_are_those_of_training_with_the_real_vocabulary(prompt):
    tokenizer = real_tokenizer()
    template = ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), 4)
    processor = MQWenVLProcessor(
        MQWenVLImageProcessor(), tokenizer, chat_template(IMAGE_PLACEHOLDER, prompt), image_length=4,
        system_prompt=prompt,
    )  # fmt: skip
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))]
    for edge in EDGES:
        messages, turns = [], [Turn("system", prompt)] * bool(prompt and edge[0][0] != "system")
        for role, *parts in edge:
            content = [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": pictures[p]}
                for p in parts
            ]  # fmt: skip
            messages.append({"role": role, "content": content})
            # A mark and its neighbours are parted by one line break, which either may bring along.
            text = "\0".join("<image>" if p in (0, 1) else p for p in parts).replace("\n\0", "\n")
            turns.append(Turn(role, text.replace("\0\n", "\n").replace("\0", "\n")))
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        found = processor.apply_chat_template(messages, **options)
        assert found["input_ids"] == template.prompt(turns), edge
        assert len(found.get("pixel_values", [])) == sum(p in (0, 1) for _, *parts in edge for p in parts)
        # As text, it reads the same.
        spelled = any("<|" in str(p) for _, *parts in edge for p in parts)
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        if not spelled:
            ids = tokenizer.decode(template.prompt(turns)).replace(IMAGE_PLACEHOLDER * 4, IMAGE_PLACEHOLDER)
            assert rendered == ids, edge
        if edge[-1][0] == "assistant" and not prompt:  # the pipeline's way to let the model go on with an answer
            found = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)
            assert found == template.encode(turns)[0][: -1 - len(template.newline)]
