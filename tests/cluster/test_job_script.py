"""What submit.py writes and refuses, and what its script does, with stand-ins for Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT

SUBMIT = ROOT / "launch" / "slurm" / "submit.py"
FLAGS = ["--nodes", "2", "--tasks-per-node", "1", "--time", "1:00:00"]


def submit(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, str(SUBMIT), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def script(config: Path, run: Path, *words: str) -> str:
    done = submit(*FLAGS, "--dry-run", "--config", str(config), "--set", f"run.output_dir={run}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """Runs a script as Slurm would, on two nodes: (its exit code and output, what scontrol and srun were asked)."""
    commands, asked = tmp_path / "commands", tmp_path / "asked"

    def start(text: str, srun: str, state: str = "RUNNING", **variables: str):
        stand_in(commands, "scontrol", f'echo "scontrol $*" >>{asked}; [ "$1" != show ] || printf "n1\\nn2\\n"')
        stand_in(commands, "squeue", f"echo {state}")
        stand_in(commands, "srun", srun)
        environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "31",
                       "SLURM_JOB_NODELIST": "n[1-2]", **variables}  # fmt: skip
        done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, timeout=60)
        return done, asked.read_text() if asked.exists() else ""

    return start


SIGNALLED = "trap 'exit {code}' USR1 TERM; kill -s {signal} $PPID; while :; do sleep 0.05; done"


def test_the_header_is_what_was_asked_for(tiny_run, tmp_path):
    header = [line for line in script(tiny_run, tmp_path / "run", "--partition", "gpu,big", "--account", "me")
              .splitlines() if line.startswith("#SBATCH")]  # fmt: skip
    assert header == [
        "#SBATCH --job-name=tiny", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --partition=gpu,big",
        "#SBATCH --account=me", "#SBATCH --time=1:00:00", "#SBATCH --signal=B:USR1@300", f"#SBATCH --chdir={ROOT}",
        f"#SBATCH --output={tmp_path}/run/slurm/%j.log", "#SBATCH --open-mode=append", "#SBATCH --requeue",
    ]  # fmt: skip


def test_ranks_are_started_with_the_address_of_the_first_node(tiny_run, tmp_path, cluster):
    text = script(tiny_run, tmp_path / "run", "train.max_steps=4")
    done, _ = cluster(text, 'echo "$MASTER_ADDR $MASTER_PORT $TRAINER_HOSTS"; printf "<%s>" "$@"')
    assert done.returncode == 0, done.stderr
    assert "n1 15031 n1,n2\n" in done.stdout
    assert (
        f"<--output={tmp_path}/run/slurm/%j-rank-%t.log><{sys.executable}><{ROOT}/launch/train.py><--config>"
        f"<{tiny_run}><--set><run.output_dir={tmp_path}/run><train.max_steps=4>"
    ) in done.stdout


def test_values_are_words_and_never_evaluated(tiny_run, tmp_path, cluster):
    hostile = f"data.system_prompt='$(touch {tmp_path}/evaluated) `id` \"; exit 3; @SBATCH@ @VALUES@ ''s'"
    done, _ = cluster(script(tiny_run, tmp_path / "run", hostile), 'printf "<%s>" "$@"')
    assert done.returncode == 0, done.stderr
    assert f"<{hostile}>" in done.stdout
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "soon"], "--time 'soon': expected a limit such as 90 (minutes), 12:00:00"),
        (["--time", "1:00\n#SBATCH --wrap=id"], "--time '1:00\\n#SBATCH --wrap=id': expected a limit"),
        (["--time", "4"], "--save-seconds 300: must be less than --time 4 (240 s)"),
        (["--partition", "gpu --wrap=id"], "--partition 'gpu --wrap=id': expected letters"),
        (["--account", "a\nb"], "--account 'a\\nb': expected letters"),
        (["--set", "data.caption_prompt='a\n\nb'"], "cannot be part of a job's script"),
        (["--set", "run.output_dir=/runs/50%"], "run.output_dir '/runs/50%': expected letters"),
        (["--set", "train.max_step=4"], "train.max_step: unknown key; did you mean 'max_steps'?"),
        (["--nodes", "3"], "train.global_batch_size=8 is not a multiple of micro_batch_size x world size (2 x 3)"),
        (["--then", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(tiny_run, tmp_path, words, said):
    done = submit(*FLAGS, "--dry-run", "--config", str(tiny_run), "--set", f"run.output_dir={tmp_path}/run", *words)
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr or f"  - {said}" in done.stderr or said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_slurm_the_way_out_is_named(tiny_run, tmp_path):
    done = submit(*FLAGS, "--config", str(tiny_run), "--set", f"run.output_dir={tmp_path}/run", PATH="/nowhere")
    assert (done.returncode, "no sbatch here" in done.stderr) == (2, True)


def test_a_container_runs_the_code_of_this_folder(tiny_run, tmp_path, cluster):
    text = script(tiny_run, tmp_path / "run", "--container", "my image.sif")
    done, _ = cluster(text, 'echo "$PYTHONPATH"; printf "<%s>" "$@"')
    assert (
        f"<apptainer><exec><--bind><{ROOT},{ROOT},{tmp_path}/run><my image.sif><python3><{ROOT}/launch/train.py>"
        in (done.stdout)
    )
    assert done.stdout.splitlines()[1].startswith(str(ROOT))


def test_a_job_array_is_refused(tiny_run, tmp_path, cluster):
    done, asked = cluster(script(tiny_run, tmp_path / "run"), "echo started", SLURM_ARRAY_TASK_ID="0")
    assert (done.returncode, asked) == (2, "")
    assert f"would train in one folder, {tmp_path}/run; submit each run by itself" in done.stderr
    assert "started" not in done.stdout


@pytest.mark.parametrize(
    ("srun", "state", "code", "is_requeued"),
    [
        (SIGNALLED.format(signal="USR1", code=75), "RUNNING", 0, True),
        (SIGNALLED.format(signal="TERM", code=75), "RUNNING", 0, True),
        (SIGNALLED.format(signal="USR1", code=138), "RUNNING", 0, True),  # before Python had started
        (SIGNALLED.format(signal="TERM", code=75), "COMPLETING", 75, False),  # cancelled
        (SIGNALLED.format(signal="USR1", code=1), "RUNNING", 1, False),
        (SIGNALLED.format(signal="USR1", code=70), "RUNNING", 70, False),
        (SIGNALLED.format(signal="USR1", code=0), "RUNNING", 0, False),  # done in the meantime
        ("exit 75", "RUNNING", 75, False),  # a rank was signalled, not the job
        ("exit 2", "RUNNING", 2, False),
        ("kill -9 $$", "RUNNING", 137, False),
    ],
)
def test_only_a_job_that_was_told_and_has_saved_is_requeued(
    tiny_run, tmp_path, cluster, srun, state, code, is_requeued
):
    done, asked = cluster(script(tiny_run, tmp_path / "run"), srun, state)
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 31" in asked) == is_requeued


def test_starts_without_a_newer_checkpoint_end_the_requeueing(tiny_run, tmp_path, cluster):
    run = tmp_path / "run"
    text = script(tiny_run, run)
    idle = SIGNALLED.format(signal="USR1", code=75)
    saving = f"echo checkpoint-$RANDOM$RANDOM >{run}/latest; {idle}"
    requeues = []
    for srun in (idle, idle, saving, idle, idle, idle):
        done, asked = cluster(text, srun)
        requeues.append(asked.count("requeue"))
    # Two idle starts are forgiven once one has saved; the third in a row is the last.
    assert requeues == [1, 2, 3, 4, 5, 5]
    assert done.returncode == 75
    assert "3 starts in a row ended without a newer checkpoint" in done.stderr
