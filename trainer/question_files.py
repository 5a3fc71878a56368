"""Many questions from a file or a folder of pictures, and the file of their answers, which goes on where it stopped.

{"id": "a", "image": "cat.jpg", "prompt": "What is this?"}      or `images`, or LLaVA's `conversations`, a line each
{"id": "a", "prompt": ..., "images": [...], "answer": "A cat.", "model": ..., "settings": {...}}
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.data.conversation import parse_question
from trainer.data.samples import Turn
from trainer.data.sources.pictures import check_picture
from trainer.errors import BadSample, DataError
from trainer.generate import Decoding, Generator, Prompt

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Question:
    id: str | int
    where: str
    """Where it comes from, for messages."""
    turns: list[Turn]
    """Up to the last question, with a mark for each picture."""
    images: list[Path]


def read_questions(file: Path, images: Path, bad: Callable[[str], None]) -> list[Question]:
    """The questions of a JSON-lines file; `bad` is told of each line that is none, by file and line.

    images: folder that the names of pictures start from. An id that is not given is the number of the line. Raises
    DataError if the file cannot be read.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    questions: dict[str | int, Question] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            question = _question(line, number, where, images)
            if question.id in questions:
                raise BadSample(f"the id {question.id!r} is that of {questions[question.id].where} too")
            questions[question.id] = question
        except BadSample as error:
            bad(f"{where}: {error}")
    return list(questions.values())


def _question(line: bytes, number: int, where: str, images: Path) -> Question:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadSample(f"expected a JSON object, found {type(record).__name__}")
    name = record.get("id", number)
    if not isinstance(name, str | int):
        raise BadSample(f"'id' must be a text or a whole number, found {name!r}")
    files = record.get("image") or record.get("images") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise BadSample("'image' or 'images' must be a file name or a list of file names")
    return Question(name, where, parse_question(record, len(files)), [images / file for file in files])


def folder_questions(folder: Path, prompt: str) -> list[Question]:
    """The same question about each picture of a folder, by name. Raises DataError if it has none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: no pictures in this folder; they are known by {', '.join(PICTURE_SUFFIXES)}")
    turns = parse_question({"prompt": prompt}, images=1)
    return [Question(file.name, f"picture {n}", turns, [file]) for n, file in enumerate(files, start=1)]


def read_image(file: Path) -> bytes:
    """The bytes of a picture that can be decoded. Raises DataError, by the file's name, if it cannot."""
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from error
    check_picture(content, str(file))
    return content


class AnswerFile:
    """Answers as lines of JSON: of a file, behind those that it has, or of the standard output.

    file: None for the standard output. The rest is what each line is checked against: one job, one file. Raises
    DataError if the file cannot be written, or holds anything but answers of this model, to these questions, with
    these settings.
    """

    def __init__(
        self, file: Path | None, questions: list[Question], export: Path, decoding: Decoding, system_prompt: str
    ):
        self.common = {"model": str(export.resolve()), "settings": {"system_prompt": system_prompt, **asdict(decoding)}}
        self.done: set[str | int] = set()
        """Ids of the questions that the file answers."""
        self.out = sys.stdout.buffer
        if file:
            self._open(file, {question.id: question for question in questions})

    def _open(self, file: Path, asked: dict[str | int, Question]) -> None:
        try:
            self.out = file.open("a+b")
        except OSError as error:
            raise DataError(f"--out {file}: cannot be written ({error.strerror})") from error
        self.out.seek(0)
        content = self.out.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            self._take(f"{file}:{number}", line, asked)
        tail, start = content[whole:], b'{"id": '
        if not (tail.startswith(start) or start.startswith(tail)):
            raise DataError(
                f"--out {file}: its last line is not an answer; --out takes a new file, or one of this command"
            )
        self.out.truncate(whole)  # cuts off the line in which an earlier job was ended

    def _take(self, where: str, line: bytes, asked: dict[str | int, Question]) -> None:
        try:
            found = json.loads(line)
            name, answer = found["id"], found["answer"]
            expected = self._line(asked[name], answer) if name in asked else {}
            differing = [key for key in expected if expected[key] != found.get(key)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where}: not an answer ({error!r}); --out takes a new file, or one that the same command has begun"
            ) from error
        if differing or not expected:
            reason = f"differs in {', '.join(differing)}" if expected else "is not asked now"
            raise DataError(
                f"{where}: an answer of another job: its question {name!r} {reason}. Give what that job was given, or "
                f"another --out"
            )
        self.done.add(name)

    def _line(self, question: Question, answer: str) -> dict[str, Any]:
        images = [str(file) for file in question.images]
        return {
            "id": question.id, "prompt": question.turns[-1].text, "images": images, "answer": answer, **self.common,
        }  # fmt: skip

    def add(self, answers: list[tuple[Question, str]]) -> None:
        """Writes the answers of a batch, at once."""
        lines = (json.dumps(self._line(*each), ensure_ascii=False) + "\n" for each in answers)
        self.out.write("".join(lines).encode())
        self.out.flush()


def answer_all(
    generator: Generator,
    questions: list[Question],
    decoding: Decoding,
    system_prompt: str,
    batch_size: int,
    done: set[str | int],
    bad: Callable[[str], None],
) -> Iterator[list[tuple[Question, str]]]:
    """Answers questions in batches, without those that are done; `bad` is told of each that cannot be asked.

    Batches, and what is drawn in each, do not depend on what is done: a job that goes on ends as one that never
    stopped.
    """
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        usable: list[tuple[Question, Prompt]] = []
        for question in batch if any(question.id not in done for question in batch) else []:
            try:
                images = [read_image(file) for file in question.images]
                usable.append((question, generator.prompt(question.turns, images, system_prompt)))
            except DataError as error:
                bad(f"{question.where}: {error}")
        answers: list[str] = []
        if any(question.id not in done for question, _ in usable):
            drawn = replace(decoding, seed=decoding.seed + start)
            answers = generator.answers([prompt for _, prompt in usable], drawn)
        yield [(q, answer) for (q, _), answer in zip(usable, answers, strict=bool(answers)) if q.id not in done]
