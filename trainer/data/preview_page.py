"""Previews -> one HTML page that needs nothing else: no script, no other file, no network.

Captions and keys come from anywhere, so every text is escaped, and characters that would hide or turn round what
stands beside them are written out.
"""

import base64
import unicodedata
from html import escape
from itertools import groupby
from string import Template

from trainer.data.preview import Piece, Preview
from trainer.errors import printable

JOINERS = "\u200c\u200d"
"""Invisible, but they shape Persian words and joined emoji, and do nothing else."""

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Preview of $shown samples</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --line: #d5d9e0; --ink: #1b1f24; --faint: #5d6673;
  --learnt: #c4efcf; --learnt-2: #a6e3b6; --learnt-line: #17722f; --learnt-ink: #0c2e16;
  --stripe: #eef0f3; --chip: #e3e6fb; --chip-ink: #333d8f; --picture: #fbe6c4; --picture-ink: #744a00;
  --bad: #fde3e1; --bad-ink: #8c1d18; --gone: #737b87;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --line: #363d47; --ink: #e4e7eb; --faint: #9aa4b1;
    --learnt: #174a2b; --learnt-2: #206339; --learnt-line: #5fd98a; --learnt-ink: #e0ffe9;
    --stripe: #262b32; --chip: #2f3566; --chip-ink: #ccd2ff; --picture: #4d3a14; --picture-ink: #ffdc9c;
    --bad: #4a1f1d; --bad-ink: #ffc9c4; --gone: #858f9c;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei",
    "WenQuanYi Micro Hei", sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 0; }
h2, .where, .problem, header ul { overflow-wrap: anywhere; }
header { margin-bottom: 1rem; }
header ul { margin: .25rem 0; padding: 0; list-style: none; color: var(--faint); font-size: .85rem; }
.legend { line-height: 2; margin: .5rem 0 0; }
.legend > span { margin-right: .9em; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem 1rem;
  margin-bottom: 1rem; }
.where, figcaption { color: var(--faint); font-size: .85rem; margin: 0 0 .5rem; }
.problem { background: var(--bad); color: var(--bad-ink); border-radius: .25rem; padding: .25rem .5rem;
  margin: 0 0 .5rem; }
.sample { display: flex; flex-wrap: wrap; gap: .75rem 1rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; align-content: flex-start; max-width: 464px; }
.pictures:empty { display: none; }
figure { margin: 0; }
img { display: block; width: 224px; max-width: 100%; border: 1px solid var(--line); image-rendering: pixelated; }
figcaption { margin: .1rem 0 0; }
.text { flex: 1 1 18rem; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; }
.text span { border-radius: .15rem; padding: .1rem 0; }
bdi > span:nth-child(even) { background: var(--stripe); }
.supervised, bdi > .supervised { background: var(--learnt); color: var(--learnt-ink);
  text-decoration: underline 2px var(--learnt-line); text-underline-offset: .2em; }
bdi > .supervised:nth-child(even) { background: var(--learnt-2); }
.cut, bdi > .cut { background: none; color: var(--gone); text-decoration: line-through; }
.control, .image, .bytes, .hidden { font: .8em/1.4 ui-monospace, Consolas, monospace; white-space: nowrap; }
.text .control, .text .image, .text .bytes, .text .hidden, .legend .control, .legend .image {
  padding: .1rem .3rem; border-radius: .3rem; background: var(--chip); color: var(--chip-ink); }
.text .image, .legend .image { background: var(--picture); color: var(--picture-ink); }
.text .hidden, .text .bytes { background: none; border: 1px dashed currentColor; color: var(--faint);
  padding: 0 .2rem; }
.text .control.supervised { background: var(--learnt-2); color: var(--learnt-ink); }
.text .control.cut { background: none; color: var(--gone); border: 1px solid var(--line); }
.end { color: var(--faint); opacity: .7; }
.text .supervised .hidden, .supervised .end { color: inherit; }
</style>
</head>
<body>
<header>
<h1>$shown of $samples samples in $shards shards</h1>
<ul>$notes</ul>
<p class="legend"><span>Read as context</span> <span class="supervised">Supervised: what the model learns to say</span>
<span class="cut">Cut: beyond the length</span> <span class="control">control token</span>
<span class="image">&lt;image&gt;: its features</span> Shades tell one token from the next.</p>
</header>
<main>
$articles
</main>
</body>
</html>
""")


def page(shown: list[Preview], samples: int, shards: int, notes: list[str]) -> str:
    """The whole page. samples, shards: how many there are in all; notes: what the texts depend on."""
    return PAGE.substitute(
        shown=len(shown),
        samples=f"{samples:,}",
        shards=f"{shards:,}",
        notes="".join(f"<li>{_text(note)}</li>" for note in notes),
        articles="\n".join(map(_article, shown)),
    )


def _article(shown: Preview) -> str:
    counts = f"{shown.tokens:,} tokens, {shown.supervised:,} supervised" + (f", {shown.cut:,} cut" if shown.cut else "")
    problems = "".join(f'<p class="problem"><b>Left out:</b> {_text(problem)}</p>' for problem in shown.problems)
    figures = "".join(
        f'<figure><img alt="picture {number} of {escape(printable(shown.key))}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(picture.jpeg).decode()}"><figcaption>{_text(picture.note)}</figcaption></figure>'
        for number, picture in enumerate(shown.pictures, start=1)
    )
    runs = groupby(shown.pieces, key=lambda piece: piece.kind == "text")
    # Words of one run may be written from right to left; control tokens around them stay where they are.
    text = "".join(
        f"<bdi>{''.join(map(_piece, run))}</bdi>" if is_text else "".join(map(_piece, run)) for is_text, run in runs
    )
    return (
        f"<article><h2>{_text(shown.key)}</h2>"
        f'<p class="where">{_text(shown.shard)} &middot; {counts}</p>{problems}'
        f'<div class="sample"><div class="pictures">{figures}</div>'
        f'<div class="text" lang="">{text}</div></div></article>'
    )


def _piece(piece: Piece) -> str:
    states = {piece.kind: True, "supervised": piece.supervised, "cut": piece.cut}
    names = " ".join(name for name, holds in states.items() if holds)
    ids = f"{piece.ids[0]} x{len(piece.ids)}" if piece.kind == "image" else " ".join(map(str, piece.ids))
    return f'<span class="{names}" title="{ids}">{_text(piece.text, marks=piece.kind == "text")}</span>'


def _text(text: str, marks: bool = False) -> str:
    """Escaped, with what cannot be seen written out. marks: line ends are shown, and break the line."""
    shown = []
    for character in text:
        if character == "\n" and marks:
            shown.append('<span class="end">&crarr;</span>\n')
        elif character == " " or character in JOINERS or unicodedata.category(character)[0] not in "CZ":
            shown.append(escape(character))
        elif character == "\u3000":  # the full-width space of Chinese text
            shown.append(character)
        else:
            shown.append(f'<span class="hidden">U+{ord(character):04X}</span>')
    return "".join(shown)
