"""Config files and command-line overrides, with errors that name the nearest right thing."""

import difflib
import importlib.resources
import os
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags


def parse(argv: Sequence[str]) -> ConfigDict:
    """Reads `--config=FILE[:ARG]` and its `--config.section.field=value` overrides.

    Args:
      argv: only arguments that start with `--config`. FILE is a path, or `configs/NAME.py` as
        installed with the package.

    Raises:
      ValueError: on a missing file, unknown field or value of the wrong type; the message says
        which, and what was probably meant.
    """
    overrides = [argument.partition("=")[0] for argument in argv if argument.startswith("--config.")]
    if overrides:
        # Checked against the file itself: the flags' own message says less, and less clearly.
        config = parse([argument for argument in argv if not argument.startswith("--config.")])
        _check_fields(config, [name.removeprefix("--config.") for name in overrides])
    values = flags.FlagValues()
    argv = ["sg4v", *map(_resolve, argv)]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        # Errors of a config file arrive with their traceback as text; its last line is the point.
        lines = str(error.args[0] if error.args else error).strip().splitlines()
        message = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        raise ValueError(f"config: {message}") from error
    if values["config"].value is None:
        raise ValueError("which config? Give --config=configs/NAME.py[:SIZE]; " + _known())
    return values["config"].value


def load(spec: str, **overrides: object) -> ConfigDict:
    """The config of `configs/NAME.py:ARG`, with `section.field` keys overridden.

    Unlike `parse`, an override may be any value, such as the tuple of groups.

    Raises:
      ValueError: as `parse`.
    """
    config = parse([f"--config={spec}"])
    _check_fields(config, list(overrides))
    config.update_from_flattened_dict(overrides)
    return config


def _check_fields(config: ConfigDict, paths: Sequence[str]) -> None:
    """Raises ValueError at the first path that is no field, naming the nearest one or all there are."""
    for path in paths:
        node = config
        parts = path.split(".")
        for i, part in enumerate(parts):
            known = list(node) if isinstance(node, ConfigDict) else []
            if part not in known:
                near = difflib.get_close_matches(part, known, n=1)
                where = ".".join(["config", *parts[:i]])
                there = f"there are {', '.join(known)}" if known else "it is a value"
                hint = f"did you mean {where}.{near[0]}?" if near else there
                raise ValueError(f"no field {where}.{part}; {hint}")
            node = node[part]


def _resolve(argument: str) -> str:
    """Points `--config=configs/x.py:arg` to the installed file if there is none here."""
    flag, separator, value = argument.partition("=")
    if flag != "--config" or not separator:
        return argument
    path, colon, arg = value.partition(":")
    if not os.path.exists(path):
        installed = _installed() / pathlib.PurePath(path).name
        if not installed.exists():
            near = difflib.get_close_matches(installed.name, _names(), n=1)
            hint = f"; did you mean configs/{near[0]}?" if near else f"; {_known()}"
            raise ValueError(f"no config file {path}{hint}")
        path = os.fspath(installed)
    return f"--config={path}{colon}{arg}"


def _installed() -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("sg4v_jax.configs")))


def _names() -> list[str]:
    hidden = ("__init__.py", "common.py", "pods.py")
    return sorted(path.name for path in _installed().glob("*.py") if path.name not in hidden)


def _known() -> str:
    return "there are " + ", ".join(f"configs/{name}" for name in _names())
