"""A real Slurm on this machine: munged, slurmctld and slurmd on two hosts, all of it in one folder."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hosts import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=n1(10.231.77.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort=17817
SlurmdPort=17818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
NodeName=n1 NodeAddr=10.231.77.1 CPUs=2 RealMemory=1000 Gres=gpu:1
NodeName=n2 NodeAddr=10.231.77.2 Port=17819 CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class Slurm:
    """A cluster of the nodes n1 and n2; its commands run on n1."""

    folder: Path
    hosts: Hosts

    @property
    def environment(self) -> dict[str, str]:
        # What an outer job, if any, has put there would reach ours.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, **variables: str) -> str:
        """What a command of Slurm's, or one that uses these, says."""
        done = self.hosts.run("n1", *words, env={**self.environment, **variables})
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_slurmd(self, node: str) -> None:
        done = self.hosts.run(node, "slurmd", "-N", node, env=self.environment)
        assert done.returncode == 0, done.stderr

    def kill_slurmd(self, node: str) -> None:
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: Callable[[], str] = str) -> None:
        """Waits until something is so, or fails with what the log, say, holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain: {self.command('squeue')}\n{what()[-5000:]}"
            time.sleep(0.2)

    def end(self, number: str, seconds: float, what: Callable[[], str] = str) -> str:
        """The state in which a job ends."""
        self.wait_for(lambda: self.job(number)["EndTime"] != "Unknown" and self._is_over(number), seconds, what)
        return self.job(number)["JobState"]

    def _is_over(self, number: str) -> bool:
        return self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


@contextlib.contextmanager
def slurm_on(hosts: Hosts, folder: Path) -> Iterator[Slurm]:
    """The cluster, ready for jobs; skips where Slurm is not installed. Ends everything it has started."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"no {', '.join(missing)} here (Debian: slurm-wlm munge)")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(mode=0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # on paper: there is no GPU behind it
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    slurm = Slurm(folder, hosts)
    munged = subprocess.Popen(
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        slurm.wait_for((folder / "munge.socket").exists, 20)
        slurm.command("slurmctld")
        for node in ("n1", "n2"):
            slurm.start_slurmd(node)
        slurm.wait_for(lambda: slurm.command("sinfo", "-h", "-p", "main", "-o", "%t %D").split() == ["idle", "2"], 30)
        yield slurm
    finally:
        daemons = [process for process in hosts.processes() if process.name() in ("slurmctld", "slurmd")]
        for process in daemons:
            process.terminate()
        psutil.wait_procs(daemons, timeout=15)
        munged.terminate()
        munged.wait(15)
