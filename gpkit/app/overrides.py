"""Check the overrides that a user typed, and explain an error in one line."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from gpkit.app.result import larger_is_better
from gpkit.checks import nearest

HERE = Path(__file__).resolve().parents[1]
# An installed wheel has the configs inside of the package, a checkout beside it.
CONFIG_DIR = HERE / "configs" if (HERE / "configs").is_dir() else HERE.parent / "configs"

# Values that may have another type than their default.
ANY_TYPE = re.compile(r"device\.devices|trainer\.(limit_\w+|precision|val_check_interval)")


TYPES: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str, int, float)),
}


# Choices of Hydra's groups that a package brings.
PLUGINS = {
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper"},
}
SEVERAL = ("logger", "callbacks")  # groups of which several files can be chosen

# What a file of configs can compute: a share of a count, and the name of a folder.
OmegaConf.register_new_resolver(
    "part", lambda count, share: count and max(1, round(count * share)), replace=True
)
OmegaConf.register_new_resolver("short", lambda name: short(name), replace=True)
OmegaConf.register_new_resolver(
    "direction", lambda name: "maximize" if larger_is_better(name) else "minimize", replace=True
)


def short(name: str, longest: int = 120) -> str:
    """Return a name for a folder. One that is too long ends with a number, to stay different.

    >>> short("penalty.match=head.*,seed=0"), short("seed=0", 4)
    ('penalty.match=head._,seed=0', 'seed~42792869')
    """
    plain = re.sub(r"[^\w.,=+-]", "_", name)
    if len(plain) <= longest:
        return plain
    return f"{plain[:longest]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return overrides as Hydra parses them."""
    return list(OverridesParser.create().parse_overrides(list(overrides)))


def set_keys(overrides: Sequence[str]) -> set[str]:
    """Return the dotted keys that overrides set, such as ``{"model.width"}``."""
    return {o.key_or_group for o in parse(overrides) if "." in o.key_or_group}


def check_types(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a value that has another type than its default.

    Args:
        cfg: the composed config.
        overrides: the overrides that it was composed with.

    Raises:
        TypeError: for the first such value.
        ValueError: for a key that nothing reads.
    """
    typed = parse(overrides)
    _require_readers(cfg)
    for o in typed:
        if is_group(o.key_or_group) and isinstance(o.value(), list):
            if o.key_or_group not in SEVERAL:
                raise TypeError(_one_name(o))
        elif o.is_add():
            _require_free(o.key_or_group)
    keys = [o.key_or_group for o in typed if not (o.is_add() or o.is_delete())]
    groups = [text for text, o in zip(overrides, typed, strict=True) if "." not in o.key_or_group]
    chosen = tuple(text for text in groups if not _is_sweep_or_value(text))
    default = _composed(chosen, str(GlobalHydra.instance().config_loader().get_search_path()))
    for key in keys:
        old, new = (OmegaConf.select(c, key, default=None) for c in (default, cfg))
        if ANY_TYPE.fullmatch(key) or old is None or new is None:
            continue
        if isinstance(new, DictConfig) or isinstance(old, DictConfig) or OmegaConf.is_list(old):
            continue  # an object for a value, such as a schedule for a weight
        words, fits = TYPES.get(type(old), ("", (object,)))
        if not isinstance(new, fits) or (isinstance(new, bool) and not isinstance(old, bool)):
            raise TypeError(f"{key} must be {words}, like its default {old}; got {new!r}")


@lru_cache(maxsize=32)
def _composed(groups: tuple[str, ...], search_path: str) -> DictConfig:
    """Return the config of some groups, as it is before values are set; to be read only.

    Args:
        groups: the choices.
        search_path: where their files are, which is the only other thing that it depends on.
    """
    return compose("train", list(groups))


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    """Return the keys at the top of any config: those of its file, and the groups that it names."""
    main = OmegaConf.load(CONFIG_DIR / "train.yaml")
    assert isinstance(main, DictConfig)
    groups = [str(k) for each in main.defaults if isinstance(each, DictConfig) for k in each]
    return frozenset({*map(str, main), *groups} - {"defaults", "hydra"})


TRAINER_KEYS = {
    "logger": "logger=csv",
    "callbacks": "callbacks=[early_stopping], or +callbacks.mine._target_=...",
    "accelerator": "device.accelerator=cpu",
    "devices": "device.devices=2",
    "strategy": "device.strategy=ddp",
    "plugins": "trainer.precision=... or device.strategy=...",
    "default_root_dir": "hydra.run.dir=...",
}


def _require_readers(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads, from the command line or from a file.

    Raises:
        ValueError: for the first such key; the message has the nearest that is read.
    """
    known = _known()
    for key in sorted({str(k) for k in cfg} - known):
        if re.search(rf"\${{{re.escape(key)}[}}.\[]", OmegaConf.to_yaml(cfg)):
            continue  # another value is made of it
        there = ", ".join(sorted(known))
        raise ValueError(f"nothing reads {key!r}{nearest(key, known)}; there are {there}")
    for group in ("loss", "scheduler"):
        unread = [k for k in cfg[group] if k != "_target_"]
        if cfg[group]._target_ is None and unread:
            raise ValueError(
                f"nothing reads {group}.{unread[0]}, since {group}._target_ is null: set it"
            )
    for key in cfg.get("debug") or ():
        raise ValueError(f"nothing reads debug.{key}: use debug={', '.join(_names('debug'))}")


def _require_free(key: str) -> None:
    """Refuse a key, added with +, that the run sets itself.

    Raises:
        ValueError: for such a key.
    """
    top, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if top == "trainer" and name in TRAINER_KEYS:
        raise ValueError(f"+{key}: the run sets trainer.{name}: use {TRAINER_KEYS[name]}")


def _is_sweep_or_value(text: str) -> bool:
    """Whether an override without a dot sets a value (``seed=1``), not a group."""
    return not is_group(text.lstrip("+~").split("=")[0].split("@")[0])


def is_group(key: str) -> bool:
    """Whether a key is a group, of whose files one is chosen."""
    return "." not in key and (CONFIG_DIR / key).is_dir()


def _one_name(override: Override) -> str:
    """Return the message for a group whose value is not one of its names."""
    group, value = override.key_or_group, override.get_value_string()
    line = f"{group} must be one of {', '.join(_names(group))}; got {value}"
    if group == "penalty" and isinstance(override.value(), list):
        line += f": for several, penalty=sum 'penalty.parts={value}'"
    return line


def _names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Return an error as one line that names the nearest valid option.

    Args:
        error: from composing a config or from running a job.
        overrides: the overrides that the user typed.

    Returns:
        One line.
    """
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], overrides)
    if found := re.search(r"(?:In '[^']*': )?Could not (?:find|load) '([^']+)'", text):
        group, _, name = found[1].rpartition("/")
        options = re.findall(r"\n\t(\S+)", text.partition("Config search path")[0])
        options = options or _names(group)  # of a group of which several can be chosen
        if not group:
            return f"there is no config {name!r}"
        plugins = PLUGINS.get(group, {})
        if name in plugins:
            return f"{group}={name} needs a package: pip install {plugins[name]}"
        options += [each for each in plugins if each not in options]
        return (
            f"{group}={name}: there is no {group} {name!r}{nearest(name, options)}; "
            f"there are {', '.join(options)}"
        )
    if found := re.search(r"Error (?:loading|locating target) '([^']+)'", text):
        return _unknown_target(found[1])
    if found := re.search(r"Multiple values for (\w+)\. To override", text):
        typed = [o for o in parse(overrides) if o.is_add() and o.key_or_group == found[1]]
        values = "".join(f"={o.get_value_string()}" for o in typed)
        return (
            f"+{found[1]}{values}: one {found[1]} is chosen already: {found[1]}{values}, without +"
        )
    if text.startswith("Config group override must be a string"):
        wrong = [o for o in parse(overrides) if is_group(o.key_or_group)]
        return _one_name(next(o for o in wrong if not isinstance(o.value(), str)))
    if found := re.search(r"Key '(\w+)' is not in struct", text):
        return f"the config has no {found[1]!r}, but a run needs it: leave out ~{found[1]}"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found[1]} must be given: {found[1]}=..."
    if type(error).__name__ == "OverrideParseException" or "LexerNoViableAlt" in text:
        return f"cannot read an override: {_flat(text)}; write key=value, and quote strings"
    if found := re.search(r"unexpected keyword argument '(\w+)'", text):
        return _unknown_option(found[1], text, overrides)
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        return explain(error.__cause__, overrides)
    if re.search(r"closed by peer|reset by peer|terminated with signal|Broken pipe", text):
        return f"a process of the run died: killed, or out of memory ({_flat(text)[:160]})"
    if isinstance(error, (KeyError, AssertionError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return _flat(text)


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Return the message for a key that the config does not have."""
    others = [
        text for text, o in zip(overrides, parse(overrides), strict=True) if o.key_or_group != key
    ]
    try:
        config = compose("train", others)
    except Exception:  # another override is wrong too: take the names of the default config
        config = compose("train", [])
    parent, _, name = key.rpartition(".")
    for typed in (o for o in parse(overrides) if o.key_or_group == key and not parent):
        groups = sorted(path.parent.name for path in CONFIG_DIR.glob(f"*/{typed.value()}.yaml"))
        if groups:
            group = next(iter(get_close_matches(key, groups, 1, 0.0)))
            return f"{key}: there is no group {key!r} (did you mean '{group}={typed.value()}'?)"
    node: Any = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        top = key.split(".")[0]
        hint = nearest(top, map(str, config)) if top not in config else ""
        return f"{key}: there is no {parent or key!r} to set{hint}"
    names = [str(k) for k in node if not str(k).startswith("_") or str(k) == "_target_"]
    where = f" of {parent}" if parent else ""
    line = f"{key}: there is no option {name!r}{where}{nearest(name, names)}"
    return f"{line}; there are {', '.join(names)} (+{key}=... adds one)"


def _unknown_target(path: str) -> str:
    """Return the message for a ``_target_`` that cannot be imported."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as missing:
        return f"_target_={path}: cannot be imported ({missing}); use module.name of what to call"
    return f"_target_={path}: {module_name} has no {name!r}{nearest(name, dir(module))}"


def _unknown_option(name: str, text: str, overrides: Sequence[str]) -> str:
    """Return the message for an option that a target does not take."""
    found = re.search(r"(?:Error in call to|Error instantiating) target '([^']+)'", text)
    told = re.sub(r"^Error in call to target '[^']+': *", "", text).partition("full_key:")
    words = _flat(told[0]).removeprefix('TypeError("').removesuffix('")')
    line = f"{words}: the target takes no option {name!r}"
    target = found[1] if found else _target_of(name, overrides)
    return line if target is None else line + nearest(name, signature_of(get_object(target)))


def _target_of(name: str, overrides: Sequence[str]) -> str | None:
    """Return the ``_target_`` that the option of this name was typed for; None if none was."""
    keys = [o.key_or_group.rpartition(".") for o in parse(overrides)]
    parents = [parent for parent, _, last in keys if last == name and parent]
    if not parents or not GlobalHydra.instance().is_initialized():
        return None
    found = OmegaConf.select(compose("train", list(overrides)), f"{parents[0]}._target_")
    return None if found is None else str(found)


def signature_of(target: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a target; none if it has no signature."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return {}


def _flat(text: str) -> str:
    """Return a text as one line, without Hydra's own advice."""
    text = re.sub(r"(Set the environment variable HYDRA_FULL_ERROR|See https://hydra).*", "", text)
    return re.sub(r"\s+", " ", text).strip()
