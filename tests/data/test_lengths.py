"""Lengths of texts: those of the examples, kept beside the tar, and made anew wherever they would be others."""

import json
import os
from pathlib import Path

import pytest
from pairs import P, make_template, members_of, pair, write_pairs, write_tar

from trainer.data.index import open_index
from trainer.data.lengths import Lengths
from trainer.data.order import Slot
from trainer.data.packing import pack_shapes
from trainer.data.reader import ShardReader
from trainer.data.template import ChatTemplate
from trainer.errors import DataError


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    return make_template(tmp_path_factory.mktemp("vocabulary"))


def lengths_of(tars: list[Path], template: ChatTemplate, **prompts: str) -> Lengths:
    return Lengths(ShardReader([open_index(tar).shard for tar in tars], **prompts), template)


def kept(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.lengths-*.npz")}


def blank_texts(tar: Path) -> None:
    """Overwrites a tar with zeros, its size and times kept: whoever reads it finds nothing to measure."""
    stat = tar.stat()
    tar.write_bytes(bytes(stat.st_size))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_lengths_are_kept_and_not_measured_again(tmp_path, template):
    tars = [write_pairs(tmp_path / f"t{n}.tar", 5 + n) for n in range(3)]
    lengths = lengths_of(tars, template)
    lengths.build()
    assert kept(tmp_path) == {f"{tar.name}.lengths-{lengths.fingerprint}.npz" for tar in tars}
    measured = [lengths.of(n).tolist() for n in range(3)]
    assert [len(own) for own in measured] == [5, 6, 7]
    for tar in tars:
        blank_texts(tar)
    again = lengths_of(tars, template)
    again.build()
    assert [again.of(n).tolist() for n in range(3)] == measured
    assert again(Slot(1, 4)) == measured[1][4]


def test_a_sample_is_as_long_as_its_text_and_pictures(tmp_path, template):
    tar = write_tar(tmp_path / "t.tar", members_of({"a": pair("a", images=3), "b": pair("b", images=0, words=9)}))
    lengths = lengths_of([tar], template)
    for i, key in enumerate("ab"):
        input_ids, _ = template.encode(lengths.reader.conversation(Slot(0, i)))
        assert lengths(Slot(0, i)) == len(input_ids), key
    # Three pictures of P tokens each; the words are the vocabulary's business.
    without = write_tar(tmp_path / "u.tar", members_of({"a": pair("a", images=3)}))
    wider = ChatTemplate(template.tokenizer, template.image_run[0], P + 10)
    assert lengths_of([without], wider)(Slot(0, 0)) == lengths(Slot(0, 0)) + 3 * 10


def test_samples_of_no_use_have_no_length(tmp_path, template):
    bad = {"json": {"json": b"[]"}, "marks": {"json": pair("marks")["json"]}, "empty": {"png": b"", "txt": b""}}
    tar = write_tar(tmp_path / "t.tar", members_of({"a": pair("a"), **bad, "b": pair("b")}))
    lengths = lengths_of([tar], template).of(0)
    assert lengths[1:4].tolist() == [0, 0, 0]
    assert all(lengths[[0, 4]] > 0)


def test_whatever_changes_the_ids_changes_where_lengths_are_kept(tmp_path, template):
    tar = write_tar(tmp_path / "t.tar", members_of({"a": {"0.png": b"", "txt": b"A ring."}}))
    other_image = ChatTemplate(template.tokenizer, template.image_run[0], P + 1)
    variants = [
        lengths_of([tar], template), lengths_of([tar], template, system_prompt="Be brief, and say what is there."),
        lengths_of([tar], template, caption_prompt="What shape is to be seen in this picture, and where is it?"),
        lengths_of([tar], other_image),
    ]  # fmt: skip
    for lengths in variants:
        lengths.build()
    assert len(kept(tmp_path)) == len(variants)
    assert len({lengths(Slot(0, 0)) for lengths in variants}) == len(variants)
    # The prompts' border counts: moved from one to the other, a word is another text.
    a = lengths_of([tar], template, system_prompt="x y", caption_prompt="z")
    b = lengths_of([tar], template, system_prompt="x", caption_prompt="y z")
    assert a.fingerprint != b.fingerprint


def test_a_changed_tar_is_measured_again(tmp_path, template):
    tar = write_tar(tmp_path / "t.tar", members_of({"a": pair("a")}))
    before = lengths_of([tar], template)
    before.build()
    write_tar(tar, members_of({"a": pair("a", words=15)}))
    os.utime(tar, ns=(0, before.reader.shards[0].mtime_ns + 10**9))
    assert lengths_of([tar], template)(Slot(0, 0)) > before(Slot(0, 0))


def test_a_tar_that_changes_while_it_is_measured_is_refused(tmp_path, template):
    tar = write_pairs(tmp_path / "t.tar", 3)
    lengths = lengths_of([tar], template)
    write_pairs(tar, 4)
    with pytest.raises(DataError, match=rf"^{tar}: the shard has changed since"):
        lengths.build()
    assert kept(tmp_path) == set()


def packs_of(tars: list[Path], template: ChatTemplate, max_length: int = 100) -> list[int]:
    lengths = lengths_of(tars, template)
    lengths.build()
    return lengths.packs([[number] for number in range(len(tars))], max_length)


def test_numbers_of_packs_are_kept_and_those_of_the_lengths(tmp_path, template):
    tars = [write_pairs(tmp_path / f"t{n}.tar", 20 + n) for n in range(3)]
    lengths = lengths_of(tars, template)
    counted = [pack_shapes(lengths.of(number), 100).count for number in range(3)]
    assert packs_of(tars, template) == counted
    for tar in tars:  # kept, so that nothing is read or packed again
        tar.with_name(f"{tar.name}.lengths-{lengths.fingerprint}.npz").unlink()
        blank_texts(tar)
    assert lengths_of(tars, template).packs([[0], [1], [2]], 100) == counted


def test_numbers_of_packs_change_with_the_shards_and_the_length(tmp_path, template):
    tars = [write_pairs(tmp_path / f"t{n}.tar", 20) for n in range(3)]
    whole = packs_of(tars, template)
    assert packs_of(tars[:2], template) == whole[:2]
    assert packs_of([tars[0], tars[2]], template) == [whole[0], whole[2]]
    assert sum(packs_of(tars, template, max_length=200)) < sum(whole)
    write_pairs(tars[1], 40)
    os.utime(tars[1], ns=(0, 10**18))
    assert packs_of(tars, template)[1] > whole[1]


def test_numbers_of_packs_follow_a_text_of_as_many_bytes(tmp_path, template):
    # The headers of the tar stay what they are; its time and its texts do not.
    def write(word: bytes) -> Path:
        return write_tar(tmp_path / "t.tar", members_of({f"{i}": {"0.png": b"", "txt": word * 10} for i in range(20)}))

    tar = write(b" ring")
    before = packs_of([tar], template)
    write(b"\x00\x01\x02\x03\x04")  # a token for every byte
    os.utime(tar, ns=(0, 10**18))
    after = lengths_of([tar], template)
    assert packs_of([tar], template) == [pack_shapes(after.of(0), 100).count]
    assert [pack_shapes(after.of(0), 100).count] > before


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: b"x" * 500])
def test_damaged_lengths_are_measured_again(tmp_path, template, damage):
    tar = write_pairs(tmp_path / "t.tar", 5)
    lengths = lengths_of([tar], template)
    lengths.build()
    expected = lengths.of(0).tolist()
    (file,) = tmp_path.glob("*.lengths-*.npz")
    file.write_bytes(damage(file.read_bytes()))
    again = lengths_of([tar], template)
    again.build()
    assert again.of(0).tolist() == expected


def test_lengths_of_many_shards_are_measured_in_processes_of_their_own(tmp_path, template):
    # As the one process would: the result may not depend on who measures.
    tars = [write_pairs(tmp_path / f"t{n}.tar", 3) for n in range(7)]
    lengths = lengths_of(tars, template)
    alone = [lengths.measure(n) for n in range(7)]
    lengths.build()
    for n, expected in enumerate(alone):
        tokens = expected["text_tokens"] + expected["images"] * P
        assert lengths.of(n).tolist() == tokens.tolist()
    assert json.dumps(lengths(Slot(6, 2)))  # a plain number, not numpy's
