"""The built-in task: pictures of one coloured shape at one of nine places, and what can be said about them.

Also the two tiny models that learn it, in the official folder layouts: a CLIP of random weights, and a Qwen that knows
the task's language, but has never seen a picture.
"""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.data.conversation import parse_conversation
from trainer.data.samples import IGNORE_INDEX
from trainer.data.template import ChatTemplate
from trainer.data.writer import ShardWriter
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, VOCABULARY_FILE, build_tokenizer, write_tiktoken

COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 86, 200), "yellow": (240, 210, 30),
    "purple": (128, 50, 160), "orange": (250, 130, 20), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
SHAPES = ["circle", "square", "triangle", "cross", "ring"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
SIZE = 48
PLACE = SIZE // 3
"""Pixels a side of the picture, and of each of its nine places. A patch of the tiny CLIP is one place."""

CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Scene:
    """One coloured shape at one place."""

    colour: str
    shape: str
    row: str
    column: str

    @property
    def caption(self) -> str:
        article = "An" if self.colour[0] in "aeiou" else "A"
        return f"{article} {self.colour} {self.shape} at the {self.row} {self.column}."

    def questions(self) -> list[tuple[str, str]]:
        return [
            ("What shape is it?", f"It is a {self.shape}."),
            (f"What colour is the {self.shape}?", f"The {self.shape} is {self.colour}."),
            ("Where is it?", f"At the {self.row} {self.column}."),
            ("Which row is it in?", f"The {self.row} row."),
            ("Which column is it in?", f"The {self.column} column."),
        ]


def random_scene(rng: random.Random) -> Scene:
    return Scene(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(ROWS), rng.choice(COLUMNS))


def draw(scene: Scene, rng: random.Random) -> bytes:
    """A PNG of the scene; background, size and exact place vary."""
    shade = rng.randint(90, 190)
    image = Image.new("RGB", (SIZE, SIZE), tuple(shade + rng.randint(-12, 12) for _ in range(3)))
    canvas, colour = ImageDraw.Draw(image), COLOURS[scene.colour]
    radius = rng.uniform(5.5, 7.0)
    x = PLACE * COLUMNS.index(scene.column) + PLACE / 2 + rng.uniform(-1, 1)
    y = PLACE * ROWS.index(scene.row) + PLACE / 2 + rng.uniform(-1, 1)
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif scene.shape == "square":
        canvas.rectangle(box, fill=colour)
    elif scene.shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    elif scene.shape == "cross":
        canvas.rectangle((x - radius, y - 2, x + radius, y + 2), fill=colour)
        canvas.rectangle((x - 2, y - radius, x + 2, y + radius), fill=colour)
    else:
        canvas.ellipse(box, outline=colour, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def conversation(scene: Scene, rng: random.Random | None) -> list[dict[str, str]]:
    """The caption as question and answer, or, given a generator, three questions about the scene in a random order."""
    turns = [(CAPTION_PROMPT, scene.caption)] if rng is None else rng.sample(scene.questions(), 3)
    return [
        {"from": speaker, "value": text if number or speaker == "gpt" else f"<image>\n{text}"}
        for number, turn in enumerate(turns) for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]  # fmt: skip


def write_shards(folder: Path, samples: int, seed: int, with_questions: bool) -> None:
    """Shards of so many pictures with a caption, or with questions."""
    rng = random.Random(seed)
    with ShardWriter(folder, samples_per_shard=500) as writer:
        for number in range(samples):
            scene = random_scene(rng)
            record = {"conversations": conversation(scene, rng if with_questions else None)}
            writer.write(f"{folder.name}-{number:06d}", {"png": draw(scene, rng), "json": record})


def write_models(folder: Path, seed: int) -> None:
    """`tiny-qwen`, which knows the task's sentences but never saw a picture, and `tiny-clip`, of random weights."""
    qwen, clip = folder / "tiny-qwen", folder / "tiny-clip"
    qwen.mkdir(parents=True, exist_ok=True)
    write_vocabulary(qwen / VOCABULARY_FILE, seed)
    torch.manual_seed(seed)
    config = QWenConfig(
        vocab_size=len(build_tokenizer(qwen / VOCABULARY_FILE)), hidden_size=96, num_hidden_layers=3,
        num_attention_heads=4, kv_channels=24, intermediate_size=576, seq_length=256, max_position_embeddings=256,
        initializer_range=0.06,
    )  # fmt: skip
    model = QWenLMHeadModel(config)
    teach_language(model, qwen / VOCABULARY_FILE, seed)
    model.save_pretrained(qwen)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PLACE,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(clip)


def teach_language(model: QWenLMHeadModel, vocabulary: Path, seed: int, steps: int = 500, batch_size: int = 32) -> None:
    """What a language model brings along before it sees: it answers in sentences about a scene it is told in words.

    The words stand where the picture will: one control token for each of the nine places, a different one for nothing
    and for every colour and shape.
    """
    tokenizer, rng = build_tokenizer(vocabulary), random.Random(seed)
    image_id, empty = tokenizer.convert_tokens_to_ids([IMAGE_PLACEHOLDER, "<|extra_1|>"])
    template = ChatTemplate(tokenizer, image_id, image_length=len(ROWS) * len(COLUMNS))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model.train()
    for step in tqdm(range(steps), desc="tiny-qwen learns the language", unit="step", disable=None):
        rows = []
        for _ in range(batch_size):
            scene = random_scene(rng)
            words = [empty] * len(template.image_run)
            place = len(COLUMNS) * ROWS.index(scene.row) + COLUMNS.index(scene.column)
            words[place] += 1 + len(SHAPES) * list(COLOURS).index(scene.colour) + SHAPES.index(scene.shape)
            turns = conversation(scene, rng if rng.random() < 0.5 else None)
            input_ids, labels = template.encode(parse_conversation({"conversations": turns}, 1, ""))
            start = input_ids.index(image_id)
            input_ids[start : start + len(words)] = words
            rows.append((torch.tensor(input_ids), torch.tensor(labels)))
        input_ids, labels = (
            torch.nn.utils.rnn.pad_sequence(column, True, fill)
            for column, fill in zip(zip(*rows, strict=True), (0, IGNORE_INDEX), strict=True)
        )
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        model(input_ids, labels=labels, loss_only=True, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_vocabulary(file: Path, seed: int) -> None:
    """A small byte-level vocabulary in tiktoken's format: 256 bytes, then the merges learnt, by rank."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(500)]
    texts = [
        text for scene in scenes for turn in [(CAPTION_PROMPT, scene.caption), *scene.questions()] for text in turn
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*texts, "system user assistant"], trainer)
    write_tiktoken(tokenizer.get_vocab(), file)
