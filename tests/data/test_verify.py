"""`verify` finds every fault, says in which shard and sample it is, and finds none where there is none."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import command
from inspected import picture, question, run, write, write_by_webdataset, write_nlvr

from trainer.config import DataConfig
from trainer.data import verify
from trainer.data.index import VERSION, open_index
from trainer.data.kept import load_kept, save_kept
from trainer.data.order import Slot
from trainer.data.reader import ShardReader
from trainer.data.template import ChatTemplate
from trainer.data.verify import Report, Verifier, check_shard
from trainer.errors import DataError
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def good(count: int = 3, prefix: str = "") -> dict[str, dict]:
    return {f"{prefix}{n}": {"png": picture(), "json": question()} for n in range(count)}


# --- Nothing is wrong ---


def test_shards_of_every_writer_are_whole(tmp_path, tiny_run):
    ours = tmp_path / "ours"
    shutil.copytree(tiny_run.parent / "shards", ours, ignore=shutil.ignore_patterns("*.npz"))
    for again in ("first", "with the index that the first has left"):
        code, out, err = run("verify", ours / "*.tar", "--tokenizer", tiny_run.parent / "tiny-qwen")
        assert (code, out) == (0, "24 samples in 4 shards: 0 problems\n"), (again, err)
    assert run("verify", write_by_webdataset(tmp_path / "theirs"))[:2] == (0, "10 samples in 4 shards: 0 problems\n")


def test_real_shards_are_whole(tmp_path):
    shards = write_nlvr(tmp_path, 60)
    done = command("python", "launch/prepare_shards.py", "verify", shards)
    assert (done.returncode, done.stdout, done.stderr) == (0, "60 samples in 3 shards: 0 problems\n", "")


# --- Samples ---

HALF = picture(size=(200, 200), form="JPEG")
FAULTS = {
    "not-a-picture": ({"png": b"hello", "json": question()}, "the picture cannot be decoded"),
    "cut-picture": ({"jpg": HALF[: len(HALF) - 100], "json": question()}, "the picture cannot be decoded"),
    "second-of-two": (
        {"0.png": picture(), "1.png": b"", "json": question("<image><image>Alike?")},
        "picture 2 of 2: the picture cannot be decoded",
    ),
    "no-json": ({"png": picture(), "json": "{"}, "its .json is not JSON"),
    "json-list": ({"png": picture(), "json": "[]"}, "its .json holds a list"),
    "no-text": ({"png": picture()}, "expected a field 'conversations'"),
    "no-picture": ({"txt": "A cat."}, "a caption, but no picture"),
    "no-answer": ({"png": picture(), "json": {"messages": [{"role": "user", "content": "?"}]}}, "the conversation has"),
    "role": ({"png": picture(), "json": {"messages": [{"role": "bot", "content": "?"}]}}, "messages[0]: unknown role"),
    "marks": ({"png": picture(), "json": question("<image><image>?")}, "2 image marks"),
    "surrogate": ({"png": picture(), "json": '{"caption": "\\ud800"}'}, "half a character"),
    "crowded": (
        {**{f"{n}.png": picture() for n in range(8)}, "json": question("<image>" * 8)},
        "its images reach to token",
    ),
    "\u7ea2\u001b[2J": ({"png": b"", "json": question()}, "the picture cannot be decoded"),
}
"""Key -> a sample that is of no use, and how the words begin that say so."""


def test_every_fault_of_a_sample_is_named_with_its_key(tmp_path, tiny_run):
    tokenizer = build_tokenizer(tiny_run.parent / "tiny-qwen" / "qwen.tiktoken")
    template = ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), image_length=16)
    tar = write(tmp_path, {"first": good(1)["0"], **{key: members for key, (members, _) in FAULTS.items()}, **good(2)})
    # Eight pictures of 16 tokens are more than 100, and nothing else here is.
    report = check_shard(Verifier(DataConfig(max_length=100, system_prompt=""), template), tar)
    assert [finding.key for finding in report.findings] == list(FAULTS)
    for finding, (_, words) in zip(report.findings, FAULTS.values(), strict=True):
        assert finding.what.startswith(words), finding
        assert finding.line(report.name).startswith(f"{tar}: sample ")
        assert finding.line(report.name).isprintable()  # whatever the key holds, the terminal stays as it is
    assert report.findings[-1].line(report.name).startswith(f"{tar}: sample '\u7ea2\\x1b[2J': ")
    # 3 good ones; one picture each but for none, two and eight.
    assert (report.samples, report.images) == (len(FAULTS) + 3, 3 + len(FAULTS) - 1 + 1 + 7)


def test_a_sample_with_two_faults_is_named_twice_and_a_cut_text_is_no_fault(tmp_path, tiny_run):
    samples = {"both": {"png": b"", "json": "{"}, "long": {"png": picture(), "json": question(answer="red " * 500)}}
    tar = write(tmp_path, samples)
    tokenizer = ("--tokenizer", tiny_run.parent / "tiny-qwen", "--image-size", "56", "--max-length", "100")
    code, out, _ = run("verify", tar, *tokenizer)
    lines = out.splitlines()
    assert code == 1
    assert [line.startswith(f"{tar}: sample 'both': ") for line in lines] == [True, True, False, False, False, False]
    assert lines[-2].startswith("samples longer than max_length=100: 1; ")
    assert lines[-1] == "2 samples in 1 shards: 2 problems"


# --- Shards ---


def test_a_damaged_shard_is_named_and_does_not_stop_the_others(tmp_path):
    tars = {name: write(tmp_path / name, good(prefix=name)) for name in ("a-good", "cut", "flipped", "z-good")}
    content = tars["cut"].read_bytes()
    tars["cut"].write_bytes(content[: len(content) // 2])
    header = bytearray(tars["flipped"].read_bytes())
    header[1024:1536] = os.urandom(512)
    tars["flipped"].write_bytes(header)
    tars["apart"] = tmp_path / "apart.tar"
    with tarfile.open(tars["apart"], "w") as archive:
        for name in ("a.png", "b.png", "a.json"):
            archive.addfile(tarfile.TarInfo(name))
    tars["empty"] = tmp_path / "empty.tar"
    tarfile.open(tars["empty"], "w").close()
    tars["garbage"] = tmp_path / "garbage.tar"
    tars["garbage"].write_bytes(b"garbage" * 1000)
    tars["absent"] = tmp_path / "absent.tar"

    code, out, err = run("verify", *tars.values())
    *found, summary = [line for line in out.splitlines() if not line.startswith(" ")]
    assert (code, summary) == (1, "6 samples in 8 shards: 6 problems"), out + err
    said = {
        "cut": "truncated",
        "flipped": "",
        "apart": "the members of sample 'a' do not stand together",
        "empty": "holds no sample",
        "garbage": "not a readable tar",
        "absent": "the shard cannot be read (No such file or directory)",
    }
    for line, (name, words) in zip(found, said.items(), strict=True):
        assert line.startswith(f"{tars[name]}: "), line
        assert words in line


def test_an_index_that_is_not_that_of_its_tar_is_named(tmp_path):
    stale, wrong = write(tmp_path / "stale", good(prefix="s")), write(tmp_path / "wrong", good(prefix="w"))
    for tar in (stale, wrong):
        open_index(tar)
    os.utime(stale, ns=(1, 1))
    # The tar's size and time are those of the index, but its members lie elsewhere: bytes of one sample for another's.
    names = ["samples", "digest", "keys", *(name for name in vars(open_index(wrong)) if name != "shard")]
    stamp = [VERSION, wrong.stat().st_size, wrong.stat().st_mtime_ns]
    columns = load_kept(wrong, "index", stamp, names)
    save_kept(wrong, "index", stamp, columns | {"offset": columns["offset"][::-1]})

    code, out, _ = run("verify", stale, wrong)
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"{stale}: the index beside it is of another state of the tar")
    assert lines[1].startswith(f"{wrong}: its index does not agree with it (in offset)")
    assert lines[-1] == "3 samples in 2 shards: 2 problems"
    Path(f"{wrong}.index.npz").unlink()
    assert run("verify", stale, wrong)[:2] == (0, "6 samples in 2 shards: 0 problems\n")


def test_what_two_shards_share_is_named_with_both(tmp_path):
    first = write(tmp_path / "first", good(3, "k"))
    copy = tmp_path / "copy.tar"
    shutil.copy(first, copy)
    other = write(tmp_path / "other", {**good(1, "new"), **good(12, "k")})
    third = write(tmp_path / "third", {"k11": good(1)["0"], "k1": good(1)["0"]})
    code, out, _ = run("verify", first, copy, other, third, first)
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert code == 1
    assert lines == [
        f"{copy}: holds the same samples as {first}",
        f"{first}: is given twice",
        f"{other}: samples 'k0', 'k1', 'k2': also in {first} (no problem)",
        f"{third}: samples 'k1', 'k11': also in {other} (no problem)",
        "24 samples in 5 shards: 2 problems",
    ]


def test_other_samples_under_the_same_keys_are_a_note(tmp_path):
    # As of two sources that the tool itself has prepared: each begins with 00000000.
    first = write(tmp_path / "first", good(2))
    second = write(tmp_path / "second", {key: {"png": picture("blue"), "json": question()} for key in good(2)})
    code, out, _ = run("verify", first, second)
    assert out.splitlines() == [
        f"{second}: samples '0', '1': also in {first} (no problem)",
        "4 samples in 2 shards: 0 problems",
    ]
    assert code == 0


def test_a_shard_that_changes_meanwhile_is_reported_and_left_closed(tmp_path, monkeypatch):
    tar = write(tmp_path, good(2))

    def changed(_report: Report, reader: ShardReader, i: int) -> None:
        reader.images(Slot(0, i))
        raise DataError(f"{tar}: the shard has changed")

    monkeypatch.setattr(verify, "_check_pictures", changed)
    before = os.listdir("/proc/self/fd")
    report = check_shard(Verifier(DataConfig()), tar)
    assert [finding.what for finding in report.findings] == ["the shard has changed"]
    assert os.listdir("/proc/self/fd") == before


# --- The command ---


def test_a_configuration_says_which_shards_and_what_fits(tmp_path, tiny_run):
    code, out, err = run("verify", "--config", tiny_run)
    assert (code, out) == (0, "24 samples in 4 shards: 0 problems\n"), err
    # A picture is 4 tokens, and a sample begins with at least 3 before it: nothing fits into 5 but what has no picture.
    code, out, _ = run("verify", "--config", tiny_run, "--set", "data.max_length=5")
    assert code == 1
    assert "images longer than max_length" in out
    tar = write(tmp_path, good(2))
    assert run("verify", tar, "--config", tiny_run)[1] == "2 samples in 1 shards: 0 problems\n"


def test_mistakes_in_the_command_have_an_exit_code_of_their_own(tmp_path, tiny_run):
    for arguments, words in {
        (str(tmp_path / "*.tar"),): "no such shards",
        (): "give SHARDS, or --config X",
        ("--config", str(tiny_run), "--max-length", "5"): "--max-length: --config says it already",
        ("a.tar", "--image-aspect", "round"): "--image-aspect round: expected one of crop, pad, squash",
        ("a.tar", "--image-size", "100"): "--image-size 100 is not a multiple of --patch-size 14",
        ("a.tar", "--tokenizer", str(tmp_path)): "no qwen.tiktoken and no tokenizer.json",
    }.items():
        code, out, err = run("verify", *arguments)
        assert (code, out) == (2, ""), err
        assert words in err


def test_keys_of_many_shards_take_eight_bytes_each(tmp_path):
    tar = write(tmp_path, good(5))
    hashes = check_shard(Verifier(DataConfig()), tar).key_hashes
    assert (hashes.dtype, hashes.nbytes) == (np.uint64, 40)
    assert len(set(hashes.tolist())) == 5
