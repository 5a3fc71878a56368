"""launch/plan.py as a user runs it: real sizes without weights, real data, what it refuses, and what it measures."""

import json
import re
import sys
import time
from pathlib import Path

import plan
import pytest
import yaml
from commands import command
from ranks import script
from shapes import QWEN, write_configs, write_small_run

from trainer.activations import activation_bytes
from trainer.config import Config
from trainer.dist import log
from trainer.errors import ConfigError, DataError
from trainer.freeze import table
from trainer.memory import usable
from trainer.run_plan import ENOUGH_TOKENS, make_plan

PUBLISHED = {"Qwen-1.8B": 1_836_828_672, "Qwen-7B": 7_721_324_544}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture
def full_run(tmp_path):
    """Makes a configuration of a published size, without weights and without data: its YAML file."""

    def make(size: str, stage: str) -> Path:
        write_configs(tmp_path, size)
        config = yaml.safe_load((Path(plan.__file__).parent / "configs" / f"{stage}.yaml").read_text())
        config["model"].pop("init_from", None)
        config["model"] |= {"language_model": str(tmp_path / "qwen"), "vision_tower": str(tmp_path / "clip")}
        config["data"]["train"] = [{"name": "absent", "shards": str(tmp_path / "absent-{00..99}.tar")}]
        config["run"]["output_dir"] = str(tmp_path / "run")
        (tmp_path / "full.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "full.yaml"

    return make


@pytest.fixture
def planned(monkeypatch, capsys):
    """Runs the command in this process, and undoes what it sets: what it prints."""
    level = log.level
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        plan.main()
        return capsys.readouterr().out

    yield run
    log.setLevel(level)


def numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.-])\d[\d,]*\.?\d*", line)]


def row(output: str, name: str) -> list[float]:
    (line,) = [line for line in output.splitlines() if re.match(rf"[* ]+{re.escape(name)}  ", line)]
    return numbers(line.partition(name)[2])


@pytest.mark.parametrize("size", QWEN)
def test_a_published_size_is_planned_in_seconds_from_its_config_json_alone(full_run, size):
    file = full_run(size, "stage2")
    started = time.monotonic()
    done = command("python", "launch/plan.py", "--config", str(file), "--world-size", "8")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60  # five seconds where nothing else runs, most of them imports
    assert row(done.stdout, "language_model") == [PUBLISHED[size], PUBLISHED[size]]
    assert row(done.stdout, "vision_tower") == [303_179_776, 0]
    assert "absent-{00..99}.tar' matches no file here; assumed are full rows of data.max_length=2,048" in done.stdout
    assert not (file.parent / "run").exists()
    # ZeRO-3 in bf16 with fp32 sums: (2, 4, 12) bytes a trained parameter over 8 ranks, the frozen tower 2.
    projector = 1024 * (d := 2048 if size == "Qwen-1.8B" else 4096) + d + d * d + d
    trained = PUBLISHED[size] + projector
    weights, gradients, optimizer = row(done.stdout, "ZeRO-3")[:3]
    assert weights == pytest.approx(2 * (trained + 303_179_776) / 8 / 2**30, abs=0.01)
    assert (gradients, optimizer) == pytest.approx((4 * trained / 8 / 2**30, 12 * trained / 8 / 2**30), abs=0.01)
    # Figures that no GPU has given are not passed off as if one had.
    assert "Planned, not measured." in done.stdout
    assert "assumed MFU" in done.stdout


def test_the_largest_micro_batch_fits_and_one_row_more_does_not(full_run):
    planned = make_plan(Config.load(full_run("Qwen-1.8B", "stage2"), world_size=8, needs_data=False), 8)
    room = usable(40 * 2**30)
    for checkpointing in (False, True):
        states = planned.own.sharding.states()
        largest = planned.fitting(planned.own, checkpointing, room)

        def takes(rows: int, states=states, checkpointing=checkpointing) -> float:
            return states.total(activation_bytes(planned.model, planned.rows.widest * rows, checkpointing))

        assert takes(largest) <= room
        assert largest == planned.rank_rows or takes(largest + 1) > room
    # Two rows of 2,048 tokens of 101 KB in 24 layers are 10 GB: kept, few fit; recomputed, all of the rank's 16.
    assert 0 < planned.fitting(planned.own, False, room) < planned.fitting(planned.own, True, room) == 16


@pytest.mark.parametrize("gib", [12, 16, 18, 20, 24, 80])
def test_auto_recomputes_in_as_few_layers_as_the_gpu_asks_for(full_run, gib):
    planned = make_plan(Config.load(full_run("Qwen-1.8B", "stage1"), world_size=8, needs_data=False), 8)
    assert planned.config.model.activation_checkpointing == "auto"
    room, states = usable(gib * 2**30), planned.own.sharding.states()
    batch = planned.rows.largest_batch(planned.config)
    taken = {every: states.total(activation_bytes(planned.model, batch, every)) for every in (0, *range(8, 0, -1))}
    fitting = [every for every, total in taken.items() if total <= room]
    assert planned.recompute_every(room) == (fitting[0] if fitting else 1)
    # 8 rows of 1,024 tokens keep 74 KB in each of 24 layers: 14.5 GB, beside 5.4 GB of weights and what else there is.
    every = planned.recompute_every(room)
    assert (every == 0) == (gib > 20), taken
    assert (every == 1) == (gib < 15), taken
    assert list(taken.values()) == sorted(taken.values(), reverse=True)


def test_what_is_recommended_fits_by_its_own_account(full_run, planned):
    file = full_run("Qwen-7B", "stage2")
    asked = ["--config", str(file), "--world-size", "8", "--gpu-memory", "20GiB"]
    said = planned(*asked)
    assert "as configured it does NOT fit" in said
    (line,) = [line for line in said.splitlines() if line.strip().startswith("--set ")]
    followed = planned(*asked, *line.split())
    assert "as configured it fits" in followed
    assert "which is likely to be the fastest way" in followed
    assert int(line.rpartition("=")[2]) * 2048 >= ENOUGH_TOKENS
    # And on a GPU that is too small for one row nothing is.
    assert "nothing fits, even a single row" in planned(*asked[:-1], "6GiB")


@pytest.mark.parametrize(("batch", "file"), [(128, "zero2"), (1024, "zero1")])
def test_gradients_of_many_micro_batches_are_to_be_reduced_once_a_step(full_run, planned, batch, file):
    asked = ["--config", str(full_run("Qwen-1.8B", "stage2")), "--world-size", "8", "--gpu-memory", "80GiB"]
    said = planned(*asked, "--set", f"train.global_batch_size={batch}")
    (line,) = [line for line in said.splitlines() if line.strip().startswith("--set ")]
    assert f"deepspeed=ds_configs/{file}.json" in line
    assert "which is likely to be the fastest way" in planned(
        *asked, "--set", f"train.global_batch_size={batch}", *line.split()
    )


def test_a_way_is_planned_alike_whichever_is_configured(full_run, planned):
    asked = ["--config", str(full_run("Qwen-1.8B", "stage2")), "--world-size", "8"]
    ways = {"ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "ZeRO-3, offload": "zero3_offload"}
    every = ["model.activation_checkpointing=true", "--set"]
    said = {name: planned(*asked, "--set", *every, f"deepspeed=ds_configs/{file}.json") for name, file in ways.items()}
    for way in ways:
        (rows,) = {tuple(row(text, way)) for text in said.values()}
        assert rows


def test_without_data_packs_are_assumed_to_be_half_pictures(full_run):
    settings = ["data.packing=true", "data.max_length=1024"]
    rows = make_plan(Config.load(full_run("Qwen-1.8B", "stage2"), settings, needs_data=False), 1).rows
    # 1024 tokens: 2 documents of a picture of 256 and as much text, half of which is an answer.
    assert (rows.mean.tokens, rows.mean.images, rows.mean.supervised) == (1024, 2, 256)
    assert rows.mean.squares == 2 * 512**2
    assert (rows.epoch_size, rows.last_step) == (None, None)


MODES = {
    "samples": [],
    "packs": ["data.packing=true", "train.global_batch_size=2"],
    "token budget": ["train.micro_batch_tokens=200"],
}


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_those_that_a_run_trains_on(tiny_run, tmp_path, mode):
    settings = [*MODES[mode], "train.epochs=1", "train.max_steps=null", "data.max_length=90",
                f"run.output_dir={tmp_path}/run"]  # fmt: skip
    before = make_plan(Config.load(tiny_run, settings), 1)
    rows = before.rows
    done = script("launch/train.py", "--config", str(tiny_run), "--set", *settings)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows.last_step == len(lines)
    for name, of_row in (("tokens", rows.mean.tokens), ("images", rows.mean.images),
                         ("supervised_tokens", rows.mean.supervised)):  # fmt: skip
        assert of_row * rows.epoch_size == pytest.approx(sum(line[name] for line in lines)), name
    assert rows.widest.tokens >= rows.mean.tokens
    # And a second stage is planned from the export that the run has left.
    from_export = [f"model.init_from={tmp_path}/run", "model.language_model=null", "model.vision_tower=null"]
    after = make_plan(Config.load(tiny_run, [*settings, *from_export]), 1)
    assert table(after.model) == table(before.model)
    assert after.rows == before.rows


# Name -> arguments, and what is said: key, what was found, and what was expected or the way out.
REFUSED = {
    "unit": (["--gpu-memory", "80GX"], ["--gpu-memory 80GX", "unknown unit 'GX'", "GiB"]),
    "no number": (["--gpu-memory", "GiB"], ["--gpu-memory GiB", "is no number", "80GiB"]),
    "no memory": (["--gpu-memory", "0GiB"], ["--gpu-memory 0GiB", "must be above 0"]),
    "no ranks": (["--world-size", "0"], ["--world-size 0", "must be at least 1"]),
    "per cent": (["--mfu", "40"], ["--mfu 40", "at most 1", "0.4"]),
    "peak": (["--peak-tflops", "-1"], ["--peak-tflops -1", "above 0"]),
    # 8 samples are not a multiple of 2 x 3.
    "batch": (["--world-size", "3"], ["global_batch_size=8", "(2 x 3)", "nearest valid values: 6, 12"]),
    "no batch": (["--set", "train.micro_batch_size=0"], ["train.micro_batch_size", "at least 1", "found 0"]),
    "no model": (["--set", "model.language_model=nowhere"], ["model.language_model", "no such folder: nowhere"]),
    "no stage": (["--set", "model.init_from=nowhere", "model.language_model=null", "model.vision_tower=null"],
                 ["model.init_from", "no such folder: nowhere"]),
    "too long": (["--set", "data.max_length=4096"], ["data.max_length=4096", "seq_length=256"]),
    "no room for text": (["--set", "data.max_length=4"], ["data.max_length=4", "no room for text", "4 features"]),
    "all frozen": (["--set", "freeze=[vision_tower, projector, language_model]"], ["freeze", "nothing is left"]),
    "no such layer": (["--set", "freeze=[language_model.layers.0-9]"], ["freeze", "there is no layer 2"]),
    "unknown key": (["--set", "train.micro_batch=2"], ["train.micro_batch", "micro_batch_size"]),
    "no ZeRO": (["--set", "deepspeed={folder}/zero0.json"], ["zero_optimization.stage is 0", "expected 1, 2 or 3"]),
    "sums": (["--set", "deepspeed={folder}/sums.json"], ["grad_accum_dtype", "'fp8'", "fp32, bf16"]),
    "stage": (["--set", "deepspeed={folder}/zero4.json"], ["zero_optimization", "stage"]),
    "shards to measure with": (["--measure", "--set", "data.train=[{name: a, shards: 'no-*.tar'}]"],
                               ["data.train[0].shards", "'no-*.tar' matches no file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(tiny_run, tmp_path, planned, name):
    for stage in (0, 4):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tmp_path / "sums.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp8"}})
    )
    arguments, said = REFUSED[name]
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    with pytest.raises(ConfigError) as error:
        planned("--config", str(tiny_run), *arguments)
    for words in said:
        assert words in str(error.value)


def test_a_refusal_is_one_message_and_exit_code_2(tiny_run):
    done = script("launch/plan.py", "--config", str(tiny_run), "--gpu-memory", "80GX")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: --gpu-memory 80GX")
    assert "Traceback" not in done.stderr


def test_damaged_shards_are_an_error_and_no_assumption(tiny_run, tmp_path, planned):
    (tmp_path / "cut.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="cut.tar"):
        planned("--config", str(tiny_run), "--set", f"data.train=[{{name: a, shards: {tmp_path}/cut.tar}}]")


@pytest.mark.parametrize("frozen", ["[vision_tower]", "[vision_tower, language_model]"])
@pytest.mark.parametrize(
    ("mode", "stage", "bf16"), [("samples", 2, "false"), ("packs", 2, "false"), ("packs", 1, "true")]
)
def test_two_steps_are_measured_beside_the_plan_and_leave_nothing(small_run, tmp_path, mode, stage, bf16, frozen):
    # A bucket of the usual size would be most of what so small a model takes.
    zero = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    settings = [f"deepspeed={tmp_path}/zero.json", f"run.output_dir={tmp_path}/run", f"freeze={frozen}", *MODES[mode]]
    settings.append(f"train.bf16={bf16}")
    done = script("launch/plan.py", "--config", str(small_run), "--measure", "--set", *settings)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    measured = done.stdout.partition("\nmeasured")[2]
    assert "CPU" in measured
    for name in ("weights", "gradients", "AdamW"):
        planned, found = row(measured, name)
        assert planned == pytest.approx(found, rel=0.01), name
    planned, found = row(measured, "peak of tensors")
    # An upper bound: of packs there is one micro-batch a step, whose gradients come as its activations go.
    assert planned == pytest.approx(found, rel=0.15)
    # Of a language model that trains, only with buckets of a usual size; ZeRO-1 in bf16 has none.
    assert found <= planned or ("language_model" not in frozen and stage == 2)
    assert numbers(re.search(r"seconds a step: .*", measured)[0])[0] > 0
