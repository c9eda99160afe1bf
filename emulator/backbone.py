"""Reads a backbone from a local Hugging Face folder: safetensors only, no code from the folder, no network, ever.

Whatever is wrong with a folder is found by `check`, which reads headers but no weights, and said in one sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from farfield.protocols.errors import BackboneError, did_you_mean
from farfield.protocols.sections import Quantization

from . import offline  # noqa: F401 - for its effect

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = "builtin:"

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve(name: str, base: Path) -> Path:
    """The folder that a Plan's `model.backbone` names; it need not exist.

    Args:
        name: `builtin:<name>`, or a path.
        base: what a relative path is relative to: the folder of the Plan.

    Raises:
        BackboneError: there is no builtin of that name.
    """
    if not name.startswith(BUILTIN):
        try:
            return base / Path(name).expanduser()
        except RuntimeError as error:
            raise BackboneError(str(error), where=name) from None
    wanted = name.removeprefix(BUILTIN)
    folder = Path(__file__).parent / "builtin"
    known = [one.name for one in folder.iterdir() if (one / _CONFIG).is_file()] if folder.is_dir() else []
    if wanted not in known:
        hint = did_you_mean(wanted, known) if known else "This installation carries none."
        raise BackboneError(f"there is no builtin backbone {wanted!r}", where=name, hint=hint)
    return folder / wanted


def check(folder: Path) -> None:
    """Make sure that `folder` can be loaded without running code and without a network.

    Raises:
        BackboneError: what is wrong, in which file, and what to do.
    """
    if not folder.is_dir():
        raise BackboneError("no such folder", where=folder, hint="Give the path of a local Hugging Face model folder.")
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            "the folder holds an adapter, not a backbone",
            where=folder / "adapter_config.json",
            hint="Merge the adapter into its backbone and give the folder of the result.",
        )
    _check_config(folder)
    _check_weights(folder)


def fingerprint(folder: Path) -> str:
    """SHA-256, in hexadecimal, of all that decides what the backbone computes.

    It covers the configuration, the weights and the tokenizer, each with its name relative to `folder`, in the order of
    the names; nothing else that lies in the folder. Files are streamed.

    Raises:
        BackboneError: a file cannot be read.
    """
    names = {_CONFIG, _INDEX, "generation_config.json"} | _TOKENIZER
    files = sorted(one for one in folder.iterdir() if one.name in names or one.suffix == ".safetensors")
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise BackboneError(f"cannot be read: {error.strerror}", where=file) from None
        name = file.relative_to(folder).as_posix().encode()
        # The length in front: no two sets of names and contents give the same bytes.
        digest.update(len(name).to_bytes(4, "big") + name + content)
    return digest.hexdigest()


def load_model(
    folder: Path,
    *,
    task: str,
    dtype: str,
    labels: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    quantization: Quantization = "none",
) -> PreTrainedModel:
    """The frozen backbone in `folder`, in evaluation mode.

    Args:
        task: `causal-lm` or `sequence-classification`.
        dtype: `bfloat16` or `float32`, what the weights are converted to.
        labels: how many classes; for classification only.
        seed: what a new classification head is drawn from, on the CPU whatever the device. A head that the folder holds
            for exactly this many classes is kept.
        device: where the model goes.
        attention: which of transformers' implementations of attention, for instance `eager`; None is `sdpa` for models
            that have it.
        quantization: what the matrices of its blocks are held in (`farfield.emulator.few_bits`); they are rounded one
            after the other while they are read.

    Raises:
        BackboneError: as `check` does; or the folder's model is not made for the task, or its weights are incomplete.
    """
    import torch

    check(folder)
    config, kind = model_class(folder, task=task, labels=labels)
    wanted = getattr(torch, dtype)
    with silent_transformers(), torch.random.fork_rng(devices=[]):
        # Weights that the checkpoint lacks are drawn while loading; not `torch.manual_seed`, which also seeds
        # accelerators, and those are not restored here.
        torch.default_generator.manual_seed(seed)
        try:
            model, report = cast("Any", kind).from_pretrained(
                folder,
                config=config,
                dtype=wanted if quantization == "none" else _widest(folder),
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BackboneError(
                f"transformers cannot load a {config.model_type!r} for task {task!r}: {_first_line(error)}",
                where=folder,
            ) from error
    _refuse_holes(folder, task, cast("PreTrainedModel", model), report)
    if quantization != "none":
        from .few_bits import shrink

        shrink(cast("PreTrainedModel", model), quantization, wanted)
    if task == "sequence-classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = _padding(folder, config)
    return cast("PreTrainedModel", model.requires_grad_(False).eval().to(device))


def matrix(folder: Path, path: str) -> torch.Tensor:
    """The weight of the layer at `path` of the model, as the folder has it; nothing else is read.

    Raises:
        BackboneError: the folder has none of that name.
    """
    from safetensors import safe_open

    held = {key: file for file in _files(folder) for key in _keys(file)}
    wanted = f"{path}.weight"
    # Files of a bare backbone lack the first part, and those of a model with a head may have one more.
    found = [key for key in held if wanted == key or wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
    if len(found) != 1:
        raise BackboneError(f"{wanted!r} was not found", where=folder, hint='Use initial = "zero".')
    with safe_open(held[found[0]], "pt") as file:
        return cast("torch.Tensor", file.get_tensor(found[0]))


def model_class(folder: Path, *, task: str, labels: int | None) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration in `folder`, with so many classes, and the class that transformers has for it and the task.

    Raises:
        BackboneError: the configuration is not understood, or its model is not made for the task.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = _config(folder)
    if task == "sequence-classification":
        if labels is None:
            raise BackboneError("a classifier needs to know how many classes there are", hint="Set model.labels.")
        if config.num_labels != labels:  # setting it anew would lose the names of the classes
            config.num_labels = labels
    auto: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    kind = auto._model_mapping.get(type(config), None)
    if kind is None:
        raise BackboneError(
            f"transformers cannot load a {config.model_type!r} for task {task!r}: it has no such model", where=folder
        )
    return config, kind[0] if isinstance(kind, tuple) else kind


def attention(device: torch.device, length: int) -> str | None:
    """The faster implementation: on a CPU, torch's fused kernel is slower on short sequences (docs/log.md).

    On longer ones it is as fast, and does not keep each score.
    """
    return "eager" if device.type == "cpu" and length <= 256 else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Where it has no padding token, the end-of-text token serves.

    Raises:
        BackboneError: there is none, it cannot be read, it wants code of its own, or it has neither of the two tokens.
    """
    from transformers import AutoTokenizer

    _config(folder)
    _refuse_remote_code(folder / "tokenizer_config.json")
    if not any((folder / name).is_file() for name in _TOKENIZER - {"chat_template.jinja"}):
        raise BackboneError("the folder holds no tokenizer", where=folder, hint="Save it there with save_pretrained.")
    with silent_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust parser raises bare `Exception` for a broken file
            raise BackboneError(f"the tokenizer cannot be read: {_first_line(error)}", where=folder) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(
                "the tokenizer has neither a padding nor an end-of-text token",
                where=folder / "tokenizer_config.json",
                hint='Name one there, for example "pad_token": "<pad>".',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_config(folder: Path) -> None:
    path = folder / _CONFIG
    if not path.is_file():
        raise BackboneError("there is no config.json", where=folder, hint="Save the model with save_pretrained.")
    config = _json(path)
    if not isinstance(config.get("model_type"), str):
        raise BackboneError("'model_type' is missing", where=path, hint="Save the model with save_pretrained.")
    _refuse_remote_code(path)
    _refuse_remote_code(folder / "tokenizer_config.json")
    for key, value in config.items():
        # `transformers` takes such a value for the name of a kernel and fetches its code from the hub.
        if key.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in json.dumps(value):
            raise BackboneError(
                f"'{key}' names code on the hub, which is never run", where=path, hint="Remove the key."
            )
    if "quantization_config" in config:
        raise BackboneError(
            "the checkpoint is already quantised",
            where=path,
            hint="Give the folder of the unquantised model; model.quantization says how it is to be held in memory.",
        )


def _refuse_remote_code(path: Path) -> None:
    if path.is_file() and "auto_map" in _json(path):
        raise BackboneError(
            "'auto_map' asks to run Python code from the folder, which is never done",
            where=path,
            hint="Use a model that transformers itself implements.",
        )


def _check_weights(folder: Path) -> None:
    if (folder / _WEIGHTS).is_file():
        _keys(folder / _WEIGHTS)
        return
    if (folder / _INDEX).is_file():
        _check_shards(folder)
        return
    pickles = sorted(
        one.name for pattern in _PICKLES for one in folder.glob(pattern) if one.name != "training_args.bin"
    )
    if pickles:
        raise BackboneError(
            f"the weights are in pickle format only ({pickles[0]}), and loading that can run any code",
            where=folder,
            hint="Convert them where you trust them: load the model and save it with save_pretrained.",
        )
    raise BackboneError(f"there is neither {_WEIGHTS} nor {_INDEX}", where=folder, hint="Is the download complete?")


def _check_shards(folder: Path) -> None:
    weight_map = _json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BackboneError("'weight_map' is missing or empty", where=folder / _INDEX, hint="Download it again.")
    for shard in sorted({str(one) for one in weight_map.values()}):
        if Path(shard).name != shard:
            raise BackboneError(f"shard {shard!r} lies outside the folder", where=folder / _INDEX)
        if not (folder / shard).is_file():
            raise BackboneError(f"shard {shard!r} is missing", where=folder / _INDEX, hint="Is the download complete?")
        lacking = {key for key, file in weight_map.items() if file == shard} - _keys(folder / shard)
        if lacking:
            raise BackboneError(f"{min(lacking)!r} is not in it, as the index says", where=folder / shard)


def _files(folder: Path) -> list[Path]:
    """The files of a checked folder that hold its weights."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    return [folder / name for name in sorted(set(_json(folder / _INDEX)["weight_map"].values()))]


def _widest(folder: Path) -> torch.dtype:
    """The format of its files' numbers; where they have several, the one that loses nothing."""
    import torch
    from safetensors import safe_open

    found = set()
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # it is no mapping
    return {frozenset({"BF16"}): torch.bfloat16, frozenset({"F16"}): torch.float16}.get(
        frozenset(one for one in found if one.startswith(("F", "BF"))), torch.float32
    )


def _keys(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; reads its header and compares the size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"no valid safetensors file: {error}", where=path, hint="Download or copy it again."
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"not valid JSON: {error}", where=path, hint="Download or copy it again.") from None
    if not isinstance(value, dict):
        raise BackboneError("not a JSON object", where=path, hint="Download or copy it again.")
    return value


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    _check_config(folder)
    with silent_transformers():
        try:
            return cast(
                "PreTrainedConfig", AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            )
        except Exception as error:  # each family checks its own settings, and not always before it divides by them
            raise BackboneError(f"not understood: {_first_line(error)}", where=folder / _CONFIG) from error


def _padding(folder: Path, config: PreTrainedConfig) -> int:
    """The id that a decoder with a classification head must know to find each text's last token."""
    if any((folder / name).is_file() for name in _TOKENIZER):
        return int(cast("int", load_tokenizer(folder).pad_token_id))
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise BackboneError(
            "names no padding and no end-of-text token", where=folder / _CONFIG, hint="Add pad_token_id."
        )
    return int(end)


def _refuse_holes(folder: Path, task: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises BackboneError if weights were made up, but for those of a new head, or the model is of the wrong kind."""
    from .architecture import describe, key_value_cache

    head = describe(model).head if task == "sequence-classification" else ()
    made_up = {str(one) for one in report["missing_keys"]} | {str(one[0]) for one in report["mismatched_keys"]}
    holes = sorted(name for name in made_up if not any(name.startswith(f"{part}.") for part in head))
    if holes:
        raise BackboneError(
            f"weights that task {task!r} needs are missing or of another shape: {', '.join(holes[:3])}"
            + (f" and {len(holes) - 3} more" if len(holes) > 3 else ""),
            where=folder,
            hint=f"All of {type(model).__name__} must be there, but for a new classification head.",
        )
    if task == "causal-lm" and key_value_cache(model) is None:
        raise BackboneError(
            f"{type(model).__name__} is an encoder: each position sees what follows it",
            where=folder,
            hint='Use task = "sequence-classification", or a decoder.',
        )


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars, reports or advice on stderr: whatever matters becomes an error here."""
    import transformers.utils.logging

    chatter: Any = transformers.utils.logging
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
