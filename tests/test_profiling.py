"""`--profile`: a trace of each rank that a viewer opens, and a table of where the time went."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from commands import ROOT, command
from ranks import free_port

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
    done = command("python", "launch/train.py", "--config", str(tiny_run), "--profile", "-1")
    assert done.returncode == 2
    assert "--profile -1: expected a number of steps" in done.stderr


def test_a_profile_shows_the_parts_of_the_steps_that_it_was_asked_for(tiny_run, tmp_path):
    run = tmp_path / "run"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py", "--config",
         str(tiny_run), "--profile", "2", "--set", f"run.output_dir={run}", "train.max_steps=6",
         "checkpoint.save_steps=100"],
        cwd=ROOT, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile of steps 3 to 4" in done.stdout
    for part in ("data", "forward", "backward", "optimizer", "communication"):
        assert f"\n  {part} " in done.stdout.replace("\r", "\n"), part
    (communication,) = [line for line in done.stdout.splitlines() if line.strip().startswith("communication")]
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
