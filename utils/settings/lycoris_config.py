"""LyCORIS's configuration of an adapter, a JSON file as SimpleTuner's users have it, as keys of [adapter]."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from utils.errors import Problem

KEY = "lycoris_config"
ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "locon": {"type": "lora"},
    "dora": {"type": "lora", "dora": True},
    "loha": {"type": "loha"},
    "lokr": {"type": "lokr"},
    "oft": {"type": "oft"},
    "diag-oft": {"type": "oft"},
    "boft": {"type": "oft", "butterfly": True},
}
"""`algo` -> what it is here. IA3 is not among them: LyCORIS's multiplies weights alone, in files of its own."""
OF_OFT = {"linear_dim": "block_size"}
NAMES = {
    "linear_dim": "rank",
    "linear_alpha": "alpha",
    "conv_dim": "conv_dim",
    "conv_alpha": "conv_alpha",
    "factor": "factor",
    "full_matrix": "full_matrix",
    "decompose_both": "decompose_both",
    "use_tucker": "tucker",
    "dropout": "dropout",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "weight_decompose": "dora",
    "dora_wd": "dora",
    "rs_lora": "rslora",
    "init_lokr_norm": "init_lokr_norm",
}
NOTHING: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("multiplier",), (1, 1.0)),
    **dict.fromkeys(("constraint", "constrain"), (0, 0.0, None)),
    **dict.fromkeys(("bypass_mode", "rescaled", "train_norm"), (False, None)),
    **dict.fromkeys(("rank_dropout_scale", "unbalanced_factorization"), (False, None)),
    # These are off in LyCORIS too, where their key is there and says so.
    **dict.fromkeys(
        ("use_tucker", "weight_decompose", "dora_wd", "rs_lora", "full_matrix", "decompose_both"), (False,)
    ),
    "factor": (-1, None),
    **dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), (0, 0.0, None)),
}
"""Key -> the values with which it changes nothing."""
CONVOLUTIONAL = ("conv_dim", "conv_alpha")
OF_LORA = "rows of trained lengths (DoRA) are LoRA's alone here, of all modules or of none; leave it out"
SCALAR = "use_scalar"
PRESET = "apply_preset"
BY_CLASS, BY_NAME, CLASSES, PATTERNS = "module_algo_map", "name_algo_map", "target_module", "target_name"


def with_lycoris_config(file: str, table: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem], list[Problem]]:
    """[adapter] with the keys that the file which `lycoris_config` names stands for, in its place; problems; and
    remarks. Keys that are written beside it have to say the same, or be others."""
    path = table[KEY]
    rest = {key: value for key, value in table.items() if key != KEY}
    if not isinstance(path, str):
        return rest, [Problem(file, f"[adapter] {KEY}", f"must be a path in quotes; given: {_shown(path)}")], []
    place = Path(os.path.expanduser(path))
    config = _object_in(place)
    if isinstance(config, str):
        return rest, [Problem(str(place), "", f"{config}; give LyCORIS's configuration, as SimpleTuner has it")], []
    problems: list[Problem] = []

    def complain(key: str, message: str) -> None:
        problems.append(Problem(str(place), f"key `{key}`", message))

    found = _read(config, complain)
    for key in found.keys() & rest.keys():
        if found[key] != rest[key]:
            message = f"is {_shown(rest[key])}, and {place} says {_shown(found[key])}; leave one of them out"
            problems.append(Problem(file, f"[adapter] {key}", message))
    remarks = []
    if config.get(SCALAR):
        what = "one factor starts from zeros, where LyCORIS starts all at random and trains a scalar from 0"
        remarks.append(Problem(str(place), f"key `{SCALAR}`", what))
    return {**found, **rest}, problems, remarks


def _object_in(path: Path) -> dict[str, Any] | str:
    """What a file says; or why it says nothing."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError as error:
        return f"is not JSON ({error})"
    return content if isinstance(content, dict) else "holds no JSON object"


def _read(config: Mapping[str, Any], complain: Callable[[str, str], None]) -> dict[str, Any]:
    algorithm = config.get("algo", "lora")
    if algorithm not in ALGORITHMS:
        complain("algo", f"{_shown(algorithm)} is not trained here; known: {', '.join(ALGORITHMS)}")
        return {}
    found = dict(ALGORITHMS[algorithm])
    is_oft = found["type"] == "oft"
    for key, value in config.items():
        if key in ("algo", SCALAR, PRESET) or value in NOTHING.get(key, ()):
            continue
        # An alpha of OFT is a bound, which its own key sets.
        if is_oft and key == "linear_alpha":
            continue
        name = {**NAMES, **(OF_OFT if is_oft else {})}.get(key)
        if name is None or (name == "dora" and found["type"] != "lora"):
            strange = f"{_shown(value)} is not known here; leave it out, or write what it is for into [adapter]"
            complain(key, OF_LORA if name else strange)
            continue
        # What is a number in TOML has one type; in JSON 1 may be a float.
        found[name] = float(value) if name.endswith(("alpha", "dropout", "norm")) and type(value) is int else value
    if any(key in config for key in CONVOLUTIONAL):
        found["convolutions"] = True
    preset = config.get(PRESET) or {}
    if not isinstance(preset, dict):
        complain(PRESET, f"is {_shown(preset)}, and an object is meant")
        return found
    include, factors, rules = _chosen_modules(preset, algorithm, complain)
    if include:
        found["include"] = include
    if rules:
        found["rules"] = rules
    if factors and found["type"] != "lokr":
        complain(PRESET, "has factors of modules, which LoKr alone has; leave them out")
    elif factors:
        found["factors"] = factors
    return found


def _chosen_modules(
    preset: Mapping[str, Any], algorithm: str, complain: Callable[[str, str], None]
) -> tuple[list[str], dict[str, int], list[dict[str, Any]]]:
    """Patterns of the modules that are adapted, the factors of some of them, and rules for those that have another
    algorithm or other keys."""
    include, factors, rules = [], {}, []
    for key, value in preset.items():
        if key in (CLASSES, PATTERNS):
            include += [_pattern(one, key) for one in value]
        elif key in (BY_CLASS, BY_NAME):
            if key == BY_NAME and not preset.get("use_fnmatch"):
                complain(f"{PRESET}.{key}", 'has regular expressions; write glob patterns and `"use_fnmatch": true`')
                continue
            for one, own in value.items():
                include.append(_pattern(one, key))
                if own.keys() <= {"factor"} or own == {"algo": algorithm, "factor": own.get("factor")}:
                    factors |= {_pattern(one, key): own["factor"]} if "factor" in own else {}
                elif rule := _rule(own, algorithm, partial(complain, f"{PRESET}.{key}.{one}")):
                    rules.append({"pattern": _pattern(one, key), **rule})
        elif key != "use_fnmatch":
            complain(f"{PRESET}.{key}", "is not known here; leave it out, or write patterns into [adapter] include")
    # What names say comes before what classes say, which are less exact.
    rules.sort(key=lambda rule: rule["pattern"].startswith("*"))
    by_name = dict(sorted(factors.items(), key=lambda one: one[0].startswith("*")))
    return list(dict.fromkeys(include)), by_name, rules


def _pattern(name: str, key: str) -> str:
    """A glob pattern: classes of diffusers have the model's name before what they were called once: FluxAttention."""
    return f"*{name}" if key in (CLASSES, BY_CLASS) else name


def _rule(own: Mapping[str, Any], algorithm: str, complain: Callable[[str], None]) -> dict[str, Any] | None:
    """What `[[adapter.rules]]` says of modules of their own algorithm; None if that is not known here."""
    named = own.get("algo", algorithm)
    if named not in ALGORITHMS:
        complain(f"{_shown(named)} is not trained here; known: {', '.join(ALGORITHMS)}")
        return None
    keys = dict(ALGORITHMS[named])
    rule: dict[str, Any] = {"type": keys.pop("type")}
    names = {**NAMES, **OF_OFT} if rule["type"] == "oft" else NAMES
    for key, value in own.items():
        if key == "algo" or value in NOTHING.get(key, ()):
            continue
        if key not in names or key in CONVOLUTIONAL:
            complain(f"`{key}` of single modules is not read; leave it out")
            return None
        if names[key] == "dora":
            complain(f"`{key}`: {OF_LORA}")
            return None
        name = names[key]
        number = float(value) if name.endswith(("alpha", "dropout", "norm")) and type(value) is int else value
        (rule if name in ("rank", "alpha", "dropout") else keys)[name] = number
    return {**rule, **({"keys": keys} if keys else {})}


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
