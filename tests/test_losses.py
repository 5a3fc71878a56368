"""The loss of a step is the mean over its supervised tokens, wherever they sit, and so are its gradients.

The reference is plain PyTorch on one process: sample by sample, without padding, full logits, and one division.
Learning rates are zero, so every step sees the weights that the reference has.
"""

import itertools
import json
import random
import shutil
import tarfile
from pathlib import Path

import demo_task
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from trainer.config import Config
from trainer.data.index import ShardIndex, open_index
from trainer.data.loader import ShardDataset
from trainer.data.order import Row, Slot, global_batch
from trainer.data.plan import NamedSource, make_stream
from trainer.data.reader import ShardReader
from trainer.data.template import ChatTemplate
from trainer.data.writer import ShardWriter
from trainer.freeze import freeze
from trainer.load import image_transform, load_model
from trainer.paths import expand_shards
from trainer.tokenizer import load_tokenizer

TOLERANCE = 1e-5
STANDING_STILL = ["optim.learning_rate=0", "optim.projector_learning_rate=0", "data.num_workers=0", "train.bf16=false",
                  "checkpoint.save_steps=1000", "logging.sample_keys=true"]  # fmt: skip


def write_uneven_shards(folder: Path) -> str:
    """Thirteen samples, pictures with an answer of a letter between texts with one of a hundred words or so."""
    rng = random.Random(0)
    with ShardWriter(folder, "uneven", samples_per_shard=5) as writer:
        for i in range(13):
            scene = demo_task.random_scene(rng)
            answer = "e" if i % 2 else " ".join(demo_task.random_scene(rng).caption for _ in range(rng.randint(3, 6)))
            turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": answer}]
            picture = {"png": demo_task.draw(scene, rng)} if i % 2 else {}
            writer.write(f"u{i}", {**picture, "json": {"conversations": turns}})
    return str(folder / "*.tar")


def write_sharp_model(plain: Path, folder: Path) -> str:
    """A language model whose words differ in likelihood: at random weights all losses would be near log(words)."""
    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def is_text(shards: list[ShardIndex], row: Row) -> bool:
    (slot,) = row
    shard = shards[slot.shard]
    return not shard.is_image[shard.members(slot.sample)].any()


def lines(world, config_file: str, settings: list[str]) -> tuple[list[dict], float | None]:
    """Metrics of a run, and the held-out loss behind it."""
    from trainer.setup import setup
    from trainer.train import evaluate, train

    state = setup(Config.load(config_file, settings, world.world_size), world, "none")
    train(state)
    held_out = evaluate(state)[0] if state.eval_data else None
    state.engine.destroy()
    text = Path(state.output_dir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()], held_out


def all_runs(world, config_file: str, runs: dict[str, list[str]]) -> dict[str, tuple[list[dict], float | None]]:
    return {name: lines(world, config_file, settings) for name, settings in runs.items()}


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> dict[str, list[str]]:
    """Settings by name of the run; every run is of two ranks."""
    out = tmp_path_factory.mktemp("losses")
    uneven = write_uneven_shards(out / "shards")
    language_model = write_sharp_model(tiny_run.parent / "tiny-qwen", out / "sharp-qwen")
    shards = [open_index(tar) for tar in expand_shards(uneven)]
    # Two samples to each of two ranks. A seed that gives rank 0 pictures alone and rank 1 texts alone in step 0, and
    # the other way round in step 1.
    kinds = [False, False, True, True, True, True, False, False]
    source = NamedSource("uneven", [index.shard for index in shards])
    order = ([make_stream([source], seed), seed] for seed in itertools.count())
    one_sided = next(
        seed for stream, seed in order
        if [is_text(shards, s) for step in (0, 1) for s in global_batch(stream, step, 4)] == kinds
    )  # fmt: skip

    def settings(name: str, *changes: str, data: str = uneven) -> list[str]:
        sources = f"data.train=[{{name: a, shards: '{data}'}}]"
        return [*STANDING_STILL, f"run.output_dir={out}/{name}", "data.max_length=256",
                f"model.language_model={language_model}", sources, *changes]  # fmt: skip

    tiny = f"{tiny_run.parent}/shards/*.tar"
    return {
        # 8 samples a step, 2 at a time on 2 ranks: two micro-batches each. Seven held-out samples leave a filler.
        "uneven": settings("uneven", "train.max_steps=2", "train.global_batch_size=8", "train.micro_batch_size=2",
                           "optim.max_grad_norm=0", f"data.eval=[{{name: b, shards: '{uneven}'}}]", "eval.samples=7"),
        # 24 samples in batches of 10: the last has 4, all on rank 0, and rank 1 has fillers alone.
        "epoch": settings("epoch", "train.max_steps=null", "train.epochs=1", "train.global_batch_size=10",
                          "train.micro_batch_size=5", data=tiny),
        **{f"one-sided {stage}": settings(stage, f"run.seed={one_sided}", f"deepspeed=ds_configs/{stage}.json",
                                          "train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2")
           for stage in ("zero2", "zero3")},
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny_run, runs) -> dict[str, tuple[list[dict], float | None]]:
    """What each run recorded on rank 0."""
    first, second = run_ranks(all_runs, 2, str(tiny_run), runs, timeout=240)
    assert [held_out for _, held_out in first.values()] == [held_out for _, held_out in second.values()]
    return first


class Plain:
    """Model and data of a run's settings on this process, without the engine."""

    def __init__(self, config_file: Path, settings: list[str]):
        config = Config.load(config_file, settings, world_size=2)
        tokenizer = load_tokenizer(config.model)
        self.model = load_model(config, tokenizer)
        freeze(self.model, config.freeze)
        shards = [open_index(tar) for source in config.data.train for tar in expand_shards(source.shards)]
        template = ChatTemplate(tokenizer, self.model.config.image_token_id, self.model.config.image_context_length)
        self.transform = image_transform(self.model.config)
        reader = ShardReader([index.shard for index in shards], config.data.system_prompt, config.data.caption_prompt)
        self.data = ShardDataset(reader, template, self.transform, config.data.max_length)
        self.slots = {shard.key(i): Slot(n, i) for n, shard in enumerate(shards) for i in range(len(shard))}

    def sums(self, keys: list[str]) -> list[tuple[torch.Tensor, int]]:
        """(sum of the cross-entropies, supervised tokens) of each sample."""
        found = []
        for key in keys:
            example = self.data.example(self.slots[key])
            pixel_values = self.transform.normalize(example.pixel_values, torch.float32)
            input_ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
            logits = self.model(input_ids, pixel_values if len(pixel_values) else None).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            found.append((loss, int((labels[1:] != -100).sum())))
        return found

    def loss(self, keys: list[str]) -> tuple[torch.Tensor, int]:
        """(mean over the supervised tokens of all samples, their number)."""
        sums = self.sums(keys)
        tokens = sum(count for _, count in sums)
        return sum(loss for loss, _ in sums) / tokens, tokens

    def grad_norm(self, loss: torch.Tensor) -> float:
        gradients = torch.autograd.grad(
            loss, [p for p in self.model.parameters() if p.requires_grad], retain_graph=True
        )
        return torch.cat([g.flatten() for g in gradients]).norm().item()


def test_loss_and_gradient_are_those_of_the_token_mean(tiny_run, runs, found):
    plain = Plain(tiny_run, runs["uneven"])
    steps, _ = found["uneven"]
    assert len(steps) == 2
    for step in steps:
        assert len(step["samples"]) == 8
        sums = plain.sums(step["samples"])
        loss, tokens = plain.loss(step["samples"])
        grad_norm = plain.grad_norm(loss)
        assert step["supervised_tokens"] == tokens
        assert step["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(grad_norm, rel=TOLERANCE)
        # Means of means, over the samples, and over four micro-batches of two, would be something else altogether.
        counts = [count for _, count in sums]
        assert max(counts) > 20 * min(counts)
        by_sample = torch.stack([loss / count for loss, count in sums]).mean()
        pairs = [(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        for wrong in (by_sample, torch.stack(pairs).mean()):
            assert abs(wrong.item() / loss.item() - 1) > 100 * TOLERANCE
            assert abs(plain.grad_norm(wrong) / grad_norm - 1) > 100 * TOLERANCE


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_rank_with_text_alone_trains_beside_one_with_pictures(tiny_run, runs, found, stage, fault):
    # That it is here at all shows that no rank waited for another for ever.
    plain = Plain(tiny_run, runs[f"one-sided {stage}"])
    steps, _ = found[f"one-sided {stage}"]
    assert [step["images"] for step in steps] == [2, 2]
    for step in steps:
        loss, _ = plain.loss(step["samples"])
        assert step["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=TOLERANCE)
    fault(f"{stage}: a batch of text alone on one rank", "trains; loss and gradient are right", equal="-")


def test_epoch_ends_with_a_smaller_batch_and_sees_every_sample_once(tiny_run, runs, found):
    plain = Plain(tiny_run, runs["epoch"])
    steps, _ = found["epoch"]
    assert [len(step["samples"]) for step in steps] == [10, 10, 4]
    seen = [key for step in steps for key in step["samples"]]
    in_tars = set()
    for tar in (tiny_run.parent / "shards").glob("*.tar"):
        with tarfile.open(tar) as archive:
            in_tars |= {name.split(".")[0] for name in archive.getnames()}
    assert len(in_tars) == 24
    assert sorted(seen) == sorted(in_tars)
    for step in steps:
        loss, tokens = plain.loss(step["samples"])
        assert step["supervised_tokens"] == tokens  # fillers supervise nothing
        assert step["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=TOLERANCE)
    for count in ("images", "tokens"):
        examples = [plain.data.example(plain.slots[key]) for key in seen]
        lengths = {"images": [len(e.pixel_values) for e in examples], "tokens": [len(e.input_ids) for e in examples]}
        assert sum(step[count] for step in steps) == sum(lengths[count])


def test_held_out_loss_is_the_token_mean_of_the_first_samples(tiny_run, runs, found):
    plain = Plain(tiny_run, runs["uneven"])
    _, held_out = found["uneven"]
    with torch.no_grad():
        expected, _ = plain.loss([f"u{i}" for i in range(7)])
        others = [plain.loss([f"u{i}" for i in range(count)])[0].item() for count in (6, 8, 13)]
    assert held_out == pytest.approx(expected.item(), rel=TOLERANCE)
    assert all(abs(other / expected.item() - 1) > 10 * TOLERANCE for other in others)
