"""Writes WebDataset shards from a data set, going on where an earlier run stopped; and looks at shards.

    python launch/prepare_shards.py FORMAT SOURCE --out DIR [--skip-bad] [--samples-per-shard N] [--workers N]

    llava        FILE.json[l] --images DIR            LLaVA's or ShareGPT's conversations
    jsonl        FILE.jsonl --images DIR              a JSON object a line: conversations, messages, caption or text
    coco         captions_train2017.json --images DIR COCO's captions
    aic          caption_train_annotations_20170902.json --images DIR   AI Challenger's Chinese captions
    img2dataset  FOLDER | 'FOLDER/*.tar'              tars that img2dataset has downloaded
    hf           NAME | FOLDER | FILE.parquet         what datasets.load_dataset opens, or save_to_disk has written

    verify       SHARDS...                            what is wrong where; exit code 1 if anything is
    stats        SHARDS... --tokenizer DIR            samples, images, lengths, what packing saves
    preview      SHARDS... --tokenizer DIR --out FILE an HTML page of samples as the model sees them

python launch/prepare_shards.py FORMAT --help lists the options of one.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shard_commands import add_inspection_commands, positive

from trainer.cores import cores
from trainer.errors import EXIT_INTERRUPTED, DataError, run_main

if TYPE_CHECKING:  # the rest is slow to import, so after the command line is known to be good
    from trainer.data.sources.source import Source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="FORMAT", required=True)
    for add in (add_llava, add_jsonl, add_coco, add_aic, add_img2dataset, add_hf):
        add(commands)
    add_inspection_commands(commands)
    args = parser.parse_args()
    args.run(args)


# --- Formats: the options of each, and what opens it ---


def add_llava(commands: argparse._SubParsersAction) -> None:
    command = _add_format(commands, "llava", open_llava, "LLaVA's or ShareGPT's JSON or JSON lines")
    _add_images(command)


def open_llava(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.conversations import ConversationSource

    return ConversationSource(Path(args.source), args.images)


def add_jsonl(commands: argparse._SubParsersAction) -> None:
    command = _add_format(
        commands, "jsonl", open_jsonl, "a JSON object a line: image(s), and conversations, messages, caption or text"
    )
    _add_images(command)


def open_jsonl(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.conversations import ConversationSource

    return ConversationSource(Path(args.source), args.images, any_text=True)


def add_coco(commands: argparse._SubParsersAction) -> None:
    command = _add_format(commands, "coco", open_coco, "COCO's captions_*.json")
    _add_images(command)
    _add_captions(command)


def open_coco(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.captions import CocoSource

    return CocoSource(Path(args.source), args.images, args.captions == "all")


def add_aic(commands: argparse._SubParsersAction) -> None:
    command = _add_format(commands, "aic", open_aic, "AI Challenger's caption_*_annotations_*.json")
    _add_images(command)
    _add_captions(command)


def open_aic(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.captions import AicSource

    return AicSource(Path(args.source), args.images, args.captions == "all")


def add_img2dataset(commands: argparse._SubParsersAction) -> None:
    _add_format(commands, "img2dataset", open_img2dataset, "a folder of img2dataset's tars, or a pattern of tars")


def open_img2dataset(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.img2dataset import Img2datasetSource

    return Img2datasetSource(args.source)


def add_hf(commands: argparse._SubParsersAction) -> None:
    command = _add_format(commands, "hf", open_hf, "a data set of the hub, a folder, or a parquet file")
    command.add_argument("--split", default="train")
    command.add_argument("--config-name", help="of a data set that has several configurations")
    command.add_argument("--image-column", help="pictures, or lists of them; found if there is only one such column")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text-column", help="captions")
    text.add_argument("--conversations-column", help="lists of turns, {from, value} or {role, content}")


def open_hf(args: argparse.Namespace) -> "Source":
    from trainer.data.sources.huggingface import HuggingFaceSource

    columns = (args.image_column, args.text_column, args.conversations_column)
    return HuggingFaceSource(args.source, args.split, args.config_name, *columns)


def _add_format(commands: argparse._SubParsersAction, name: str, opens, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run_prepare, opens=opens, format=name)
    command.add_argument("source", help=help)
    command.add_argument("--out", type=Path, required=True, help="folder for the shards")
    command.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="default 1000")
    command.add_argument("--skip-bad", action="store_true", help="leave bad entries out, count them, and go on")
    workers = cores()
    command.add_argument("--workers", type=positive, default=workers, metavar="N", help=f"processes; default {workers}")
    return command


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=Path, required=True, help="folder that the names of pictures start from")


def _add_captions(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--captions", choices=["first", "all"], default="first",
        help="of a picture's captions: the first alone (default), or each as a sample with a copy of the picture",
    )  # fmt: skip


# --- Commands ---


def run_prepare(args: argparse.Namespace) -> None:
    """Makes the shards of one source, and says what was kept and why the rest was not."""
    if (images := getattr(args, "images", None)) and not images.is_dir():
        raise DataError(f"--images {images}: no such folder")

    from trainer.data.prepare import Preparation, prepare

    task = Preparation(
        source=args.opens(args),
        title=args.source,
        prefix=shard_prefix(args.source),
        out=args.out,
        options=format_options(args),
        samples_per_shard=args.samples_per_shard,
        skip_bad=args.skip_bad,
    )
    try:
        summary = prepare(task, args.workers)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on, with the shards in {args.out} as they are", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    left_out = sum(summary.left_out.values())
    print(f"{summary.kept} samples in {summary.shards} shards in {args.out}; left out: {left_out}")
    print(summary.table(), end="")


def shard_prefix(source: str) -> str:
    """The source's name, without what has a meaning in patterns of shards."""
    path = Path(source)
    name = path.parent.name if "*" in path.name else path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "shard"


def format_options(args: argparse.Namespace) -> dict[str, str | None]:
    """What the samples depend on beside the source: all options but those of how the work is done."""
    how = ("run", "opens", "source", "out", "workers", "skip_bad", "samples_per_shard")
    options = {name: value for name, value in vars(args).items() if name not in how}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in options.items()}


if __name__ == "__main__":
    run_main(main)
