"""The chat page as a person uses it: launch/chat.py in a process of its own, the page in headless Chromium."""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_task
import psutil
import pytest
from commands import ROOT, free_port

from trainer.data.samples import Turn
from trainer.errors import ConfigError
from trainer.generate import Decoding, Generator

TOKENS = 20


@pytest.fixture(scope="module")
def browser():
    """Chromium, and what it was asked to fetch."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: .ci/run installs it")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(browser, tiny_export, tmp_path_factory):
    """launch/chat.py on a run folder: its address, and its process."""
    pytest.importorskip("gradio")
    run = tmp_path_factory.mktemp("chat") / "my_run_1"
    shutil.copytree(tiny_export, run / "checkpoint-000007" / "hf")
    (run / "checkpoint-000007" / "state.json").write_text('{"step": 7}')
    (run / "latest").write_text("checkpoint-000007\n")
    with serving(run, TOKENS) as served:
        yield served


@contextmanager
def serving(model: Path, tokens: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """launch/chat.py, with answers of so many tokens: its address, and its process."""
    port, log = free_port(), model / "log"
    words = ("launch/chat.py", "--model", str(model), "--port", str(port), "--max-new-tokens", str(tokens))
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(browser, server):
    """A new tab. It may ask nobody but the server."""
    address, _ = server
    tab = browser.new_page(viewport={"width": 1000, "height": 900})
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    yield tab
    tab.close()
    assert [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def generator(tiny_export) -> Generator:
    return Generator(tiny_export)


@pytest.fixture(scope="module")
def picture() -> bytes:
    rng = random.Random(0)
    return demo_task.draw(demo_task.random_scene(rng), rng)


class Expected:
    """The conversation as Generator has it by itself."""

    def __init__(self, generator: Generator):
        self.generator, self.turns, self.images = generator, [], []
        self.answers: list[str] = []

    def ask(self, text: str, *images: bytes) -> list[str]:
        """Every answer so far."""
        self.turns.append(Turn("user", "<image>\n" * len(images) + text))
        self.images += images
        prompt = self.generator.prompt(self.turns, self.images)
        self.answers.append(self.generator.answers([prompt], Decoding(TOKENS))[0])
        self.turns.append(Turn("assistant", self.answers[-1]))
        return [visible(answer) for answer in self.answers]


def visible(text: str) -> str:
    """What of a text does not depend on how a page breaks its lines."""
    return "".join(character for character in text if character.isprintable() and not character.isspace())


def ask(page, text: str, answered_by: str = "") -> None:
    """Types a question and sends it: it leaves the box, or is answered by a message of this text.

    Enter does nothing while the last answer is still on its way, if only by its last word.
    """
    box, end = page.locator("textarea"), time.monotonic() + 20
    box.fill(text)
    while page.get_by_text(answered_by).count() == 0 if answered_by else box.input_value():
        assert time.monotonic() < end, text
        box.press("Enter")
        page.wait_for_timeout(200)


def attach(page, name: str, content: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("input[type=file]").first.set_input_files(file)


def answers(page) -> list[str]:
    return [visible(text) for text in page.locator("#messages .bot .message-content").all_inner_texts()]


def wait_for_answers(page, expected: list[str]) -> None:
    end = time.monotonic() + 20
    while (found := answers(page)) != expected:
        assert time.monotonic() < end, (found, expected)
        page.wait_for_timeout(50)


WATCH = """() => {
    window.seen = new Set();
    const look = () => document.querySelectorAll("#messages .bot .message-content").forEach(e => seen.add(e.innerText));
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def test_a_picture_and_two_questions_give_the_models_answers(page, generator, picture, tmp_path):
    conversation = Expected(generator)
    page.get_by_text("my_run_1 · 第 7 步 · step 7").wait_for()
    page.evaluate(WATCH)
    attach(page, "scene.png", picture)
    page.locator("[aria-label='Remove file']").wait_for()
    ask(page, "What shape is it?")
    wait_for_answers(page, conversation.ask("What shape is it?", picture))
    ask(page, "它在哪里？")
    wait_for_answers(page, conversation.ask("它在哪里？"))
    shown = page.locator("#messages .user img")
    assert shown.count() == 1
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [demo_task.SIZE] * 2
    # The answer came piece by piece: a beginning of it was on the page before the whole.
    first = visible(conversation.answers[0])
    seen = {visible(text) for text in page.evaluate("[...window.seen]")}
    assert any(text and text != first and first.startswith(text) for text in seen), seen
    # Nothing is cut off on the right, and the box to type in stays in sight.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("textarea").bounding_box()["y"] < 900
    page.screenshot(path=tmp_path / "chat.png")

    page.get_by_role("button", name="清空 · Clear").click()
    wait_for_answers(page, [])
    ask(page, "它在哪里？")
    wait_for_answers(page, Expected(generator).ask("它在哪里？"))


def test_a_wrong_file_and_a_long_question_are_refused_in_words_and_the_conversation_goes_on(page, generator, picture):
    conversation = Expected(generator)
    ask(page, "What?")
    wait_for_answers(page, conversation.ask("What?"))

    attach(page, "notes.png", b"not a picture")
    page.locator("[aria-label='Remove file']").wait_for()
    ask(page, "And this?", answered_by="notes.png：不是可用的图片 · not a usable picture")
    assert page.locator("textarea").input_value() == "And this?"  # the question is not lost
    page.locator("[aria-label='Remove file']").click()
    attach(page, "notes.txt", b"not a picture")  # by its name not even taken
    page.get_by_text("Invalid file type: notes.txt").wait_for()

    ask(page, "~" * 300, answered_by="Too long: the conversation and its pictures have")
    said = page.get_by_text("Too long: the conversation and its pictures have").first.inner_text()
    tokens = len(generator.template.prompt([Turn("system", generator.system_prompt), *conversation.turns,
                                            Turn("user", "~" * 300)]))  # fmt: skip
    assert f"共 {tokens} 个词元，上限 256" in said
    assert f"have {tokens} tokens, at most 256" in said

    attach(page, "scene.png", picture)
    page.locator("[aria-label='Remove file']").wait_for()
    ask(page, "Where?")
    wait_for_answers(page, conversation.ask("Where?", picture))


def test_two_tabs_do_not_disturb_each_other(page, browser, server, generator, picture):
    address, _ = server
    other = browser.new_page()
    other.goto(address)
    attach(page, "scene.png", picture)
    page.locator("[aria-label='Remove file']").wait_for()
    for tab, text in ((page, "What?"), (other, "Where is the red ring?")):
        tab.locator("textarea").fill(text)
    for tab in (page, other):
        tab.locator("textarea").press("Enter")
    wait_for_answers(page, Expected(generator).ask("What?", picture))
    wait_for_answers(other, Expected(generator).ask("Where is the red ring?"))
    other.close()


@pytest.mark.long
def test_an_answer_that_is_stopped_stays_and_the_conversation_goes_on(browser, generator, tiny_export):
    with serving(tiny_export, 180) as (address, _):
        page, question = browser.new_page(), "What shape is it?"
        page.goto(address)
        ask(page, question)
        for _ in range(3000):
            if (found := answers(page)) and len(found[0]) >= 5:
                break
            page.wait_for_timeout(20)
        else:
            pytest.fail("no answer begins")
        page.get_by_role("button", name="停止 · Stop").click()
        page.wait_for_timeout(1500)
        (stopped,) = answers(page)
        page.wait_for_timeout(1000)
        assert answers(page) == [stopped]
        turns = [Turn("user", question)]
        whole = generator.answers([generator.prompt(turns, [])], Decoding(180))[0]
        assert visible(whole).startswith(stopped)
        assert len(stopped) < len(visible(whole))
        ask(page, "Go on.")
        page.wait_for_function("document.querySelectorAll('#messages .user').length == 2")
        page.close()


def test_the_page_stays_on_this_machine(page, server):
    address, process = server
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    # By another name the same server is another one; without the policy an opaque answer would come.
    other = json.dumps(address.replace("127.0.0.1", "localhost") + "/")
    assert page.evaluate(f"fetch({other}, {{mode: 'no-cors'}}).then(() => 'fetched', () => 'forbidden')") == "forbidden"
    assert page.evaluate("fetch('/').then(() => 'fetched', () => 'forbidden')") == "fetched"


def launch(monkeypatch, *args: str) -> None:
    import chat as launched

    for name in ("GRADIO_ANALYTICS_ENABLED", "no_proxy"):  # which it sets
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", ["chat.py", *args])
    launched.main()


def test_without_gradio_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match="pip install -r requirements-chat.txt"):
        launch(monkeypatch, "--model", "anywhere")


def test_a_port_that_is_taken_is_told_before_the_model_is_read(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot be listened on .*in use"):
            launch(monkeypatch, "--model", "anywhere", "--port", port)
    with pytest.raises(ConfigError, match="--port 70000: cannot be listened on"):
        launch(monkeypatch, "--model", "anywhere", "--port", "70000")
