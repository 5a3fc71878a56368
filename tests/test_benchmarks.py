"""The benchmarks that stand behind a promised number run; how fast is judged by running them on a quiet machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_loader_benchmark_prints_its_table_and_the_pixels_are_those_of_the_clip_processor():
    command = [sys.executable, "benchmarks/loader.py", "--pictures", "96", "--rounds", "1", "--at-least", "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [re.split(r" *\| *", line)[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[1].split("Processor")[0] for row in rows] == ["Transformers' `CLIPImage", "this loader"] * 2
    assert all(0 <= int(row[7]) <= 1 for row in rows)
    # Milliseconds of worker and trainer together are the reciprocal of pictures a second and core.
    for row in rows:
        assert 1000 / (float(row[2]) + float(row[3])) == pytest.approx(float(row[4]), rel=0.1)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_elementwise_benchmark_prints_its_table_and_the_gradients_are_the_plain_ones():
    command = [sys.executable, "benchmarks/elementwise.py", "--tokens", "32", "--rounds", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [re.split(r" *\| *", line)[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1]) for row in rows if row[1] != "Liger's"] == [
        (work, way) for work in ("norm", "rotary", "gate") for way in ("plain", "compiled")
    ]
