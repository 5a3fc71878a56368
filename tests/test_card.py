"""What the model card of an export tells, and what it keeps to itself."""

import pytest
import yaml

from trainer.card import ModelCard, command, published
from trainer.config import Config
from trainer.load import load_model
from trainer.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--config", "/home/me/stage2.yaml"], "train.py --config stage2.yaml"),
        (["--local_rank=0", "--config", "stage2"], "train.py --config stage2"),
        (["--set", "model.init_from=/data/me/runs/stage1"], "train.py --set model.init_from=stage1"),
        (["--set", "data.train=[{name: a, shards: '/d/x/*.tar'}]"], "train.py --set 'data.train=[{name: a, shards: "),
        (["--set", "x=https://me:pass@host/a/b.tar?key=1"], "train.py --set x=https://host/a/b.tar"),
        (["--resume", "me/a/checkpoint-000002"], "train.py --resume checkpoint-000002"),
        (["--config=../me/stage2.yaml"], "train.py --config=stage2.yaml"),
        (["--set", "model.init_from=~/me/runs/stage1/"], "train.py --set model.init_from=stage1/"),
        (["--set", "model.init_from=/data/My Runs/rate=1/stage1"], "train.py --set model.init_from=stage1"),
        (["--set", "x=[s3://me/d/0.tar,file:///home/1.tar]"], "train.py --set 'x=[0.tar,1.tar]'"),
        (["--set", "x=me/{000..003}/d/[0-9]/{a,b}-{00..99}.tar"], "train.py --set 'x={a,b}-{00..99}.tar'"),
        (["--set", "x={y: me/d/a, z: [hf://a/b.tar]}"], "train.py --set 'x={y: a, z: [hf://a/b.tar]}'"),
        (["--set", "optim.betas=[0.9, 0.95]"], "train.py --set 'optim.betas=[0.9, 0.95]'"),
    ],
)
def test_the_command_has_no_folders_of_this_machine_and_no_passwords(given, shown):
    found = command(["/opt/mqwen/launch/train.py", *given])
    assert found.startswith(shown)
    assert not any(secret in found for secret in ("/home", "/data", "/d/", "me/", "pass", "key=1"))


def test_settings_are_told_and_paths_are_not(tiny_run):
    config = Config.load(tiny_run)
    model = load_model(config, load_tokenizer(config.model))
    card = ModelCard.of(config, model).text(7, 1.25)
    assert "tiny-qwen that sees: tiny-clip" in card
    assert "7 optimizer steps, held-out loss 1.2500." in card
    assert "Data: tiny. Frozen: vision_tower." in card
    assert str(tiny_run.parent) not in card
    settings = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert settings == published(config)
    assert settings["optim"] == config.to_dict()["optim"]
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
