"""Finds the weight files of a pipeline's part and reads their headers, without reading weights."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pcpo_fast.errors import UserError, reason_of

QUANTISED = re.compile(r"[IU]8|F[468]_.*")
"""Names that safetensors headers use for types of fewer than 16 bits."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Prefix of the weight files of each library."""
COUNTS = ("position_ids", "num_batches_tracked")
"""Suffixes of tensors that may hold integers: in old text encoders, and in batch norms."""
POINTER = b"version https://git-lfs"


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: the file that holds it.
        dtype: its type as in the header, such as "BF16".
        tensor: an empty tensor of its shape on the meta device.
    """

    file: Path
    dtype: str
    tensor: Tensor


@dataclass(frozen=True)
class Weights:
    """The weight files of a part.

    Attributes:
        files: the files.
        variant: their variant, such as "fp16"; None for files without one.
        index: the index that lists them; None for a single file.
    """

    files: tuple[Path, ...]
    variant: str | None = None
    index: Path | None = None


def read_json(path: Path, key: str = "model.path") -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing, unreadable or not a JSON object; ``key`` names the setting.
    """
    try:
        text = path.read_bytes()
        values = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{key}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        if text.startswith(POINTER):
            raise UserError(f"{key}: {path} is {_pointer(path)}") from None
        raise UserError(f"{key}: {path} is not valid JSON: {reason_of(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{key}: {path} must contain a JSON object")
    return values


def find_weights(folder: Path, library: str, wanted: str | None) -> Weights:
    """Find the files that a library would read a part from.

    Args:
        folder: the part's folder.
        library: "diffusers" or "transformers".
        wanted: the preferred variant. None prefers files without a variant, then the only variant if there is one.

    Raises:
        UserError: no weights were found, their index is broken, or there are several variants to choose from.
    """
    stem = STEMS[library]
    candidates = [wanted, None] if wanted is not None else [None]
    found = next(filter(None, (_weights(folder, library, one) for one in candidates)), None)
    if found is not None:
        return found
    others = variants(folder, library)
    if len(others) == 1 and (only := _weights(folder, library, others[0])) is not None:
        return only
    if others:
        raise UserError(
            f"model.path: {folder} holds no {stem}.safetensors, only the variants {', '.join(others)}: choose one with "
            "model.variant"
        )
    raise UserError(f"model.path: {folder} holds no {stem}.safetensors{_instead(folder)}")


def variants(folder: Path, library: str) -> list[str]:
    """The variants for which a part has files."""
    stem = re.escape(STEMS[library])
    name = re.compile(
        rf"{stem}\.([\w-]+?)(-\d{{5}}-of-\d{{5}})?\.safetensors"
        rf"|{stem}\.safetensors\.index\.([\w-]+)\.json|{stem}\.safetensors\.([\w-]+)\.index\.json"
    )
    matches = (name.fullmatch(path.name) for path in folder.glob("*"))
    return sorted({found[1] or found[3] or found[4] for found in matches if found})


def read_headers(files: Iterable[Path], key: str = "model.path") -> dict[str, Stored]:
    """Read the headers of safetensors files: every tensor, by name.

    Raises:
        UserError: a file is truncated, a git-lfs pointer or not safetensors; ``key`` names the setting.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    found[name] = Stored(file, part.get_dtype(), torch.empty(part.get_shape(), device="meta"))
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{key}: {file} {_broken(file, error)}") from None
    return found


def refuse_quantised(stored: dict[str, Stored], key: str = "model.path") -> None:
    """Refuse quantised weights.

    Raises:
        UserError: a weight is quantised; names the first one, and ``key`` names the setting.
    """
    quantised = [name for name, one in stored.items() if QUANTISED.fullmatch(one.dtype)]
    if quantised:
        one = stored[quantised[0]]
        raise UserError(
            f"{key}: {one.file} is quantised: {quantised[0]}{and_more(quantised)} is stored as {one.dtype}. Quantised "
            "weights cannot be trained: use the model before quantisation"
        )


def refuse_integers(stored: dict[str, Stored]) -> None:
    """Refuse integer weights, which the libraries would silently convert to floating point.

    Raises:
        UserError: a weight is an integer; names the first one.
    """
    others = [
        name for name, one in stored.items() if not re.fullmatch(r"B?F\d+", one.dtype) and not name.endswith(COUNTS)
    ]
    if others:
        one = stored[others[0]]
        raise UserError(
            f"model.path: {one.file}: {others[0]}{and_more(others)} is stored as {one.dtype}, but weights must be "
            "floating-point numbers"
        )


def and_more(names: Sequence[str]) -> str:
    """The number of names after the first, to be inserted into a sentence."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weights(folder: Path, library: str, variant: str | None) -> Weights | None:
    stem, infix = STEMS[library], "" if variant is None else f".{variant}"
    single = folder / f"{stem}{infix}.safetensors"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    old = folder / f"{stem}.safetensors{infix}.index.json"  # the name in older versions of diffusers
    if library == "diffusers" and variant is not None and not index.is_file() and old.is_file():
        index = old
    # Given both, diffusers reads the index and transformers the single file.
    if (single.is_file() or single.is_symlink()) and not (library == "diffusers" and index.is_file()):
        return Weights((single,), variant)
    if not index.is_file():
        return None
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"model.path: {index} has no weight_map naming a file for each weight")
    for weight, name in listed.items():
        if not (folder / name).is_file():
            raise UserError(f"model.path: {index} says that {weight} is in {name}, but there is no such file")
    return Weights(tuple(folder / name for name in sorted(set(listed.values()))), variant, index)


def _instead(folder: Path) -> str:
    """What a folder without weights contains instead, as the end of a sentence."""
    names = sorted(path.name for path in folder.glob("*"))
    for suffix, problem in (
        (".gguf", "quantised weights cannot be trained"),
        (".safetensors", "name a single file of the network in model.transformer or model.unet"),
        (".bin", "pickled weights are not read: save the model anew with safe_serialization=True"),
    ):
        of_kind = [name for name in names if name.endswith(suffix)]
        if of_kind:
            return f", but {of_kind[0]}{and_more(of_kind)}; {problem}"
    return ""


def _broken(file: Path, error: Exception) -> str:
    try:
        with file.open("rb") as opened:
            start, size = opened.read(len(POINTER)), file.stat().st_size
    except OSError as problem:
        return f"cannot be read: {reason_of(problem)}"
    if start == POINTER:
        return f"is {_pointer(file)}"
    if start.startswith(b"GGUF"):
        return "is a GGUF file: quantised weights cannot be trained, so take the model that was quantised"
    if size == 0:
        return "is empty: copy or download it again"
    return f"is truncated or not a safetensors file ({reason_of(error)}): copy or download it again"


def _pointer(file: Path) -> str:
    return f"a git-lfs pointer and not the file itself: run `git lfs pull` in {file.parent}"
