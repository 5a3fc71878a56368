"""Makes an export of what the notes' own code (WatchTower-Liu/VLM-learning) trained.

    python launch/import_notes.py --language-model Qwen-1_8B --vision-tower clip-vit-large-patch14 --notes DIR --out hf

DIR has adapter_config.json, adapter_model.bin and other_params.bin; the first two folders are those it was trained on.
The export opens as any other: with launch/generate.py, and as model.init_from of a stage.
"""

import argparse
from pathlib import Path

from trainer.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", type=Path, required=True, help="folder of the Qwen that was trained")
    parser.add_argument("--vision-tower", type=Path, required=True, help="folder of its CLIP")
    parser.add_argument("--notes", type=Path, required=True, help="folder with adapter_model.bin and other_params.bin")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    args = parser.parse_args()

    from trainer.notes import import_notes  # slow to import, so after the arguments are known to be good

    import_notes(args.language_model, args.vision_tower, args.notes, args.out)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
