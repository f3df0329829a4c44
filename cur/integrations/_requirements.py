"""Imported before all else in this package: one error that says what to type, instead of a missing module."""

from importlib.util import find_spec

_missing = [name for name in ("torch", "transformers", "safetensors", "greenlet") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"`cur.integrations` needs {', '.join(_missing)}, not installed here; "
        'type: pip install "cur-decomposition[transformers]"'
    )
