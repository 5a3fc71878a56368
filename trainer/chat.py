"""A chat page for an exported model: pictures, several turns, answers as they grow. Needs Gradio, an optional extra.

The page takes nothing from elsewhere: each answer of the server forbids the browser to ask another one.
"""

import html
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from trainer.checkpoint import STATE
from trainer.data.conversation import place_images
from trainer.data.samples import IMAGE_MARK, Turn
from trainer.errors import DataError
from trainer.generate import Decoding, Generator, TooLong
from trainer.question_files import PICTURE_SUFFIXES, read_image

TITLE = "看图对话 · Chat about pictures"
PLACEHOLDER = "提问，可附图片 · Ask, with pictures if you like"
EMPTY = "附上图片并提问 · Attach a picture and ask about it"
CLEAR = "清空 · Clear"
STOP = "停止 · Stop"
NO_TEXT = "请输入问题 · Please type a question"

LOCAL_ONLY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content-Security-Policy: Gradio's page may run its scripts in any way, but fetches all it has from its own server."""

STYLE = "#messages [aria-label='Share'] { display: none }"
"""That button would send the picture to huggingface.co."""

NOTICE_SECONDS = 20
KEEP_SECONDS = 86400
"""How long pictures that were uploaded stay in Gradio's temporary folder, where the page is not closed before."""


@dataclass
class Conversation:
    """What the next prompt is made of."""

    turns: list[Turn] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)


def name_and_step(export: Path) -> str:
    """What a person calls a model: of a run's checkpoint the run's name and the step, or else the folder's name."""
    checkpoint = export.resolve().parent
    if (checkpoint / STATE).is_file():
        step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"]
        return f"{checkpoint.parent.name} · 第 {step} 步 · step {step}"
    return export.resolve().name


def ask(conversation: Conversation, text: str, files: list[str]) -> Conversation:
    """The conversation with one more question, its pictures at their marks or in front.

    Raises DataError, in words for the page, where that is no question.
    """
    if not text.strip():
        raise DataError(NO_TEXT)
    images = []
    for file in files:
        try:
            images.append(read_image(Path(file)))
        except DataError as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise DataError(f"{Path(file).name}：不是可用的图片 · not a usable picture ({reason})") from error
    try:
        question = place_images([Turn("user", text)], len(images))
    except DataError as error:
        raise DataError(f"图片与 {IMAGE_MARK} 标记数目不符 · {error}") from error
    return Conversation([*conversation.turns, *question], [*conversation.images, *images])


def notice(text: str) -> None:
    gr.Warning(html.escape(text), NOTICE_SECONDS)


def chat_page(generator: Generator, name: str, decoding: Decoding, system_prompt: str | None) -> gr.Blocks:
    """The page, to be launched. Each tab has its own conversation; one answer is found at a time."""

    def respond(message: dict[str, Any], shown: list[dict], conversation: Conversation) -> Iterator[tuple]:
        """(text box, messages, conversation) as the answer grows; a question that cannot be asked stays in the box.

        The box is emptied once: the next question may be typed while the answer grows.
        """
        text, files = message["text"] or "", message["files"] or []
        try:
            asked = ask(conversation, text, files)
            prompt = generator.prompt(asked.turns, asked.images, system_prompt)
        except TooLong as error:
            notice(
                f"对话连同图片共 {error.tokens} 个词元，上限 {error.limit}：请缩短问题，或清空对话。 · Too long: the "
                f"conversation and its pictures have {error.tokens} tokens, at most {error.limit}. Shorten the "
                f"question, or clear the conversation."
            )
        except DataError as error:
            notice(str(error))
        else:
            shown = [*shown, *({"role": "user", "content": {"path": file}} for file in files)]
            shown.append({"role": "user", "content": text})
            answer = "…"
            yield None, [*shown, {"role": "assistant", "content": answer}], conversation
            for answer in generator.stream(prompt, decoding):
                # With each word, for a stop comes unannounced: what is shown is what was said.
                said = Conversation([*asked.turns, Turn("assistant", answer)], asked.images)
                yield gr.skip(), [*shown, {"role": "assistant", "content": answer}], said
            return
        yield gr.skip(), gr.skip(), conversation

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=(3600, KEEP_SECONDS)) as page:
        gr.Markdown(f"### {TITLE}\n模型 · Model: `{name}`")
        messages = gr.Chatbot(
            show_label=False, placeholder=EMPTY, render_markdown=False, buttons=["copy"], scale=1, elem_id="messages"
        )
        box = gr.MultimodalTextbox(
            show_label=False, placeholder=PLACEHOLDER, file_count="multiple", file_types=list(PICTURE_SUFFIXES),
            max_plain_text_length=10**6, autofocus=True,
        )  # fmt: skip
        with gr.Row():
            stop, clear = gr.Button(STOP), gr.Button(CLEAR)
        conversation = gr.State(Conversation())
        answering = box.submit(
            respond, [box, messages, conversation], [box, messages, conversation], concurrency_limit=1,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        stop.click(None, cancels=[answering], queue=False, api_visibility="private")
        gr.on(
            [clear.click, messages.clear], lambda: (None, [], Conversation()), None, [box, messages, conversation],
            cancels=[answering], queue=False, api_visibility="private",
        )  # fmt: skip
    return page.queue(default_concurrency_limit=1)


class _LocalOnly:
    """Adds the policy to whatever an ASGI application answers."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", LOCAL_ONLY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serves the page at this address until Ctrl-C."""
    page.launch(
        server_name=host, server_port=port, share=False, quiet=True, ssr_mode=False, run_history=False,
        footer_links=[], css=STYLE,
        theme=gr.themes.Default(font=["Helvetica Neue", "Arial", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(_LocalOnly)]},
    )  # fmt: skip
