"""The golden cases: what the original Qwen code, with image features, computed from the checkpoint in shared/golden.

The folder's cases.json says what each case is. All in fp32; the original ran on another PyTorch, so equal means 1e-4.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from reference import shared
from safetensors.torch import load_file, save_file

from trainer.models.modeling_mqwen import MQWenLMHeadModel

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
GRADIENTS = [
    "images",
    "lm_head.weight",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.2.mlp.c_proj.weight",
    "transformer.ln_f.weight",
    "transformer.wte.weight",
]


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(shared("golden/cases.safetensors"))


@pytest.fixture(scope="module")
def other_config() -> dict:
    return json.loads(shared("golden/cases.json").read_text())["other_config"]


def load(folder=None, **kwargs) -> MQWenLMHeadModel:
    """Opens a folder (by default the golden one) and insists that every weight was found and none was left over."""
    kwargs.setdefault("dtype", torch.float32)
    folder = folder or shared("golden")
    model, info = MQWenLMHeadModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def model(other_config) -> MQWenLMHeadModel:
    return load(otherConfig=other_config)


def run_image_case(model, cases, **kwargs):
    return model(cases["image.input_ids"], cases["image.images"], **kwargs)


def test_every_case_of_the_file_is_tested(cases):
    assert {name.split(".")[0] for name in cases} == {"text", "image", "mask", "greedy", "long", "grad"}
    assert {name.removeprefix("grad.") for name in cases if name.startswith("grad.")} == {*GRADIENTS, "loss"}


@pytest.mark.parametrize("case", ["text", "long"])  # long: 48 tokens for a seq_length of 32
@torch.no_grad()
def test_logits_of_text(model, cases, case):
    assert (cases["long.input_ids"].shape[1], model.config.seq_length) == (48, 32)
    logits = model(cases[f"{case}.input_ids"]).logits
    torch.testing.assert_close(logits, cases[f"{case}.logits"], **TOLERANCE)


@torch.no_grad()
def test_long_case_needs_the_stretched_base_and_the_log_n_scale(cases, other_config):
    # Otherwise the case above would pass without either.
    for absent in ("use_dynamic_ntk", "use_logn_attn"):
        model = load(otherConfig=other_config)
        setattr(model.config, absent, False)
        logits = model(cases["long.input_ids"]).logits
        assert (logits - cases["long.logits"]).abs().max() > 1e-2, absent


@torch.no_grad()
def test_logits_and_loss_of_images(model, cases):
    # 10 tokens with one placeholder grow to 10 - 1 + 6 = 15.
    output = run_image_case(model, cases, labels=cases["image.labels"])
    assert output.logits.shape == (2, 15, 320)
    torch.testing.assert_close(output.logits, cases["image.logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, cases["image.loss"][0], **TOLERANCE)


@torch.no_grad()
def test_loss_only_gives_the_loss_without_logits(model, cases):
    output = run_image_case(model, cases, labels=cases["image.labels"], loss_only=True)
    assert output.logits is None
    torch.testing.assert_close(output.loss, cases["image.loss"][0], **TOLERANCE)


@torch.no_grad()
def test_padding_is_not_attended_to(model, cases):
    mask = cases["mask.attention_mask"]
    logits = run_image_case(model, cases, attention_mask=mask).logits
    kept = mask.bool()
    assert not kept.all()
    torch.testing.assert_close(logits[kept], cases["mask.logits"][kept], **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(model, cases, use_cache):
    prompt, expected = cases["image.input_ids"][:1], cases["greedy.new_tokens"]
    output = model.generate(
        prompt, images=cases["image.images"][:1], max_new_tokens=12, do_sample=False, use_cache=use_cache
    )
    assert output.tolist() == torch.cat((prompt, expected), dim=1).tolist()


@pytest.mark.parametrize("loss_only", [False, True])
def test_loss_and_gradients_in_training(model, cases, loss_only):
    model.train()
    images = cases["image.images"].clone().requires_grad_()
    loss = model(cases["image.input_ids"], images, labels=cases["image.labels"], loss_only=loss_only).loss
    loss.backward()
    torch.testing.assert_close(loss, cases["grad.loss"][0], **TOLERANCE)
    gradients = {"images": images.grad} | {name: p.grad for name, p in model.named_parameters()}
    for name in GRADIENTS:
        # Small gradients (1e-3 and below) count too, so the tolerance follows the largest of each tensor.
        expected = cases[f"grad.{name}"]
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_names_and_shapes_are_those_of_the_official_file(model, tmp_path):
    official = {name: weight.shape for name, weight in load_file(shared("golden/model.safetensors")).items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == official
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: weight.shape for name, weight in saved.items()} == official


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
@torch.no_grad()
def test_either_keyword_of_the_original_example_loads_bf16(cases, other_config, keyword):
    kwargs = {keyword: torch.bfloat16, "otherConfig": other_config, "trust_remote_code": True}
    model, info = MQWenLMHeadModel.from_pretrained(shared("golden"), output_loading_info=True, **kwargs)
    assert not any(info.values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # bf16 keeps 8 bits: about 2**-8 of the logits' range, a few times over three layers.
    logits, expected = run_image_case(model.eval(), cases).logits.float(), cases["image.logits"]
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_other_config_may_be_an_object(cases, other_config):
    model = load(otherConfig=SimpleNamespace(**other_config))
    torch.testing.assert_close(run_image_case(model, cases).logits, cases["image.logits"], **TOLERANCE)


@pytest.mark.parametrize("absent", [{}, {"otherConfig": None}, {"otherConfig": {}}, {"otherConfig": SimpleNamespace()}])
@torch.no_grad()
def test_without_other_config_the_defaults_of_the_notes_hold(cases, absent):
    model = load(**absent)
    placeholder = model.transformer.image_placeholder
    assert placeholder.replace_token_id == 151646  # <|extra_0|>
    assert placeholder.image_context_length == 256  # (224 / 14) squared
    assert placeholder.image_feature_hidden_size == 64  # the language model's own
    torch.testing.assert_close(model(cases["text.input_ids"]).logits, cases["text.logits"], **TOLERANCE)


def test_features_of_another_width_are_refused_at_loading(other_config):
    with pytest.raises(ValueError, match=r"1024.*64"):
        load(otherConfig=other_config | {"image_feature_hidden_size": 1024})


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@torch.no_grad()
def test_config_flag_casts_the_transformer(cases, other_config, flag, dtype):
    model = load(otherConfig=other_config, **{flag: True})
    assert {p.dtype for p in model.transformer.parameters()} == {dtype}
    assert model.lm_head.weight.dtype == torch.float32
    output = run_image_case(model, cases, labels=cases["image.labels"])
    expected = cases["image.logits"]
    assert (output.logits - expected).abs().max() < 0.05 * expected.abs().max()  # as above
    loss_only = run_image_case(model, cases, labels=cases["image.labels"], loss_only=True).loss
    torch.testing.assert_close(output.loss, loss_only)


@pytest.fixture(params=["bin", "sharded bin", "sharded safetensors"])
def repacked(request, model, tmp_path):
    """The golden checkpoint in the other layouts in which official weights are published."""
    state = load_file(shared("golden/model.safetensors"))
    shutil.copy(shared("golden/config.json"), tmp_path)
    if request.param == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif request.param == "sharded bin":
        names = sorted(state)
        shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, members in shards.items():
            torch.save({name: state[name] for name in members}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


@torch.no_grad()
def test_every_layout_of_the_folder_gives_identical_logits(repacked, model, cases, other_config):
    again = load(repacked, otherConfig=other_config)
    assert torch.equal(run_image_case(again, cases).logits, run_image_case(model, cases).logits)


@torch.no_grad()
def test_published_tables_in_the_file_are_ignored(model, cases, other_config, tmp_path):
    # Early official files carry the rotary frequencies; a stale table must neither be used nor reported.
    state = load_file(shared("golden/model.safetensors")) | {"transformer.rotary_emb.inv_freq": torch.zeros(8)}
    shutil.copy(shared("golden/config.json"), tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load(tmp_path, otherConfig=other_config)
    assert torch.equal(run_image_case(again, cases).logits, run_image_case(model, cases).logits)
