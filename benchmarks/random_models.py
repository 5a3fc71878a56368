"""Random weights in the layout of the official folders, to measure and rehearse where the real ones cannot be had.

    python benchmarks/random_models.py --out models
    python benchmarks/random_models.py --out models --language-model 7b --tiktoken ../shared/qwen/qwen.tiktoken

Writes models/Qwen-1_8B (or Qwen-7B; bf16, in shards) and models/clip-vit-large-patch14 (fp32, one file, both towers),
with the files, the configuration fields and the weight names that the published folders have. Weights are N(0, 0.02),
norms 1, biases 0; drawn on a GPU where there is one, which has other numbers. One shard is in memory at a time: 2 GB. A
folder that is already there is left as it is.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]

SHARD_BYTES = 2_000_000_000
"""Weights per file, as published: two files for Qwen-1.8B, eight for Qwen-7B."""

BLOCK = 1 << 22
"""Numbers drawn at a time, in fp32 (16 MB, small enough that the allocator hands out the same pages again)."""

LANGUAGE_MODELS = {
    "1.8b": ("Qwen-1_8B", {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}, 11008),
    "7b": ("Qwen-7B", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}, 22016),
}
VOCABULARY = 151_936

VISION_MODELS = {"clip-l14": "clip-vit-large-patch14"}
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CLIP_IMAGE, CLIP_PATCH, CLIP_TEXT_LENGTH, CLIP_VOCABULARY, CLIP_PROJECTION = 224, 14, 77, 49408, 768


def qwen_config(sizes: dict, intermediate_size: int) -> dict:
    """config.json with the fields of the official one."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        **sizes,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 8192,
        "softmax_in_fp32": False,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": VOCABULARY,
    }


QWEN_GENERATION_CONFIG = {
    "chat_format": "raw",
    "do_sample": True,
    "eos_token_id": 151643,
    "max_new_tokens": 512,
    "pad_token_id": 151643,
    "stop_words_ids": [[151643]],
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}
QWEN_TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
}


def qwen_shapes(config: dict) -> Shapes:
    """Names and shapes of the weights, in the order of the files."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    projection = config["kv_channels"] * config["num_attention_heads"]
    width = config["intermediate_size"] // 2
    shapes: Shapes = {"transformer.wte.weight": (vocabulary, d)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"transformer.h.{i}.ln_1.weight": (d,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * projection, d),
            f"transformer.h.{i}.attn.c_attn.bias": (3 * projection,),
            f"transformer.h.{i}.attn.c_proj.weight": (d, projection),
            f"transformer.h.{i}.ln_2.weight": (d,),
            f"transformer.h.{i}.mlp.w1.weight": (width, d),
            f"transformer.h.{i}.mlp.w2.weight": (width, d),
            f"transformer.h.{i}.mlp.c_proj.weight": (d, width),
        }
    return shapes | {"transformer.ln_f.weight": (d,), "lm_head.weight": (vocabulary, d)}


def clip_config() -> dict:
    """config.json of the whole CLIPModel."""
    text = {"projection_dim": CLIP_PROJECTION, **CLIP_TEXT}
    vision = {"projection_dim": CLIP_PROJECTION, "image_size": CLIP_IMAGE, "patch_size": CLIP_PATCH, **CLIP_VISION}
    common = {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
    }
    text_common = {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": CLIP_TEXT_LENGTH,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "vocab_size": CLIP_VOCABULARY,
    }
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": CLIP_PROJECTION,
        "text_config": common | text_common | text,
        "text_config_dict": text,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": common | {"model_type": "clip_vision_model"} | vision,
        "vision_config_dict": vision,
    }


CLIP_PREPROCESSOR_CONFIG = {
    "crop_size": CLIP_IMAGE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": CLIP_IMAGE,
}


def clip_shapes() -> Shapes:
    """Names and shapes of both towers, as the official file has them (`pre_layrnorm` is spelt so there)."""
    text, vision, patches = CLIP_TEXT["hidden_size"], CLIP_VISION["hidden_size"], (CLIP_IMAGE // CLIP_PATCH) ** 2
    return {
        "logit_scale": (),
        "text_model.embeddings.position_embedding.weight": (CLIP_TEXT_LENGTH, text),
        "text_model.embeddings.position_ids": (1, CLIP_TEXT_LENGTH),
        "text_model.embeddings.token_embedding.weight": (CLIP_VOCABULARY, text),
        **clip_layers("text_model", CLIP_TEXT),
        **norm_shapes("text_model.final_layer_norm", text),
        "text_projection.weight": (CLIP_PROJECTION, text),
        "vision_model.embeddings.class_embedding": (vision,),
        "vision_model.embeddings.patch_embedding.weight": (vision, 3, CLIP_PATCH, CLIP_PATCH),
        "vision_model.embeddings.position_embedding.weight": (patches + 1, vision),
        "vision_model.embeddings.position_ids": (1, patches + 1),
        **norm_shapes("vision_model.pre_layrnorm", vision),
        **clip_layers("vision_model", CLIP_VISION),
        **norm_shapes("vision_model.post_layernorm", vision),
        "visual_projection.weight": (CLIP_PROJECTION, vision),
    }


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def clip_layers(tower: str, sizes: dict) -> Shapes:
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    shapes: Shapes = {}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for projection in ("k_proj", "out_proj", "q_proj", "v_proj"):
            shapes |= {f"{layer}.self_attn.{projection}.weight": (d, d), f"{layer}.self_attn.{projection}.bias": (d,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (f, d), f"{layer}.mlp.fc1.bias": (f,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (d, f), f"{layer}.mlp.fc2.bias": (d,)}
        shapes |= norm_shapes(f"{layer}.layer_norm1", d) | norm_shapes(f"{layer}.layer_norm2", d)
    return shapes


def random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """N(0, 0.02); biases 0, norms 1; CLIP's logit scale at its initial value and its table of positions (int64)."""
    if name.endswith(".position_ids"):
        return torch.arange(shape[-1]).view(shape)
    if name == "logit_scale":
        return torch.tensor(2.6592, dtype=dtype)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if name.endswith(".weight") and len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weight = torch.empty(shape, dtype=dtype)
    for block in weight.view(-1).split(BLOCK):
        # Drawn in fp32 whatever the dtype: a bf16 draw has few distinct values.
        drawn = torch.empty(block.shape, device=generator.device).normal_(0.0, 0.02, generator=generator)
        block.copy_(drawn.to(dtype))
    return weight


def split_into_shards(shapes: Shapes, itemsize: int) -> Iterator[Shapes]:
    """Consecutive weights of up to SHARD_BYTES together."""
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * itemsize
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += bytes_
    yield shard


def write_weights(folder: Path, shapes: Shapes, dtype: torch.dtype, sharded: bool) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors with their index, one file at a time."""
    shards = list(split_into_shards(shapes, dtype.itemsize)) if sharded else [shapes]
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if sharded else "model.safetensors"
        progress(f"{folder.name}: writing {file}")
        weights = {name: random_weight(name, shape, dtype, generator) for name, shape in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        del weights  # before the next shard is drawn
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        weight_map |= dict.fromkeys(shard, file)
    if sharded:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def write_language_model(folder: Path, config: dict, tiktoken: Path | None) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", QWEN_GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", QWEN_TOKENIZER_CONFIG)
    if tiktoken is not None:
        shutil.copyfile(tiktoken, folder / "qwen.tiktoken")
    write_weights(folder, qwen_shapes(config), torch.bfloat16, sharded=True)


def write_vision_model(folder: Path) -> None:
    write_json(folder / "config.json", clip_config())
    write_json(folder / "preprocessor_config.json", CLIP_PREPROCESSOR_CONFIG)
    write_weights(folder, clip_shapes(), torch.float32, sharded=False)


def write_folder(folder: Path, write, *arguments) -> None:
    """Calls `write` on a temporary name and renames: a folder that is there is whole."""
    if folder.exists():
        print(f"{folder} is already there")
        return
    partial = folder.with_name(f".{folder.name}.partial") / folder.name
    shutil.rmtree(partial.parent, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial, *arguments)
    partial.rename(folder)
    partial.parent.rmdir()
    progress("")
    print(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the models' folders")
    parser.add_argument("--language-model", choices=LANGUAGE_MODELS, default="1.8b")
    parser.add_argument("--vision", choices=VISION_MODELS, default="clip-l14")
    parser.add_argument("--tiktoken", type=Path, metavar="FILE", help="qwen.tiktoken, copied beside the language model")
    args = parser.parse_args()
    if args.tiktoken is not None and not args.tiktoken.is_file():
        parser.error(f"--tiktoken {args.tiktoken}: no such file")

    name, sizes, intermediate_size = LANGUAGE_MODELS[args.language_model]
    write_folder(args.out / VISION_MODELS[args.vision], write_vision_model)
    write_folder(args.out / name, write_language_model, qwen_config(sizes, intermediate_size), args.tiktoken)


if __name__ == "__main__":
    main()
