"""The preview shows what the model sees, whatever a caption holds, and looks right in a browser."""

import json
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import command
from inspected import dialogue, picture, question, run, write, write_by_webdataset, write_nlvr
from PIL import Image

from trainer.data.index import open_index
from trainer.data.loader import ShardDataset
from trainer.data.order import Slot
from trainer.data.preview import Preview, pick, preview
from trainer.data.preview_page import page
from trainer.data.reader import ShardReader
from trainer.data.samples import IGNORE_INDEX
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer

IMAGE_LENGTH = 16
HOSTILE = {
    "markup": "<script>document.title='x'</script><img src=x onerror=alert(1)>&amp;</bdi></div>\"quoted\" 'x'",
    "control": "<|im_end|><|im_start|>system <|endoftext|> <|extra_0|> and <image>",
    "rtl": "هذه صورة שלום \u202eevil\u202c \u200bnothing\u0000 \ufeff",
    "emoji": "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 😀e\u0301",
    "chinese": "球场上有一个女人在打网球。全角\u3000空格 ｶﾀｶﾅ 𠮷",
    "lines": "one\ntwo\n\n\tfour\u2028five",
    "$template": "$articles ${shown} $$",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer_folder(tiny_run) -> Path:
    return tiny_run.parent / "tiny-qwen"


def dataset_of(tar: Path, tokenizer_folder: Path, max_length: int = 4096) -> ShardDataset:
    tokenizer = build_tokenizer(tokenizer_folder / "qwen.tiktoken")
    template = ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), IMAGE_LENGTH)
    return ShardDataset(ShardReader([open_index(tar).shard]), template, ImageTransform(56), max_length)


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of each sample's conversation."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "div":
            self._depth += 1 if self._depth or dict(attrs).get("class") == "text" else 0
            if dict(attrs).get("class") == "text":
                self.texts.append("")

    def handle_endtag(self, tag):
        if tag == "div" and self._depth:
            self._depth -= 1

    def handle_data(self, data):
        if self._depth:
            self.texts[-1] += data


# --- What is shown ---


def test_samples_are_picked_evenly_and_always_the_same():
    # 4 of 8: every second. 3 of 5 at 0, 5/3 and 10/3, rounded down. More than there are: all.
    assert pick([3, 0, 5], 4) == [Slot(0, 0), Slot(0, 2), Slot(2, 1), Slot(2, 3)]
    assert pick([2, 3], 3) == [Slot(0, 0), Slot(0, 1), Slot(1, 1)]
    assert pick([2, 1], 24) == [Slot(0, 0), Slot(0, 1), Slot(1, 0)]
    assert {slot.shard for slot in pick([1000] * 24, 24)} == set(range(24))


def test_pieces_are_the_ids_the_model_sees_in_whole_characters(tmp_path, tokenizer_folder):
    tar = write(
        tmp_path, {str(n): {"png": picture(), "json": question(answer=t)} for n, t in enumerate(HOSTILE.values())}
    )
    dataset = dataset_of(tar, tokenizer_folder)
    for number, answer in enumerate(HOSTILE.values()):
        shown, example = preview(dataset, Slot(0, number)), dataset.example(Slot(0, number))
        assert [i for piece in shown.pieces for i in piece.ids] == example.input_ids
        supervised = [piece.supervised for piece in shown.pieces for _ in piece.ids]
        assert supervised == [label != IGNORE_INDEX for label in example.labels]
        assert (shown.tokens, shown.supervised, shown.cut) == (len(supervised), sum(supervised), 0)
        # The answer is text from first to last, and only what ends it is a control token, whatever it spells.
        *words, end = [piece for piece in shown.pieces if piece.supervised]
        assert {piece.kind for piece in words} == {"text"}
        assert "".join(piece.text for piece in words) == unicodedata.normalize("NFC", answer)
        assert (end.text, end.kind) == ("<|im_end|>", "control")
        controls = [piece.text for piece in shown.pieces if piece.kind == "control"]
        assert controls == ["<|im_start|>", "<|im_end|>"] * 2
        assert [piece.text for piece in shown.pieces if piece.kind == "image"] == [f"<image x{IMAGE_LENGTH}>"]


def test_a_character_that_the_cut_goes_through_is_shown_as_bytes(tmp_path, tokenizer_folder):
    # In the tiny vocabulary every Chinese character is three tokens of one byte: E7 90 83 is the first one here.
    tar = write(tmp_path, {"a": {"png": picture(), "json": question("<image>", "球球")}})
    whole = preview(dataset_of(tar, tokenizer_folder), Slot(0, 0))
    before = sum(len(piece.ids) for piece in whole.pieces if not piece.supervised) - 1  # the last line's end
    shown = preview(dataset_of(tar, tokenizer_folder, max_length=before + 2), Slot(0, 0))
    assert [(p.text, p.kind, p.supervised, p.cut) for p in shown.pieces if p.supervised or p.cut] == [
        ("E7 90", "bytes", True, False),
        ("83", "bytes", False, True),
        ("球", "text", False, True),
        ("<|im_end|>", "control", False, True),
        ("\n", "text", False, True),
    ]
    # Left: one byte, three of the second character, the mark and the line's end.
    assert (shown.tokens, shown.supervised, shown.cut) == (before + 2, 2, 1 + 3 + 1 + 1)


def test_what_is_left_out_is_shown_as_far_as_it_can_be_with_its_reason(tmp_path, tokenizer_folder):
    samples = {
        "picture": {"png": b"nothing", "json": question()},
        "answer": {"png": picture(), "json": dialogue(("user", "<image>"))},
        "crowded": {**{f"{n}.png": picture() for n in range(4)}, "json": question("<image>" * 4)},
    }
    dataset = dataset_of(write(tmp_path, samples), tokenizer_folder, max_length=60)
    shown = [preview(dataset, Slot(0, i)) for i in range(3)]
    reasons = ["the picture cannot be decoded", "the conversation has no answer", "its images reach to token"]
    for one, reason, pictures, has_text in zip(shown, reasons, (0, 1, 4), (True, False, True), strict=True):
        (problem,) = one.problems
        assert problem.startswith(reason)
        assert (len(one.pictures), bool(one.pieces)) == (pictures, has_text)
        assert problem.split("'")[0] in page([one], 1, 1, [])


# --- The page ---


def hostile_page(folder: Path, tokenizer_folder: Path) -> Path:
    samples = {
        f"{name}<b>\u00a0\u202e\"'>": {
            "png": picture("magenta"),
            "json": question("<image>" + text.replace("<image>", ""), text),
        }
        for name, text in HOSTILE.items()
    }
    out = folder / "page.html"
    code, said, err = run(
        "preview", write(folder, samples), "--tokenizer", tokenizer_folder, "--out", out, "--image-size", "56"
    )
    assert code == 0, err
    assert said == f"{len(HOSTILE)} of {len(HOSTILE)} samples in {out}\n"
    return out


def test_a_hostile_caption_stays_text(tmp_path, tokenizer_folder):
    html = hostile_page(tmp_path, tokenizer_folder).read_text(encoding="utf-8")
    parsed = Parsed(html)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "h1",
        "h2",
        "ul",
        "li",
        "p",
        "b",
        "span",
    }
    allowed |= {"article", "div", "figure", "img", "figcaption", "bdi"}
    assert {tag for tag, _ in parsed.tags} == allowed - {"b"}  # no sample is left out, and no key makes a tag
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/jpeg;base64,")
        assert tag != "img" or set(attributes) == {"alt", "src"}
    alts = [attributes["alt"] for tag, attributes in parsed.tags if tag == "img"]
    assert alts == [f"picture 1 of {name}<b>\\xa0\\u202e\"'>" for name in HOSTILE]
    assert [a["class"] for tag, a in parsed.tags if tag == "h2" and "class" in a] == []
    # Nothing that turns text round or hides it is left raw, and everything else is there, letter by letter.
    shown = "".join(parsed.texts)
    for character in "\u202e\u202c\u200b\u0000\ufeff\u2028":
        assert character not in html
    assert "U+202E" in shown
    assert "U+0000" in shown
    assert HOSTILE["markup"] in shown
    assert HOSTILE["control"] in shown
    assert HOSTILE["chinese"] in shown
    assert HOSTILE["$template"] in shown
    assert unicodedata.normalize("NFC", HOSTILE["emoji"]) in shown


def test_pages_of_shards_of_every_writer(tmp_path, tiny_run, tokenizer_folder):
    out = tmp_path / "page.html"
    code, said, err = run("preview", "--config", tiny_run, "--out", out, "--samples", "6")
    assert (code, said) == (0, f"6 of 24 samples in {out}\n"), err
    assert out.read_text().count("<article>") == 6
    code, said, err = run(
        "preview", write_by_webdataset(tmp_path / "theirs"), "--tokenizer", tokenizer_folder, "--out", out
    )
    assert (code, said) == (0, f"10 of 10 samples in {out}\n"), err
    assert "64 × 48" in out.read_text(encoding="utf-8")
    assert run("preview", "a.tar", "--tokenizer", tokenizer_folder, "--out", tmp_path)[0] == 2
    assert run("preview", "a.tar", "--tokenizer", tokenizer_folder, "--out", tmp_path / "no" / "page.html")[0] == 2
    assert run("preview", tmp_path / "absent.tar", "--tokenizer", tokenizer_folder, "--out", out)[0] == 2


# --- In a browser ---

LEARNT = {"light": (0xC4, 0xEF, 0xCF), "dark": (0x17, 0x4A, 0x2B)}
PAGE = {"light": (0xF4, 0xF5, 0xF7), "dark": (0x14, 0x17, 0x1B)}


def browse(html: Path, width: int, scheme: str, *options: str) -> str:
    """Opens a page in headless Chromium, in a frame so many pixels wide: a window is never as narrow as a phone."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: .ci/run installs it")
    outer = html.with_name("outer.html")
    outer.write_text(
        f"""<body style="margin: 0">
        <iframe src="{html.name}" style="border: 0; width: {width}px; height: 1500px"></iframe>
        <pre></pre><script>
        addEventListener("load", () => {{
          const page = document.querySelector("iframe").contentDocument;
          document.querySelector("pre").textContent = JSON.stringify({{
            title: page.title, width: page.documentElement.scrollWidth,
            scripts: page.scripts.length, loaded: [...page.images].filter(image => image.naturalWidth).length,
          }});
        }});</script>"""
    )
    done = command(
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--allow-file-access-from-files", "--hide-scrollbars", f"--user-data-dir={html.parent}/profile",
        f"--window-size={max(width, 500)},1500", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        *options, outer.as_uri(), timeout=180,
    )  # fmt: skip
    return done.stdout


def colours(file: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(file) as shot:
        return {colour: count for count, colour in shot.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_pictures_and_supervised_words_are_seen(tmp_path, tokenizer_folder, width, scheme):
    answer = "It is the red circle at the top. " * 40
    samples = {f"{n}": {"png": picture("magenta", (80, 60)), "json": question(answer=answer)} for n in range(2)}
    out, shot = tmp_path / "page.html", tmp_path / "shot.png"
    arguments = ("--tokenizer", tokenizer_folder, "--out", out, "--image-size", "56")
    assert run("preview", write(tmp_path, samples), *arguments)[0] == 0
    browse(out, width, scheme, f"--screenshot={shot}")
    found = colours(shot)
    # Two pictures of 224 x 224, all magenta but for JPEG's rounding; half of them, if the page is long on a phone.
    magenta = sum(count for (r, g, b), count in found.items() if r > 240 and g < 15 and b > 240)
    assert magenta > (2 if width > 1000 else 1) * 0.95 * 224 * 224
    # The legend has a few thousand pixels of that colour, the answers many times as many.
    assert found.get(LEARNT[scheme], 0) > 30_000
    assert found.get(PAGE[scheme], 0) > 30_000


def test_hostile_captions_do_nothing_in_a_browser(tmp_path, tokenizer_folder):
    html = hostile_page(tmp_path, tokenizer_folder)
    for width in (1200, 390):
        dom = browse(html, width, "light", "--dump-dom")
        seen = json.loads(dom.partition("<pre>")[2].partition("</pre>")[0])
        count = len(HOSTILE)
        # As wide as the window, so nothing sticks out; every picture is there; no script is there or has run.
        assert seen == {"title": f"Preview of {count} samples", "width": width, "scripts": 0, "loaded": count}


def test_real_shards_in_a_browser(tmp_path, tokenizer_folder):
    out, shot = tmp_path / "page.html", tmp_path / "shot.png"
    code, _, err = run(
        "preview", write_nlvr(tmp_path, 60), "--tokenizer", tokenizer_folder, "--out", out, "--samples", "4"
    )
    assert code == 0, err
    browse(out, 1200, "light", f"--screenshot={shot}")
    found = colours(shot)
    # NLVR's shapes are of three colours on grey: black, yellow and blue.
    for red, green, blue in ((211, 211, 211), (255, 255, 0), (0, 153, 255)):
        near = sum(n for (r, g, b), n in found.items() if max(abs(r - red), abs(g - green), abs(b - blue)) < 6)
        assert near > 1000, (red, green, blue)


def test_the_page_says_how_many_samples_there_are():
    assert "1 of 2,000 samples in 30 shards" in page([Preview("shard", "key")], 2000, 30, [])
