"""The options that generate.py and chat.py share."""

import argparse
from pathlib import Path


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="an exported folder, a checkpoint, or a run folder")
    parser.add_argument("--system-prompt", help="default: as the model was trained; '' for none")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default 256")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default), above draws"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest share P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing; default 0")
