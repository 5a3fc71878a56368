"""Who a process is, from what a launcher left in its environment."""

import os
import subprocess
import sys

import pytest
from commands import ROOT

from trainer.dist import World, world_from_environment
from trainer.errors import ConfigError

ALL = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these of the launcher's variables."""

    def set_to(variables: dict[str, str]) -> None:
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_without_a_launcher_a_process_is_alone(environment):
    environment({})
    assert world_from_environment() == World(rank=0, world_size=1, local_rank=0)
    assert world_from_environment().is_main


def test_launcher_gives_the_place(environment):
    environment(ALL)
    world = world_from_environment()
    assert world == World(rank=5, world_size=8, local_rank=1)
    assert not world.is_main


@pytest.mark.parametrize("missing", [["WORLD_SIZE"], ["MASTER_ADDR", "MASTER_PORT"], ["RANK", "WORLD_SIZE"]])
@pytest.mark.parametrize("empty", [True, False])
def test_half_an_environment_names_what_is_missing(environment, missing, empty):
    rest = {name: value for name, value in ALL.items() if name not in missing}
    environment({**rest, **(dict.fromkeys(missing, "") if empty else {})})
    with pytest.raises(ConfigError) as raised:
        world_from_environment()
    said = str(raised.value)
    assert f"sets {', '.join(sorted(rest))} but not {', '.join(missing)}:" in said
    assert "torchrun" in said


@pytest.mark.parametrize("inherited", [{}, {"MASTER_ADDR": "node-1"}, {"MASTER_PORT": "29500", "MASTER_ADDR": ""}])
def test_address_alone_is_no_launcher(environment, inherited):
    # Clusters export MASTER_ADDR in every shell; a process without a rank is alone all the same.
    environment(inherited)
    assert world_from_environment() == World()


def test_lone_process_has_a_group_wherever_it_is_started():
    code = (
        "from trainer.dist import *\n"
        "with distributed(world_from_environment()) as world:\n"
        "    barrier(); print(sum_over_ranks([1.5, 2.0], world.device))\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ALL}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, "MASTER_ADDR": "node-1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[1.5, 2.0]" in done.stdout


SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
ADDRESS = {"MASTER_ADDR": "n1", "MASTER_PORT": "15000"}


def test_tasks_of_srun_are_ranks(monkeypatch):
    # Empty counts as unset; and what the function sets is taken back after the test.
    for name, value in {**dict.fromkeys([*ALL, "LOCAL_WORLD_SIZE"], ""), **SLURM, **ADDRESS}.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=3, world_size=4, local_rank=1)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_a_launcher_inside_an_allocation_goes_before_slurm(environment, monkeypatch):
    environment(ALL)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(rank=5, world_size=8, local_rank=1)


def test_tasks_of_srun_without_an_address_are_told_what_to_export(monkeypatch):
    for name, value in {**dict.fromkeys([*ALL, "LOCAL_WORLD_SIZE"], ""), **SLURM}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="but not MASTER_ADDR, MASTER_PORT: .*under `srun`, export"):
        world_from_environment()


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "-1"}])
def test_ranks_that_cannot_be_are_refused(environment, wrong):
    environment({**ALL, **wrong})
    with pytest.raises(ConfigError, match="must be numbers|which cannot be"):
        world_from_environment()


LOOK = """
import os, runpy, sys
class Look:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise SystemExit("loads PyTorch with " + os.environ.get("OMP_WAIT_POLICY", "nothing"))
sys.meta_path.insert(0, Look())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("own", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_how_threads_wait_is_said_before_pytorch_is_loaded_unless_the_user_has_said_it(own, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | own
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(ROOT / "launch" / "train.py"), "--config", "demo_stage1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.strip() == f"loads PyTorch with {expected}"
