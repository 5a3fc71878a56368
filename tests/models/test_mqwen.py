"""Image features in Qwen: where they go, what they change, and that generating with them is the same model.

The reference is `by_hand`: embeddings put together token by token in Python, given to the model as `inputs_embeds`.
"""

import pytest
import torch

from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_qwen import QWenLMHeadModel

X = 300
"""The placeholder of `tiny_model`."""

P = 6
"""Features of an image in `tiny_model`."""

RUN = [X] * P
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def features(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, P, 64, generator=torch.Generator().manual_seed(seed))


def grown(row: list[int]) -> list[int]:
    """Every single placeholder of a row -> a run of P."""
    return [token for given in row for token in (RUN if given == X else [given])]


def by_hand(model, row: list[int], images: torch.Tensor) -> torch.Tensor:
    """Embeddings (1, T, D) of a row of single placeholders."""
    images, parts = iter(images), []
    for token in row:
        parts.append(next(images) if token == X else model.transformer.wte.weight[[token]])
    assert next(images, None) is None
    return torch.cat(parts)[None]


def loss_by_hand(logits: list[torch.Tensor], labels: list[list[int]]) -> torch.Tensor:
    """Mean over all targets of all rows of -log p(label at t + 1 | logits at t)."""
    losses = [
        -row_logits[t].log_softmax(-1)[row_labels[t + 1]]
        for row_logits, row_labels in zip(logits, labels, strict=True)
        for t in range(len(row_labels) - 1)
        if row_labels[t + 1] != -100
    ]
    return torch.stack(losses).mean()


ROWS = {
    "one image": [[11, 12, X, 13, 14]],
    "image first": [[X, 12, 13]],
    "image last": [[12, 13, X]],
    "several images": [[11, X, 12, X, 13, 14, X]],
    "neighbours": [[11, X, X, 12]],
    "as many each row": [[11, X, 12, 13], [X, 14, 15, 16]],
    "different counts": [[11, X, 12, X, 13], [14, 15, X, 16, 17], [18, 19, 20, 21, 22]],
    "no image": [[11, 12, 13], [14, 15, 16]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_single_placeholders_grow_into_their_features(tiny_model, rows):
    counts = [row.count(X) for row in rows]
    images = features(sum(counts))
    logits = tiny_model(torch.tensor(rows), images).logits
    # Rows of L tokens with n images grow to L + n (P - 1); shorter rows are padded on the right.
    assert logits.shape[1] == max(len(row) + n * (P - 1) for row, n in zip(rows, counts, strict=True))
    for i, (row, own) in enumerate(zip(rows, images.split(counts), strict=True)):
        expected = tiny_model(inputs_embeds=by_hand(tiny_model, row, own)).logits[0]
        torch.testing.assert_close(logits[i, : len(grown(row))], expected, **TOLERANCE)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("loss_only", [False, True])
@torch.no_grad()
def test_both_forms_give_the_same_logits_and_loss(tiny_model, rows, loss_only):
    images = features(sum(row.count(X) for row in rows))
    width = max(len(grown(row)) for row in rows)
    runs = torch.tensor([grown(row) + [0] * (width - len(grown(row))) for row in rows])
    mask = torch.tensor([[1] * len(grown(row)) + [0] * (width - len(grown(row))) for row in rows])
    labels = runs.masked_fill((runs == X) | (mask == 0), -100)
    arguments = {"labels": labels, "loss_only": loss_only}
    as_runs = tiny_model(runs, images, attention_mask=mask, **arguments)
    as_singles = tiny_model(torch.tensor(rows), images, **arguments)
    torch.testing.assert_close(as_runs.loss, as_singles.loss, **TOLERANCE)
    if not loss_only:
        kept = mask.bool()
        torch.testing.assert_close(as_runs.logits[kept], as_singles.logits[kept], **TOLERANCE)


@torch.no_grad()
def test_forms_may_be_mixed_in_a_batch(tiny_model):
    # Three rows of 9 tokens: three single placeholders, one run, and both forms in one row.
    rows = [[11, X, 12, X, 13, X, 14, 15, 16], [11, *RUN, 12, 13], [*RUN, 17, X, 18]]
    singles = [rows[0], [11, X, 12, 13], [X, 17, X, 18]]
    images = features(3 + 1 + 2)
    logits = tiny_model(torch.tensor(rows), images).logits
    for i, (row, own) in enumerate(zip(singles, images.split([3, 1, 2]), strict=True)):
        expected = tiny_model(inputs_embeds=by_hand(tiny_model, row, own)).logits[0]
        torch.testing.assert_close(logits[i, : len(grown(row))], expected, **TOLERANCE)


@torch.no_grad()
def test_images_fill_their_places_in_reading_order(tiny_model):
    input_ids, images = torch.tensor([[11, X, 12, X, 13], [14, X, 15, 16, 17]]), features(3)
    logits = tiny_model(input_ids, images).logits
    swapped = tiny_model(input_ids, images[[1, 0, 2]]).logits
    assert not torch.allclose(logits[0], swapped[0], atol=1e-2)
    torch.testing.assert_close(logits[1], swapped[1], **TOLERANCE)


@torch.no_grad()
def test_given_mask_grows_with_its_row(tiny_model):
    # The second row is right-padded by two tokens of rubbish.
    input_ids = torch.tensor([[11, X, 12, 13, 14], [15, X, 16, 99, 98]])
    mask, images = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), features(2)
    grown_mask = torch.tensor([[1] * 10, [1] * 8 + [0] * 2])
    expected = tiny_model(inputs_embeds=by_hand(tiny_model, [15, X, 16], images[1:])).logits[0]
    for given in (mask, grown_mask):
        logits = tiny_model(input_ids, images, attention_mask=given).logits
        torch.testing.assert_close(logits[1, :8], expected, **TOLERANCE)


@pytest.mark.parametrize("loss_only", [False, True])
@torch.no_grad()
def test_labels_may_have_the_given_or_the_grown_length(tiny_model, loss_only):
    rows, counts = [[11, X, 12, X, 13], [14, 15, X, 16, 17]], [2, 1]
    images = features(3)
    logits = [
        tiny_model(inputs_embeds=by_hand(tiny_model, row, own)).logits[0]
        for row, own in zip(rows, images.split(counts), strict=True)
    ]
    grown_labels = [[-100 if token == X else token for token in grown(row)] for row in rows]
    grown_labels[0][0] = -100  # no target anyway
    expected = loss_by_hand(logits, grown_labels)
    # A given label at a placeholder (here the input itself) has no one position after growth, so it is not supervised.
    given = torch.tensor(rows)
    padded = torch.tensor([grown_labels[0], grown_labels[1] + [-100] * (P - 1)])
    for labels in (given, padded):
        loss = tiny_model(torch.tensor(rows), images, labels=labels, loss_only=loss_only).loss
        torch.testing.assert_close(loss, expected, **TOLERANCE)


MISMATCHES = {
    "too many images": ([[11, X, 12]], 2, "2 images for 1 places"),
    "too few images": ([[11, X, 12, X, X]], 2, "2 images for 3 places"),
    "images without places": ([[11, 12, 13]], 1, "1 images for 0 places"),
    "places without images": ([[11, X, 12]], None, "0 images for 1 places"),
    "run without images": ([[11, *RUN, 12]], None, "0 images for 1 places"),
    "broken run": ([[11, *RUN[1:], 12]], 1, "1 images for 5 places"),
    "run cut in two": ([[11, X, X, 12, X, X, X, X]], 1, "1 images for 6 places"),
    "run cut between rows": ([[11, X, X, X], [X, X, X, 12]], 1, "1 images for 6 places"),
    "runs of 5 and 7": ([[11, *RUN[1:], 12, *RUN, X]], 2, "2 images for 12 places"),
}


@pytest.mark.parametrize(("rows", "count", "message"), MISMATCHES.values(), ids=MISMATCHES)
@pytest.mark.parametrize("training", [False, True])
def test_mismatch_names_both_counts(tiny_model, rows, count, message, training):
    images = None if count is None else features(count)
    with pytest.raises(ValueError, match=message):
        tiny_model.train(training)(torch.tensor(rows), images)
    with pytest.raises(ValueError, match=message):
        tiny_model.eval().generate(torch.tensor(rows), images=images, max_new_tokens=2)


def test_images_of_another_size_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"5 features.*6"):
        tiny_model(torch.tensor([[11, X, 12]]), features(1)[:, :5])


def test_features_receive_the_gradient_of_their_places(tiny_model):
    images = features(3).requires_grad_()
    input_ids = torch.tensor([[11, X, 12, X, 13, 14], [15, 16, 17, 18, X, 19]])
    labels = torch.full_like(input_ids, -100)
    labels[0, 2] = 12  # predicted from the last feature of image 0; images 1 and 2 come later or elsewhere
    tiny_model.train()(input_ids, images, labels=labels).loss.backward()
    assert (images.grad.abs().sum((1, 2)) > 0).tolist() == [True, False, False]


# --- Generation ---

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


PROMPTS = [[11, X, 12, 13, X, 14], [15, 16, 17], [18, X, 19, 20]]
COUNTS = [2, 0, 1]


def alone(model, row: list[int], images: torch.Tensor, **settings):
    """What a prompt gives by itself, from a plain Qwen that knows nothing of images: the new tokens and all else."""
    qwen = QWenLMHeadModel(model.config).eval()
    qwen.load_state_dict(model.state_dict())
    embeddings = by_hand(model, row, images).detach()
    return qwen.generate(inputs_embeds=embeddings, return_dict_in_generate=True, output_logits=True, **settings)


@pytest.mark.parametrize("form", ["single", "run"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batch_of_different_prompts_equals_each_alone(tiny_model, form, use_cache):
    prompts = PROMPTS if form == "single" else [grown(row) for row in PROMPTS]
    input_ids, mask = left_padded(prompts)
    images = features(3)
    output = tiny_model.generate(
        input_ids,
        images=images,
        attention_mask=mask,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    length = input_ids.shape[1]
    assert torch.equal(output.sequences[:, :length], input_ids)  # the prompt comes back as it was given
    assert output.sequences.shape[1] == length + 8
    for row in range(3):
        # The reference recomputes everything at each step.
        expected = alone(tiny_model, PROMPTS[row], images.split(COUNTS)[row], **GREEDY, use_cache=False)
        assert torch.equal(output.sequences[row, length:], expected.sequences[0])
        logits, expected_logits = (torch.stack(x.logits, dim=1) for x in (output, expected))
        torch.testing.assert_close(logits[row], expected_logits[0], **TOLERANCE)


@torch.no_grad()
def test_greedy_token_by_token_with_plain_forward(tiny_model):
    # A reference without `generate`: the argmax of a full forward, appended by hand.
    images, row = features(2), [11, X, 12, 13, X, 14]
    tokens = torch.tensor([row])
    for _ in range(8):
        next_token = tiny_model(tokens, images).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, next_token), dim=1)
    assert torch.equal(tiny_model.generate(torch.tensor([row]), images=images, **GREEDY), tokens)


def test_rows_that_grow_differently_need_no_mask(tiny_model):
    # 5 tokens each, 15 and 10 after growth: the 5 that fill up the second row are not attended to.
    input_ids, images = torch.tensor([[11, X, 12, X, 13], [14, 15, X, 16, 17]]), features(3)
    batch = tiny_model.generate(input_ids, images=images, **GREEDY)
    for row, own in enumerate(images.split([2, 1])):
        expected = alone(tiny_model, input_ids[row].tolist(), own, **GREEDY)
        assert torch.equal(batch[row, 5:], expected.sequences[0])


def test_prompts_beyond_seq_length_keep_their_own_stretch_in_a_batch(tiny_model):
    # 71 > seq_length 64: that row's rotary base is stretched and its queries scaled; the row of 40 must not notice.
    prompts = [[*range(11, 76), *RUN], [*RUN, *range(20, 54)]]
    assert [len(row) for row in prompts] == [71, 40]
    input_ids, mask = left_padded(prompts)
    images = features(2)
    settings = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    batch = tiny_model.generate(input_ids, images=images, attention_mask=mask, **settings)
    for row, own in enumerate(images.split([1, 1])):
        # 71 + 8 <= 128 and 40 + 8 <= 64: the stretch does not change on the way, so no cache gives the same.
        single = tiny_model.generate(torch.tensor([prompts[row]]), images=own, use_cache=False, **settings)
        logits, expected_logits = (torch.stack(x.logits, dim=1) for x in (batch, single))
        torch.testing.assert_close(logits[row], expected_logits[0], **TOLERANCE)
    # A plain forward, where the model itself counts positions from the mask, agrees with the first step.
    with torch.no_grad():
        logits = tiny_model(input_ids, images, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(logits, batch.logits[0], **TOLERANCE)


@torch.no_grad()
def test_the_stretch_of_the_prompt_is_kept_with_its_cache(tiny_model):
    # A prompt of 60, then 10 tokens: the cached keys are rotated by the prompt's base (unstretched, 60 <= 64), so the
    # later queries must be too. The reference has no cache and no stretching.
    input_ids = torch.arange(70)[None]
    cache, logits = None, []
    for chunk in input_ids.split([60] + [1] * 10, dim=1):
        output = tiny_model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    tiny_model.config.use_dynamic_ntk = False
    torch.testing.assert_close(torch.cat(logits, dim=1), tiny_model(input_ids).logits, **TOLERANCE)


def test_images_change_what_is_generated(tiny_model):
    input_ids = torch.tensor([PROMPTS[0]])
    first, second = (tiny_model.generate(input_ids, images=features(2, seed), **GREEDY) for seed in (3, 4))
    assert not torch.equal(first, second)


def test_beams_keep_the_images_of_their_row(tiny_model):
    # Rows with 2, 0 and 1 images: a repeat of the images one by one would mix those of row 0, or shift row 2's.
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    input_ids, mask = left_padded(PROMPTS)
    images = features(3)
    batch = tiny_model.generate(input_ids, images=images, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert batch.sequences.shape == (3 * 2, 6 + 8)
    assert torch.equal(batch.sequences[:, :6], input_ids.repeat_interleave(2, dim=0))
    for row in range(3):
        expected = alone(tiny_model, PROMPTS[row], images.split(COUNTS)[row], **settings)
        both = slice(2 * row, 2 * row + 2)
        assert torch.equal(batch.sequences[both, 6:], expected.sequences)
        torch.testing.assert_close(batch.sequences_scores[both], expected.sequences_scores, **TOLERANCE)


def test_sampling_runs_and_its_returned_sequences_keep_their_images(tiny_model):
    input_ids, mask = left_padded(PROMPTS)
    arguments = {"images": features(3), "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
    sampling = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    sampled = tiny_model.generate(input_ids, **arguments, **sampling, top_k=50)
    assert sampled.shape == (6, 6 + 8)
    assert not torch.equal(sampled[0], sampled[1])
    # Sampling among the one best token is greedy: both sequences of a row are the greedy one.
    top_1 = tiny_model.generate(input_ids, **arguments, **sampling, top_k=1)
    greedy = tiny_model.generate(input_ids, **arguments, do_sample=False)
    assert torch.equal(top_1, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_model_never_answers_with_a_placeholder(tiny_model, use_cache):
    # <|extra_0|> has an output row like any token. No image belongs to one that the model writes: without a cache the
    # next step would count it as a place.
    def prefers_placeholders(input_ids, scores):
        return scores.index_add(1, torch.tensor([X]), torch.full((len(scores), 1), 100.0))

    arguments = {"logits_processor": [prefers_placeholders], "use_cache": use_cache}
    output = tiny_model.generate(torch.tensor([[11, X, 12]]), images=features(1), **arguments, **GREEDY)
    assert output.shape == (1, 3 + 8)
    assert X not in output[0, 3:]


# --- Ways to run it ---


def step(model, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and all gradients of one training batch, with images."""
    images = features(3).requires_grad_()
    model.zero_grad()
    input_ids = torch.tensor([[11, X, 12, X, 13], [14, 15, X, 16, 17]])
    loss = model.train()(input_ids, images, labels=input_ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()} | {"images": images.grad}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is not in 5.17
@pytest.mark.parametrize("loss_only", [False, True])
def test_gradient_checkpointing_changes_nothing_but_the_work(tiny_model, loss_only):
    runs = []
    for block in tiny_model.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: runs.append(1))
    loss, gradients = step(tiny_model, loss_only=loss_only)
    assert len(runs) == 2  # layers
    tiny_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = step(tiny_model, loss_only=loss_only)
    assert len(runs) == 2 + 2 * 2  # each layer once more in backward
    assert torch.equal(again, loss)
    assert recomputed.keys() == gradients.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], recomputed[name])] == []


def test_loss_only_runs_the_end_of_the_last_layer_where_something_is_learnt(tiny_model):
    widths = {}
    for number, block in enumerate(tiny_model.transformer.h):
        for name, module in (("keys", block.attn.c_attn), ("output", block.attn.c_proj), ("gate", block.mlp.w1)):
            module.register_forward_hook(lambda _, __, out, at=(number, name): widths.update({at: out.shape[:-1]}))
    ids = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]])
    labels = torch.tensor([[-100, 12, -100, 14], [-100, -100, -100, 18]])
    tiny_model(ids, labels=labels, loss_only=True)
    everywhere, supervised = (2, 4), (1, 3)
    assert widths == {(0, "keys"): everywhere, (0, "output"): everywhere, (0, "gate"): everywhere,
                      (1, "keys"): everywhere, (1, "output"): supervised, (1, "gate"): supervised}  # fmt: skip


def test_loss_only_without_a_label_still_has_a_gradient_of_everything(tiny_model):
    # Every rank runs backward, and under ZeRO-2 every parameter has to arrive there.
    ids = torch.tensor([[11, X, 12, 13]])
    output = tiny_model.train()(ids, features(1), labels=torch.full_like(ids, -100), loss_only=True)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in tiny_model.parameters())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_loss_only_gives_the_same_gradients(tiny_model, padding):
    masks = {"none": [[1] * 5] * 2, "left": [[1] * 5, [0, 1, 1, 1, 1]], "right": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]}
    mask = torch.tensor(masks[padding])
    loss, gradients = step(tiny_model, attention_mask=mask)
    cheap, same = step(tiny_model, attention_mask=mask, loss_only=True)
    torch.testing.assert_close(cheap, loss, **TOLERANCE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_only", [False, True])
@torch.no_grad()
def test_labels_of_neither_length_are_refused(tiny_model, loss_only):
    # 5 tokens grow to 10. Labels of 7 fit neither; flattened over rows they would be read at wrong positions.
    input_ids = torch.tensor([[11, X, 12, 13, 14]] * 2)
    with pytest.raises(ValueError, match=r"7.*10"):
        tiny_model(input_ids, features(2), labels=torch.ones(2, 7, dtype=torch.long), loss_only=loss_only)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(tiny_model):
    input_ids, images = torch.tensor([[11, X, 12]]), features(1)
    output = tiny_model(input_ids, images, labels=input_ids, use_cache=False)
    loss, logits = tiny_model(input_ids, images, labels=input_ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert isinstance(tiny_model.transformer(torch.tensor([[11, 12]]), return_dict=False), tuple)


@torch.no_grad()
def test_eager_attention_equals_sdpa(tiny_model):
    input_ids, mask = left_padded([grown(row) for row in PROMPTS])
    images, attended = features(3), mask.bool()
    long = torch.arange(80)[None]  # beyond seq_length 64
    assert tiny_model.config._attn_implementation == "sdpa"
    expected = [tiny_model(input_ids, images, attention_mask=mask).logits[attended], tiny_model(long).logits]
    tiny_model.set_attn_implementation("eager")
    eager = [tiny_model(input_ids, images, attention_mask=mask).logits[attended], tiny_model(long).logits]
    torch.testing.assert_close(eager, expected, **TOLERANCE)


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers(tiny_model):
    output = tiny_model(torch.tensor([[11, X, 12]]), features(1), output_hidden_states=True)
    assert len(output.hidden_states) == 2 + 1  # the embeddings, then one for each layer
    assert {state.shape for state in output.hidden_states} == {(1, 8, 64)}
    torch.testing.assert_close(output.hidden_states[0], by_hand(tiny_model, [11, X, 12], features(1)))
    torch.testing.assert_close(tiny_model.lm_head(output.hidden_states[-1]), output.logits)
    assert tiny_model(torch.tensor([[11, 12]])).hidden_states is None


@torch.no_grad()
def test_attention_weights_need_eager(tiny_model):
    input_ids, images = torch.tensor([[11, X, 12]]), features(1)
    with pytest.raises(ValueError, match="eager"):
        tiny_model(input_ids, images, output_attentions=True)
    tiny_model.set_attn_implementation("eager")
    attentions = tiny_model(input_ids, images, output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:  # (B, H, T, T)
        assert weights.shape == (1, 4, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 8))
        assert weights.triu(1).count_nonzero() == 0  # nobody sees what comes later


def test_what_the_decoder_cannot_honour_is_refused(tiny_model):
    for name in ("head_mask", "encoder_hidden_states", "encoder_attention_mask"):
        with pytest.raises(ValueError, match=name.split("_")[0]):
            tiny_model(torch.tensor([[11, 12]]), **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="exactly one"):
        tiny_model()


@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_do_not_see_each_other(tiny_model, training):
    # Positions that start again mark a new document: 8 tokens with an image, then 5 of text.
    tiny_model.train(training)
    images, first, second = features(1), [11, *RUN, 12], [13, 14, 15, 16, 17]
    positions = torch.tensor([[*range(8), *range(5)]])
    logits = tiny_model(torch.tensor([first + second]), images, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, :8], tiny_model(torch.tensor([first]), images).logits, **TOLERANCE)
    torch.testing.assert_close(logits[:, 8:], tiny_model(torch.tensor([second])).logits, **TOLERANCE)


@pytest.mark.parametrize("place", ["emb_dropout_prob", "attn_dropout_prob"])
@torch.no_grad()
def test_dropout_acts_in_training_only(tiny_config, place):
    setattr(tiny_config, place, 0.5)
    model, input_ids = MQWenLMHeadModel(tiny_config).eval(), torch.tensor([[11, 12, 13, 14]])
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
