"""Where the files that a configuration names lie."""

import glob
import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.urls import scheme_of

ROOT = Path(__file__).resolve().parents[1]
"""The repository: `ds_configs/` and `launch/configs/` lie here."""


def find_config(path: str | Path) -> Path:
    """A path, a run's folder, or the name of a file in launch/configs/ with or without its ending."""
    configs = ROOT / "launch" / "configs"
    for file in (Path(path), Path(path) / "config.yaml", configs / path, configs / f"{path}.yaml"):
        if file.is_file():
            return file
    if Path(path).is_dir():
        raise ConfigError(f"--config {path}: a folder without config.yaml, so not that of a run; name a YAML file")
    known = ", ".join(sorted(file.stem for file in configs.glob("*.yaml")))
    raise ConfigError(f"--config {path}: no such file, and no such name in launch/configs/ (there are: {known})")


def find_deepspeed(path: str) -> Path:
    """DeepSpeed's JSON, from the working folder or from the repository."""
    return Path(path) if Path(path).is_file() else ROOT / path


def expand_shards(patterns: str | list[str]) -> list[Path | str]:
    """Paths, globs and brace ranges -> tars, each pattern's sorted by name. Empty where a pattern finds nothing.

    URLs stay text, and their globs stay globs: those their server has to answer."""
    tars: list[Path | str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for one in expand_braces(pattern):
            if scheme_of(one):
                tars.append(one)
            else:
                tars += map(Path, sorted(glob.glob(one)) if glob.has_magic(one) else [one])
    return tars


def expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [whole for n in numbers for whole in expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]
