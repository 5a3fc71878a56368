"""The configuration: where a value comes from, and what is said about a mistake."""

import json
import shutil
from pathlib import Path

import list_keys
import pytest
import yaml

from trainer.config import Config, LoraConfig
from trainer.errors import ConfigError
from trainer.paths import expand_shards, find_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tiny_run) -> dict:
    """A configuration without mistakes, to be changed."""
    return yaml.safe_load(tiny_run.read_text())


@pytest.fixture
def load(tmp_path):
    """Loads a tree, or YAML text, as a user's file."""

    def load_tree(tree, *overrides: str, world_size: int = 1) -> Config:
        file = tmp_path / "mine.yaml"
        file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return Config.load(file, list(overrides), world_size)

    return load_tree


@pytest.fixture
def mistakes(load):
    """The lines of the ConfigError that loading a tree raises."""

    def lines(*args, **kwargs) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            load(*args, **kwargs)
        head, *found = str(raised.value).split("\n  - ")
        assert ("mine.yaml with overrides: " if len(args) > 1 else "mine.yaml: ") in head
        assert f"{len(found)} mistake" in head
        return found

    return lines


# --- Where a value comes from ---


def test_default_then_yaml_then_set(load, tree):
    # warm-up: 0.03 by default, 0.1 in the file, 0.2 on the command line. Of `optim` nothing else changes.
    assert load({**tree, "optim": {}}).optim.warmup_ratio == 0.03
    assert load(tree).optim.warmup_ratio == 0.1
    config = load(tree, "optim.warmup_ratio=0.2")
    assert config.optim.warmup_ratio == 0.2
    assert (config.optim.projector_learning_rate, config.optim.schedule) == (5e-3, "cosine")


def test_later_set_wins_and_values_are_yaml(load, tree):
    shards = tree["data"]["train"][0]["shards"]
    config = load(
        tree, "run.seed=1", "run.seed=2", "train.bf16=true", "data.system_prompt=''",
        "freeze=[projector, vision_tower]", f"data.eval=[{{name: held-out, shards: '{shards}'}}]",
        "data.caption_prompt=a = b?",
    )  # fmt: skip
    assert config.run.seed == 2
    assert config.train.bf16 is True
    assert config.data.system_prompt == ""
    assert config.freeze == ["projector", "vision_tower"]
    assert [source.name for source in config.data.eval] == ["held-out"]
    assert config.data.caption_prompt == "a = b?"  # only the first = ends the key


def test_set_fills_sections_that_are_absent_or_empty(load, tree):
    text = yaml.safe_dump({key: value for key, value in tree.items() if key not in ("logging", "checkpoint")})
    config = load(text + "logging:\n", "logging.every_steps=3", "checkpoint.keep_last=7")
    assert (config.logging.every_steps, config.checkpoint.keep_last) == (3, 7)


def test_rates_written_as_people_write_them(load, tree):
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1: without a point it is text
    tree["optim"] = {"learning_rate": "1e-4", "projector_learning_rate": "2E-3", "betas": ["9e-1", 0.95]}
    optim = load(tree, "optim.weight_decay=1e-2", "optim.max_grad_norm=1").optim
    assert (optim.learning_rate, optim.projector_learning_rate, optim.weight_decay) == (0.0001, 0.002, 0.01)
    assert optim.betas == [0.9, 0.95]
    assert isinstance(optim.max_grad_norm, float)


def test_output_dir_follows_the_name(load, tree):
    tree["run"] = {"name": "cats"}
    assert load(tree).run.output_dir == "runs/cats"
    assert load(tree, "run.output_dir=elsewhere").run.output_dir == "elsewhere"


def test_what_is_saved_loads_as_the_same_configuration(load, tree):
    config = load(tree, "optim.projector_learning_rate=1e-4", "freeze=['language_model.layers.0-0']")
    assert load(config.to_dict()) == config


def test_config_by_name_or_by_path():
    expected = ROOT / "launch" / "configs" / "stage1.yaml"
    assert find_config("stage1") == find_config("stage1.yaml") == find_config(expected) == expected


def test_unknown_config_name_lists_the_known():
    with pytest.raises(ConfigError, match="stage3: no such file.*demo_stage1.*stage1, stage2"):
        Config.load("stage3")


def test_folder_that_is_no_run_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder without config\.yaml, so not that of a run"):
        Config.load(tmp_path)


def test_config_in_the_working_folder_goes_before_a_named_one(tmp_path, monkeypatch):
    (tmp_path / "stage1.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_config("stage1.yaml").resolve() == tmp_path / "stage1.yaml"


# --- Shards ---


@pytest.fixture
def tars(tmp_path) -> Path:
    """data-08.tar ... data-11.tar and one of another name."""
    for name in ("data-08", "data-09", "data-10", "data-11", "other"):
        (tmp_path / f"{name}.tar").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("data-09.tar", ["data-09"]),
        ("data-1*.tar", ["data-10", "data-11"]),
        ("*.tar", ["data-08", "data-09", "data-10", "data-11", "other"]),
        ("data-{08..11}.tar", ["data-08", "data-09", "data-10", "data-11"]),  # as wide as it is written
        ("data-{8..11}.tar", ["data-8", "data-9", "data-10", "data-11"]),
        ("data-{0..1}{8..9}.tar", ["data-08", "data-09", "data-18", "data-19"]),
        ("data-{0..1}[01].tar", ["data-10", "data-11"]),  # 00 and 01 are not there
        (["other.tar", "data-0*.tar"], ["other", "data-08", "data-09"]),  # in the order of the list
        ("nothing-*.tar", []),
        ([], []),
    ],
)
def test_shards_are_paths_globs_brace_ranges_or_lists(tars, patterns, expected):
    whole = [f"{tars}/{p}" for p in patterns] if isinstance(patterns, list) else f"{tars}/{patterns}"
    assert expand_shards(whole) == [tars / f"{name}.tar" for name in expected]


def test_missing_tars_are_named(mistakes, tree, tars):
    tree["data"]["train"] = [
        {"name": "a", "shards": f"{tars}/data-{{08..13}}.tar"},
        {"name": "b", "shards": [f"{tars}/other.tar", f"{tars}/new-*.tar"]},
    ]
    tree["data"]["eval"] = [{"name": "c", "shards": f"{tars}/gone.tar"}]
    found = mistakes(tree)
    assert found == [
        f"data.train[0].shards: no such file: {tars}/data-12.tar (and 1 more)",
        f"data.train[1].shards: '{tars}/new-*.tar' matches no file",
        f"data.eval[0].shards: no such file: {tars}/gone.tar",
    ]


@pytest.mark.parametrize("shards", ["", []])
def test_source_without_shards_is_a_mistake(mistakes, tree, shards):
    tree["data"]["eval"] = [{"name": "held-out", "shards": shards}]
    assert mistakes(tree) == ["data.eval[0].shards: names no tar"]


# --- LoRA: a section that may be absent ---


def test_lora_is_off_unless_it_is_given_and_then_has_defaults(load, tree):
    assert load(tree).lora is None
    assert load({**tree, "lora": None}).lora is None
    assert load({**tree, "lora": {}}).lora == LoraConfig()
    assert load(tree, "lora.r=8").lora == LoraConfig(r=8)
    assert load({**tree, "lora": {"r": 8}}, "lora=null").lora is None
    config = load({**tree, "lora": {"r": 8, "target_modules": "q_proj|v_proj"}}, "lora.alpha=4")
    assert config.lora == LoraConfig(r=8, alpha=4, target_modules="q_proj|v_proj")
    assert load(config.to_dict()) == config


def test_mistakes_of_lora_are_named(mistakes, tree):
    tree["lora"] = {"rank": 8, "r": 0, "alpha": "much", "dropout": 1, "target_modules": "c_attn||w1"}
    found = mistakes(tree, "freeze=[vision_tower, language_model, language_model.layers.0-0]")
    assert sorted(found) == [
        "freeze: with lora all of the language model's own weights are frozen, and adapters train in every layer: "
        "leave 'language_model.layers.0-0' out",
        "lora.alpha: expected a whole number, found 'much'",
        "lora.dropout: must be from 0 to below 1, found 1.0",
        "lora.r: must be at least 1, found 0",
        "lora.rank: unknown key; known are r, alpha, dropout, target_modules",
        "lora.target_modules: expected names with | between them, found 'c_attn||w1'",
    ]
    assert mistakes(tree, "lora=yes") == ["lora: expected keys (r, alpha, dropout, target_modules), found True"]


# --- Mistakes ---


def test_eight_mistakes_are_reported_at_once(mistakes, tree, tmp_path):
    text = f"""
run: {{name: tiny, sede: 1}}
model:
  language_model: {tmp_path}/nowhere
  vision_tower: {tree["model"]["language_model"]}
  image_aspect: stretch
data:
  train: [{{name: tiny}}]
optim: {{learning_rate: fast, warmup_ratio: 1.5}}
train: {{max_steps: 5, global_batch_size: 10, micro_batch_size: 4}}
"""
    expected = [
        ("run.sede", "unknown key; did you mean 'seed'?"),
        ("model.language_model", f"no such folder: {tmp_path}/nowhere"),
        ("model.vision_tower", "of architecture 'qwen', expected 'clip' or 'clip_vision_model'"),
        ("model.image_aspect", "expected one of crop, pad, squash, found 'stretch'"),
        ("data.train[0].shards", "missing"),
        ("optim.learning_rate", "expected a number, found 'fast'"),
        ("optim.warmup_ratio", "must be between 0 and 1, found 1.5"),
        ("train.global_batch_size=10", "nearest valid values: 8, 12"),
    ]
    found = mistakes(text)
    for key, said in expected:
        assert [line for line in found if line.startswith(key) and said in line], f"{key}: {said}\nnot in {found}"
    assert len(found) == len(expected) == 8  # and nothing that is no mistake


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("run", {"seed": "one"}, "run.seed: expected a whole number, found 'one'"),
        ("run", {"seed": 1.5}, "run.seed: expected a whole number, found 1.5"),
        ("run", {"seed": 2**64}, f"run.seed: must be a number of 63 bits, found {2**64}"),
        ("run", {"seed": True}, "run.seed: expected a whole number, found True"),
        ("run", {"seed": None}, "run.seed: expected a whole number, found None"),
        ("run", {"name": 7}, "run.name: expected text, found 7"),
        ("run", ["name"], "run: expected keys (name, output_dir, seed, overwrite, hang_seconds), found ['name']"),
        ("freeze", "vision_tower", "freeze: expected a list of text, found 'vision_tower'; write [vision_tower]"),
        ("freeze", [1], "freeze[0]: expected text, found 1"),
        (
            "freeze",
            ["h.(4"],
            "freeze: 'h.(4' is not a regular expression (missing ), unterminated subpattern at position 2)",
        ),
        ("optim", {"learning_rate": True}, "optim.learning_rate: expected a number, found True"),
        ("optim", {"learning_rate": ".nan"}, "optim.learning_rate: expected a number, found '.nan'"),
        ("optim", {"learning_rate": float("nan")}, "optim.learning_rate: expected a number, found nan"),
        ("optim", {"max_grad_norm": float("inf")}, "optim.max_grad_norm: expected a number, found inf"),
        ("optim", {"schedule": "cosin"}, "optim.schedule: expected one of cosine, linear, constant, found 'cosin'"),
        ("optim", {"betas": 0.9}, "optim.betas: expected a list of numbers, found 0.9; write [0.9]"),
        ("optim", {"betas": [0.9]}, "optim.betas: expected two numbers from 0 to below 1, found [0.9]"),
        ("optim", {"betas": ["a", 0.9]}, "optim.betas[0]: expected a number, found 'a'"),
        ("deepspeed", "zero2.json", "deepspeed: no such file: zero2.json"),
        ("checkpoint", {"save_steps": 0}, "checkpoint.save_steps: must be at least 1, found 0"),
        ("checkpoint", {"keep_last": -1}, "checkpoint.keep_last: must not be negative, found -1"),
        (
            "checkpoint",
            {"keep_best": True},
            "checkpoint.keep_best: needs held-out losses: give data.eval and eval.every_steps",
        ),
        ("eval", {"answers": 4}, "eval.answers: needs held-out samples: give data.eval"),
        ("logging", {"sample_keys": "yes please"}, "logging.sample_keys: expected true or false, found 'yes please'"),
    ],
)
def test_one_mistake_gives_one_line(mistakes, tree, section, value, said):
    assert mistakes({**tree, section: value}) == [said]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"name": "a", "shards": 5}, "data.train[0].shards: expected text or a list of text, found 5"),
        (
            {"name": "a", "shards": [5, "TAR"]},
            "data.train[0].shards: expected text or a list of text, found [5, 'TAR']",
        ),
        ({"shards": "TAR"}, "data.train[0].name: missing"),
        ({"name": 5, "shards": "TAR"}, "data.train[0].name: expected text, found 5"),
        ({"name": "a", "shards": "TAR", "wieght": 2}, "data.train[0].wieght: unknown key; did you mean 'weight'?"),
    ],
)
def test_sources_are_checked_like_sections(mistakes, tree, tars, source, said):
    tar = str(tars / "other.tar")
    tree["data"]["train"] = [json.loads(json.dumps(source).replace("TAR", tar))]
    assert mistakes(tree) == [said.replace("TAR", tar)]


@pytest.mark.parametrize(
    ("key", "near"),
    [("train.global_batchsize", "global_batch_size"), ("data.evaluation", None), ("trian.bf16", "train")],
)
def test_unknown_key_names_the_nearest(mistakes, tree, key, near):
    section, name = key.split(".")
    (found,) = mistakes({**tree, section: {**tree.get(section, {}), name: 1}})
    if near:
        assert found.endswith(f"unknown key; did you mean '{near}'?")
    else:
        assert found.startswith(f"{key}: unknown key; known are train, eval, max_length")


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "freeze.0=projector", "run.seed.x=1"])
def test_set_that_names_no_key_is_a_mistake(mistakes, tree, override):
    # `freeze` has no keys of its own, nor has a number.
    tree["run"]["seed"] = 3
    tree["freeze"] = ["vision_tower"]
    assert mistakes(tree, override) == [f"--set {override}: expected section.key=value"]


def test_set_is_checked_like_the_file(mistakes, tree):
    assert mistakes(tree, "train.max_step=5", "run.seed=x", "freeze=[") == [
        "--set freeze=[: the value is not YAML (while parsing a flow node\n"
        "expected the node content, but found '<stream end>'\n"
        '  in "<unicode string>", line 1, column 2:\n    [\n     ^)',
        "run.seed: expected a whole number, found 'x'",
        "train.max_step: unknown key; did you mean 'max_steps'?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", r"not YAML: .*\n.*\n.*in \".*mine.yaml\", line 1"),
        ("- run", "expected sections, found a list"),
        (
            "train: {}\nrun: {}\ntrain: {epochs: 1}",
            r"not YAML: 'train' is given twice, first in line 1\n\s+in .*line 3",
        ),
        ("train:\n  epochs: 1\n  epochs: 2", r"not YAML: 'epochs' is given twice, first in line 2\n\s+in .*line 3"),
        ("train: {epochs: 1, epochs: 2}", "not YAML: 'epochs' is given twice, first in line 1"),
    ],
)
def test_file_that_is_no_configuration(load, text, said):
    with pytest.raises(ConfigError, match=f"mine.yaml: {said}"):
        load(text)


def test_what_yaml_merges_is_given_once(load, tree):
    del tree["eval"]
    text = yaml.safe_dump(tree) + "eval: &a {every_steps: 3}\nlogging: {<<: *a, every_steps: 4}\n"
    config = load(text)
    assert (config.eval.every_steps, config.logging.every_steps) == (3, 4)


def test_file_that_is_not_utf_8_is_to_be_saved_as_such_and_windows_marks_are_read_over(tmp_path, tree):
    (tmp_path / "gbk.yaml").write_bytes("run: {name: 训练}".encode("gbk"))
    with pytest.raises(ConfigError, match=r"gbk\.yaml: not UTF-8 .*; save it as UTF-8"):
        Config.load(tmp_path / "gbk.yaml")
    (tmp_path / "bom.yaml").write_bytes(yaml.safe_dump(tree).replace("\n", "\r\n").encode("utf-8-sig"))
    assert Config.load(tmp_path / "bom.yaml").run.name == tree["run"]["name"]


def test_shards_that_are_a_folder_say_how_its_tars_are_named(mistakes, tree, tmp_path):
    tree["data"]["train"][0]["shards"] = str(tmp_path)
    assert mistakes(tree) == [f"data.train[0].shards: '{tmp_path}' is a folder; write '{tmp_path}/*.tar'"]


def test_empty_file_lacks_model_data_and_length(mistakes):
    assert mistakes("") == [
        "model.language_model: missing; or give model.init_from",
        "model.vision_tower: missing; or give model.init_from",
        "data.train: no source to train on",
        "train.max_steps: give either this or train.epochs, and null for the other",
    ]


def test_epochs_or_steps_but_not_both(load, mistakes, tree):
    said = ["train.max_steps: give either this or train.epochs, and null for the other"]
    assert mistakes(tree, "train.epochs=1") == said  # the file has max_steps
    assert mistakes(tree, "train.max_steps=null") == said
    assert load(tree, "train.max_steps=null", "train.epochs=2").train.epochs == 2


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "nearest"),
    [
        (128, 2, 3, "126, 132"),  # multiples of 2 x 3
        (4, 2, 4, "8"),  # of 8, and 0 is no batch
        (129, 1, 2, "128, 130"),
    ],
)
def test_batch_that_does_not_divide_names_the_nearest_that_do(load, mistakes, tree, size, micro, world_size, nearest):
    sizes = f"train.global_batch_size={size}", f"train.micro_batch_size={micro}"
    assert mistakes(tree, *sizes, world_size=world_size) == [
        f"train.global_batch_size={size} is not a multiple of micro_batch_size x world size ({micro} x {world_size}); "
        f"nearest valid values: {nearest}"
    ]
    for valid in nearest.split(", "):
        load(tree, f"train.global_batch_size={valid}", sizes[1], world_size=world_size)


def test_model_folders_of_other_architectures(load, mistakes, tree, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "empty").mkdir()
    language_model, vision_tower = mistakes(
        tree, f"model.language_model={tmp_path}/t5", f"model.vision_tower={tmp_path}/empty"
    )
    assert language_model == (
        f"model.language_model: {tmp_path}/t5 is of architecture 't5', expected 'qwen' or 'qwen2' or 'qwen3', or "
        f"another causal language model of Transformers"
    )
    assert vision_tower.startswith(f"model.vision_tower: {tmp_path}/empty has no readable config.json")
    # Official ones that cannot train: Qwen-7B-Chat-Int4 says so in its config.json.
    int4 = '{"model_type": "qwen", "quantization_config": {"bits": 4, "quant_method": "gptq"}}'
    (tmp_path / "t5" / "config.json").write_text(int4)
    (said,) = mistakes(tree, f"model.language_model={tmp_path}/t5")
    assert said == (
        f"model.language_model: {tmp_path}/t5 is quantized (gptq) and cannot train: name the model that it was made "
        f"from"
    )
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "llama"}')
    load(tree, f"model.language_model={tmp_path}/t5")  # its weights and tokens are another matter


def test_model_comes_from_one_place(mistakes, tree, tmp_path):
    assert mistakes(tree, f"model.init_from={tmp_path}") == [
        "model: give either init_from or language_model and vision_tower, not both"
    ]


def test_output_dir_that_is_a_file(mistakes, tree, tmp_path):
    (tmp_path / "notes").touch()
    said = f"run.output_dir: {tmp_path}/notes is a file, expected a folder"
    assert mistakes(tree, f"run.output_dir={tmp_path}/notes") == [said]


def test_mistakes_of_the_deepspeed_file_come_with_the_others(mistakes, tree, tmp_path):
    (tmp_path / "zero.json").write_text('{"gradient_cliping": 1.0, "zero_optimization": {"stage": 2}}')
    found = mistakes(tree, f"deepspeed={tmp_path}/zero.json", "run.sede=1")
    assert [line.split(":")[0] for line in found] == ["run.sede", "deepspeed"]


# --- What is documented ---


def test_table_of_keys_in_the_readme_is_current():
    section = (ROOT / "README.md").read_text().split("\n## Every key\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows == list_keys.table().splitlines(), "run `python launch/list_keys.py --write`"


def test_every_key_has_a_row_and_a_meaning():
    # Independently of the generator: the keys of a whole configuration, written out.
    rows = [row.split(" | ") for row in list_keys.table().splitlines()[2:]]
    assert all(meaning.strip(" |") for _, _, meaning in rows)
    documented = {key.strip("| `") for key, _, _ in rows} - {
        f"data.train[].{key}" for key in ("name", "shards", "weight")
    }
    tree = Config(lora=LoraConfig()).to_dict()
    keys = {"lora"} | {f"{s}.{key}" for s, values in tree.items() if isinstance(values, dict) for key in values}
    assert documented == keys | {s for s, values in tree.items() if not isinstance(values, dict)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_of_the_repository_are_right_where_their_paths_exist(file, world_size, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load(file.read_text())
    for name, tiny in (("language_model", "tiny-qwen"), ("vision_tower", "tiny-clip"), ("init_from", "tiny-qwen")):
        if folder := tree["model"].get(name):
            shutil.copytree(tiny_run.parent / tiny, folder)
    for source in tree["data"]["train"] + tree["data"].get("eval", []):
        tar = Path(source["shards"].replace("*", "0"))
        tar.parent.mkdir(parents=True)
        tar.touch()
    assert Config.load(file.stem, [], world_size).run.name == tree["run"]["name"]


def test_sources_of_one_name_are_refused(mistakes, tree):
    shards = tree["data"]["train"][0]["shards"]
    tree["data"]["train"] = [{"name": name, "shards": shards} for name in ("a", "b", "a")]
    assert mistakes(tree) == ["data.train: several sources are named a; each needs a name of its own"]


def test_a_glob_on_a_web_server_is_refused_before_it_is_asked(mistakes, tree):
    tree["data"]["train"] = [{"name": "a", "shards": "https://host.invalid/x-*.tar"}]
    (mistake,) = mistakes(tree)
    assert mistake.startswith("data.train[0].shards: 'https://host.invalid/x-*.tar': a web server has no list")


def test_writing_it_says_what_differs_from_the_one_before(tiny_run, tmp_path):
    file = tmp_path / "config.yaml"
    assert Config.load(tiny_run).write(file) == []
    assert Config.load(tiny_run).write(file) == []
    # A key that an older version did not have is no change of the user's.
    file.write_text(file.read_text().replace("  max_skipped_steps: 10\n", ""))
    longer = Config.load(tiny_run, ["train.max_steps=20", "optim.schedule=linear", "freeze=[]"])
    assert longer.write(file) == [
        "freeze: ['vision_tower'] -> []", "optim.schedule: cosine -> linear", "train.max_steps: 10 -> 20",
    ]  # fmt: skip
    assert Config.load(file).train.max_steps == 20
    file.write_bytes("a: 你".encode()[:-1])  # cut short by a kill
    assert Config.load(tiny_run).write(file) == []
    assert Config.load(file).train.max_steps == 10
