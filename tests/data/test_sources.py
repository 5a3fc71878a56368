"""`llava` and `jsonl`: entries of the published forms become samples; each kind of bad entry is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_sources import DEEP, bad, entry, picture, pictures, records, texts, write_json

from trainer.data.conversation import MALFORMED, MISCOUNTED, PICTURELESS
from trainer.data.index import open_index
from trainer.data.picture import UNDECODABLE
from trainer.data.sources.captions import AicSource, CocoSource
from trainer.data.sources.conversations import ConversationSource
from trainer.data.sources.pictures import NO_PICTURE, OUTSIDE, UNKNOWN_FORMAT, UNREADABLE
from trainer.data.sources.source import MALFORMED_ENTRY, NO_CAPTION
from trainer.data.writer import ShardWriter
from trainer.errors import DataError


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of pictures: in subfolders and several formats, one broken, one of a format that shards do not hold."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture("red"))
    (folder / "sub" / "b.JPG").write_bytes(picture("blue", "JPEG"))
    (folder / "c.webp").write_bytes(picture("green", "WEBP"))
    (folder / "broken.png").write_bytes(picture("red")[:40])
    (folder / "text.png").write_text("no picture")
    (folder / "d.gif").write_bytes(picture("red", "GIF"))
    (folder / "folder.png").mkdir()
    (tmp_path / "secret.png").write_bytes(picture("black"))
    return folder


# --- llava ---


def llava(images: Path, entries) -> ConversationSource:
    return ConversationSource(write_json(images.parent, entries), images)


def test_llava_entries_become_samples(images):
    text = {"id": "text/only é", "conversations": entry(0, question="Hi", answer="Hello")["conversations"]}
    entries = [
        entry("one", "a.png"),
        entry("in a folder", "sub/b.JPG"),
        entry("several", ["a.png", "sub/b.JPG", "c.webp"], "<image>, <image> or <image>?"),
        text,
        entry(7, ["c.webp"], "What is it?"),  # no mark: it is put before the question
        {"conversations": text["conversations"], "image": ""},
    ]
    found = records(llava(images, entries))
    red, blue, green = ((images / name).read_bytes() for name in ("a.png", "sub/b.JPG", "c.webp"))
    assert [pictures(record) for record in found] == [
        {"png": red},
        {"jpg": blue},
        {"0.png": red, "1.jpg": blue, "2.webp": green},
        {},
        {"webp": green},
        {},
    ]
    # Keys are unique and fit for a tar; the id itself is kept in the JSON.
    assert [record.key for record in found] == [
        "00000000-one",
        "00000001-in_a_folder",
        "00000002-several",
        "00000003-text_only_",
        "00000004-7",
        "00000005-5",
    ]
    ids = ["one", "in a folder", "several", "text/only é", "7", "5"]
    assert [record.members["json"]["id"] for record in found] == ids
    assert found[0].members["json"] == {"id": "one", "conversations": entries[0]["conversations"]}
    assert found[4].members["json"]["conversations"][0] == {"from": "human", "value": "<image>\nWhat is it?"}


def test_sharegpt_has_systems_turns_and_a_list_named_images(images):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image><image>\nWhich is red?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And the other?"},
        {"from": "gpt", "value": "Blue."},
    ]
    [found] = records(llava(images, [{"conversations": turns, "images": ["a.png", "sub/b.JPG"]}]))
    assert list(pictures(found)) == ["0.png", "1.jpg"]
    assert found.members["json"]["conversations"] == turns


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_lines_and_a_list_give_the_same_samples(images, name):
    entries = [
        entry("é", "a.png", answer="图像 🙂"),
        entry("b", "c.webp"),
        entry("last", question="Hi", answer="Hello"),
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in entries]
    wanted = records(llava(images, "[\n " + " ,\n".join(lines) + "\n]\n"))
    assert wanted[0].members["json"]["conversations"][1]["value"] == "图像 🙂"
    assert len(wanted) == 3
    for text in ("\n".join(lines), "\ufeff" + "\n\n".join(lines) + "\n", "\r\n".join(lines) + "\r\n"):
        assert records(ConversationSource(write_json(images.parent, text, name), images)) == wanted


def test_entries_with_one_id_are_different_samples(images):
    assert len(records(llava(images, [entry("same", "a.png")] * 3))) == 3  # `records` compares the keys


def test_more_than_ten_images_keep_their_order(images, tmp_path):
    # "10.png" stands before "2.png" in the tar; the index goes by the number.
    files = ["a.png", *["c.webp"] * 9, "sub/b.JPG", "c.webp"]
    [record] = records(llava(images, [entry("many", files, "<image>" * 12)]))
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write(record.key, record.members)
    index, tar = open_index(writer.shards[0]), writer.shards[0].read_bytes()
    rows = [(int(index.offset[row]), int(index.size[row])) for row in np.flatnonzero(index.is_image)]
    assert [tar[offset : offset + size] for offset, size in rows] == [(images / file).read_bytes() for file in files]


NAMES = "'image' must be a file name or a list of file names"
BAD_ENTRIES = {
    "missing": (entry("x", "none.png"), NO_PICTURE, "images/none.png: no such picture"),
    "broken": (entry("x", "broken.png"), UNDECODABLE, "images/broken.png: the picture cannot be decoded"),
    "no picture": (entry("x", "text.png"), UNDECODABLE, "images/text.png: the picture cannot be decoded"),
    "a folder": (entry("x", "folder.png"), UNREADABLE, "Is a directory"),
    "null byte": (entry("x", "a\0.png"), UNREADABLE, "null byte"),
    "half a name": (entry("x", "\ud83d.png"), UNREADABLE, "surrogates not allowed"),
    "format": (entry("x", "d.gif"), UNKNOWN_FORMAT, "images/d.gif: shards hold pictures as jpg, jpeg, png, webp"),
    "no extension": (entry("x", "a"), UNKNOWN_FORMAT, "images/a: shards hold pictures as"),
    "above": (entry("x", "../secret.png"), OUTSIDE, "../secret.png: leads out of the folder"),
    "above, by a detour": (entry("x", "sub/../../secret.png"), OUTSIDE, "leads out of the folder"),
    "too many marks": (entry("x", "a.png", "<image><image>"), MISCOUNTED, "2 image marks '<image>'"),
    "too few marks": (entry("x", ["a.png", "a.png"]), MISCOUNTED, "1 image marks '<image>'"),
    "mark without image": (entry("x"), MISCOUNTED, "1 image marks '<image>'"),
    "image as object": (entry("x", {"bytes": None}), MALFORMED_ENTRY, NAMES),
    "image as number": (entry("x", 7), MALFORMED_ENTRY, NAMES),
    "images as numbers": (entry("x", ["a.png", 7]), MALFORMED_ENTRY, NAMES),
    "no conversation": ({"id": "x", "image": "a.png"}, MALFORMED_ENTRY, "found ['id', 'image']"),
    "no answer": (entry("x", "a.png", answer=""), "no answer", "has no answer to learn from"),
    "role": ({"id": "x", "conversations": [{"from": "bot", "value": "Hi"}]}, MALFORMED, "unknown role 'bot'"),
    "no turn": ({"id": "x", "conversations": []}, MALFORMED, "'conversations' must be a list of turns"),
    "half a character": (entry("x", "a.png", answer="\ud83d"), MALFORMED, "a lone surrogate"),
}


@pytest.mark.parametrize(("one", "kind", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_named_by_number_id_and_kind(images, one, kind, message):
    source = llava(images, [entry("good", "a.png"), one, entry("also good", "c.webp")])
    found_kind, found = bad(source, 1)
    assert found_kind == kind
    assert found.startswith("entry 1 (id 'x'): ")
    assert message in found
    # The number stays that of the file, so a key says where its entry is.
    assert [source.record(number).key for number in (0, 2)] == ["00000000-good", "00000002-also_good"]


def test_an_absolute_name_of_a_picture_is_refused(images, tmp_path):
    source = llava(images, [entry("x", str(tmp_path / "secret.png")), entry("y", str(images / "a.png"))])
    assert bad(source, 0)[0] == OUTSIDE
    kind, said = bad(source, 1)
    assert "an absolute name; names of pictures start from the folder" in said
    assert kind == OUTSIDE  # even inside: a JSON that names folders of one machine is of no use elsewhere
    # A detour that stays inside is none.
    assert pictures(llava(images, [entry("x", "sub/../a.png")]).record(0)) == {"png": picture("red")}


def test_half_a_character_in_an_id_is_named(images):
    kind, message = bad(llava(images, [entry("x\ud83d", "a.png")]), 0)
    assert kind == MALFORMED_ENTRY
    assert message.startswith("entry 0: half a character (a lone surrogate) in the id 'x\\ud83d'")


def test_a_bad_line_is_one_bad_entry(images):
    lines = [json.dumps(entry("a", "a.png")), '{"id": 1,', "[" * 100_000, '"a"', json.dumps(entry("b", "a.png"))]
    source = ConversationSource(write_json(images.parent, "\n".join(lines), "data.jsonl"), images)
    assert bad(source, 1)[0] == bad(source, 2)[0] == bad(source, 3)[0] == MALFORMED_ENTRY
    assert bad(source, 1)[1].startswith(f"entry 1, line 2 of {images.parent}/data.jsonl: not JSON (")
    assert bad(source, 2)[1] == f"entry 2, line 3 of {images.parent}/data.jsonl: not JSON (nested too deeply)"
    assert source.record(4).key == "00000004-b"


NOT_LLAVA = {
    "half a list": ('[{"id": 1,', "not JSON (Expecting property name enclosed in double quotes: line 1 column 11"),
    "no comma": ('[{"id": 1} {"id": 2}]', "not JSON (Expecting ',' delimiter"),
    "a comma too many": ('[{"id": 1}, ]', "not JSON (Expecting value"),
    "no end": ('[{"id": 1}', "not JSON (Expecting ',' delimiter"),
    "more behind": ('[{"id": 1}] [', "not JSON (Extra data"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "deep": (DEEP, "not JSON (nested too deeply)"),
    "JSON lines": ('{"id": 1}\n{"id": 2}\n', "entry 0: expected LLaVA's fields 'conversations' and 'image'"),
    "an object": ('{\n"id": 1}', "expected a JSON list or one JSON object a line, found dict"),
    "no entry": ("[ ]", "the list is empty"),
    "nothing": ("", "the file is empty"),
    "blank": (" \n", "not JSON"),
    "a list of texts": ('["a"]', "entry 0: expected LLaVA's fields 'conversations' and 'image', found str"),
    "bad lines": ('{"id": 1}\n{"id": 2', "entry 0: expected LLaVA's fields"),
    "COCO": ('[{"image_id": 3, "caption": "A cat."}]', "found ['caption', 'image_id']"),
    "text for turns": ('[{"conversations": "Hi"}]', "found ['conversations']"),
}


@pytest.mark.parametrize(("content", "message"), NOT_LLAVA.values(), ids=NOT_LLAVA)
def test_a_file_of_another_form_is_named(tmp_path, content, message):
    file = tmp_path / "data.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as raised:
        ConversationSource(file, tmp_path)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("opens", [ConversationSource, CocoSource, AicSource])
def test_a_file_that_cannot_be_read_is_named(tmp_path, opens):
    with pytest.raises(DataError, match=r"/none\.json: cannot be read \(No such file or directory\)"):
        opens(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        opens(tmp_path, tmp_path)


# --- jsonl ---


def test_a_line_may_hold_any_text_the_trainer_knows(images):
    turns = entry(0)["conversations"]
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    lines = [
        {"image": "a.png", "conversations": turns},
        {"id": "m", "images": ["a.png"], "messages": messages},
        {"image": "a.png", "caption": " A cat. ", "score": 3},
        {"image": "sub/b.JPG", "text": "A sky.", "caption": None},
    ]
    file = write_json(images.parent, "\n".join(map(json.dumps, lines)), "data.jsonl")
    source = ConversationSource(file, images, any_text=True)
    assert texts(source) == [
        {"id": "0", "conversations": turns},
        {"id": "m", "conversations": turns},  # one form for all, with the mark
        {"id": "2", "caption": "A cat."},
        {"id": "3", "caption": "A sky."},
    ]
    assert list(pictures(source.record(3))) == ["jpg"]


BAD_LINES = {
    "empty": ({"image": "a.png", "caption": " "}, NO_CAPTION),
    "a number": ({"image": "a.png", "caption": 7}, NO_CAPTION),
    "a caption of nothing": ({"text": "Hello"}, PICTURELESS),
    "neither": ({"image": "a.png"}, MALFORMED_ENTRY),
    "messages of parts": (
        {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        MALFORMED,
    ),
}


@pytest.mark.parametrize(("line", "kind"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_has_its_kind(images, line, kind):
    lines = [{"image": "a.png", "caption": "A cat."}, line]
    file = write_json(images.parent, "\n".join(map(json.dumps, lines)), "data.jsonl")
    assert bad(ConversationSource(file, images, any_text=True), 1)[0] == kind
