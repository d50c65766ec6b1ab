"""Configs: YAML files in the ``{name, args}`` grammar, checked key by key before anything runs."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from utils.errors import UserError
from utils.registry import nearest
from utils.typed import conform, is_tree


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads ``2e-4`` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping; a key given twice is an error, not an override."""
        seen = set()
        for key_node, _ in node.value:
            # Compared as written: values that a `<<` merges in may be overridden.
            key = key_node.value
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"config: a key must be a plain word (line {line})")
            if key in seen:
                raise UserError(f"config: key `{key}` is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class DataConfig:
    """One data set: what it holds, how samples are made of it, and how they are loaded.

    Attributes:
        dataset: spec of the image source.
        wrapper: spec of what makes (LR, HR) samples of it.
        batch_size: samples per iteration, over all ranks.
        num_workers: loader processes, over all ranks.
        scales: scales to validate at.
    """

    dataset: dict[str, Any]
    wrapper: dict[str, Any]
    batch_size: int = 1
    num_workers: int = 0
    scales: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """A checked config. Attribute names are the YAML's keys.

    Attributes:
        name: file name without suffix; names the folder below ``save/``.
        model: model spec. `optimizer`, `lr_scheduler` likewise.
        phase: 0 or 1 for PCSR, None for original networks.
        psnr_type: "rgb" or "y", the channels that PSNR and SSIM are taken on.
        patch_size, step: patch-wise evaluation, in LR pixels.
        data_norm: ``{mean, std}`` on RGB in [0, 1], or None for the backbone's default.
        routing_loss: spec of phase 1's loss; None for the published one.
        loss_rgb_w, loss_avg_w: weights of its two parts, of the pixels and of the routing.
        l2_from: the first iteration, from 0, in which pixels are compared by L2; None for L1
            always. Values and gradients of L2 are some ten times smaller: `loss_rgb_w` and
            `grad_clip` weigh as much less.
        psnr_from: likewise for minus the images' mean PSNR, in dB, see `engine.pixel_loss`. What
            began last is in effect. Its gradients are some hundred times those of L1.
        iter_max, iter_print, iter_val, iter_save: in iterations.
        iter_save_s: save at least this often, in seconds; None for `iter_save` alone.
        scale: the original network's scale.
        seed: of weights and samples; None draws one.
        init: weights that a new run starts from, of which PCSR takes backbone and heaviest
            upsampler; None for random ones, in phase 1 for the phase 0 config's.
        revive: the iterations, from 0, before which dead ReLU units get new weights, see
            `models.dead_units`.
        precision: "fp32" or "bf16" (autocast) arithmetic in training.
        channels_last: memory layout of the convolutions in training.
        microbatches: on the CPU, pieces that a batch is cut into, one thread each; None for 4
            (1 in bf16).
        accumulate: parts that a batch is computed in one after another, for less memory.
        grad_clip: the largest norm of the gradient of all weights; None for any.
        ema: decay of the average of the weights that validation and release take; None for none.
        warmup: iterations in which the learning rate grows to that of `lr_scheduler`.
        nan_skip: updates in a row that are left out where loss or gradient is not finite, before
            the run stops; 0 stops at once.
        compile: "none", "default" (torch.compile), "graphs" (the same, with its CUDA graphs) or
            "capture" (a CUDA graph of the step, without a compiler).
        keep_last: checkpoints to keep: iter_last.pth and those before it.
        raw: the whole config as read, overrides applied.
    """

    name: str
    model: dict[str, Any]
    phase: int | None = None
    train_dataset: DataConfig | None = None
    valid_dataset: DataConfig | None = None
    test_dataset: DataConfig | None = None
    psnr_type: str = "y"
    patch_size: int = 32
    step: int = 28
    data_norm: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None
    routing_loss: dict[str, Any] | None = None
    loss_rgb_w: float = 1000.0
    loss_avg_w: float = 3.0
    l2_from: int | None = None
    psnr_from: int | None = None
    iter_max: int = 0
    iter_print: int = 100
    iter_val: int = 0
    iter_save: int = 1000
    iter_save_s: float | None = None
    scale: int | None = None
    seed: int | None = None
    init: str | None = None
    revive: list[int] = field(default_factory=list)
    precision: str = "fp32"
    channels_last: bool = False
    microbatches: int | None = None
    accumulate: int = 1
    grad_clip: float | None = None
    ema: float | None = None
    warmup: int = 0
    nan_skip: int = 0
    compile: str = "none"
    keep_last: int = 2
    raw: dict[str, Any] = field(default_factory=dict)


_CHOICES = {
    "phase": (0, 1),
    "psnr_type": ("rgb", "y"),
    "precision": ("fp32", "bf16"),
    "compile": ("none", "default", "graphs", "capture"),
}
_AT_LEAST_ONE = (
    "patch_size",
    "step",
    "iter_print",
    "batch_size",
    "iter_save",
    "scale",
    "microbatches",
    "accumulate",
    "keep_last",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config file.

    Args:
        path: YAML file.
        overrides: ``key.path=value`` strings; values are read as YAML.

    Raises:
        UserError: no such file, not YAML, unknown or missing key, or a value of the wrong type.
    """
    raw = load_raw(path)
    for override in overrides:
        _apply_override(raw, override)
    return check_config(raw, Path(path).stem)


def load_raw(path: str | Path) -> dict[str, Any]:
    """A config file's mapping as it is, not checked; see :func:`load_config` for what it raises."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"config: {path} does not exist") from error
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config: {path} is no UTF-8 text file") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"config: {path} must hold a mapping of keys")
    return _unshared(raw)


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are values of their own, so that each can be overridden."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def check_config(raw: Mapping[str, Any], name: str) -> Config:
    """Turn a plain mapping into a :class:`Config`; see :func:`load_config` for what it raises."""
    if raw.get("model") is None:
        raise UserError("config: key `model` is missing")
    values = _check_keys(raw, Config, "", skip=("name", "raw"))
    if "l2_from" in values and values["l2_from"] == values.get("psnr_from"):
        raise UserError("config: `l2_from` and `psnr_from` are equal: leave one of them out")
    return Config(name=name, raw=copy.deepcopy(dict(raw)), **values)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; UserError names `source` and the line where it is malformed."""
    endless = f"config: {source} is nested without end, or too deeply: look at its aliases"
    try:
        value = yaml.load(text, _Loader)
    except RecursionError as error:
        raise UserError(endless) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"config: {source}: {problem}{place}") from error
    if not is_tree(value):
        raise UserError(endless)
    return value


def dump_yaml(raw: Mapping[str, Any]) -> str:
    """The config as YAML text, keys in the order of the file."""
    return yaml.safe_dump(dict(raw), sort_keys=False, default_flow_style=None, width=100)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key.path=value")
    *parents, last = key.strip().split(".")
    node: Any = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: `{parent}` is not a mapping")
        node = child
    node[last] = parse_yaml(value, f"--set {override}")


def _check_keys(raw: Mapping[str, Any], cls: type, where: str, skip: Sequence[str] = ()) -> dict:
    known = {name: kind for name, kind in get_type_hints(cls).items() if name not in skip}
    values = {}
    for key, value in raw.items():
        if key not in known:
            raise UserError(f"config: unknown key `{where}{key}`{nearest(key, known)}")
        if value is not None:
            values[key] = _check_value(known[key], value, f"{where}{key}", key)
    return values


def _check_value(kind: Any, value: Any, where: str, key: str) -> Any:
    if DataConfig in get_args(kind):
        return _data_config(value, where)
    checked = conform(value, kind, where)
    if key in _CHOICES and checked not in _CHOICES[key]:
        choices = ", ".join(str(c) for c in _CHOICES[key])
        raise UserError(f"config: `{where}` must be one of {choices}, not {value!r}")
    lowest = 1 if key in _AT_LEAST_ONE else 0
    if isinstance(checked, (int, float)) and checked < lowest:
        raise UserError(f"config: `{where}` must be {lowest} or more, not {value!r}")
    if key == "revive" and any(step < 0 for step in checked):
        raise UserError(f"config: `{where}` must be iterations, from 0 on, not {value!r}")
    if key == "seed" and checked >= 2**63:
        raise UserError(f"config: `{where}` must be below 2^63, not {value!r}")
    if key == "ema" and checked >= 1:
        raise UserError(f"config: `{where}` must be below 1, not {value!r}")
    if key == "grad_clip" and checked == 0:
        raise UserError(f"config: `{where}` must be above 0: leave it out for no limit")
    return checked


def _data_config(value: Any, where: str) -> DataConfig:
    conform(value, dict, where)
    for key in ("dataset", "wrapper"):
        if value.get(key) is None:
            raise UserError(f"config: `{where}.{key}` is missing")
    return DataConfig(**_check_keys(value, DataConfig, f"{where}."))
