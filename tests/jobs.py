"""Jobs as a user starts them, to be disturbed: real launcher, real ranks, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from commands import ROOT, launcher
from ranks import train_ranks


class Job:
    """`deepspeed launch/train.py` on two ranks, in a session of its own."""

    def __init__(self, config: Path, run: Path, *settings: str, resume: str = "auto", log: Path | None = None):
        self.run = run
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run.mkdir(exist_ok=True)
        self.log = log or run.with_suffix(".log")
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*launcher(2), "--config", str(config), "--resume", resume,
                 "--set", f"run.output_dir={run}", *settings],
                cwd=ROOT, env={**os.environ, "PATH": path}, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, without their data workers; empty before they are started."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = process.cmdline()
                if "launch/train.py" in words and any(word.startswith("--local_rank") for word in words):
                    parent = process.parent()
                    if parent and not any(word.startswith("--local_rank") for word in parent.cmdline()):
                        found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.cmdline())

    def everyone(self) -> list[psutil.Process]:
        """All processes of the job: launchers, ranks, data workers."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def steps(self) -> int:
        """Steps that metrics.jsonl has."""
        return len(lines_of(self.run))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Waits until something is so, or fails with the job's log."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job has ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"waited in vain:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.005)

    def end(self, seconds: float = 120, known: list[psutil.Process] | None = None) -> int:
        """The job's exit code, once it and all that it started have ended. known: those processes, where the command
        itself may have ended."""
        if known is None:
            known = self.everyone() if self.process.poll() is None else []
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()[-3000:]}") from None
        _, alive = psutil.wait_procs(known, timeout=30)
        assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
        return code


def trained(config: Path, run: Path, *settings: str) -> Path:
    """A run on two ranks that nothing happens to, or that goes on in a folder: that folder."""
    log = run.with_suffix(".again.log")
    code = train_ranks(log, "--config", str(config), "--set", f"run.output_dir={run}", *settings)
    assert code == 0, log.read_text()[-3000:]
    return run


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Waits until something is so, or fails with what there is to say."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain:\n{what()}"
        time.sleep(0.05)


def lines_of(run: Path) -> list[dict]:
    """The whole lines of a run's metrics."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(run: Path) -> list[tuple]:
    """What must be the same, bit for bit, in a run that was disturbed and in one that was not."""
    return [(line["step"], line["loss"], line["grad_norm"], tuple(line["samples"])) for line in lines_of(run)]


def final_weights(run: Path) -> dict[str, bytes]:
    """The weights that the run's newest checkpoint exports: the bytes of its files."""
    export = run / (run / "latest").read_text().strip() / "hf"
    return {file.name: file.read_bytes() for file in export.glob("*.safetensors")}
