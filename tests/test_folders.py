"""Folders of others come in: layouts of every size, both forms of a tower, and what is wrong with a folder by name."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from newer import TOWER, write_language_model, write_tokenizer, write_tower
from PIL import Image
from ranks import script
from transformers import CLIPVisionModel, Qwen2Config, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from trainer.config import Config, ModelConfig
from trainer.data.samples import Turn
from trainer.data.template import ChatTemplate
from trainer.errors import ConfigError
from trainer.export import picture_processor
from trainer.folders import language_config, preprocessing, read_model, tower_config
from trainer.load import check_computes, image_transform, meta_model, model_config
from trainer.models.modeling_causal_lm import language_model_class
from trainer.tokenizer import IMAGE_PAD, image_token_id, load_tokenizer

QWEN = {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "kv_channels": 128, "no_bias": True,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.X"},
        "bf16": False, "fp16": False, "fp32": False, "rotary_pct": 1.0, "rotary_emb_base": 10000, "seq_length": 8192,
        "scale_attn_weights": True, "softmax_in_fp32": False, "use_cache_quantization": False,
        "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0"}  # fmt: skip
"""What the official folders of all sizes share, auto_map and fields that mean nothing here included."""


@pytest.mark.parametrize(
    ("own", "parameters"),
    [
        # (hidden size, layers, heads, intermediate size, vocabulary, and what else differs), weights by the sum below
        ({"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008,
          "vocab_size": 151936}, 1_836_828_672),
        ({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016,
          "vocab_size": 151936, "seq_length": 2048}, 7_721_324_544),
        ({"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 27392,
          "vocab_size": 152064, "seq_length": 2048}, 14_167_290_880),
        ({"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 49152,
          "vocab_size": 152064, "seq_length": 32768, "rotary_emb_base": 1000000, "use_dynamic_ntk": False,
          "use_logn_attn": False}, 72_287_920_128),
    ],
    ids=["1.8B", "7B", "14B", "72B"],
)  # fmt: skip
def test_official_layouts_of_every_size(tmp_path, own, parameters):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, **own}))
    config = language_config(tmp_path)
    with torch.device("meta"):
        model = language_model_class(config)(config)
    d, f, v = own["hidden_size"], own["intermediate_size"] // 2, own["vocab_size"]
    layer = (d + 1) * 3 * d + d * d + 3 * d * f + 2 * d  # c_attn with bias, c_proj, the MLP, two norms
    assert 2 * v * d + own["num_hidden_layers"] * layer + d == parameters
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.seq_length == own.get("seq_length", 8192)
    assert config.use_dynamic_ntk is own.get("use_dynamic_ntk", True)


def test_newer_models_are_planned_from_their_config_alone(tiny_run, tmp_path):
    # Qwen2.5-7B: 28 layers of 28 heads, keys and values of four; an untied head. (source: its config.json)
    d, f, v, kv = 3584, 18944, 152064, 512
    text = Qwen2Config(
        hidden_size=d, intermediate_size=f, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=v, tie_word_embeddings=False,
    )  # fmt: skip
    text.save_pretrained(tmp_path / "lm")
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
              "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}  # fmt: skip
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(vision))
    done = script(
        "launch/plan.py", "--config", str(tiny_run), "--world-size", "2", "--set",
        f"model.language_model={tmp_path}/lm", f"model.vision_tower={tmp_path}/tower", "data.max_length=2048",
        "data.train=[{name: absent, shards: nowhere.tar}]", "train.bf16=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    layer = d * d + d + 2 * (d * kv + kv) + d * d + 3 * d * f + 2 * d
    assert 2 * v * d + 28 * layer + d == 7_615_616_512  # as published
    assert "language_model       7,615,616,512     7,615,616,512" in done.stdout


# --- Towers ---


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "cls"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
def test_a_whole_model_and_its_vision_part_are_the_same_tower(tmp_path, kind, cls):
    write_tower(tmp_path / "whole", kind)
    cls.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "part")
    towers = [read_model(tower_config(tmp_path / name), tmp_path / name, torch.float32) for name in ("whole", "part")]
    weights = [tower.state_dict() for tower in towers]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert not any("pooling" in name or name.startswith("head.") for name in weights[0])
    assert {tower.config.model_type for tower in towers} == {f"{kind}_vision_model"}


@pytest.mark.parametrize(
    ("kind", "size", "patch", "features"), [("clip", 224, 14, 256), ("clip", 336, 14, 576), ("siglip", 384, 14, 729)]
)
def test_features_and_pixels_follow_from_the_towers_size(tmp_path, kind, size, patch, features):
    settings = {**TOWER, "model_type": f"{kind}_vision_model", "image_size": size, "patch_size": patch}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = model_config(ModelConfig(vision_tower=str(tmp_path)))
    transform = image_transform(config)
    assert config.image_context_length == features
    assert (transform.size, transform.aspect) == (size, "squash" if kind == "siglip" else "crop")
    assert transform(encoded(noise(400, 300))).shape == (3, size, size)
    assert image_transform(model_config(ModelConfig(vision_tower=str(tmp_path), image_aspect="pad"))).aspect == "pad"


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
def test_siglip_sees_pictures_as_its_own_processor_makes_them(tmp_path, resample):
    write_tower(tmp_path / "siglip", "siglip")
    settings: dict[str, Any] = json.loads((tmp_path / "siglip" / "preprocessor_config.json").read_text())
    settings["resample"] = resample
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = SiglipImageProcessorPil(size=settings["size"], resample=resample)
    transform = image_transform(model_config(ModelConfig(vision_tower=str(tmp_path / "siglip"))))
    for width, height in ((16, 16), (40, 30), (7, 90), (300, 200)):
        image = noise(width, height)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        pixels = transform(encoded(image))
        # One level of 255, of a range of two: PyTorch's filter stands in for Pillow's where it is faster.
        found = transform.normalize(pixels[None], torch.float32)
        assert (found - expected).abs().max() <= 2 / 255 + 1e-6
        again = picture_processor(transform)(image, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(again, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], expected three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\], expected three numbers"),
        ({"resample": 1}, "resample is 1, expected 2"),
    ],
)
def test_preprocessing_that_cannot_be_meant_is_named(tmp_path, settings, said):
    write_tower(tmp_path / "siglip", "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {said}"):
        preprocessing(tmp_path / "siglip")


# --- Tokenizers ---

TURNS = [Turn("user", "<image>\nwhere is the red square? <|im_start|>"), Turn("assistant", "in the middle")]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_newer_tokenizers_write_the_same_conversation(tiny_run, tmp_path, kind):
    write_language_model(tmp_path / "lm", kind)
    tokenizer = load_tokenizer(ModelConfig(language_model=str(tmp_path / "lm")))
    placeholder = image_token_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(placeholder) == IMAGE_PAD
    assert tokenizer.encode(IMAGE_PAD) == [placeholder]
    ids, labels = ChatTemplate(tokenizer, placeholder, 4).encode(TURNS)
    older = load_tokenizer(ModelConfig(language_model=str(tiny_run.parent / "tiny-qwen")))
    reference, reference_labels = ChatTemplate(older, image_token_id(older), 4).encode(TURNS)
    # The vocabularies are alike up to the placeholder: Qwen v1 has it behind <|im_end|>, as Qwen2 gets it.
    assert (ids, labels) == (reference, reference_labels)
    assert ids.count(placeholder) == 4
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhere?"}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\n{IMAGE_PAD}\nwhere?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.pad_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "export")  # and read again it is the same
    again = load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "export")))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


def test_placeholder_needs_a_free_row(tiny_run, tmp_path):
    write_language_model(tmp_path / "lm", "qwen2", free_rows=0)
    config = Config.load(tiny_run, [f"model.language_model={tmp_path}/lm"])
    with pytest.raises(ConfigError, match=r"no free row for <\|image_pad\|>: use a model with one"):
        meta_model(config, load_tokenizer(config.model))


def test_tokenizer_without_chatml_is_refused(tmp_path):
    write_tokenizer(tmp_path, ["<|endoftext|>", "<|im_end|>"])
    with pytest.raises(ConfigError, match=r"lacks the control tokens <\|im_start\|>"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))


# --- What a language model must be ---


def test_models_that_compute_otherwise_are_refused_before_they_train(tmp_path):
    from transformers import GraniteConfig, Qwen3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 50}  # fmt: skip

    def model(config):
        torch.manual_seed(0)
        return language_model_class(config)(config).eval()

    check_computes(model(Qwen3Config(**sizes)), tmp_path, packing=True)
    with pytest.raises(ConfigError, match="logits of a 'granite' are not its head times its last hidden state"):
        check_computes(model(GraniteConfig(**sizes, logits_scaling=8.0)), tmp_path, packing=False)
    leaky = model(Qwen3Config(**sizes))
    original = type(leaky).forward

    def forget(self, *args, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        return original(self, *args, **kwargs, attention_mask=torch.ones(1, 5) if cu_seq_lens_q is not None else None)

    leaky.forward = forget.__get__(leaky)
    check_computes(leaky, tmp_path, packing=False)
    with pytest.raises(ConfigError, match="packed documents would see each other in a 'qwen3'"):
        check_computes(leaky, tmp_path, packing=True)
