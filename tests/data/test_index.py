"""An index says where the samples of a tar lie: whoever wrote the tar, and never a word for a damaged one.

The reference is Python's `tarfile`, member by member, grouped by the names alone.
"""

import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pairs import members_of, write_tar

from trainer.data.index import ShardIndex, open_index
from trainer.data.order import Slot
from trainer.data.reader import ShardReader
from trainer.data.writer import ShardWriter
from trainer.errors import BadSample, DataError

BLOCK = 512

# Sizes around a tar's block, and none; a sample without a picture, one with several, keys in folders.
SAMPLES = {
    "a": {"jpg": bytes(range(256)) * 2, "json": b"{}"},
    "b": {"txt": b""},
    "c": {"0.png": b"x" * 511, "1.webp": b"y" * 513, "json": b'{"caption": "c"}'},
    "folder/with.dots/a": {"jpeg": b"z" * 5000, "txt": b"words"},
    "d": {"png": b"p", "json": b"{}" * 600},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder for indexes that cannot lie beside their tar, kept away from the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def a_tar(folder: Path) -> Path:
    return write_tar(folder / "shard.tar", members_of(SAMPLES))


def contents(index: ShardIndex, i: int) -> list[bytes]:
    """Contents of a sample's members, read where the index points."""
    found = []
    with index.shard.path.open("rb") as file:
        for offset, size in zip(index.offset[index.members(i)], index.size[index.members(i)], strict=True):
            file.seek(offset)
            found.append(file.read(size))
    return found


def stored(index: ShardIndex) -> dict[str, list[bytes]]:
    """Key -> contents of the members, sorted."""
    return {index.key(i): sorted(contents(index, i)) for i in range(len(index))}


def by_tarfile(file: Path) -> dict[str, list[bytes]]:
    """The same by tarfile: the key is the name up to the first dot behind the last slash."""
    found: dict[str, list[bytes]] = {}
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            folder, name = os.path.split(member.name)
            found.setdefault(os.path.join(folder, name.split(".")[0]), []).append(archive.extractfile(member).read())
    return {key: sorted(members) for key, members in found.items()}


# --- Tars of all makers ---


def by_our_writer(folder: Path) -> list[Path]:
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    return writer.shards


def by_tar_writer(folder: Path) -> list[Path]:
    with webdataset.TarWriter(str(folder / "one.tar"), encoder=False) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    return [folder / "one.tar"]


def by_shard_writer(folder: Path) -> list[Path]:
    with webdataset.ShardWriter(f"{folder}/many-%d.tar", maxcount=2, encoder=False, verbose=0) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    return sorted(folder.glob("many-*.tar"))


def by_tarfile_in(form: int):
    return lambda folder: [write_tar(folder / "one.tar", members_of(SAMPLES), form)]


MAKERS = {
    "our writer": (by_our_writer, 2),
    "webdataset TarWriter": (by_tar_writer, 1),
    "webdataset ShardWriter": (by_shard_writer, 3),
    "tarfile ustar": (by_tarfile_in(tarfile.USTAR_FORMAT), 1),
    "tarfile gnu": (by_tarfile_in(tarfile.GNU_FORMAT), 1),
    "tarfile pax": (by_tarfile_in(tarfile.PAX_FORMAT), 1),
}


@pytest.mark.parametrize(("make", "shards"), MAKERS.values(), ids=MAKERS)
def test_offsets_give_the_bytes_that_tarfile_gives(tmp_path, make, shards):
    tars = make(tmp_path)
    assert len(tars) == shards
    found: dict[str, list[bytes]] = {}
    for tar in tars:
        for index in (open_index(tar), open_index(tar)):  # made, then read back
            assert stored(index) == by_tarfile(tar)
            assert list(stored(index)) == list(by_tarfile(tar))
        found |= stored(open_index(tar))
    assert found == {key: sorted(members.values()) for key, members in SAMPLES.items()}


def test_members_are_told_apart_by_their_extension(tmp_path):
    names = ["a.JPG", "a.Json", "b.0.jpeg", "b.1.webp", "b.txt", "c.png", "c.json", "c.txt"]
    index = open_index(write_tar(tmp_path / "kinds.tar", [(name, b"") for name in names]))
    assert [index.key(i) for i in range(len(index))] == ["a", "b", "c"]
    kinds = [
        ["image" if index.is_image[m] else "json" if index.is_json[m] else "txt" for m in range(8)[members]]
        for members in map(index.members, range(3))
    ]
    assert [sorted(own) for own in kinds] == [["image", "json"], ["image", "image", "txt"], ["image", "json", "txt"]]


def test_images_of_a_sample_are_in_the_order_of_their_numbers(tmp_path):
    # Writers sort names, webdataset's too: "10.png" stands before "2.png" in the tar.
    pictures = {f"{number}.png": b"picture %d" % number for number in range(12)}
    with webdataset.TarWriter(str(tmp_path / "many.tar"), encoder=False) as writer:
        for key in ("a", "b"):
            writer.write({"__key__": key, **pictures, "json": b"{}"})
    with tarfile.open(tmp_path / "many.tar") as archive:
        assert archive.getnames()[1:4] == ["a.1.png", "a.10.png", "a.11.png"]
    index = open_index(tmp_path / "many.tar")
    for i in range(2):
        found = zip(contents(index, i), index.is_image[index.members(i)], strict=True)
        assert [content for content, is_image in found if is_image] == list(pictures.values())


@pytest.mark.parametrize("extension", ["txt", "json"])
def test_texts_that_a_dot_in_their_names_brings_together_are_no_sample(tmp_path, extension):
    texts = {f"{number}.{extension}": b'{"caption": "x"}' for number in range(2)}
    with webdataset.TarWriter(str(tmp_path / "dots.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "0.png": b"", "1.png": b"", **texts})
    with pytest.raises(BadSample, match="a key ends at the first dot"):
        ShardReader([open_index(tmp_path / "dots.tar").shard]).conversation(Slot(0, 0))


def test_unknown_members_are_ignored(tmp_path):
    file = tmp_path / "mixed.tar"
    with tarfile.open(file, "w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            member.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"abc"))

        add("folder", tarfile.DIRTYPE)
        for name in ("README", "a.cls", "a.json", "a.npy", "a.pyd", "._a.jpg", ".json", "a.jpg.bak"):
            add(name)
        add("a.jpg", tarfile.SYMTYPE)
        add("b.pickle")
        add("c.json")
    index = open_index(file)
    assert stored(index) == {"a": [b"abc"], "c": [b"abc"]}
    assert not index.is_image.any()


def test_the_same_name_in_two_folders_is_two_samples(tmp_path):
    names = ["x/1.txt", "y/1.txt", "x.y/1.txt", "./1.txt", "1.txt"]
    index = open_index(write_tar(tmp_path / "folders.tar", [(name, name.encode()) for name in names]))
    assert stored(index) == {name.removesuffix(".txt"): [name.encode()] for name in names}


def test_keys_may_be_long_or_in_any_script(tmp_path):
    # Beyond the 100 bytes of a plain header, tar writes names in further blocks, which the offsets must skip.
    keys = ["k" * 300, "图像-é-🙂", "folder/" * 40 + "x"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar = write_tar(tmp_path / f"{form}.tar", [(f"{key}.txt", key.encode()) for key in keys], form)
        assert stored(open_index(tar)) == {key: [key.encode()] for key in keys}


def test_a_key_that_is_not_unicode_is_kept_apart(tmp_path):
    with tarfile.open(tmp_path / "latin.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("\xe9.txt", "\xea.txt"):
            archive.addfile(tarfile.TarInfo(name))
    index = open_index(tmp_path / "latin.tar")
    assert [index.key(i) for i in range(len(index))] == ["\ufffd"] * 2  # what no letter stands for is shown as such


def test_a_tar_without_samples_has_an_empty_index(tmp_path):
    for number, members in enumerate([[], [("a.cls", b"1")]]):
        tar = write_tar(tmp_path / f"{number}.tar", members)
        assert len(open_index(tar)) == len(open_index(tar)) == 0


# --- Damaged tars ---


def end_of_members(tar: Path) -> int:
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // BLOCK) * BLOCK


def test_a_tar_cut_off_anywhere_is_refused(tmp_path):
    # Every half block: inside headers, inside data, and at every boundary of a header, where tarfile and webdataset
    # take what is left for a whole, shorter tar.
    whole = a_tar(tmp_path).read_bytes()
    end = end_of_members(tmp_path / "shard.tar")
    silent = 0
    for cut in range(0, end + BLOCK, BLOCK // 2):
        file = tmp_path / "cut.tar"
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar: "):
            open_index(file)
        try:
            with tarfile.open(file) as archive:
                silent += len(archive.getmembers()) > 0
        except tarfile.ReadError:
            continue
    assert silent > len(SAMPLES)  # so tarfile alone is no guard
    # One block of zeros behind the last member says that nothing is missing, though tar writes more.
    (tmp_path / "cut.tar").write_bytes(whole[: end + BLOCK])
    assert len(open_index(tmp_path / "cut.tar")) == len(SAMPLES)


@pytest.mark.parametrize("member", range(1, 9))
def test_a_damaged_header_is_refused(tmp_path, member):
    # One bit flipped: tarfile ends at a header (but the first) whose checksum is wrong, and says nothing.
    tar = a_tar(tmp_path)
    with tarfile.open(tar) as archive:
        offset = archive.getmembers()[member].offset
    damaged = bytearray(tar.read_bytes())
    damaged[offset] ^= 1
    tar.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"shard\.tar: the archive ends at byte {offset}, but"):
        open_index(tar)


def test_two_tars_in_one_file_are_refused(tmp_path):
    # As made by `cat`: tarfile reads the first and says nothing of the second.
    tar = a_tar(tmp_path)
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(DataError, match=r"shard\.tar: .*several tars in one file"):
        open_index(tar)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>" * 1000])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "not.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"not\.tar: "):
        open_index(tmp_path / "not.tar")


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"zipped\.tar: not a readable tar"):
        open_index(tmp_path / "zipped.tar")


def test_a_missing_tar_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.tar: the shard cannot be read \(No such file"):
        open_index(tmp_path / "none.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=r"folder\.tar: a folder, expected a tar; write '.*folder\.tar/\*\.tar'"):
        open_index(tmp_path / "folder.tar")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.json", "b.json"], "the members of sample 'a' do not stand together"),
        (["a.json", "a.jpg", "a.json", "a.jpg"], r"member a\.json comes twice"),
    ],
    ids=["scattered", "twice"],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path, names, message):
    tar = write_tar(tmp_path / "bad.tar", [(name, b"") for name in names])
    with pytest.raises(DataError, match=rf"bad\.tar: {message}"):
        open_index(tar)
    assert not list(tmp_path.glob("*.npz"))


# --- The stored index ---


def index_file(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index.npz")


def blank(tar: Path) -> None:
    """Overwrites a tar with zeros, its size and times kept: only a stored index still knows what was there."""
    stat = tar.stat()
    tar.write_bytes(bytes(stat.st_size))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def keys(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_a_stored_index_spares_the_scan(tmp_path):
    tar = a_tar(tmp_path)
    open_index(tar)
    assert sorted(tmp_path.iterdir()) == [tar, index_file(tar)]  # no partial file either
    blank(tar)
    assert keys(open_index(tar)) == list(SAMPLES)


@pytest.mark.parametrize("kept", ["size", "time", "neither"])
def test_a_changed_tar_gets_a_new_index(tmp_path, kept):
    tar = write_tar(tmp_path / "shard.tar", [("a.txt", b"1")])
    before = tar.stat()
    open_index(tar)
    # A tar is a multiple of 10 KiB; 20 KiB more do not fit where one member did.
    write_tar(tar, [("b.txt", b"2" if kept == "size" else b"2" * 20_000)])
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns + (kept != "time")))
    assert (tar.stat().st_size == before.st_size) == (kept == "size")
    for _ in range(2):
        assert keys(open_index(tar)) == ["b"]


@pytest.fixture
def unwritable(request, tmp_path) -> Path:
    """A tar in a folder where no file can be made."""
    tar = a_tar(tmp_path)
    if request.param == "permissions":
        if os.geteuid() == 0:
            pytest.skip("root may write in a read-only folder; '/proc' covers what follows")
        (tmp_path / "shards").mkdir()
        tar = tar.rename(tmp_path / "shards" / "shard.tar")
        tar.parent.chmod(0o555)
        yield tar
        tar.parent.chmod(0o755)
    else:
        # Every open file is also /proc/self/fd/N, and in that folder not even root makes files.
        with tar.open("rb") as file:
            yield Path(f"/proc/self/fd/{file.fileno()}")


@pytest.mark.parametrize("unwritable", ["permissions", "/proc"], indirect=True)
def test_index_of_a_read_only_folder_lies_in_the_cache(unwritable, cache):
    with pytest.raises(OSError):
        index_file(unwritable).touch()
    assert keys(open_index(unwritable)) == list(SAMPLES)
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".npz"]
    blank(unwritable.resolve())
    assert keys(open_index(unwritable)) == list(SAMPLES)


@pytest.mark.parametrize("unwritable", ["permissions", "/proc"], indirect=True)
def test_index_that_can_be_kept_nowhere_names_both_folders(unwritable, monkeypatch):
    # Made anew by every process of every rank, it would cost a scan of all tars each time: better to say so at once.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(DataError) as raised:
        open_index(unwritable)
    said = str(raised.value)
    assert said.startswith(f"{unwritable}: its index cannot be kept: neither in {unwritable.parent} (")
    assert "nor in /proc/none/mqwen-trainer/index (" in said
    assert "name a folder in XDG_CACHE_HOME" in said


def damages(whole: bytes) -> dict[str, bytes]:
    array = io.BytesIO()
    np.save(array, np.arange(3))
    rng = random.Random(0)
    cuts = {f"cut at {cut}": whole[:cut] for cut in range(0, len(whole), 97)}
    flips = {}
    for _ in range(300):
        place = rng.randrange(len(whole))
        flips[f"flipped at {place}"] = (
            whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]
        )
    return {"garbage": b"garbage", "another array": array.getvalue(), "a pickle": pickle.dumps([1]), **cuts, **flips}


def test_a_damaged_index_is_made_anew(tmp_path):
    tar = a_tar(tmp_path)
    open_index(tar)
    whole = index_file(tar).read_bytes()
    expected = by_tarfile(tar)
    for damage, content in damages(whole).items():
        index_file(tar).write_bytes(content)
        assert stored(open_index(tar)) == expected, damage
        assert stored(open_index(tar)) == expected, damage


@pytest.mark.parametrize("change", ["version", "column"])
def test_an_index_of_another_version_is_made_anew(tmp_path, change):
    # Here: made by a version that took every sample for the first one. It is not believed, and it is replaced.
    tar = a_tar(tmp_path)
    index = open_index(tar)
    with np.load(index_file(tar)) as kept:
        columns = dict(kept)
    columns["key_bytes"] = np.zeros_like(columns["key_bytes"])
    if change == "version":
        columns["stamp"] = columns["stamp"] + [1, 0, 0]
    else:
        del columns["offset"]
    np.savez(index_file(tar), **columns)
    assert keys(open_index(tar)) == keys(index) == list(SAMPLES)
    blank(tar)
    assert keys(open_index(tar)) == list(SAMPLES)


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("column", ["stamp", "key_bytes", "offset"])
def test_an_index_cannot_bring_code(tmp_path, column):
    tar = a_tar(tmp_path)
    open_index(tar)
    with np.load(index_file(tar)) as kept:
        columns = dict(kept)
    columns[column] = np.array([Planted(tmp_path / "executed")], dtype=object)
    np.savez(index_file(tar), **columns)
    # The trap works: whoever allows pickles falls into it.
    with np.load(index_file(tar), allow_pickle=True) as trap:
        _ = trap[column]
    (tmp_path / "executed").rmdir()

    assert stored(open_index(tar)) == by_tarfile(tar)
    assert not (tmp_path / "executed").exists()
    with np.load(index_file(tar), allow_pickle=False) as kept:
        assert kept[column].dtype != object  # replaced
