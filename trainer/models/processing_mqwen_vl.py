"""MQWenVLProcessor: chat messages with pictures -> what `MQWenForConditionalGeneration` takes.

The ids are those of training: ChatML, each picture a run of placeholders as long as its features.
"""

import json

from transformers import BatchFeature, ProcessorMixin

PADDING = ("padding", "max_length", "pad_to_multiple_of")
ELSEWHERE = ("tools", "documents", "return_assistant_tokens_mask", "truncation")
"""Options of `apply_chat_template`: of the tokenizer's padding, and those that are left to Transformers."""


def chat_template(image_token: str, system_prompt: str = "") -> str:
    """ChatML in Jinja. A message's content is a string, or a list of {"type": "text", "text": ...} and
    {"type": "image", ...}; a picture stands on a line of its own, as in LLaVA's data.

    system_prompt: opens conversations that have no system message.
    """
    system = json.dumps(system_prompt, ensure_ascii=False)
    opening = f"<|im_start|>system\n{{{{ {system} }}}}<|im_end|>\n"
    return (
        ("{% if messages[0]['role'] != 'system' %}" + opening + "{% endif %}" if system_prompt else "")
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        "{% if not loop.first and not loop.previtem.get('text', '').endswith('\n') %}{{ '\n' }}{% endif %}"
        + image_token
        + "{% else %}"
        "{% if not loop.first and loop.previtem['type'] == 'image' and not part['text'].startswith('\n') %}"
        "{{ '\n' }}{% endif %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


class MQWenVLProcessor(ProcessorMixin):
    """image_token: the placeholder. image_length: features of a picture. system_prompt: of training; the chat template
    has it."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<|extra_0|>",
        image_length=256,
        system_prompt="",
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_length = image_length
        self.system_prompt = system_prompt
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * self.image_length

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=False,
        return_dict=False,
        return_tensors=None,
        processor_kwargs=None,
        **kwargs,
    ):
        """As in Transformers. Tokens are made piece by piece, as in training, and not from the rendered text: what
        spells a control token in a message is text, and white space does not run together across pieces.

        Another template, or an option beyond those named here, is left to Transformers.
        """
        if not tokenize or chat_template or any(kwargs.get(name) for name in ELSEWHERE):
            return super().apply_chat_template(
                conversation, chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tokenize=tokenize, return_dict=return_dict,
                return_tensors=return_tensors, processor_kwargs=processor_kwargs, **kwargs,
            )  # fmt: skip
        batched = not isinstance(conversation[0], dict)
        options = {name: value for name, value in kwargs.items() if name in PADDING} | (processor_kwargs or {})
        options.pop("return_tensors", None)
        return_tensors = None if return_tensors == "auto" else return_tensors
        rows, pictures = [], []
        for messages in conversation if batched else [conversation]:
            messages = getattr(messages, "messages", messages)
            rows.append(self._ids(messages, add_generation_prompt, continue_final_message))
            pictures += [_source(part) for message in messages for part in _parts(message) if part["type"] == "image"]
        data = dict(self.tokenizer.pad({"input_ids": rows}, **{"padding": False, **options}))
        if pictures:
            data |= self.image_processor(self.image_processor.fetch_images(pictures))
        if not batched and not return_tensors:
            data |= {name: data[name][0] for name in ("input_ids", "attention_mask")}
        data = BatchFeature(data, tensor_type=return_tensors)
        return data if return_dict else data["input_ids"]

    def _ids(self, messages, add_generation_prompt, continue_final_message):
        """Token ids of a conversation; continue_final_message: it ends within the last message."""
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        start, end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        newline, ids = self._encode("\n"), []
        for number, message in enumerate(messages, start=1):
            ids += [start, *self._encode(message["role"]), *newline, *self._content(message)]
            if number < len(messages) or not continue_final_message:
                ids += [end, *newline]
        return ids + [start, *self._encode("assistant"), *newline] * bool(add_generation_prompt)

    def _content(self, message):
        ids, text, before = [], "", None
        for part in _parts(message):
            if part["type"] == "image":
                text += "\n" * (before is not None and not text.endswith("\n"))
                ids += self._encode(text) + [self.image_token_id] * self.image_length
                text = ""
            else:
                text += "\n" * (before == "image" and not part["text"].startswith("\n")) + part["text"]
            before = part["type"]
        return ids + self._encode(text)

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _parts(message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _source(part):
    """Of a picture: a Pillow image, path, URL or base64 text."""
    for name in ("image", "path", "url", "base64"):
        if part.get(name) is not None:
            return part[name]
    raise ValueError(f"a part of type 'image' without a picture: expected 'image', 'path', 'url' or 'base64' in {part}")
