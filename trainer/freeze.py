"""What trains and what does not."""

import hashlib
import re

from torch import nn

from trainer.config_checks import frozen_by_lora
from trainer.dist import log
from trainer.errors import ConfigError, did_you_mean
from trainer.lora import describe_adapter, is_adapter, stored_name
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

PARTS = {"vision_tower": "vision_tower.", "projector": "multi_modal_projector.", "language_model": "language_model."}
"""Name in configurations -> prefix of its parameters."""

LORA = "lora"
"""The part of adapters inside the language model, which no pattern of `freeze` names."""

LAYERS = {
    "vision_tower": r"^vision_tower\.encoder\.layers\.",
    "language_model": r"^language_model\.(?:transformer\.h|model\.layers)\.",
}
"""Parts with numbered layers -> what comes before a layer's number; newer language models have the second name."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    if is_adapter(name):
        return LORA
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def freeze(model: MQWenForConditionalGeneration, patterns: list[str]) -> None:
    """Turns off gradients of every parameter that a pattern names.

    A pattern is a part, a range of layers ("language_model.layers.0-11", both ends included) or a regular expression
    searched for in the parameter's name, as it is without LoRA; adapters are left as they are. What no feature depends
    on of a tower that trains (`unread_parameters`) is turned off too, and logged.

    Raises ConfigError, for all patterns at once, where one matches nothing, or where nothing would be left to
    train; and with adapters, which freeze the language model, where one is of some of its weights alone.
    """
    own = {stored_name(name): p for name, p in model.named_parameters() if not is_adapter(name)}
    has_adapter = any(is_adapter(name) for name, _ in model.named_parameters())
    errors = []
    for pattern in patterns:
        for where, expression in _expressions(pattern).items():
            named = {name: parameter for name, parameter in own.items() if expression.search(name)}
            for parameter in named.values():
                parameter.requires_grad_(False)
            if not named:
                hint = did_you_mean(pattern, PARTS)
                errors.append(f"'{pattern}' matches no parameter{where}" + (f" ({hint})" if hint else ""))
                break
            if has_adapter and pattern not in PARTS and {part_of(name) for name in named} == {"language_model"}:
                errors.append(frozen_by_lora(pattern))
                break
    unread = [parameter for parameter in model.unread_parameters().values() if parameter.requires_grad]
    for parameter in unread:
        parameter.requires_grad_(False)
    if unread and any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        layer, count = model.config.vision_feature_layer, sum(parameter.numel() for parameter in unread)
        log.info(
            "%s parameters of the vision tower do not train: nothing reads what lies behind hidden state %s "
            "(model.vision_feature_layer)", f"{count:,}", layer,
        )  # fmt: skip
    if not any(parameter.requires_grad for parameter in model.parameters()):
        left = "; what is not frozen lies behind model.vision_feature_layer, and nothing reads it" if unread else ""
        errors.append(f"everything is frozen: nothing is left to train{left}")
    if errors:
        examples = ", ".join([*PARTS, "language_model.layers.0-11"])
        raise ConfigError("freeze: " + "; ".join(errors) + f". Parts and ranges are written {examples}.")


def _expressions(pattern: str) -> dict[str, re.Pattern[str]]:
    """The expressions over parameter names that a pattern stands for, by what to say where one matches nothing."""
    if pattern in PARTS:
        return {"": re.compile(f"^{re.escape(PARTS[pattern])}")}
    if (match := re.fullmatch(r"(\w+)\.layers\.(\d+)-(\d+)", pattern)) and match[1] in LAYERS:
        layers = range(int(match[2]), int(match[3]) + 1)
        found = {f": there is no layer {i}": re.compile(f"{LAYERS[match[1]]}{i}[.]") for i in layers}
        return found or {": the range is empty": re.compile(r"(?!)")}
    return {"": re.compile(pattern)}


def describe_trained(model: nn.Module) -> str:
    """How many parameters train, a hash of their names and shapes, and what scales adapters."""
    trained = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.requires_grad]
    digest = hashlib.sha256("\n".join(trained).encode()).hexdigest()[:8]
    return f"{len(trained)} parameters ({digest}){describe_adapter(model)}"


def table(model: nn.Module) -> str:
    """Parameters of each part, and how many of them train."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        count = counts.setdefault(part_of(name), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    counts["total"] = [sum(count[i] for count in counts.values()) for i in (0, 1)]
    rows = [f"{part:<16}{total:>18,}{trains:>18,}" for part, (total, trains) in counts.items()]
    return "\n".join([f"{'part':<16}{'parameters':>18}{'trained':>18}", *rows])
