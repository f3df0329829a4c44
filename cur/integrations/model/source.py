"""The directory that a model in memory came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cur.integrations.files.beside import parts_of
from cur.integrations.files.reading import CONFIG
from cur.integrations.model.origin import origin_of

__all__ = ["source_of"]


def source_of(model: Any) -> Path | None:
    """Return the directory that a model was loaded from, None if it came from none, or from one file.

    Of the hub, it is what lies in the cache; what it lacks is fetched where the hub can be reached.

    Parameters
    ----------
    model : Any
        The model to ask about.
    """
    name = origin_of(model).source
    if not name:
        return None
    place = Path(name).expanduser()
    if place.is_dir():
        return place.absolute() if (place / CONFIG).exists() else None
    revision = getattr(model.config, "_commit_hash", None)
    if revision is None:  # a GGUF file, or a directory that is gone
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    weights = [
        f"*.{kind}" for kind in ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx*", "ot")
    ]
    try:
        found = Path(snapshot_download(name, revision=revision, ignore_patterns=weights))
        if parts := parts_of(found):
            snapshot_download(name, revision=revision, allow_patterns=[f"{part}/*" for part in parts])
        return found
    except (LocalEntryNotFoundError, OSError):
        return None
