"""Asks an exported model about pictures, or without any.

    python launch/generate.py --model runs/stage2 --image cat.jpg --prompt "What is this?"
    python launch/generate.py --model runs/stage2 --image a.jpg --image b.jpg --prompt "Is <image> older than <image>?"
    python launch/generate.py --model runs/stage2 --image FOLDER --prompt "Describe the image." [--out answers.jsonl]
    python launch/generate.py --model runs/stage2 --jsonl questions.jsonl --out answers.jsonl [--image FOLDER]

Pictures stand where the prompt has <image>, or else in front. Of a folder, each picture is asked about. A line of
--jsonl has "prompt" (or LLaVA's "conversations", up to the last question), "image" or "images", and "id"; names of
pictures start from the file's folder, or from --image. The same command goes on with an --out that was not finished.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from answer_options import add_answer_options

from trainer.errors import EXIT_INTERRUPTED, ConfigError, DataError, printable, run_main

if TYPE_CHECKING:  # slow to import, so after the command line is known to be good
    from trainer.generate import Decoding
    from trainer.question_files import Question


def main() -> None:
    args = parse()
    many = bool(args.jsonl) or (len(args.image) == 1 and args.image[0].is_dir())
    check(args, many)

    from trainer.generate import Decoding

    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.num_beams, args.seed)
    if many:
        answer_many(args, decoding)
    else:
        answer_one(args, decoding)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_answer_options(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated, in reading order")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="many questions, one a line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of many answers, as JSON lines; default: print them")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions answered together; default 8")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search; default 1, none")
    parser.add_argument("--stream", action="store_true", help="show one answer as it grows, as on a terminal")
    return parser.parse_args()


def check(args: argparse.Namespace, many: bool) -> None:
    """Raises ConfigError where the options do not go together, DataError where there is no such file."""
    for file in args.image + ([args.jsonl] if args.jsonl else []):
        if not file.exists():
            raise DataError(f"{file}: no such file")
    if args.jsonl and args.prompt is not None:
        raise ConfigError("--jsonl has the questions: leave --prompt out")
    if args.jsonl and (len(args.image) > 1 or not all(folder.is_dir() for folder in args.image)):
        raise ConfigError("--jsonl names the pictures: --image may only be the folder that their names start from")
    if not args.jsonl and args.prompt is None:
        raise ConfigError("--prompt is missing: the question, or --jsonl with many")
    if not many and any(file.is_dir() for file in args.image):
        raise ConfigError("--image: a folder stands alone; give it without other pictures")
    if args.out and not many:
        raise ConfigError("--out is for many questions: give --jsonl, or a folder as --image")
    if args.out and args.jsonl and args.out.resolve() == args.jsonl.resolve():
        raise ConfigError(f"--out {args.out}: has the questions; the answers need a file of their own")
    if args.stream and (many or args.num_beams > 1):
        raise ConfigError("--stream shows one answer as it grows: one question, without --num-beams")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: must be at least 1")


def answer_one(args: argparse.Namespace, decoding: "Decoding") -> None:
    from trainer.data.conversation import parse_question
    from trainer.folders import find_export
    from trainer.generate import Generator
    from trainer.question_files import read_image

    images = [read_image(file) for file in args.image]
    turns = parse_question({"prompt": args.prompt}, len(images))
    generator = Generator(find_export(args.model))
    prompt = generator.prompt(turns, images, args.system_prompt)
    if not args.stream and (not sys.stdout.isatty() or args.num_beams > 1):
        answer = generator.answers([prompt], decoding)[0]
        print(printable(answer, lines=True) if sys.stdout.isatty() else answer)
        return
    shown = ""
    for text in generator.stream(prompt, decoding):
        print(printable(text[len(shown) :], lines=True), end="", flush=True)
        shown = text
    print()


def answer_many(args: argparse.Namespace, decoding: "Decoding") -> None:
    from trainer.question_files import folder_questions, read_questions

    bad = 0

    def leave_out(message: str) -> None:
        nonlocal bad
        bad += 1
        print(f"left out: {printable(message)}", file=sys.stderr)

    if args.jsonl:
        questions = read_questions(args.jsonl, args.image[0] if args.image else args.jsonl.parent, leave_out)
    else:
        questions = folder_questions(args.image[0], args.prompt)
    count = len(questions) + bad
    if questions:
        try:
            write_answers(args, decoding, questions, leave_out)
        except KeyboardInterrupt:
            print("\nstopped" + ("; the same command goes on" if args.out else ""), file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
    if bad == count:
        what = f"none of {count} questions can be used; each is named above" if count else "the file is empty"
        raise DataError(f"{args.jsonl or args.image[0]}: {what}")
    print(f"answered: {count - bad}; left out: {bad}", file=sys.stderr)


def write_answers(
    args: argparse.Namespace, decoding: "Decoding", questions: "list[Question]", leave_out: Callable[[str], None]
) -> None:
    """Answers the questions, as lines of --out, or else of the standard output."""
    from tqdm import tqdm

    from trainer.folders import find_export
    from trainer.generate import Generator
    from trainer.load import trained_system_prompt
    from trainer.question_files import AnswerFile, answer_all

    export = find_export(args.model)
    opening = trained_system_prompt(export) if args.system_prompt is None else args.system_prompt
    file = AnswerFile(args.out, questions, export, decoding, opening)
    batches = answer_all(Generator(export), questions, decoding, opening, args.batch_size, file.done, leave_out)
    total = -(-len(questions) // args.batch_size)
    for answers in tqdm(batches, total=total, unit="batch", disable=None if args.out else True):
        file.add(answers)


if __name__ == "__main__":
    run_main(main)
