"""Prints the table of configuration keys that stands in README.md, from the dataclasses.

python launch/list_keys.py            print it
python launch/list_keys.py --write    put it into README.md
"""

import argparse
import ast
import dataclasses
import inspect
import typing
from pathlib import Path

from trainer import config

MARK = "<!-- keys: written by `python launch/list_keys.py --write` -->\n"
README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(MARK)
    after = rest[rest.index("\n## ") :]
    README.write_text(f"{before}{MARK}\n{table()}{after}", encoding="utf-8")


def table() -> str:
    """Markdown: key, default, meaning. The meaning is the text below the field in trainer/config.py."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for section in dataclasses.fields(config.Config):
        keys = next(filter(dataclasses.is_dataclass, (section.type, *typing.get_args(section.type))), None)
        if keys is not section.type:  # a plain value, or a section that may be absent
            rows.append(row(section.name, section, meanings(config.Config)))
        if keys:
            rows += [row(f"{section.name}.{f.name}", f, meanings(keys)) for f in dataclasses.fields(keys)]
        if section.name == "data":
            fields = dataclasses.fields(config.ShardsConfig)
            rows += [row(f"data.train[].{f.name}", f, meanings(config.ShardsConfig)) for f in fields]
    return "\n".join(rows) + "\n"


def row(key: str, field: dataclasses.Field, texts: dict[str, str]) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "required" if default is dataclasses.MISSING else "" if default in (None, "", []) else f"`{default}`"
    shown = shown.replace("|", "\\|")  # which would end the cell
    return f"| `{key}` | {shown} | {texts[field.name]} |"


def meanings(cls: type) -> dict[str, str]:
    """Field -> the string that follows it in the source."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


if __name__ == "__main__":
    main()
