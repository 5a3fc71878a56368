"""Writes WebDataset shards from a data set.

python launch/prepare_shards.py llava FILE.json --images DIR --out DIR
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from trainer.data.index import open_index
from trainer.data.sources import llava_records, read_llava
from trainer.data.writer import ShardWriter
from trainer.errors import DataError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=["llava"], help="layout of the source")
    parser.add_argument("source", type=Path, help="the JSON file")
    parser.add_argument("--images", type=Path, required=True, help="folder that the JSON's image names start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--skip-bad", action="store_true", help="leave bad entries out, list them, and go on")
    args = parser.parse_args()
    if args.samples_per_shard < 1:
        parser.error(f"--samples-per-shard {args.samples_per_shard}: expected 1 or more")
    if not args.images.is_dir():
        raise DataError(f"--images {args.images}: no such folder")
    if existing := sorted(args.out.glob("*.tar")):
        raise DataError(f"{args.out} already holds {len(existing)} shards; choose another folder or remove them")

    entries = read_llava(args.source)
    skipped: list[str] | None = [] if args.skip_bad else None
    with ShardWriter(args.out, args.source.stem, args.samples_per_shard) as writer:
        records = llava_records(entries, args.images, skipped)
        # Quiet when the output is not a terminal.
        for record in tqdm(records, total=len(entries), unit="sample", disable=None):
            writer.write(record.key, record.members)
    for reason in skipped or []:
        print(f"left out: {reason}", file=sys.stderr)
    if not writer.samples:
        raise DataError(f"{args.source}: no sample was good enough to keep")
    samples = sum(len(open_index(shard)) for shard in writer.shards)
    print(f"{samples} samples in {len(writer.shards)} shards in {args.out}; left out: {len(skipped or [])}")


if __name__ == "__main__":
    run_main(main)
