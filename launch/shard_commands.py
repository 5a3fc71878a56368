"""Commands of launch/prepare_shards.py that look at shards, whoever wrote them.

    verify   SHARDS... [--tokenizer DIR]             what is wrong where; exit code 1 if anything is
    preview  SHARDS... --tokenizer DIR --out FILE    an HTML page of samples as the model sees them
    stats    SHARDS... --tokenizer DIR               samples, images, lengths, what packing saves

In place of SHARDS and --tokenizer, --config X takes the shards, tokenizer, prompts and lengths of a training
configuration; SHARDS beside it are looked at in place of its own.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Config, DataConfig, ModelConfig, ShardsConfig
from trainer.errors import ConfigError, DataError
from trainer.paths import expand_shards

if TYPE_CHECKING:  # slow to import
    from trainer.data.template import ChatTemplate
    from trainer.data.transform import ImageTransform

PROBLEMS_FOUND = 1
"""Exit code of `verify`; 2 is a mistake in the command itself."""

WITHOUT_CONFIG: dict[str, tuple[type, Any, str]] = {
    "tokenizer": (str, None, "folder with qwen.tiktoken or tokenizer.json"),
    "max_length": (int, DataConfig.max_length, "tokens of a sample, or of a pack"),
    "image_size": (int, 224, "pixels a side that the vision tower sees"),
    "patch_size": (int, 14, "pixels a side of its patches: an image takes (image size / patch size)^2 tokens"),
    "image_aspect": (str, "crop", "how pictures become square: crop, pad or squash"),
    "system_prompt": (str, DataConfig.system_prompt, "as data.system_prompt"),
    "caption_prompt": (str, DataConfig.caption_prompt, "as data.caption_prompt"),
}
"""Options that a configuration answers: type, default, meaning."""


def add_inspection_commands(commands: argparse._SubParsersAction) -> None:
    """Adds `verify`, `preview` and `stats` to a command line."""
    _add(commands, "verify", run_verify, "check shards end to end: say what is wrong where")
    preview = _add(commands, "preview", run_preview, "an HTML page of samples as the model sees them")
    preview.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    preview.add_argument("--samples", type=positive, default=24, metavar="N", help="default 24")
    stats = _add(commands, "stats", run_stats, "samples, images, lengths, and what packing saves")
    stats.add_argument(
        "--micro-batch-size", type=positive, metavar="N",
        help="samples of a padded batch; default: the configuration's, or 8",
    )  # fmt: skip


def _add(commands: argparse._SubParsersAction, name: str, run, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    command.add_argument("shards", nargs="*", metavar="SHARDS", help="paths, globs, brace ranges (d-{000..099}.tar)")
    command.add_argument("--config", metavar="X", help="a training configuration, in place of the options below")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of it")
    for option, (kind, default, meaning) in WITHOUT_CONFIG.items():
        shown = f"{meaning}; default: {default}" if default else meaning
        name, metavar = f"--{option.replace('_', '-')}", "N" if kind is int else "DIR" if default is None else "TEXT"
        command.add_argument(name, type=positive if kind is int else str, metavar=metavar, help=shown)
    return command


def positive(text: str) -> int:
    """Type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


# --- What is looked at, and how ---


@dataclass
class View:
    """Shards, and the settings that they are read with."""

    config: Config
    transform: "ImageTransform"
    image_length: int
    """Tokens of an image."""

    @property
    def places(self) -> list[Path | str]:
        """Paths and URLs of the shards."""
        from trainer.data.remote import expand

        found = [place for source in self.config.data.train for place in expand_shards(source.shards)]
        return [one for place in found for one in (expand(place) if isinstance(place, str) else [place])]

    def template(self) -> "ChatTemplate":
        from trainer.data.template import ChatTemplate
        from trainer.tokenizer import image_token_id, load_tokenizer

        tokenizer = load_tokenizer(self.config.model)
        return ChatTemplate(tokenizer, image_token_id(tokenizer), self.image_length)


def open_view(args: argparse.Namespace, needs_tokenizer: bool) -> View:
    """What the command line says. Raises ConfigError for a mistake in it."""
    given = [option for option in WITHOUT_CONFIG if getattr(args, option) is not None]
    if args.config is not None:
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')}: --config says it already; use --set to change it")
        view = _configured(args)
    else:
        if args.set or not args.shards or (needs_tokenizer and args.tokenizer is None):
            raise ConfigError(f"give SHARDS{' and --tokenizer DIR' if needs_tokenizer else ''}, or --config X")
        view = _from_options(args)
    return view


def _configured(args: argparse.Namespace) -> View:
    config = Config.load(args.config, args.set)
    if args.shards:
        config.data.train = [ShardsConfig("shards", args.shards)]

    from trainer.load import image_transform, model_config

    model = model_config(config.model)
    return View(config, image_transform(model), model.image_context_length)


def _from_options(args: argparse.Namespace) -> View:
    from trainer.data.transform import IMAGE_ASPECTS, ImageTransform

    values = {
        option: default if getattr(args, option) is None else getattr(args, option)
        for option, (_, default, _) in WITHOUT_CONFIG.items()
    }
    size, patch, aspect = values["image_size"], values["patch_size"], values["image_aspect"]
    if size % patch:
        raise ConfigError(f"--image-size {size} is not a multiple of --patch-size {patch}")
    if aspect not in IMAGE_ASPECTS:
        raise ConfigError(f"--image-aspect {aspect}: expected one of {', '.join(IMAGE_ASPECTS)}")
    data = DataConfig(
        train=[ShardsConfig("shards", args.shards)],
        max_length=values["max_length"],
        system_prompt=values["system_prompt"],
        caption_prompt=values["caption_prompt"],
    )
    config = Config(model=ModelConfig(tokenizer=values["tokenizer"]), data=data)
    return View(config, ImageTransform(size, aspect), (size // patch) ** 2)


# --- Commands ---


def run_verify(args: argparse.Namespace) -> None:
    """Prints every problem as it is found, then how many there are of each kind."""
    view = open_view(args, needs_tokenizer=False)
    if not (places := view.places):
        raise DataError(f"{', '.join(args.shards)}: no such shards")

    from tqdm import tqdm

    from trainer.data.verify import Verifier, check_shards, check_together, summary
    from trainer.open_data import open_cache

    data = view.config.data
    template = view.template() if args.config or args.tokenizer else None
    verifier = Verifier(data, template, open_cache(data))
    kinds: Counter[str] = Counter()
    reports = []
    for report in check_shards(verifier, places):
        for finding in report.findings:
            tqdm.write(finding.line(report.name))  # above the progress bar, not through it
            kinds[finding.kind] += 1
        report.findings.clear()
        reports.append(report)
    for name, finding in check_together(verifier, reports):
        print(finding.line(name))
        if not finding.is_note:
            kinds[finding.kind] += 1
    print(summary(reports, kinds, data.max_length))
    if kinds:
        sys.exit(PROBLEMS_FOUND)


def run_preview(args: argparse.Namespace) -> None:
    """Writes the page."""
    view = open_view(args, needs_tokenizer=True)
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise DataError(f"--out {args.out}: expected a file in a folder that exists")

    from trainer.data.loader import ShardDataset
    from trainer.data.preview import pick, preview
    from trainer.data.preview_page import page
    from trainer.data.writer import write_whole
    from trainer.open_data import open_cache, open_reader, open_sources

    template, data, transform = view.template(), view.config.data, view.transform
    cache = open_cache(data)
    reader = open_reader(open_sources(data.train, cache), data, cache)
    dataset = ShardDataset(reader, template, transform, data.max_length)
    sizes = [len(shard) for shard in reader.shards]
    shown = [preview(dataset, slot) for slot in pick(sizes, args.samples)]
    notes = [
        f"at most {data.max_length} tokens, {view.image_length} of them for each image",
        f"pictures {transform.size} × {transform.size} ({transform.aspect}); below each is what it was before",
        f"tokenizer of {args.config or args.tokenizer}",
    ]
    write_whole(args.out, page(shown, sum(sizes), len(sizes), notes))
    bad = sum(bool(one.problems) for one in shown)
    print(f"{len(shown)} of {sum(sizes)} samples in {args.out}" + (f"; {bad} of them would be left out" if bad else ""))


def run_stats(args: argparse.Namespace) -> None:
    """Prints the numbers."""
    view = open_view(args, needs_tokenizer=True)

    from trainer.data.lengths import Lengths
    from trainer.data.stats import describe, measure
    from trainer.open_data import open_cache, open_reader, open_sources

    template, data = view.template(), view.config.data
    cache = open_cache(data)
    sources = open_sources(data.train, cache)
    lengths = Lengths(open_reader(sources, data, cache), template)
    batch_size = args.micro_batch_size or (view.config.train.micro_batch_size if args.config else 8)
    stats = measure(lengths, sources, data.max_length)
    print(describe(stats, data.max_length, view.image_length, batch_size))
