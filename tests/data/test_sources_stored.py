"""`img2dataset` and `hf`: tars and data sets as these tools write them; each kind of bad entry is named.

At the end: when a source's fingerprint changes.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny_sources import bad, entry, picture, pictures, records, texts, write_json

from trainer.data.conversation import MALFORMED, PICTURELESS
from trainer.data.picture import UNDECODABLE
from trainer.data.sources.conversations import ConversationSource
from trainer.data.sources.huggingface import HuggingFaceSource
from trainer.data.sources.img2dataset import FAILED_DOWNLOAD, Img2datasetSource
from trainer.data.sources.pictures import NO_PICTURE, OUTSIDE
from trainer.data.sources.source import MALFORMED_ENTRY, NO_CAPTION
from trainer.errors import DataError

# --- img2dataset ---


def downloaded(key: str, caption: str | None = "A cat.", status: str = "success", **changes) -> dict:
    """The .json that img2dataset writes beside a picture."""
    return {
        "caption": caption, "url": "https://example.org/a.jpg", "key": key, "status": status, "error_message": None,
        "width": 6, "height": 4, "original_width": 640, "original_height": 480, "exif": "{}",
        "sha256": "0" * 64, **changes,
    }  # fmt: skip


def write_tar(tar: Path, members: dict[str, bytes | dict | str]) -> None:
    with tarfile.open(tar, "w") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def sample(key: str, content: bytes, record: dict, text: str | None = None) -> dict[str, bytes | dict | str]:
    caption = {} if text is None else {f"{key}.txt": text}
    return {f"{key}.jpg": content, **caption, f"{key}.json": record}


@pytest.fixture
def downloads(tmp_path) -> Path:
    folder = tmp_path / "laion"
    folder.mkdir()
    good = picture("red", "JPEG")
    one = {
        **sample("000000000", good, downloaded("000000000"), "A cat."),
        **sample("000000002", good[:60], downloaded("000000002"), "A dog."),
        **sample("000000003", good, downloaded("000000003", None)),
        **sample("000000004", good, downloaded("000000004", status="failed_to_resize", error_message="oh"), "A fox."),
    }
    two = {
        **sample("000010000", picture("blue", "WEBP"), downloaded("000010000"), "another"),
        **sample("000010001", good, {"key": "000010001", "status": "success"}, "Only in the txt."),
        **sample("000010002", good, downloaded("000010002", " "), " "),
        **{"000010003.jpg": good, "000010003.json": "[]"},
        **{"000010004.json": downloaded("000010004")},
    }
    write_tar(folder / "00000.tar", one)
    write_tar(folder / "00001.tar", two)
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"")
    return folder


def test_img2datasets_tars_are_checked_and_sharded_anew(downloads):
    source = Img2datasetSource(str(downloads))
    assert len(source) == 9
    good = [source.record(number) for number in (0, 4, 5)]
    assert [record.key for record in good] == ["00000000-000000000", "00000004-000010000", "00000005-000010001"]
    assert [record.members["json"] for record in good] == [
        {"id": "000000000", "caption": "A cat."},
        {"id": "000010000", "caption": "A cat."},  # the .json's, before the .txt's
        {"id": "000010001", "caption": "Only in the txt."},
    ]
    # The second is called .jpg, but is WebP: its content decides.
    assert [list(pictures(record)) for record in good] == [["jpg"], ["webp"], ["jpg"]]
    kinds = {number: bad(source, number)[0] for number in (1, 2, 3, 6, 7, 8)}
    assert kinds == {
        1: UNDECODABLE,
        2: NO_CAPTION,
        3: FAILED_DOWNLOAD,
        6: NO_CAPTION,
        7: MALFORMED,
        8: MALFORMED_ENTRY,
    }
    assert bad(source, 3)[1] == f"{downloads / '00000.tar'}: sample 000000004: status 'failed_to_resize' (oh)"


def test_a_pattern_chooses_among_tars(downloads):
    source = Img2datasetSource(str(downloads / "*1.tar"))
    assert len(source) == 5
    assert source.record(0).members["json"]["id"] == "000010000"


def test_a_folder_without_tars_is_named(tmp_path):
    with pytest.raises(DataError, match="no tars there; expected the output folder of img2dataset"):
        Img2datasetSource(str(tmp_path))


def test_a_half_downloaded_tar_is_named(downloads):
    whole = (downloads / "00001.tar").read_bytes()
    (downloads / "00001.tar").write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"00001\.tar"):
        Img2datasetSource(str(downloads))


def test_a_tar_that_changes_meanwhile_is_named(downloads):
    source, tar = Img2datasetSource(str(downloads)), downloads / "00000.tar"
    assert source.record(0).key == "00000000-000000000"
    tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(DataError, match=r"00000\.tar: the shard has changed"):
        source.record(0)


# --- hf ---


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def stored(**columns) -> datasets.Dataset:
    """A data set in memory, its pictures as bytes."""
    return datasets.Dataset.from_dict(
        {name: cells for name, (_, cells) in columns.items()},
        features=datasets.Features({name: feature for name, (feature, _) in columns.items()}),
    )


def cell(content: bytes | None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


TEXT, IMAGE = datasets.Value("string"), datasets.Image()
TURNS = datasets.List({"from": TEXT, "value": TEXT})


def test_a_folder_of_pictures_with_captions(tmp_path):
    # https://huggingface.co/docs/datasets/image_dataset: metadata.jsonl beside the pictures
    folder = tmp_path / "cats" / "train"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(picture("red"))
    # As people do who have their pictures once and several data sets of them.
    (tmp_path / "elsewhere.jpg").write_bytes(picture("blue", "JPEG"))
    (folder / "2.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    lines = [{"file_name": "1.png", "text": "Red."}, {"file_name": "2.jpg", "text": "Blue."}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = HuggingFaceSource(str(tmp_path / "cats"))
    assert texts(source) == [{"id": "0", "caption": "Red."}, {"id": "1", "caption": "Blue."}]
    assert [pictures(record) for record in records(source)] == [
        {"png": picture("red")},
        {"jpg": picture("blue", "JPEG")},
    ]
    assert source.record(1).key == "00000001"


def test_a_parquet_file_of_llavas_with_several_pictures(tmp_path):
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    data = stored(
        images=(datasets.List(IMAGE), [[cell(picture("red")), cell(picture("blue", "JPEG"))], []]),
        conversations=(TURNS, [turns, entry(0, question="Hi", answer="Hello")["conversations"]]),
        source=(TEXT, ["a", "b"]),
    )
    data.to_parquet(tmp_path / "data.parquet")
    source = HuggingFaceSource(str(tmp_path / "data.parquet"))
    assert [list(pictures(record)) for record in records(source)] == [["0.png", "1.jpg"], []]
    assert texts(source)[0] == {"id": "0", "conversations": turns}


def test_parquet_of_other_tools_holds_plain_bytes(tmp_path):
    import pandas

    # Without the words of `datasets` in its metadata, a picture is an object of bytes and path.
    pandas.DataFrame({"jpg": [cell(picture("red", "JPEG"), "a.jpg")], "caption": ["Red."]}).to_parquet(
        tmp_path / "a.parquet"
    )
    pandas.DataFrame({"raw": [picture("red")], "caption": ["Red."]}).to_parquet(tmp_path / "b.parquet")
    assert list(pictures(HuggingFaceSource(str(tmp_path / "a.parquet")).record(0))) == ["jpg"]
    assert list(pictures(HuggingFaceSource(str(tmp_path / "b.parquet")).record(0))) == ["png"]


@pytest.mark.parametrize("splits", [False, True])
def test_a_data_set_saved_to_disk(tmp_path, splits):
    messages = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]]
    turns = (datasets.List({"role": TEXT, "content": TEXT}), messages)
    data = stored(picture=(IMAGE, [cell(picture())]), chat=turns)
    (datasets.DatasetDict(validation=data) if splits else data).save_to_disk(tmp_path / "saved")
    split = {"split": "validation"} if splits else {}
    source = HuggingFaceSource(str(tmp_path / "saved"), **split, conversations_column="chat")
    assert texts(source)[0]["conversations"] == [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
    ]
    if splits:
        with pytest.raises(DataError, match="no split 'train'; --split names one of validation"):
            HuggingFaceSource(str(tmp_path / "saved"))


def test_turns_may_be_stored_as_an_object_of_lists(tmp_path):
    # What `Sequence({...})` made of a list of objects before version 4 of `datasets`; many data sets are still so.
    turns = {"from": ["human", "gpt"], "value": ["What?", "A cat."]}
    columns = {"from": datasets.List(TEXT), "value": datasets.List(TEXT)}
    ragged = {"from": ["human", "gpt"], "value": ["What?"]}
    data = stored(image=(IMAGE, [cell(picture())] * 2), conversations=(columns, [turns, ragged]))
    data.to_parquet(tmp_path / "data.parquet")
    source = HuggingFaceSource(str(tmp_path / "data.parquet"))
    values = [turn["value"] for turn in source.record(0).members["json"]["conversations"]]
    assert values == ["<image>\nWhat?", "A cat."]
    assert bad(source, 1) == (MALFORMED_ENTRY, "row 1: the lists in column 'conversations' differ in length")


def test_lists_of_captions_give_the_first(tmp_path):
    data = stored(image=(IMAGE, [cell(picture())]), caption=(datasets.List(TEXT), [["One.", "Two."]]))
    data.to_parquet(tmp_path / "data.parquet")
    assert texts(HuggingFaceSource(str(tmp_path / "data.parquet")))[0]["caption"] == "One."


def test_pictures_keep_their_bytes_unless_shards_do_not_hold_the_format(tmp_path):
    # The names lie; the content decides.
    cells = [cell(picture("red", "WEBP"), "a.png"), cell(picture("blue", "GIF"), "b.jpg"), cell(picture("blue", "BMP"))]
    stored(image=(IMAGE, cells), text=(TEXT, ["a", "b", "c"])).to_parquet(tmp_path / "data.parquet")
    found = [pictures(record) for record in records(HuggingFaceSource(str(tmp_path / "data.parquet")))]
    assert found[0] == {"webp": picture("red", "WEBP")}
    for one in found[1:]:
        with Image.open(io.BytesIO(one["png"])) as opened:
            assert (opened.format, opened.getpixel((0, 0))) == ("PNG", (0, 0, 255))


def test_bad_rows_have_their_kinds(tmp_path):
    import pandas

    (tmp_path / "secret.png").write_bytes(picture("black"))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cells = [
        cell(picture()), None, cell(picture()[:40]), cell(None, str(tmp_path / "secret.png")), cell(picture()),
        cell(None, str(cache / "none.png")), cell(None, str(cache / ".." / "secret.png")),
    ]  # fmt: skip
    captions = ["A", "B", "C", "D", None, "F", "G"]
    pandas.DataFrame({"image": cells, "text": captions}).to_parquet(tmp_path / "data.parquet")
    source = HuggingFaceSource(str(tmp_path / "data.parquet"))
    kinds = [bad(source, number)[0] for number in range(1, 7)]
    assert kinds == [PICTURELESS, UNDECODABLE, OUTSIDE, NO_CAPTION, NO_PICTURE, OUTSIDE]
    assert bad(source, 2)[1].startswith("row 2: picture 0: the picture cannot be decoded")


def test_columns_that_could_be_meant_are_listed(tmp_path):
    two = stored(a=(IMAGE, [cell(picture())]), b=(IMAGE, [cell(picture())]), title=(TEXT, ["A"]), tag=(TEXT, ["B"]))
    two.to_parquet(tmp_path / "two.parquet")
    file = str(tmp_path / "two.parquet")
    with pytest.raises(DataError, match=r"2 columns with pictures; --image-column names .* a \(Image.*title \(Value"):
        HuggingFaceSource(file)
    with pytest.raises(DataError, match=r"--text-column \(captions\) or --conversations-column .* title \(Value"):
        HuggingFaceSource(file, image_column="b")
    with pytest.raises(DataError, match="no column 'none'; the columns are a "):
        HuggingFaceSource(file, image_column="b", text_column="none")
    with pytest.raises(DataError, match=r"column 'title' does not hold pictures; the columns are a "):
        HuggingFaceSource(file, image_column="title", text_column="tag")
    assert texts(HuggingFaceSource(file, image_column="b", text_column="tag"))[0]["caption"] == "B"


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(DataError, match=r"`datasets` cannot open split 'train' \(FileNotFoundError"):
        HuggingFaceSource(str(tmp_path / "none"))
    stored(image=(IMAGE, [cell(picture())]), text=(TEXT, ["A"])).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"cannot open split 'test'.*--split"):
        HuggingFaceSource(str(tmp_path / "data.parquet"), split="test")


# --- Fingerprints ---


def test_a_fingerprint_changes_with_the_source_and_only_then(downloads, tmp_path, monkeypatch):
    llava = write_json(tmp_path, [entry("a", "a.png")], "llava.json")
    parquet = tmp_path / "data.parquet"

    def save(caption: str) -> None:
        stored(image=(IMAGE, [cell(picture())]), text=(TEXT, [caption])).to_parquet(parquet)

    def change_tar() -> None:
        write_tar(downloads / "00001.tar", sample("7", picture(), downloaded("7"), "A."))

    def change_llava() -> None:
        write_json(tmp_path, [entry("bb")], "llava.json")

    save("A")
    sources = {
        "llava": (lambda: ConversationSource(llava, tmp_path), change_llava),
        "img2dataset": (lambda: Img2datasetSource(str(downloads)), change_tar),
        "hf": (lambda: HuggingFaceSource(str(parquet)), lambda: save("B")),
    }  # fmt: skip
    for name, (opens, change) in sources.items():
        before = json.dumps(opens().fingerprint())
        assert json.dumps(opens().fingerprint()) == before, name
        change()
        assert json.dumps(opens().fingerprint()) != before, name
    # Nor does it matter to a data set whether it was cached before.
    before = HuggingFaceSource(str(parquet)).fingerprint()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    assert HuggingFaceSource(str(parquet)).fingerprint() == before
    assert os.listdir(tmp_path / "another cache")
