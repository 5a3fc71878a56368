"""What the model answers while it trains is what its export answers, on all ranks alike."""

from pathlib import Path

import pytest
from conftest import write_tiny_shards
from ranks import run_ranks

from trainer.config import Config
from trainer.generate import Generator, generate


def answered(world, config_file: str, out: str, stage: str) -> list:
    from trainer.setup import setup
    from trainer.train import evaluate, train

    settings = [f"run.output_dir={out}/run", f"deepspeed=ds_configs/{stage}.json", "train.max_steps=3",
                f"data.eval=[{{name: e, shards: '{out}/held-out/*.tar'}}]", "eval.every_steps=2", "eval.answers=5",
                "eval.max_new_tokens=12", "data.num_workers=0"]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, "none")
    train(state)
    loss, found = evaluate(state)
    assert state.engine.module.training
    state.engine.destroy()
    if world.is_main:
        opened = Generator(Path(out, "run", "checkpoint-000003", "hf"))
        questions = [question for question, _ in found]
        alone = [
            generate(opened.model, opened.device, opened.tokenizer, opened.transform, [q.prompt], q.pixel_values,
                     max_new_tokens=12)[0]
            for q in questions
        ]  # fmt: skip
        return [(q.key, len(q.pixel_values), answer, other) for (q, answer), other in zip(found, alone, strict=True)]
    return [(q.key, len(q.pixel_values), answer) for q, answer in found]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_answers_are_those_of_the_export_on_all_ranks(tiny_run, tmp_path, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tiny_shards(tmp_path / "held-out", (5,))
    first, second = run_ranks(answered, 2, str(tiny_run), str(tmp_path), stage)
    assert [(key, pictures) for key, pictures, *_ in first] == [(f"s0-{i}", (1, 2, 1, 0, 1)[i]) for i in range(5)]
    assert [row[:3] for row in first] == second
    for key, _, answer, alone in first:
        assert answer == alone, key  # batched under ZeRO, and alone in a plain process
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    texts = events.Tensors("eval/answers/text_summary")
    assert [event.step for event in texts] == [2, 3]
    table = texts[-1].tensor_proto.string_val[0].decode()
    assert len(table.splitlines()) == 7
    assert all(f"| s0-{i} |" in table for i in range(5))
    assert [event.step for event in events.Images("eval/pictures")]
