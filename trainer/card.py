"""The model card of an export: what the model is, where it comes from, and how it is asked."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.config import Config
from trainer.freeze import table
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.urls import shown

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [mqwen_vl]
---
# {name}

{language_model} that sees: {vision_tower} behind a two-layer projector. State of the run `{name}` after
{step} optimizer steps{loss}.

## Use

```python
{sample}```

{system}

## Training

Data: {sources}. Frozen: {frozen}.

```
{table}
```

The command was

```
{command}
```

with the configuration

```yaml
{config}```
"""


START = r"(?<![^\s'\",=\[\]{}])"
OF_PATH = r"(?:[^\s'\",=\[\]{}/]|[\[{][^\s'\":\[\]{}]*[\]}])"
"""Where a path begins in an argument, and what its names are made of: the brackets are of [0-9] and {000..099}."""

FOLDERS = re.compile(
    rf"({START}(?:https|hf)://(?:{OF_PATH}|/)*)|{START}{OF_PATH}*/(?:(?:{OF_PATH}|[ =/])*/)?(?=[^\s/'\",\]}}])"
)
"""Of a path, absolute or not, of s3:// or file://, all but its last name; or, as the group, a public URL."""


def published(config: Config) -> dict:
    """The settings that mean something elsewhere: of folders the names alone, of shards nothing."""
    tree = config.to_dict()
    tree.pop("run")
    tree["model"] = {key: Path(v).name if isinstance(v, str) else v for key, v in tree["model"].items()}
    for split in ("train", "eval"):
        tree["data"][split] = [{"name": s["name"], "weight": s["weight"]} for s in tree["data"][split]]
    tree["data"].pop("cache_dir")
    tree["deepspeed"] = Path(tree["deepspeed"]).name
    return tree


OPEN = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this one
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto")
"""
OPEN_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this one, the adapter; the model it belongs to is the checkpoint's base/
base = "../base"
processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True, dtype="auto")
model = PeftModel.from_pretrained(model, folder)
"""
ASK = """\
picture, question = {"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is this?"}
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [picture, question]}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

BASE_CARD = "The model that the LoRA adapter in `../hf` belongs to, without it; its projector is the trained one.\n"


def command(arguments: list[str]) -> str:
    """The command line, without the folders and passwords of the place where it was given.

    Of paths the last names are left, of https:// and hf:// what is no password or query.
    """
    given = [argument for argument in arguments[1:] if not argument.startswith("--local_rank")]
    return shlex.join([Path(arguments[0]).name, *(FOLDERS.sub(r"\1", shown(argument)) for argument in given)])


@dataclass(frozen=True)
class ModelCard:
    """What is known of a run before it begins."""

    config: Config
    table: str
    """Parameters by part, and how many of them train."""
    command: str
    parts: dict[str, str]
    """Names of the language model and of the vision tower."""

    @classmethod
    def of(cls, config: Config, model: MQWenForConditionalGeneration) -> "ModelCard":
        parts = {"language_model": "A language model", "vision_tower": "a vision tower", **model.config.base_models}
        return cls(config, table(model), command(sys.argv), parts)

    def text(self, step: int, held_out_loss: float | None) -> str:
        """README.md of the export after a step."""
        config, system = self.config, self.config.data.system_prompt
        return CARD.format(
            name=config.run.name,
            sample=(OPEN_ADAPTER if config.lora else OPEN) + ASK,
            step=step,
            loss="" if held_out_loss is None else f", held-out loss {held_out_loss:.4f}",
            system="Conversations without a system message are opened, as in training, with "
            f"“{system}”." if system else "It was trained without a system message.",
            sources=", ".join(source.name for source in config.data.train),
            frozen=", ".join(config.freeze) or "nothing",
            table=self.table,
            command=self.command,
            config=yaml.safe_dump(published(config), sort_keys=False, allow_unicode=True),
            **self.parts,
        )  # fmt: skip
