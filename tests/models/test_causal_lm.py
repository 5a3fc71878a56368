"""Newer language models behind the composite class: their own logits, with images, packs and the loss in chunks."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from trainer.engine import checkpoint_activations
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.modeling_causal_lm import language_model_class
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.setup import packed_inputs

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "initializer_range": 0.2}  # fmt: skip
LANGUAGE_MODELS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=False),  # heads wider together than the model
}
PICTURE, PATCHES = 99, 4
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request) -> MQWenForConditionalGeneration:
    """Seeded, in eval; its biases and norms are random too: at 0 and 1 a lost one would not show."""
    torch.manual_seed(0)
    config = MQWenVLConfig(LANGUAGE_MODELS[request.param].to_dict(), CLIPVisionConfig(**TOWER), image_token_id=PICTURE)
    model = MQWenForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture
def original(model):
    """Transformers' own class with the same weights: the reference."""
    reference = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="eager")
    reference.load_state_dict(model.language_model.state_dict())
    return reference.eval()


def rows(*lengths: int) -> list[torch.Tensor]:
    """Rows of text, each with one picture behind its second token."""
    torch.manual_seed(1)
    picture = torch.full((PATCHES,), PICTURE)
    texts = [torch.randint(0, 90, (n - PATCHES,)) for n in lengths]
    return [torch.cat((text[:2], picture, text[2:])) for text in texts]


def embeds_by_hand(model, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(T,) and one picture's (P, D) -> (1, T, D)."""
    embeds = model.get_input_embeddings().weight[ids].clone()
    embeds[2 : 2 + PATCHES] = features
    return embeds[None]


@torch.no_grad()
def test_logits_are_those_of_the_original_class_on_embeddings_made_by_hand(model, original):
    (ids,), pixels = rows(12), torch.randn(1, 3, 16, 16)
    features = model.get_image_features(pixels)[0]
    assert features.shape == (PATCHES, 32)
    expected = original(inputs_embeds=embeds_by_hand(model, ids, features)).logits
    found = model(ids[None], pixels).logits
    assert (found - expected).abs().max() < 1e-5
    assert not torch.equal(found, model(ids[None], torch.randn(1, 3, 16, 16)).logits)
    # One placeholder grows to the same row; the last logits alone are the last.
    one = torch.cat((ids[:3], ids[2 + PATCHES :]))
    assert torch.equal(model(one[None], pixels).logits, found)
    assert (model(ids[None], pixels, logits_to_keep=1).logits - found[:, -1:]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 images for 0 places"):
        model(ids[None, :2], pixels)
    with pytest.raises(ValueError, match="0 images for 1 places"):
        model(ids[None])


def test_loss_and_gradients_are_those_of_the_original_class(model, original):
    (ids,), pixels = rows(12), torch.randn(1, 3, 16, 16)
    labels = torch.where(torch.arange(12) < 7, -100, ids)[None]
    embeds = embeds_by_hand(model, ids, model.get_image_features(pixels)[0].detach())
    # The reference looks its own embedding up, so that a tied one gets its gradient from both ends.
    own = original.get_input_embeddings()(ids)[None]
    picture = (ids == PICTURE)[None, :, None]
    original(inputs_embeds=torch.where(picture, embeds, own), labels=labels).loss.backward()
    for extra, factor in (({}, 1.0), ({"loss_only": True}, 1.0), ({"loss_only": True, "num_items_in_batch": 10}, 0.5)):
        model.zero_grad()
        loss = model(ids[None], pixels, labels=labels, **extra).loss
        loss.backward()
        for (name, ours), theirs in zip(model.language_model.named_parameters(), original.parameters(), strict=True):
            assert torch.allclose(ours.grad, factor * theirs.grad, atol=1e-5), (extra, name)
        assert model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_recomputed_activations_give_the_same_gradients(model):
    (ids,), pixels = rows(12), torch.randn(1, 3, 16, 16)
    gradients = []
    for every in (0, 1):
        checkpoint_activations(model, every)
        assert all(layer.gradient_checkpointing == bool(every) for layer in model.language_model.model.layers)
        model.train().zero_grad()
        model(ids[None], pixels, labels=ids[None], loss_only=True).loss.backward()
        gradients.append([p.grad.clone() for p in model.language_model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_packed_documents_are_as_alone(model):
    documents, pixels = rows(9, 5, 14), torch.randn(3, 3, 16, 16)
    packed = packed_inputs(torch.tensor([len(d) for d in documents]).cumsum(0).tolist(), torch.device("cpu"))
    row = torch.cat(documents)[None]
    with torch.no_grad():
        logits = model(row, pixels, **packed).logits
        alone = [model(d[None], p[None]).logits[0] for d, p in zip(documents, pixels, strict=True)]
        assert (logits[0] - torch.cat(alone)).abs().max() < 1e-5
        changed = row.clone()
        changed[0, 0] += 1
        assert torch.equal(model(changed, pixels, **packed).logits[0, 9:], logits[0, 9:])
        assert not torch.equal(model(changed, pixels, **packed).logits[0, :9], logits[0, :9])

    def loss_of(ids, pictures, **inputs):
        labels = torch.where(ids == PICTURE, -100, ids)
        labels[:, inputs.get("cu_seq_lens_q", torch.tensor([0]))[:-1].long()] = -100
        return model(ids, pictures, labels=labels, loss_only=True, num_items_in_batch=1, **inputs).loss

    # A document's first token is nobody's target, alone or packed.
    together = loss_of(row, pixels, **packed)
    apart = sum(loss_of(d[None], p[None]) for d, p in zip(documents, pixels, strict=True))
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    weight = model.multi_modal_projector.linear_2.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (together, apart)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_attention_that_would_mix_packed_documents_is_refused(model):
    documents = rows(9, 5)
    packed = packed_inputs([9, 14], torch.device("cpu"))
    inputs = {"input_ids": torch.cat(documents)[None], "pixel_values": torch.randn(2, 3, 16, 16), **packed}
    model.language_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="default attention"):
        model(**inputs)


@torch.no_grad()
def test_answers_in_a_batch_are_those_of_each_prompt_alone_with_and_without_a_cache(model):
    prompts, pixels = [*rows(9, 5), torch.tensor([5, 6, 7])], torch.randn(2, 3, 16, 16)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    padded = torch.nn.utils.rnn.pad_sequence(prompts, True, 0, "left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left")
    batch = model.generate(padded, pixel_values=pixels, attention_mask=mask, **settings)[:, padded.shape[1] :]
    for i, prompt in enumerate(prompts):
        picture = pixels[i : i + 1]
        for use_cache in (True, False):
            alone = model.generate(prompt[None], pixel_values=picture, use_cache=use_cache, **settings)
            assert torch.equal(alone[0, len(prompt) :], batch[i])
        # By hand: the most likely word behind the whole row, again and again.
        row = prompt[None]
        for word in batch[i]:
            scores = model(row, picture if len(picture) else None).logits[0, -1]
            scores[PICTURE] = -torch.inf  # which is never written
            assert scores.argmax() == word
            row = torch.cat((row, word[None, None]), dim=1)


@torch.no_grad()
def test_saved_names_are_plain_and_a_tied_head_is_the_embedding_again(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    names = {n.removeprefix("language_model.") for n in load_file(tmp_path / "whole" / "model.safetensors")}
    tied = model.config.text_config.tie_word_embeddings
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"} <= names
    assert ("lm_head.weight" in names) is not tied
    read = MQWenForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    assert (read.language_model.lm_head.weight is read.get_input_embeddings().weight) is tied
    (ids,), pixels = rows(12), torch.randn(1, 3, 16, 16)
    assert torch.equal(read(ids[None], pixels).logits, model(ids[None], pixels).logits)
    # The language model alone is a folder of Transformers'.
    model.language_model.save_pretrained(tmp_path / "alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone").eval()
    assert type(alone).__name__ == type(model.language_model).__name__ == alone.config.architectures[0]
    text = torch.tensor([[1, 2, 3]])
    assert torch.allclose(alone(text).logits, model(text).logits, atol=1e-5)


@torch.no_grad()
def test_another_architecture_serves_too_and_one_that_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="'siglip_vision_model' is no causal language model"):
        language_model_class(SiglipVisionConfig())
    # GPT-2 has absolute positions: padding on the left would move them.
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)
    gpt2 = language_model_class(config)(config).eval()
    assert gpt2.lm_head.weight is gpt2.get_input_embeddings().weight
    alone = gpt2(torch.tensor([[5, 6, 7]])).logits
    padded = gpt2(torch.tensor([[0, 0, 5, 6, 7]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]])).logits
    assert torch.allclose(padded[:, 2:], alone, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2])
def test_every_patch_of_siglip_is_a_feature(layer):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**TOWER)
    config = MQWenVLConfig(LANGUAGE_MODELS["qwen2"], vision, vision_feature_layer=layer, image_token_id=PICTURE)
    model = MQWenForConditionalGeneration(config).eval()
    assert config.image_context_length == PATCHES
    assert not any("head" in name for name, _ in model.vision_tower.named_parameters())
    pixels = torch.randn(2, 3, 16, 16)
    outputs = model.vision_tower(pixels, output_hidden_states=True)
    features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    assert torch.equal(model.get_image_features(pixels), model.multi_modal_projector(features))


def test_rotary_frequencies_stay_in_fp32_when_an_engine_casts_the_model(model, tmp_path):
    # DeepSpeed calls `module.bfloat16()`; Transformers, loading in bf16, leaves them as they are.
    exact = {name: buffer.clone() for name, buffer in model.language_model.named_buffers() if "inv_freq" in name}
    assert exact
    model.bfloat16()
    assert next(model.language_model.parameters()).dtype == torch.bfloat16
    cast = dict(model.language_model.named_buffers())
    for name, frequencies in exact.items():
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], frequencies)
    model.save_pretrained(tmp_path)
    again = MQWenForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 90, (1, 200))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
