"""Records of text become turns: every form that is understood, and a message with names and counts for all others."""

import copy

import pytest

from trainer.data.conversation import parse_conversation
from trainer.data.samples import Turn
from trainer.errors import BadSample


def pairs(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns]


def parse(record, images: int = 0, caption_prompt: str = "Describe the image.") -> list[tuple[str, str]]:
    return pairs(parse_conversation(record, images, caption_prompt))


def llava(*values: str) -> dict:
    """A LLaVA record: question, answer, question, ..."""
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    }  # fmt: skip


# --- What is understood ---


def test_llava_and_openai_say_the_same():
    turns = [("system", "Be brief."), ("user", "<image>\nWhat is it?"), ("assistant", "A cat."), ("user", "Sure?")]
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    as_llava = {"conversations": [{"from": speakers[role], "value": text} for role, text in turns]}
    as_openai = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert parse(as_llava, 1) == parse(as_openai, 1) == turns


def test_role_names_of_both_forms_may_be_mixed():
    # ShareGPT's descendants write "user" and "assistant" into LLaVA's fields.
    record = {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}
    assert parse(record) == [("user", "Hi"), ("assistant", "Hello")]


def test_further_fields_have_no_effect():
    record = {"id": 7, "image": "x.jpg", "conversations": [{"from": "gpt", "value": "Yes", "weight": 1}]}
    assert parse(record) == [("assistant", "Yes")]


def test_a_caption_answers_the_caption_prompt():
    record = {"caption": " A red circle. \n", "url": "https://example.org"}
    assert parse(record, 1, "Say what you see.") == [
        ("user", "<image>\nSay what you see."),
        ("assistant", "A red circle."),
    ]


def test_the_mark_may_stand_in_the_caption_prompt():
    assert parse({"caption": "A cat."}, 1, "Here: <image> What is it?")[0] == ("user", "Here: <image> What is it?")


def test_a_conversation_goes_before_a_caption():
    assert parse(llava("Q", "A") | {"caption": "C"}) == [("user", "Q"), ("assistant", "A")]


def test_texts_are_taken_as_they_are():
    text = "  <|im_start|>\n\t图像 🙂 "
    assert parse(llava(text, text)) == [("user", text), ("assistant", text)]


def test_a_record_is_not_changed():
    record = llava("What is it?", "A cat.")
    before = copy.deepcopy(record)
    parse(record, 1)
    assert record == before


# --- Where images stand ---


@pytest.mark.parametrize(("images", "head"), [(0, ""), (1, "<image>\n"), (3, "<image>\n<image>\n<image>\n")])
def test_unmarked_images_stand_before_the_first_question(images, head):
    record = {
        "messages": [
            {"role": "system", "content": "S"},
            *({"role": r, "content": r} for r in ("user", "assistant", "user")),
        ]
    }
    assert parse(record, images) == [
        ("system", "S"),
        ("user", f"{head}user"),
        ("assistant", "assistant"),
        ("user", "user"),
    ]


def test_marked_images_stay_in_their_turns():
    record = llava("<image><image>Compare.", "The first.", "And <image> this?", "No.")
    assert parse(record, 3)[2] == ("user", "And <image> this?")


def test_only_marks_of_questions_count():
    # An answer that speaks of "<image>" is text, as is a system prompt.
    record = {
        "conversations": [
            {"from": "system", "value": "The mark is <image>."},
            {"from": "human", "value": "What marks a picture?"},
            {"from": "gpt", "value": "<image>"},
        ]
    }
    assert parse(record, 0)[1:] == [("user", "What marks a picture?"), ("assistant", "<image>")]
    assert parse(record, 1)[1:] == [("user", "<image>\nWhat marks a picture?"), ("assistant", "<image>")]


@pytest.mark.parametrize(("marks", "images"), [(1, 0), (1, 2), (2, 1), (3, 1)])
def test_marks_must_be_as_many_as_images(marks, images):
    with pytest.raises(BadSample, match=rf"^{marks} image marks '<image>' in the questions, but {images} images$"):
        parse(llava("<image>" * marks + "Q", "A"), images)


def test_an_image_needs_a_question():
    with pytest.raises(BadSample, match="has images but no question to put them in"):
        parse({"messages": [{"role": "assistant", "content": "A"}]}, 1)


# --- What is not understood ---


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected a JSON object, found list"),
        ("text", "expected a JSON object, found str"),
        (None, "expected a JSON object, found NoneType"),
        ({}, r"the fields are \[\]"),
        ({"text": "x", "id": 1}, r"expected a field 'conversations' .*; the fields are \['id', 'text'\]"),
        ({"caption": None}, r"the fields are \['caption'\]"),
        ({"caption": ["a", "b"]}, r"the fields are \['caption'\]"),
        ({"conversations": []}, "'conversations' must be a list of turns"),
        ({"conversations": "Q: x A: y"}, "'conversations' must be a list of turns"),
        ({"messages": {"role": "user"}}, "'messages' must be a list of turns"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object with the texts 'role' and 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            r"messages\[0\]: expected an object with the texts 'role' and 'content'",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]},
            r"conversations\[1\]: expected an object with the texts 'from' and 'value'",
        ),
        (
            {"conversations": [{"role": "user", "value": "x"}]},
            r"conversations\[0\]: unknown role None; known are human, user, gpt, assistant, system",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: unknown role 'tool'; known are human,"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\]: unknown role \['user'\]"),
        (llava("Q"), "has no answer to learn from"),
        (llava("Q", ""), r"has no answer to learn from \(no turn of 'gpt' or 'assistant' with text\)"),
        ({"caption": "A cat."}, "^a caption, but no picture$"),
    ],
)  # fmt: skip
def test_other_forms_are_named(record, message):
    with pytest.raises(BadSample, match=message):
        parse(record)


def test_an_empty_caption_is_no_answer():
    with pytest.raises(BadSample, match="has no answer to learn from"):
        parse({"caption": "  \n"}, 1)


@pytest.mark.parametrize(
    ("record", "images", "kind"),
    [
        ([], 0, "malformed conversation"),
        ({"messages": ["hi"]}, 0, "malformed conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 0, "malformed conversation"),
        (llava("Q", "abc\ud83d"), 0, "malformed conversation"),
        ({"label": 3}, 0, "no caption or conversation"),
        (llava("Q"), 0, "no answer"),
        (llava("<image>Q", "A"), 2, "images and marks differ in number"),
        ({"caption": "A cat."}, 0, "caption without a picture"),
    ],
)
def test_what_is_wrong_has_a_kind_that_many_samples_share(record, images, kind):
    # The ledger counts by it: it must not hold a number, a name or a text of the sample.
    with pytest.raises(BadSample) as raised:
        parse(record, images)
    assert raised.value.kind == kind


@pytest.mark.parametrize("record", [llava("Q", "abc\ud83d"), llava("abc\ude00", "A"), {"caption": "abc\ud800d"}])
def test_half_a_character_is_refused(record):
    # JSON can spell the half of a surrogate pair ("\ud83d"), but no tokenizer can encode it.
    with pytest.raises(BadSample, match=r"half a character \('\\ud.*, a lone surrogate\) at place 3 of a text"):
        parse(record, images=1 if "caption" in record else 0)


def test_one_answer_among_empty_ones_is_enough():
    assert parse(llava("Q", "", "R", "A"))[-1] == ("assistant", "A")
