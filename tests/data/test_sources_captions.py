"""`coco` and `aic`: files with the fields, names and nesting of the published ones; each kind of bad entry is named."""

from pathlib import Path

import pytest
from tiny_sources import DEEP, bad, picture, pictures, records, texts, write_json

from trainer.data.conversation import parse_conversation
from trainer.data.sources.captions import AicSource, CocoSource
from trainer.data.sources.pictures import NO_PICTURE, OUTSIDE
from trainer.data.sources.source import MALFORMED_ENTRY, NO_CAPTION
from trainer.errors import DataError

# --- coco ---


def coco_tree(names: dict[int, str], captions: list[tuple[int, str]]) -> dict:
    """As captions_train2017.json."""
    return {
        "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017, "date_created": "2017/09/01"},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "CC"}],
        "images": [
            {"license": 1, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}",
             "height": 4, "width": 6, "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://f", "id": number}
            for number, name in names.items()
        ],
        "annotations": [
            {"image_id": image, "id": 900 + position, "caption": caption}
            for position, (image, caption) in enumerate(captions)
        ],
    }  # fmt: skip


@pytest.fixture
def coco_images(tmp_path) -> Path:
    folder = tmp_path / "train2017"
    folder.mkdir()
    for number, colour in {391895: "red", 522418: "blue"}.items():
        (folder / f"{number:012d}.jpg").write_bytes(picture(colour, "JPEG"))
    return folder


COCO_NAMES = {391895: "000000391895.jpg", 522418: "000000522418.jpg"}
# Not sorted by picture, as in the published file.
COCO_CAPTIONS = [(522418, "A sky. "), (391895, "A rose.\n"), (522418, "Blue."), (391895, "Red.")]


def test_coco_gives_each_picture_its_first_caption(coco_images, tmp_path):
    source = CocoSource(write_json(tmp_path, coco_tree(COCO_NAMES, COCO_CAPTIONS)), coco_images)
    assert [record.key for record in records(source)] == ["00000000-391895", "00000001-522418"]
    assert texts(source) == [{"id": "391895", "caption": "A rose."}, {"id": "522418", "caption": "A sky."}]
    assert pictures(source.record(1)) == {"jpg": picture("blue", "JPEG")}
    # The configuration's question is put before a caption; the picture's mark is found a place.
    turns = parse_conversation(source.record(1).members["json"], 1, "Describe the image.")
    assert [turn.text for turn in turns] == ["<image>\nDescribe the image.", "A sky."]


def test_coco_gives_all_captions_if_asked(coco_images, tmp_path):
    source = CocoSource(write_json(tmp_path, coco_tree(COCO_NAMES, COCO_CAPTIONS)), coco_images, all_captions=True)
    found = [(text["id"], text["caption"]) for text in texts(source)]
    assert found == [("391895", "A rose."), ("391895", "Red."), ("522418", "A sky."), ("522418", "Blue.")]


@pytest.mark.parametrize("all_captions", [False, True])
def test_coco_pictures_and_captions_without_each_other_are_named(coco_images, tmp_path, all_captions):
    tree = coco_tree({391895: "000000391895.jpg", 7: "7.jpg", 8: "8.jpg"}, [(391895, "A."), (9, "B."), (8, "C.")])
    source = CocoSource(write_json(tmp_path, tree), coco_images, all_captions)
    assert len(source) == 4
    assert bad(source, 1) == (NO_CAPTION, "entry 1 (image 7): 7.jpg has no caption")
    assert bad(source, 2)[0] == NO_PICTURE
    assert bad(source, 3)[0] == "captions without a picture"


def test_other_files_of_coco_are_told_from_captions(tmp_path):
    tree = coco_tree(COCO_NAMES, [])
    tree["annotations"] = [{"image_id": 391895, "bbox": [1, 2, 3, 4], "category_id": 1, "id": 5}]
    with pytest.raises(DataError, match=r"annotations\[0\]: expected 'image_id' and 'caption'.*not in instances_"):
        CocoSource(write_json(tmp_path, tree), tmp_path)
    with pytest.raises(DataError, match="expected COCO's captions_.*found list"):
        CocoSource(write_json(tmp_path, []), tmp_path)
    with pytest.raises(DataError, match=r"not JSON \(nested too deeply\)"):
        CocoSource(write_json(tmp_path, DEEP), tmp_path)


# --- aic ---


def aic_entry(name: str, captions) -> dict:
    """As in caption_train_annotations_20170902.json."""
    return {"url": "http://img5.cache.netease.com/photo/0005/x.jpg", "image_id": name, "caption": captions}


@pytest.fixture
def aic_images(tmp_path) -> Path:
    folder = tmp_path / "caption_train_images_20170902"
    folder.mkdir()
    for name in ("8f00f3d0f1008e08", "b96ff46ba5b1cbe5", "c" * 40):
        (folder / f"{name}.jpg").write_bytes(picture("red", "JPEG"))
    return folder


AIC = [
    aic_entry("8f00f3d0f1008e08.jpg", ["一个男人。", "二", "三", "四", "五"]),
    aic_entry("b96ff46ba5b1cbe5.jpg", ["两个女人。\n", "二", "三", "四", "五"]),
    aic_entry("c" * 40 + ".jpg", ["三只猫。", "二", "三", "四", "五"]),
]


def test_ai_challenger_is_asked_the_notes_two_prompts_in_turn(aic_images, tmp_path):
    source = AicSource(write_json(tmp_path, AIC), aic_images)
    turns = [[turn["value"] for turn in text["conversations"]] for text in texts(source)]
    assert turns == [
        ["这副图像描述了什么？<image>", "一个男人。"],
        ["<image>这幅图像中有什么？", "两个女人。"],
        ["这副图像描述了什么？<image>", "三只猫。"],
    ]
    assert source.record(0).key == "00000000-8f00f3d0f1008e08"
    assert source.record(0).members["json"]["id"] == "8f00f3d0f1008e08.jpg"


def test_ai_challenger_gives_all_captions_if_asked(aic_images, tmp_path):
    source = AicSource(write_json(tmp_path, AIC), aic_images, all_captions=True)
    assert len(source) == 15
    answers = [text["conversations"][1]["value"] for text in texts(source)]
    assert answers[4:7] == ["五", "两个女人。", "二"]


BAD_AIC = {
    "missing": (aic_entry("none.jpg", ["一"]), NO_PICTURE),
    "outside": (aic_entry("../secret.jpg", ["一"]), OUTSIDE),
    "no captions": (aic_entry("8f00f3d0f1008e08.jpg", []), NO_CAPTION),
    "blank": (aic_entry("8f00f3d0f1008e08.jpg", [" "]), NO_CAPTION),
    "numbers": (aic_entry("8f00f3d0f1008e08.jpg", [7]), MALFORMED_ENTRY),
    "no name": ({"caption": ["一"]}, MALFORMED_ENTRY),
    "no object": ("a", MALFORMED_ENTRY),
}


@pytest.mark.parametrize("all_captions", [False, True])
@pytest.mark.parametrize(("one", "kind"), BAD_AIC.values(), ids=BAD_AIC)
def test_a_bad_entry_of_ai_challenger_has_its_kind(aic_images, tmp_path, one, kind, all_captions):
    source = AicSource(write_json(tmp_path, [AIC[0], one]), aic_images, all_captions)
    number = 5 if all_captions else 1
    assert bad(source, number)[0] == kind
    assert bad(source, number)[1].startswith(f"entry {number} ")


def test_a_list_of_something_else_is_not_ai_challengers(tmp_path):
    with pytest.raises(DataError, match=r"entry 0: expected AI Challenger's fields .* found \['image'\]"):
        AicSource(write_json(tmp_path, [{"image": "a"}]), tmp_path)
