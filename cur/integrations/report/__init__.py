"""What came of it: figures of every layer and of the model, as data, as a card and as a page; perplexity.

Imports `plan`, `measure`, `model`, `files` and `nn`.
"""

from cur._lib.moved import former_names

__getattr__ = former_names(
    __name__, ("cur.integrations.report.data", "cur.integrations.model.size", "cur._lib.versions")
)
