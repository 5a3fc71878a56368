"""Opens an export by every door of Transformers, with none of our code.

    python tests/doors.py EXPORT FOLDER

FOLDER/chats.json has chats; written there are doors.json (greedy answers by door) and doors.safetensors (logits of each
prompt). Run as a script, where `trainer` need not be installed.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

sys.modules["trainer"] = None  # nothing that Transformers does later can import it

ASK = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
TOKENS = 12


def answers(model, processor, chats: list, together: bool) -> list[str]:
    found = []
    for some in [chats] if together else [[chat] for chat in chats]:
        inputs = processor.apply_chat_template(some, processor_kwargs={"padding": True}, **ASK)
        inputs = inputs.to(model.device, dtype=model.dtype)
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() for text in texts]
    return found


def by_pipeline(export: Path, chats: list) -> list[str]:
    pipe = pipeline("image-text-to-text", model=str(export), trust_remote_code=True)
    found = [pipe(text=chat, max_new_tokens=TOKENS, return_full_text=False)[0] for chat in chats]
    return [one["generated_text"].strip() for one in found]


def main() -> None:
    export, folder = map(Path, sys.argv[1:])
    chats = json.loads((folder / "chats.json").read_text())
    options = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(export, **options).model_type == "mqwen_vl"
    tokenizer = AutoTokenizer.from_pretrained(export, **options)
    processor = AutoProcessor.from_pretrained(export, **options)
    assert type(AutoImageProcessor.from_pretrained(export, **options)) is type(processor.image_processor)
    model = AutoModelForCausalLM.from_pretrained(export, **options).eval()
    found = {
        "AutoModelForCausalLM": answers(model, processor, chats, together=False),
        "batch, padded on the left": answers(model, processor, chats, together=True),
        "AutoModelForImageTextToText": answers(
            AutoModelForImageTextToText.from_pretrained(export, **options).eval(), processor, chats, together=False
        ),
        "pipeline": by_pipeline(export, chats),
    }
    logits = {}
    for number, chat in enumerate(chats):
        with torch.no_grad():
            inputs = processor.apply_chat_template(chat, **ASK)
            logits[str(number)] = model(**inputs).logits
        if "pixel_values" not in inputs:  # words alone need the tokenizer alone
            words = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **ASK)
            assert words["input_ids"].tolist() == inputs["input_ids"].tolist()
    again = folder / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    model.language_model.save_pretrained(folder / "plain-qwen")
    reopened = AutoModelForCausalLM.from_pretrained(again, **options).eval()
    found["saved again"] = answers(reopened, AutoProcessor.from_pretrained(again, **options), chats, together=True)
    # From Python's side the same; whether it agrees to a digit is not asked of bf16.
    assert len(answers(model.to(torch.bfloat16), processor, chats, together=True)) == len(chats)
    assert AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16, **options).dtype == torch.bfloat16
    if importlib.util.find_spec("accelerate"):
        placed = AutoModelForCausalLM.from_pretrained(export, device_map="auto", **options).eval()
        found["device_map"] = answers(placed, processor, chats, together=True)
    (folder / "doors.json").write_text(json.dumps(found))
    save_file(logits, folder / "doors.safetensors")


if __name__ == "__main__":
    main()
