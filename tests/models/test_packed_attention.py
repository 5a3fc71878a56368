"""Packed documents see themselves alone: what the model computes of them is what it computes of each by itself."""

import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_CONFIG, tiny_language_model

from trainer.models.packed_attention import packed_attention
from trainer.setup import packed_inputs

LENGTHS = [1, 19, 7, 30]
"""57 tokens: of one, and of others that no power of two divides."""


def bounds_of(lengths: list[int]) -> list[int]:
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


@pytest.fixture
def documents(tiny_config) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 299, (1, length)) for length in LENGTHS]  # 300 is the placeholder


def pack(documents: list[torch.Tensor]) -> dict:
    ends = bounds_of([document.shape[1] for document in documents])[1:]
    return {"input_ids": torch.cat(documents, dim=1), **packed_inputs(ends, torch.device("cpu"))}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_each_document_alone(tiny_model, documents, checkpointing):
    tiny_model.train()
    if checkpointing:
        tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    alone = torch.cat([tiny_model(document, use_cache=False).logits for document in documents], dim=1)
    (alone**2).sum().backward()
    expected = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    packed = tiny_model(**pack(documents), use_cache=False).logits
    (packed**2).sum().backward()
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_losses_are_those_of_each_document_alone_token_by_token(tiny_model, documents):
    # The first token of a document is predicted by nothing, least of all by the last of the one before.
    def losses(logits, labels):
        return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")

    alone = [losses(tiny_model(document).logits, document) for document in documents]
    labels = torch.cat([torch.cat((torch.full((1, 1), -100), document[:, 1:]), dim=1) for document in documents], dim=1)
    inputs = pack(documents)
    packed = losses(tiny_model(**inputs, use_cache=False).logits, labels)
    supervised = labels[0, 1:] != -100
    assert int(supervised.sum()) == sum(LENGTHS) - len(LENGTHS)
    torch.testing.assert_close(packed[supervised], torch.cat(alone), atol=1e-5, rtol=1e-5)
    mean = tiny_model(**inputs, labels=labels, use_cache=False, loss_only=True).loss
    torch.testing.assert_close(mean, torch.cat(alone).mean(), atol=1e-5, rtol=1e-5)
    parameters = list(tiny_model.parameters())
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (mean, torch.cat(alone).mean()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_another_document_changes_nothing(tiny_model, documents):
    first = tiny_model(**pack(documents), use_cache=False).logits
    documents[1] = (documents[1] + 1) % 299
    second = tiny_model(**pack(documents), use_cache=False).logits
    bounds = bounds_of(LENGTHS)
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert torch.equal(first[:, start:end], second[:, start:end]) == (number != 1)


def test_pictures_find_their_documents(tiny_model):
    # Runs of six placeholders in two of three documents: each gets its own features.
    mark, size = OTHER_CONFIG["replace_token_id"], OTHER_CONFIG["image_context_length"]
    torch.manual_seed(2)
    images = torch.randn(2, size, 64)
    run = [mark] * size
    documents = [torch.tensor([ids]) for ids in ([5, *run, 6, 7], [8, 9], [*run, 4])]
    alone = [
        tiny_model(document, images=image).logits
        for document, image in zip(documents, (images[:1], images[:0], images[1:]), strict=True)
    ]
    packed = tiny_model(**pack(documents), images=images, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_a_pack_longer_than_the_model_stretches_nothing(tiny_config, documents):
    # Beyond seq_length an evaluated model stretches its rotary base and scales queries: by a document's length, never
    # by the pack's. 57 tokens in a model of 40; the longest document has 30.
    tiny_config.seq_length = 40
    tiny_config.use_dynamic_ntk = tiny_config.use_logn_attn = True
    model = tiny_language_model(tiny_config)
    alone = torch.cat([model(document).logits for document in documents], dim=1)
    packed = model(**pack(documents), use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_attention_equals_one_under_a_block_mask():
    # The reference: one attention over everything, with a mask of blocks.
    torch.manual_seed(3)
    bounds = bounds_of(LENGTHS)
    query, key, value = torch.randn(3, 1, 4, bounds[-1], 16)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (document[:, None] == document[None]) & torch.ones(bounds[-1], bounds[-1]).tril().bool()
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)
    found = packed_attention(query, key, value, torch.tensor(bounds, dtype=torch.int32), max(LENGTHS), 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"use_cache": True}, {"attention_mask": torch.ones(1, 57)}, {"position_ids": None}])
def test_what_does_not_go_with_packs_is_refused(tiny_model, documents, wrong):
    with pytest.raises(ValueError, match="packed documents"):
        tiny_model(**(pack(documents) | wrong))
