"""The files of a model's directory that are no weights, and go along with every checkpoint made from it.

Processors and chat templates, licences, the model's own code, what sentence-transformers keeps around a model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from cur.integrations.files.reading import CONFIG, CheckpointError

__all__ = [
    "ACCOUNT",
    "HISTORY",
    "PAGE",
    "PLAN",
    "REPORT",
    "carry",
    "is_as_stored",
    "missing_files",
    "name_of",
    "parts_of",
]

PLAN = "plan.json"
REPORT = "report.json"
PAGE = "report.html"
ACCOUNT = "account.json"

HISTORY = (PLAN, REPORT, "healing.json", "healing.jsonl", "quantization.json")
"""What a checkpoint of ours says of how it was made, which stays true of what is made from it."""

# What describes the one checkpoint that it lies in.
_OWN = (CONFIG, "README.md", PAGE, ACCOUNT)
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|npz|mlmodel|tflite|part|partial)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index\.json|adapter_config\.json|trainer_state\.json|events\.out\.tfevents.*"
)
_MODULES = "modules.json"
# What older tokenizers say in files of their own would overrule what a tokenizer says that was saved anew.
_TOKENIZER = "tokenizer_config.json"
_IN_TOKENIZER = ("added_tokens.json", "special_tokens_map.json")


def name_of(source: Path) -> str:
    """Return what a directory is called: of the hub's cache the name of the model there.

    Parameters
    ----------
    source : Path
        The directory of a model.
    """
    if source.parent.name != "snapshots":
        return str(source)
    return source.parent.parent.name.removeprefix("models--").replace("--", "/")


def is_as_stored(tokenizer: Any, source: Path) -> bool:
    """Say whether a tokenizer is what transformers reads from a directory.

    Its files are better copied then than written anew: transformers reads those of some models as a tokenizer of its
    own make, whatever they hold, and other libraries read the files.

    Parameters
    ----------
    tokenizer : Any
        The tokenizer in memory.
    source : Path
        The directory to compare it with.

    Returns
    -------
    bool
        Whether both are the same.
    """
    try:
        again = AutoTokenizer.from_pretrained(source)
        with TemporaryDirectory(prefix="cur-") as scratch:
            places = Path(scratch, "given"), Path(scratch, "stored")
            for one, place in zip((tokenizer, again), places, strict=True):
                one.save_pretrained(place)
            given, stored = ({file.name: file.read_bytes() for file in place.iterdir()} for place in places)
            return given == stored
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError):
        return False  # it has none, or one that only its own code reads


def carry(source: Path, target: Path, *, history: bool = True) -> None:
    """Copy every file of a directory that is no weights and that the target does not have already.

    Parameters
    ----------
    source : Path
        The directory of the model to carry files from.
    target : Path
        Directory of what was made from it.
    history : bool, default True
        Whether records of how it was made go along.

    Raises
    ------
    CheckpointError
        If ``modules.json`` of sentence-transformers is damaged.
    """
    for name, goes in _files(source):
        if name in _IN_TOKENIZER and (target / _TOKENIZER).exists():
            continue
        if goes and (history or name not in HISTORY) and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def missing_files(source: Path, target: Path) -> list[str]:
    """Name what lies beside the weights in one directory and not in the other; of folders that are left out the name.

    Weights and what describes that one checkpoint alone do not count.

    Parameters
    ----------
    source : Path
        The directory that should be complete.
    target : Path
        The directory that may lack files.

    Returns
    -------
    list of str
        The names of the missing files.
    """
    anew = _IN_TOKENIZER if (target / _TOKENIZER).exists() else ()
    return [name for name, _ in _files(source) if name not in anew and not (target / name).exists()]


def _files(source: Path) -> Iterator[tuple[str, bool]]:
    """Yield every file but the model's own weights by its name below the directory, and whether it goes along."""
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            yield from _folder(entry, entry.name in parts_of(source))
        elif entry.name.startswith(".") or entry.name in _OWN:
            continue
        elif not _WEIGHTS.fullmatch(entry.name):
            yield entry.name, True
        elif not entry.name.endswith((".safetensors", ".bin", ".index.json")):
            yield entry.name, False


def _folder(folder: Path, part: bool) -> Iterator[tuple[str, bool]]:
    """Yield the files of a folder that belongs to the model, or its name if it is a model, or a copy, of its own."""
    if folder.name.startswith((".", "__")):
        return
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    if not part and any(_WEIGHTS.fullmatch(file.name) for file in files):
        yield folder.name, False
        return
    for file in sorted(files):
        yield file.relative_to(folder.parent).as_posix(), True


def parts_of(source: Path) -> set[str]:
    """Return the folders of what sentence-transformers puts behind the model, with weights of their own.

    Parameters
    ----------
    source : Path
        The directory of a model.

    Raises
    ------
    CheckpointError
        If ``modules.json`` is damaged.
    """
    path = source / _MODULES
    if not path.exists():
        return set()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {str(module["path"]).split("/")[0] for module in modules if module.get("path")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not list modules by `path` ({error}): it is damaged; fetch it again"
        ) from error
