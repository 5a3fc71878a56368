"""The main job on the built-in task: shards, two stages of training, and a model that describes pictures it never saw.

    make demo                       or, in an environment that has the packages: python launch/demo.py

Leaves everything in runs/demo: shards, models, both stages' curves and checkpoints, report.json, captions.png.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from demo_task import CAPTION_PROMPT, Scene, draw, random_scene, write_models, write_shards
from PIL import Image, ImageDraw

from trainer.errors import run_main
from trainer.folders import find_export
from trainer.paths import ROOT

OUT = Path("runs/demo")
HELD_OUT = 256
"""Pictures drawn for the end, from a seed of their own: no training shard holds these drawings."""

ANSWER_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only describe held-out pictures with the last export")
    if parser.parse_args().report:
        report(find_export(ROOT / OUT / "stage2"), ROOT / OUT)
        return
    started = time.monotonic()
    out = ROOT / OUT
    shutil.rmtree(out, ignore_errors=True)
    # The models are tiny: two threads would mostly wait for each other.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print("1/4  tiny models (tiny-qwen learns the language, one to two minutes) and pictures", flush=True)
    write_models(out / "models", seed=0)
    write_shards(out / "shards" / "captions", 4000, seed=1, with_questions=False)
    write_shards(out / "shards" / "questions", 4000, seed=2, with_questions=True)
    write_shards(out / "shards" / "held-out", 256, seed=3, with_questions=False)
    print("2/4  stage 1, align: the projector alone, ZeRO-2", flush=True)
    deepspeed("demo_stage1")
    print("3/4  stage 2, instruct: projector and language model, ZeRO-3", flush=True)
    deepspeed("demo_stage2")
    print("4/4  describing held-out pictures, in a fresh process", flush=True)
    run(sys.executable, str(ROOT / "launch" / "demo.py"), "--report")

    file = out / "report.json"
    found = {**json.loads(file.read_text()), "seconds": round(time.monotonic() - started, 1)}
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"\ncurves       tensorboard --logdir {OUT}\n"
        f"checkpoint   {find_export(out / 'stage2').relative_to(ROOT)}\n"
        f"captions     {OUT / 'captions.png'}\n"
        f"exact match  {found['exact_match']:.1%} with the right image, "
        f"{found['exact_match_shuffled']:.1%} with another sample's\n"
        f"questions    {found['exact_match_questions']:.1%} answered to the letter\n"
        f"seconds      {found['seconds']:.0f}"
    )


def deepspeed(config: str) -> None:
    """One stage, by the command that a user types: two ranks, or one where there is a single GPU."""
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    launcher = Path(sys.executable).with_name("deepspeed")
    run(str(launcher), "--num_gpus", str(ranks), "launch/train.py", "--config", config)


def run(*command: str) -> None:
    print("     $", " ".join(command).replace(f"{ROOT}/", ""), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def report(export: Path, out: Path) -> None:
    """Describes pictures the model never saw, each also given another sample's picture, and draws eight of them."""
    from trainer.generate import Generator

    rng = random.Random(4)
    scenes = [random_scene(rng) for _ in range(HELD_OUT)]
    pictures = [draw(scene, rng) for scene in scenes]
    generator = Generator(export)
    captions = ask(generator, pictures, [CAPTION_PROMPT] * HELD_OUT)
    # What the model says of the next sample's picture, held against this sample's caption.
    others = captions[1:] + captions[:1]
    found = {
        "exact_match": exact_match(scenes, captions),
        "exact_match_shuffled": exact_match(scenes, others),
        "exact_match_questions": questions_answered(generator, scenes, pictures),
        "held_out_images": HELD_OUT,
    }
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    contact_sheet(pictures[:8], captions[:8]).save(out / "captions.png")


def ask(generator, pictures: list[bytes], questions: list[str], batch_size: int = 64) -> list[str]:
    """The answers to one question about each picture."""
    answers: list[str] = []
    for start in range(0, len(pictures), batch_size):
        batch = slice(start, start + batch_size)
        answers += generator.answer(pictures[batch], questions[batch], max_new_tokens=ANSWER_TOKENS)
    return answers


def questions_answered(generator, scenes: list[Scene], pictures: list[bytes]) -> float:
    """The share of all questions about all scenes that are answered to the letter."""
    asked = [(picture, *turn) for scene, picture in zip(scenes, pictures, strict=True) for turn in scene.questions()]
    shown, questions, expected = (list(column) for column in zip(*asked, strict=True))
    answers = ask(generator, shown, questions)
    return sum(map(str.__eq__, answers, expected)) / len(expected)


def exact_match(scenes: list[Scene], captions: list[str]) -> float:
    return sum(scene.caption == caption for scene, caption in zip(scenes, captions, strict=True)) / len(scenes)


def contact_sheet(pictures: list[bytes], captions: list[str]) -> Image.Image:
    """Two rows of pictures, four times enlarged, each with its caption below."""
    width, height, picture = 288, 240, 192
    sheet = Image.new("RGB", (4 * width, 2 * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (encoded, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % 4 * width, number // 4 * height
        enlarged = Image.open(io.BytesIO(encoded)).resize((picture, picture), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + (width - picture) // 2, top + 10))
        canvas.text((left + width // 2, top + picture + 26), caption, fill="black", anchor="mm", font_size=15)
    return sheet


if __name__ == "__main__":
    run_main(main)
