"""Qwen2 as a second, independent reference.

Below seq_length, and always in training, Qwen v1 computes what Qwen2 does with as many key-value heads as heads: only
the packing of the weights differs. So a tiny Qwen2ForCausalLM of Transformers, its weights renamed, must agree.
"""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trainer.models.modeling_qwen import QWenLMHeadModel

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
PLAIN_NAMES = {
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
    "input_layernorm.weight": "ln_1.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
}


def as_qwen(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Qwen2's weights, or their gradients, under Qwen's names: query, key and value become one fused tensor."""
    renamed = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(layers):
        theirs, ours = f"model.layers.{i}.", f"transformer.h.{i}."
        renamed |= {ours + name: tensors[theirs + theirs_name] for theirs_name, name in PLAIN_NAMES.items()}
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{ours}attn.c_attn.{kind}"] = torch.cat(parts)
    return renamed


@pytest.fixture
def qwen2(tiny_config) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=tiny_config.vocab_size,
        hidden_size=tiny_config.hidden_size,
        num_hidden_layers=tiny_config.num_hidden_layers,
        num_attention_heads=tiny_config.num_attention_heads,
        num_key_value_heads=tiny_config.num_attention_heads,
        intermediate_size=tiny_config.intermediate_size // 2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # at 0 and 1, biases and norms could be lost unnoticed
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def qwen(qwen2, tiny_config) -> QWenLMHeadModel:
    model = QWenLMHeadModel(tiny_config).eval()
    model.load_state_dict(as_qwen(qwen2.state_dict(), tiny_config.num_hidden_layers), strict=True)
    return model


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [1, 17, 64])
@torch.no_grad()
def test_logits_agree_up_to_seq_length(qwen, qwen2, length):
    input_ids = random_ids(2, length)
    torch.testing.assert_close(qwen(input_ids).logits, qwen2(input_ids).logits, **TOLERANCE)


@torch.no_grad()
def test_beyond_seq_length_only_evaluation_stretches(qwen, qwen2):
    # 80 tokens > seq_length 64. Training does not stretch (Qwen v1), so Qwen2 stays the reference there.
    input_ids = random_ids(2, 80)
    expected = qwen2(input_ids).logits
    torch.testing.assert_close(qwen.train()(input_ids).logits, expected, **TOLERANCE)
    assert (qwen.eval()(input_ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("length", [32, 80])
@pytest.mark.parametrize("loss_only", [False, True])
def test_loss_and_every_gradient_agree_in_training(qwen, qwen2, length, loss_only):
    input_ids = random_ids(2, length)
    labels = input_ids.clone()
    labels[0, :20] = -100  # a prompt
    expected = qwen2.train()(input_ids, labels=labels).loss
    expected.backward()
    loss = qwen.train()(input_ids, labels=labels, loss_only=loss_only).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    gradients = as_qwen({name: p.grad for name, p in qwen2.named_parameters()}, qwen.config.num_hidden_layers)
    assert gradients.keys() == dict(qwen.named_parameters()).keys()
    for name, parameter in qwen.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_sum_over_the_steps_tokens_agrees(qwen, qwen2):
    # Two micro-batches with 9 and 29 targets: sums over 38 add up to the mean over the whole, mean of means does not.
    input_ids = random_ids(2, 30)
    labels = input_ids.clone()
    labels[0, :21] = -100
    whole = qwen2(input_ids, labels=labels).loss
    for loss_only in (False, True):
        rows = [
            qwen(input_ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=38, loss_only=loss_only).loss
            for i in range(2)
        ]
        torch.testing.assert_close(sum(rows), whole, **TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_on_either_side_agrees(qwen, qwen2, side):
    input_ids, lengths = random_ids(3, 20), torch.tensor([[20], [13], [4]])
    mask = (torch.arange(20) < lengths).long()
    if side == "left":
        mask = mask.flip(1)
    kept = mask.bool()
    logits = qwen(input_ids, attention_mask=mask).logits[kept]
    # Rotation is relative, so it does not matter to Qwen2 that its positions start at the padding.
    torch.testing.assert_close(logits, qwen2(input_ids, attention_mask=mask).logits[kept], **TOLERANCE)
    # ... and what stands in the padding has no say.
    other = torch.where(kept, input_ids, (input_ids + 1) % 320)
    torch.testing.assert_close(qwen(other, attention_mask=mask).logits[kept], logits, **TOLERANCE)


@torch.no_grad()
def test_cached_decoding_agrees_step_by_step(qwen, qwen2):
    # A prompt of 7, a chunk of 4, then one token at a time, against Qwen2 without any cache.
    input_ids = random_ids(2, 16)
    cache, logits = None, []
    for chunk in input_ids.split([7, 4, 1, 1, 1, 1, 1], dim=1):
        output = qwen(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(torch.cat(logits, dim=1), qwen2(input_ids).logits, **TOLERANCE)


@torch.no_grad()
def test_generation_from_a_left_padded_batch_agrees(qwen, qwen2):
    input_ids = random_ids(2, 12)
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(qwen.generate(input_ids, **settings), qwen2.generate(input_ids, **settings))


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(qwen, qwen2):
    input_ids = random_ids(2, 9)
    expected = qwen2(input_ids).logits
    torch.testing.assert_close(qwen(input_ids, logits_to_keep=1).logits, expected[:, -1:], **TOLERANCE)
    positions = torch.tensor([2, 7])
    torch.testing.assert_close(qwen(input_ids, logits_to_keep=positions).logits, expected[:, positions], **TOLERANCE)
