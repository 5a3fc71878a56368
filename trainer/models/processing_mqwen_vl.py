"""MQWenVLProcessor: chat messages with pictures -> what `MQWenForConditionalGeneration` takes.

The ids are those of training: ChatML, each picture a run of placeholders as long as its features.
"""

import json

from transformers import ProcessorMixin


def chat_template(image_token: str, system_prompt: str = "") -> str:
    """ChatML in Jinja. A message's content is a string, or a list of {"type": "text", "text": ...} and
    {"type": "image", ...}; a picture stands on a line of its own, as in LLaVA's data.

    system_prompt: opens conversations that have no system message.
    """
    return (
        (
            "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
            f"{{{{ {json.dumps(system_prompt, ensure_ascii=False)} }}}}<|im_end|>\n"
            "{% endif %}"
            if system_prompt
            else ""
        )
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if not loop.first and 'image' in (part['type'], loop.previtem['type']) %}{{ '\\n' }}{% endif %}"
        f"{{% if part['type'] == 'image' %}}{image_token}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}<|im_end|>\n"
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

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, **kwargs):
        """As in Transformers; what spells a control token in a message is encoded as text, as in training."""
        if tokenize and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(conversation, chat_template, tokenize=tokenize, **kwargs)
