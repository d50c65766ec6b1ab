"""Checkpoints: spec and tensors in one file, loaded without running anything it holds.

Format: ``{model: {name, args, sd}, optimizer: {...}, lr_scheduler: {...}, iter}``, and where the
weights are averaged, ``ema: {decay, sd}``; released weights hold `model` and `iter`. Published
checkpoints of the same format load as they are. A ``.safetensors`` file holds `model` and `iter`,
see `utils.safetensors_files`.
"""

import errno
import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from utils import safetensors_files
from utils.atomic import replace_file
from utils.errors import UserError, first_line
from utils.typed import is_tree

LAST_NAME = "iter_last.pth"
BEST_NAME = "best.pth"
RELEASE_NAME = "release.pth"
# Of a ZIP archive, at most, its end that says where all is.
_END_BYTES = 2**16 + 22
# Mean and std, which published checkpoints lack: the config gives them, or the backbone does.
NORM_KEYS = ("norm.mean", "norm.std")


def find_weights(save_dir: Path) -> Path:
    """The weights of a run: ``iter_last.pth`` where it is there, else ``release.pth``.

    Raises:
        UserError: neither is there.
    """
    for name in (LAST_NAME, RELEASE_NAME):
        if (save_dir / name).is_file():
            return save_dir / name
    raise UserError(
        f"no weights in {save_dir} ({LAST_NAME} or {RELEASE_NAME}): train the model, "
        f"or name a checkpoint with --weights"
    )


class UnreadableError(UserError):
    """A file that cannot be read now, and may be as it should be."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Only tensors and plain values are accepted.

    A bare state dict is returned as ``{"model": {"sd": ...}}``.

    Raises:
        UserError: missing, damaged, holding Python objects, or not a checkpoint; as
            `UnreadableError` where it may be whole, and it is the system that does not give it.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder: name the .pth file in it")
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if safetensors_files.is_safetensors(path):
        safetensors_files.check_safetensors()
    try:
        content = _read(path)
    except pickle.UnpicklingError as error:
        what = "it holds" if "GLOBAL" in str(error) else "it is damaged, or holds"
        raise UserError(
            f"checkpoint {path} refused: {what} Python objects, which could run code on loading; "
            f"only tensors and plain values are accepted"
        ) from error
    except MemoryError as error:
        raise UnreadableError(f"checkpoint {path}: not enough memory to read it") from error
    except Exception as error:
        # A damaged archive may name a place that cannot be gone to: that is EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UnreadableError(
                f"checkpoint {path} cannot be read: {error.strerror or error}"
            ) from error
        # The restricted unpickler meets arbitrary bytes: IndexError, OSError, TypeError,
        # struct.error, RuntimeError and others all mean the same.
        raise UserError(
            f"checkpoint {path} is damaged or not a checkpoint ({first_line(error)})"
        ) from error
    return _as_checkpoint(content, path)


def _read(path: Path) -> Any:
    if safetensors_files.is_safetensors(path):
        return safetensors_files.read(path)
    _check_sums(path)
    with warnings.catch_warnings():
        # Said of files that are refused anyway; the error that follows is the one to read.
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_sums(path: Path) -> None:
    """The check sums of an archive's parts, which `torch.load` does not look at.

    Raises:
        zipfile.BadZipFile: one does not fit, or the archive has no end; other damage has others.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # of an old kind, without any
        # `zipfile` takes an end that the system does not give for one that is not there.
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        file.read()
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the check sum of {damaged} does not fit")


def build_model(
    checkpoint: Mapping[str, Any], path: str | Path, data_norm: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the model that a checkpoint describes and load its weights; in eval mode.

    Args:
        data_norm: the config's, for checkpoints that do not hold mean and std.

    Raises:
        UserError: no spec, weights that do not fit it, or that hold NaN or infinity.
    """
    spec = checkpoint["model"]
    if "name" not in spec:
        raise UserError(f"checkpoint {path} holds no model spec: name its config with --config")
    try:
        model = models.make(spec, data_norm=data_norm)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    load_weights(model, weights_for_inference(checkpoint), path)
    for key, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(f"checkpoint {path} is damaged: {key} holds NaN or infinity")
    return model.eval()


def weights_for_inference(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict to run: the trained weights' averages where the checkpoint holds some."""
    return {**checkpoint["model"]["sd"], **checkpoint.get("ema", {}).get("sd", {})}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` strictly, but for mean and std, which may be absent.

    Raises:
        UserError: missing, unexpected or differently shaped tensors, the first of them named.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    missing = [key for key in own if key not in state and key not in NORM_KEYS]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"checkpoint {source} is of another model: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def load_phase0(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load backbone and heaviest upsampler of a PCSR model; the others keep what they have.

    Raises:
        UserError: as :func:`load_weights`.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    fresh = ("light_sampler", "classifier.")
    own = {k: v for k, v in model.state_dict().items() if k.startswith(fresh)}
    fixed = {k: v for k, v in state.items() if not k.startswith(fresh)}
    load_weights(model, {**own, **fixed}, source)


def check_same_model(config_spec: Mapping[str, Any], spec: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose model is not the config's.

    PCSR models agree where the parts that both have agree, so a phase 0 checkpoint passes for
    its phase 1 config.

    Raises:
        UserError: naming the first difference.
    """
    if "name" not in spec:
        return
    pcsr = all(s["name"].startswith("pcsr") for s in (config_spec, spec))
    if config_spec["name"] != spec["name"] and not pcsr:
        raise UserError(
            f"checkpoint {path} holds `{spec['name']}`, the config asks for `{config_spec['name']}`"
        )
    found = _first_difference(_full_args(config_spec), _full_args(spec))
    if found is not None:
        key, ours, theirs = found
        raise UserError(
            f"checkpoint {path} is of another model: its `{key}` is {theirs}, "
            f"the config's is {ours}"
        )


def check_same_norm(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that learned with another `data_norm` than the config's, which `model` has.

    Weights that are stored in half precision have a rounded one, which is taken for the same.

    Raises:
        UserError: naming both.
    """
    own = model.state_dict()
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for key in NORM_KEYS:
        theirs = state.get(key)
        if theirs is not None and key in own and not same_norm(theirs, own[key].cpu()):
            name = key.rpartition(".")[2]
            raise UserError(
                f"checkpoint {source} learned with `data_norm.{name}` {_numbers(theirs)}, the "
                f"config's is {_numbers(own[key])}: make them equal, or leave `data_norm` out"
            )


def same_norm(first: Tensor, second: Tensor) -> bool:
    """Whether two of `data_norm`'s values are equal, but for the rounding of half precision."""
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)


def _numbers(values: Tensor) -> str:
    return f"[{', '.join(f'{value:g}' for value in values.flatten().tolist())}]"


def save_checkpoint(
    path: Path, content: Mapping[str, Any], first: Callable[[], None] | None = None
) -> None:
    """Write a checkpoint so that at any moment `path` is whole: the old one or the new one.

    Args:
        path: a ``.safetensors`` file gets the model and the iteration only.
        first: called once the new one is safe on the disk, before the old one goes.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    if safetensors_files.is_safetensors(path):
        safetensors_files.check_safetensors()
        written = memoryview(safetensors_files.to_bytes(content))
    else:
        # Through memory: torch.save reports a full disk as "unexpected pos 832 vs 726".
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        written = buffer.getbuffer()
    try:
        with replace_file(path, first=first) as temporary:
            temporary.write_bytes(written)
    except OSError as error:
        kept = "the one before is kept" if path.is_file() else "nothing was written"
        raise UserError(f"cannot save {path}: {error.strerror or error}; {kept}") from error


def _as_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    if isinstance(content, dict):
        model = content.get("model")
        if isinstance(model, dict) and _is_state_dict(model.get("sd")):
            is_spec = isinstance(model.get("name", ""), str)
            is_spec &= isinstance(model.get("args", {}), dict) and is_tree(model.get("args"))
            ema = content.get("ema", model)
            if is_spec and isinstance(ema, dict) and _is_state_dict(ema.get("sd")):
                return content
        elif _is_state_dict(content):
            return {"model": {"sd": content}}
    raise UserError(
        f"checkpoint {path} is not one of this format: it has no `model` with `name`, `args` and "
        f"`sd` (and `ema` with `sd`), and is no state dict of plain tensors"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    )


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that holds real numbers, one for each element."""
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    return is_tensor and not value.is_meta and not value.is_complex() and not value.is_quantized


def _full_args(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's arguments with the builder's defaults filled in, recursively."""
    args = dict(spec.get("args") or {})
    if spec.get("name") in models.MODELS:
        args = {**models.MODELS.defaults(spec["name"]), **args}
    args.pop("data_norm", None)
    return {
        key: {"name": value["name"], "args": _full_args(value)}
        if isinstance(value, Mapping) and "name" in value
        else value
        for key, value in args.items()
    }


def _first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Path and values of the first key that both have and that differs."""
    for key in ours:
        if key not in theirs or ours[key] == theirs[key]:
            continue
        if isinstance(ours[key], Mapping) and isinstance(theirs[key], Mapping):
            found = _first_difference(ours[key], theirs[key])
            if found is not None:
                return f"{key}.{found[0]}", *found[1:]
            continue
        return key, ours[key], theirs[key]
    return None
