"""Checks that the parts of a pipeline's folder are complete, before any of them is loaded.

diffusers and transformers continue with random weights where a file lacks them or names them differently, and with an
empty tokenizer where there is no vocabulary. The libraries' own rules for names are applied here to the files' headers.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.policies.weight_files import (
    Stored,
    and_more,
    find_weights,
    read_headers,
    read_json,
    refuse_integers,
    refuse_quantised,
)

META = torch.device("meta")
HARMLESS = ("lm_head.weight", "position_ids")
"""Suffixes of weights in published files that are not loaded: T5's decoder head, and buffers saved by old versions."""


Difference = tuple[list[str], list[str], list[tuple[str, list[int], list[int]]]]
"""How the tensors in files differ from those of a configuration: names missing from the files, unexpected names in the
files, and mismatches as (name, shape in the file, shape by the configuration)."""


@contextmanager
def about(where: object) -> Iterator[None]:
    """Turn any exception that a library raises within the block into a UserError about ``where``.

    A user's file can make the libraries raise anything, so the block should concern only one file.
    """
    try:
        with quiet_libraries():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.path: {where}: {type(error).__name__}: {reason_of(error)}") from error


def check_model(part: Path, kind: Any, variant: str | None) -> None:
    """Check that a network, VAE or text encoder has exactly the weights that its configuration asks for.

    Args:
        part: its folder.
        kind: its class in diffusers or transformers.
        variant: variant of the files, as in :func:`pcpo_fast.policies.weight_files.find_weights`.

    Raises:
        UserError: otherwise; names the file and the weight.
    """
    config = check_config(part, kind)
    library = kind.__module__.partition(".")[0]
    weights = find_weights(part, library, variant)
    stored = read_headers(weights.files)
    refuse_quantised(stored)
    refuse_integers(stored)
    if library == "transformers":
        difference = _of_transformers(kind, part, stored)
    else:
        model, given = _on_meta(kind, part, config), _tensors(stored)
        if weights.index is None:
            model._fix_state_dict_keys_on_load(given)  # names from before weights could be split over files
        difference = _compare(model.state_dict(), given)
    where = weights.files[0] if weights.index is None else weights.index
    _refuse(difference, stored, where, kind.__name__, "model.path")


def check_single_file(file: Path, part: Path, kind: Any, key: str) -> None:
    """Check that a single file holds a network's weights, under its authors' names or diffusers'.

    Args:
        file: the file of weights.
        part: folder whose ``config.json`` describes the network.
        kind: the network's class.
        key: the setting that names the file.

    Raises:
        UserError: otherwise; names the file and the weight.
    """
    if not file.exists():
        raise UserError(f"{key}: {file} does not exist")
    if file.is_dir():
        raise UserError(
            f"{key}: {file} is a folder; give one .safetensors file, or the pipeline's folder in model.path"
        )
    if file.suffix not in (".safetensors", ".sft", ".gguf"):
        raise UserError(
            f"{key}: {file} is not a .safetensors file, and pickled weights are not supported: convert it first"
        )
    config = check_config(part, kind)
    stored = read_headers([file], key)
    refuse_quantised(stored, key)
    model, given = _on_meta(kind, part, config), _tensors(stored)
    own = model.state_dict()
    found, problem = len(own.keys() & given.keys()), ""
    if found < len(own):
        try:
            with quiet_libraries():
                convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
                converted = convert(config=config, checkpoint=dict(given))
        except KeyError as error:
            problem = f"lacks {error.args[0]}, so it holds no {kind.__name__}"
        except Exception:  # with unknown names the conversion can fail in any way
            problem = (
                f"holds no {kind.__name__}: its names, such as {min(stored, default='none')}, are "
                "neither diffusers' nor those of its authors"
            )
        few = found <= len(own) / 2
        if problem and few:
            raise UserError(f"{key}: {file} {problem}")
        if not problem and (few or len(own.keys() & converted.keys()) > found):  # many names may be the same in both
            given = converted
    _refuse(_compare(own, given), stored, file, kind.__name__, key)


def check_config(part: Path, kind: Any, key: str = "model.path") -> dict[str, Any]:
    """Read a part's ``config.json`` and check that it describes the class ``kind``.

    Args:
        part: the part's folder.
        kind: the class it must be.
        key: the setting that names the pipeline's folder, for messages.

    Raises:
        UserError: it is missing, malformed, of another class, or says that the weights are quantised.
    """
    file = part / "config.json"
    config = read_json(file, key)
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        raise UserError(
            f"{key}: {part.name} is quantised ({_method(quantised)}; quantization_config in {file}): "
            "quantised parts cannot be loaded or trained, so use the model before quantisation"
        )
    found = config.get("_class_name")
    if found is None and "model_type" in config and hasattr(kind, "config_class"):
        # CLIP's text model has been saved as "clip" and as "clip_text_model".
        fits = str(kind.config_class.model_type).startswith(str(config["model_type"]))
        found = kind.__name__ if fits else f"model of the type {config['model_type']}"
    if found not in (None, kind.__name__):
        raise UserError(f"{key}: {file} is of a {found}; {part.name} must be a {kind.__name__}")
    return config


def check_latent_scale(part: Path) -> None:
    """Check that the scale and shift of latents in the VAE's configuration, if given, are valid numbers.

    Raises:
        UserError: otherwise; names the file and the key.
    """
    file = part / "config.json"
    config = read_json(file)
    for name, default in (("scaling_factor", 1.0), ("shift_factor", None)):
        value: Any = config.get(name, default)
        if value is None and default is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name == "scaling_factor" and not value > 0):
            positive = " above 0" if name == "scaling_factor" else ""
            raise UserError(f"model.path: {file}: {name} must be a number{positive}, got {value!r}")


def check_rotary_axes(file: Path, config: Mapping[str, Any], default: tuple[int, ...]) -> None:
    """Check that the axes of FLUX's rotary embeddings add up to the size of an attention head.

    Args:
        file: the network's ``config.json``, for messages.
        config: its contents.
        default: the axes if the configuration gives none.

    Raises:
        UserError: otherwise; names the file.
    """
    axes, width = config.get("axes_dims_rope", default), config.get("attention_head_dim", 128)
    if not isinstance(axes, list | tuple) or sum(axes) != width:
        raise UserError(
            f"model.path: {file} says axes_dims_rope {axes}, which must add up to attention_head_dim {width}"
        )


def check_encoder_depth(encoder: Path, layers: Sequence[int], named_in: str = "") -> None:
    """Check that a text encoder has the layers whose states the network reads.

    Args:
        encoder: its folder.
        layers: their numbers from 1, in ascending order.
        named_in: where the numbers come from, for the message.

    Raises:
        UserError: otherwise; names the file.
    """
    file = encoder / "config.json"
    said = read_json(file)
    there = said.get("text_config", said).get("num_hidden_layers")
    if isinstance(there, int) and there < layers[-1]:
        read = " and ".join(filter(None, (", ".join(map(str, layers[:-1])), str(layers[-1]))))
        raise UserError(
            f"model.path: {file} says num_hidden_layers {there}; the states of layers {read} are read{named_in}, so it "
            f"must be at least {layers[-1]}"
        )


def check_tokenizer(part: Path, kind: Any, encoder: Path) -> None:
    """Check that a tokenizer has a vocabulary, and that its text encoder has an embedding for every token.

    Raises:
        UserError: otherwise; names the file.
    """
    names: dict[str, str] = kind.vocab_files_names
    whole, pieces = names["tokenizer_file"], [name for key, name in names.items() if key != "tokenizer_file"]
    if not (part / whole).is_file() and not all((part / name).is_file() for name in pieces):
        lacking = [name for name in pieces if not (part / name).is_file()]
        raise UserError(
            f"model.path: {part} has no vocabulary: neither {whole} nor {', '.join(lacking)} is there, so all "
            "prompts would be encoded alike"
        )
    files = [part / name for name in ([whole] if (part / whole).is_file() else pieces)]
    for file in (*files, part / "tokenizer_config.json"):
        if file.suffix == ".json" and file.exists():
            read_json(file)
    where = " and ".join(map(str, files))
    with about(f"{where} cannot be read as a {kind.__name__}"):
        tokenizer = kind.from_pretrained(part, local_files_only=True)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        known = model["vocab"]  # by name, or in a list of pairs
        vocabulary = set(known if isinstance(known, Mapping) else (piece for piece, _ in known))
        ids = tokenizer("a red circle", padding="max_length", max_length=16, truncation=True)["input_ids"]
    special = set(tokenizer.all_special_tokens)
    if len(vocabulary - special) < 2:
        raise UserError(f"model.path: {where} has no vocabulary, so all prompts would be encoded alike")
    unmade = _without_merge(model, vocabulary - special)
    if len(unmade) > len(vocabulary) // 100:
        raise UserError(
            f"model.path: {files[-1]} lacks merges: no merge produces {unmade[0]!r}{and_more(unmade)}, so words would "
            "be split into letters"
        )
    config = read_json(encoder / "config.json")
    config = config.get("text_config", config)
    room, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    if "rope_parameters" in config or "rope_theta" in config:
        positions = None  # rotary embeddings have no table that could end
    largest = max(*ids, *tokenizer.get_vocab().values())
    if isinstance(room, int) and largest >= room:
        raise UserError(
            f"model.path: {where} has tokens up to number {largest}, but {encoder.name}/config.json has embeddings for "
            f"{room} (vocab_size): the two belong to different models"
        )
    length = tokenizer.model_max_length
    if isinstance(positions, int) and not (isinstance(length, int | float) and length <= positions):
        raise UserError(
            f"model.path: {part / 'tokenizer_config.json'} must set model_max_length to at most {positions}, the "
            f"positions that {encoder.name} has (max_position_embeddings)"
        )


def check_scheduler(part: Path, name: str, *, flow: bool) -> None:
    """Check that a scheduler can be created from its configuration and fits the kind of model.

    Args:
        part: its folder.
        name: its class in diffusers.
        flow: whether the model is a flow model.

    Raises:
        UserError: otherwise; names the file.
    """
    file = part / "scheduler_config.json"
    config = read_json(file)
    if name.startswith("FlowMatch") != flow:
        kinds = ("diffusion", "flow") if flow else ("flow", "diffusion")
        raise UserError(f"model.path: {file}: a {name} is for {kinds[0]} models, and this is a {kinds[1]} model")
    with about(f"{file} makes no {name}"):
        getattr(diffusers, name).from_config(config)


def check_finite(module: nn.Module, part: Path, prefix: str = "") -> None:
    """Refuse weights that are infinite or NaN; takes one pass over the weights if all are finite.

    Args:
        module: its adapters, and weights that are not stored as floating-point numbers, are skipped.
        part: folder of the weights, for the message.
        prefix: what the names of the module's weights begin with in the whole part.

    Raises:
        UserError: a weight is not finite; names the part and the weight.
    """
    weights = {
        prefix + name: weight.detach()
        for name, weight in module.named_parameters()
        if "lora_" not in name and weight.is_floating_point() and not weight.is_meta
    }
    if weights and not bool(torch.nn.utils.get_total_norm(weights.values(), float("inf")).isfinite()):
        bad = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
        name = bad[0].replace(".base_layer.", ".")
        raise UserError(f"model.path: {part}: {name}{and_more(bad)} holds values that are infinite or not a number")


def _on_meta(kind: Any, part: Path, config: Mapping[str, Any]) -> Any:
    with about(f"{part / 'config.json'} makes no {kind.__name__}"), META:
        return kind.from_config(dict(config))


def _tensors(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: one.tensor for name, one in stored.items()}


def _compare(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Difference:
    return (
        [name for name in own if name not in given],
        [name for name in given if name not in own],
        [
            (name, list(given[name].shape), list(own[name].shape))
            for name in own
            if name in given and given[name].shape != own[name].shape
        ],
    )


def _of_transformers(kind: Any, part: Path, stored: Mapping[str, Stored]) -> Difference:
    """The difference as transformers reports it, after its own renaming, tying and ignoring of weights."""
    with about(f"{part / 'config.json'} makes no {kind.__name__}"):
        config = kind.config_class.from_pretrained(part, local_files_only=True)
        _, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=_tensors(stored),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    unexpected = [name for name in sorted(report["unexpected_keys"]) if not name.endswith(HARMLESS)]
    mismatched = [(name, list(file), list(model)) for name, file, model in sorted(report["mismatched_keys"])]
    return (sorted(report["missing_keys"]), unexpected, mismatched)


def _refuse(difference: Difference, stored: Mapping[str, Stored], where: Path, kind: str, key: str) -> None:
    missing, unexpected, mismatched = difference
    if missing and unexpected:
        raise UserError(
            f"{key}: {where} is not the {kind} of config.json: it lacks {missing[0]}{and_more(missing)} and "
            f"has {unexpected[0]}{and_more(unexpected)} instead"
        )
    if missing:
        raise UserError(f"{key}: {where} lacks {missing[0]}{and_more(missing)}, which config.json requires")
    if unexpected:
        file = stored[unexpected[0]].file if unexpected[0] in stored else where
        raise UserError(f"{key}: {file} has {unexpected[0]}{and_more(unexpected)}, which config.json does not have")
    if mismatched:
        name, found, wanted = mismatched[0]
        file = stored[name].file if name in stored else where
        raise UserError(
            f"{key}: {file}: {name}{and_more([each[0] for each in mismatched])} has the shape {found}, but "
            f"by config.json it must be {wanted}"
        )


def _without_merge(model: Mapping[str, Any], vocabulary: Collection[str]) -> list[str]:
    """Tokens of more than one character that no merge of a byte-pair encoding produces, longest first."""
    if model.get("type") != "BPE":
        return []
    end = model.get("end_of_word_suffix") or ""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    made = {"".join(pair) for pair in pairs}
    long = (piece for piece in vocabulary if len(piece.removesuffix(end)) > 1)
    return sorted((piece for piece in long if piece not in made), key=lambda piece: (-len(piece), piece))


def _method(quantised: Any) -> str:
    if not isinstance(quantised, Mapping):
        return str(quantised)
    bits = next((f", {bits} bits" for bits in (4, 8) if quantised.get(f"load_in_{bits}bit")), "")
    return f"{quantised.get('quant_method', 'by an unnamed method')}{bits}"
