"""Compression of transformer models: measure, plan, swap, save.

Importing this package needs the ``transformers`` extra. It also registers the checkpoint format, so that
after ``import cur.integrations`` a compressed directory loads with ``AutoModelForCausalLM.from_pretrained``.
The modules themselves are imported when one of their names is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"`cur.integrations` needs {', '.join(_missing)}, not installed here; "
        'type: pip install "cur-decomposition[transformers]"'
    )

if TYPE_CHECKING:
    from cur.integrations.calibration import Statistics, collect
    from cur.integrations.evaluate import Perplexity, perplexity
    from cur.integrations.layers import choose_layers, decoder_layers, linear_modules
    from cur.integrations.models import DEFAULT_MODEL, LoadedModel, load_model
    from cur.integrations.text import batches, dataset_texts, embedded_text, read_text, token_windows

_HOME = {
    "DEFAULT_MODEL": "models",
    "LoadedModel": "models",
    "Perplexity": "evaluate",
    "Statistics": "calibration",
    "batches": "text",
    "choose_layers": "layers",
    "collect": "calibration",
    "dataset_texts": "text",
    "decoder_layers": "layers",
    "embedded_text": "text",
    "linear_modules": "layers",
    "load_model": "models",
    "perplexity": "evaluate",
    "read_text": "text",
    "token_windows": "text",
}

__all__ = [
    "DEFAULT_MODEL",
    "LoadedModel",
    "Perplexity",
    "Statistics",
    "batches",
    "choose_layers",
    "collect",
    "dataset_texts",
    "decoder_layers",
    "embedded_text",
    "linear_modules",
    "load_model",
    "perplexity",
    "read_text",
    "token_windows",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
