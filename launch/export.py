"""Makes a trained model ready to leave its run.

    python launch/export.py --model RUN --out DIR                            the complete folder, as it was saved
    python launch/export.py --model RUN --out DIR --merge                    a LoRA adapter folded into the model
    python launch/export.py --model RUN --out DIR --part language_model      a plain Qwen folder
    python launch/export.py --model RUN --out DIR --part projector           the projector alone

RUN is a run, a checkpoint or an export. Of a LoRA run, without --merge, DIR gets the model as base/ and the adapter,
for PEFT, as hf/; parts have the adapter folded in. A folder that is not empty is never written to.
"""

import argparse
from pathlib import Path

from trainer.errors import run_main

DTYPES = ("bfloat16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a run, a checkpoint, or an exported folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--merge", action="store_true", help="add the LoRA adapter to the weights")
    parser.add_argument("--part", choices=("language_model", "projector"), help="this part alone")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they are")
    args = parser.parse_args()

    import torch  # slow to import, so after the arguments are known to be good

    from trainer.publish import publish

    publish(args.model, args.out, args.merge, args.part, getattr(torch, args.dtype) if args.dtype else None)
    files = [file for file in args.out.rglob("*") if file.is_file()]
    print(f"{args.out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB")


if __name__ == "__main__":
    run_main(main)
