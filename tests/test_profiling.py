"""`--profile`: a trace of each rank that a viewer opens, and a table of where the time went."""

import gzip
import json
from types import SimpleNamespace

from ranks import script, train_ranks

from trainer.profiling import communication_seconds


def event(key: str, micros: float, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, cpu_time_total=micros, self_device_time_total=0.0 if key.startswith("gloo") else micros,
        is_user_annotation=annotation,
    )  # fmt: skip


def test_communication_is_that_of_kernels_not_of_the_names_given_to_them():
    found = [event("ncclDevKernel_AllReduce", 2e6), event("nccl:all_reduce", 2e6, annotation=True), event("gemm", 5e6)]
    assert communication_seconds(SimpleNamespace(key_averages=lambda: found)) == 2.0
    found = [event("gloo:all_reduce", 1e6, annotation=True), event("aten::mm", 5e6)]
    assert communication_seconds(SimpleNamespace(key_averages=lambda: found)) == 1.0


def test_a_number_of_steps_below_zero_is_refused(tiny_run):
    done = script("launch/train.py", "--config", str(tiny_run), "--profile", "-1")
    assert done.returncode == 2
    assert "--profile -1: expected a number of steps" in done.stderr


def test_a_profile_shows_the_parts_of_the_steps_that_it_was_asked_for(tiny_run, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = ["--set", f"run.output_dir={run}", "train.max_steps=6", "checkpoint.save_steps=100"]
    assert train_ranks(log, "--config", str(tiny_run), "--profile", "2", *settings) == 0, log.read_text()
    said = log.read_text().splitlines()
    assert any("profile of steps 3 to 4" in line for line in said)
    for part in ("data", "forward", "backward", "optimizer"):
        assert any(line.startswith(f"  {part} ") for line in said), part
    (communication,) = [line for line in said if line.strip().startswith("communication")]
    assert float(communication.split()[1].rstrip("%")) > 0
    traces = sorted((run / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"steps-000003-000004-rank{rank}.json.gz" for rank in (0, 1)]
    for trace in traces:
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("ph") == "X"]
        # A step of two micro-batches a rank: each has a forward and a backward pass.
        assert [names.count(part) for part in ("data", "forward", "backward", "optimizer")] == [2, 4, 4, 4]
        assert "aten::mm" in names
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
