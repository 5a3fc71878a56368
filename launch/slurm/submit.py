"""Submits training to Slurm: one stage, or several, each after the one before.

    python launch/slurm/submit.py --config stage1.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 \\
        [--set section.key=value ...] [--then stage2.yaml model.init_from=runs/stage1 ...]

The script is written to OUTPUT_DIR/slurm/job.sh, checked (`sbatch --test-only`) and submitted; --dry-run prints it
instead. Logs: OUTPUT_DIR/slurm/.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from trainer.config import Config
from trainer.errors import ConfigError, run_main
from trainer.paths import ROOT

TEMPLATE = Path(__file__).with_name("job.sh")

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?")
"""minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
(source: man sbatch)"""

PLAIN = re.compile(r"[\w./+,:=-]+")
"""What a name or path in an `#SBATCH` line may hold: Slurm would split at spaces, expand % and obey quotes."""

STARTS_WITHOUT_PROGRESS = 3
"""In a row, after which a job no longer requeues itself."""


def main() -> None:
    args = parse_arguments()
    jobs = [write_script(args, config, overrides) for config, overrides in stages(args)]
    if args.dry_run:
        print("\n".join(script.read_text(encoding="utf-8") for script in jobs), end="")
        return
    for script in jobs:
        sbatch("--test-only", str(script))
    before: list[str] = []
    for script in jobs:
        # Where the stage before has failed, this one could wait for ever.
        after = [f"--dependency=afterok:{before[-1]}", "--kill-on-invalid-dep=yes"] if before else []
        before.append(sbatch("--parsable", *after, str(script)).partition(";")[0])
        print(f"job {before[-1]}: {script.parents[1]}" + (f", after job {before[-2]}" if after else ""))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in launch/configs/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="its overrides")
    parser.add_argument(
        "--then", nargs="+", action="append", default=[], metavar=("CONFIG", "KEY=VALUE"),
        help="another stage, with its overrides, once the one before is done; may be repeated",
    )  # fmt: skip
    parser.add_argument("--nodes", type=count, default=1)
    tasks = parser.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--gpus-per-node", type=count, help="GPUs, and ranks, of each node")
    tasks.add_argument("--tasks-per-node", type=count, help="ranks of each node, where there are no GPUs")
    parser.add_argument("--cpus-per-task", type=count, help="cores of each rank: its own and its data workers'")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--time", required=True, help="limit of one start: minutes, hours:minutes:seconds, days-hours")
    parser.add_argument("--save-seconds", type=count, default=300, help="so long before the limit, save and requeue")
    parser.add_argument("--container", help="an Apptainer image that has the packages; the code stays this folder's")
    parser.add_argument("--dry-run", action="store_true", help="write and print the scripts, and submit nothing")
    return parser.parse_args()


def count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {value!r}")
    return int(value)


def stages(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(configuration, overrides) of each stage."""
    return [(args.config, args.set), *((config, overrides) for config, *overrides in args.then)]


def write_script(args: argparse.Namespace, config_name: str, overrides: list[str]) -> Path:
    """Checks one stage and writes its script into its run folder, which a stage after it may name as its start."""
    ranks = args.nodes * (args.gpus_per_node or args.tasks_per_node)
    config = Config.load(config_name, overrides, ranks)
    run = Path(config.run.output_dir).absolute()
    text = render(args, config, run, [config_name, *(["--set", *overrides] if overrides else [])])
    script = run / "slurm" / "job.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    return script


def render(args: argparse.Namespace, config: Config, run: Path, arguments: list[str]) -> str:
    """The job's script. Raises ConfigError for values that Slurm would take for something else."""
    gpu_access = ["--nv"] if args.gpus_per_node else []
    container = ["apptainer", "exec", *gpu_access, "--bind", f"{ROOT},{Path.cwd()},{run}", str(args.container)]
    python = [*container, "python3"] if args.container else [sys.executable]
    command = [*python, str(ROOT / "launch" / "train.py"), "--config", *arguments]
    srun = [f"--cpus-per-task={args.cpus_per_task}"] if args.cpus_per_task else []
    values = {
        "ROOT": quoted(str(ROOT)),
        "RUN": quoted(str(run)),
        "STARTS_WITHOUT_PROGRESS": str(STARTS_WITHOUT_PROGRESS),
        "SRUN": array(srun),
        "COMMAND": array(command),
    }
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("@SBATCH@", "\n".join(f"#SBATCH {option}" for option in sbatch_options(args, config, run)))
        .replace("@VALUES@", "\n".join(f"{name}={value}" for name, value in values.items()))
    )


def sbatch_options(args: argparse.Namespace, config: Config, run: Path) -> list[str]:
    limit = seconds(args.time)
    if args.save_seconds >= limit:
        raise ConfigError(f"--save-seconds {args.save_seconds}: must be less than --time {args.time} ({limit} s)")
    tasks = args.gpus_per_node or args.tasks_per_node
    options = {
        "job-name": re.sub(r"[^\w.-]+", "-", config.run.name),
        "nodes": args.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_task,
        **{name: plain(f"--{name}", getattr(args, name)) for name in ("partition", "account", "qos")},
        "time": args.time,
        "signal": f"B:USR1@{args.save_seconds}",
        "chdir": plain("the working folder", str(Path.cwd())),
        "output": f"{plain('run.output_dir', str(run))}/slurm/%j.log",
        "open-mode": "append",
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--requeue"]


def seconds(time: str) -> int:
    """Of a time limit as Slurm writes it. Raises ConfigError if it is none."""
    found = TIME.fullmatch(time)
    if not found or not time.isascii():
        raise ConfigError(
            f"--time {time!r}: expected a limit such as 90 (minutes), 12:00:00 or 2-00 (days-hours), as sbatch does"
        )
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"]:
        return int(found["days"]) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if found["third"] else first * 60 + second


def plain(name: str, value: str | None) -> str | None:
    if value is not None and not PLAIN.fullmatch(value):
        raise ConfigError(f"{name} {value!r}: expected letters, digits and _./+,:=- alone, as Slurm reads them")
    return value


def array(words: list[str]) -> str:
    return "(" + " ".join(map(quoted, words)) + ")"


def quoted(value: str) -> str:
    """One word of the shell, never more. Raises ConfigError for line ends and what a terminal would obey."""
    if not value.isprintable():
        raise ConfigError(f"{value!r}: cannot be part of a job's script; values are of one printable line")
    return shlex.quote(value)


def sbatch(*arguments: str) -> str:
    """What sbatch prints. Raises ConfigError with its reason where it refuses."""
    try:
        done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("no sbatch here: submit from a login node of the cluster, or see --dry-run") from error
    if done.returncode:
        raise ConfigError(f"sbatch {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_main(main)
