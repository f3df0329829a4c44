from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from cur.integrations.model import stored_tensors


def test_a_name_that_the_model_has_is_not_lost_to_a_renaming(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Families rename what older files hold, by patterns that also match names of their own.
    renamings = [(r"\.norm\.", ".kv_norm."), (r"\.old_embed\.", ".embed_tokens.")]
    monkeypatch.setattr(stored_tensors, "conversions", lambda _: [WeightRenaming(*pair) for pair in renamings])
    names = ["model.norm.weight", "model.old_embed.weight", "norm.weight", "model.gone.weight"]
    assert stored_tensors.names_in_model(make_model("llama"), names) == {
        "model.norm.weight": ("model.norm.weight", False),
        "model.old_embed.weight": ("model.embed_tokens.weight", False),
        "norm.weight": ("model.norm.weight", False),
        "model.gone.weight": ("model.gone.weight", False),
    }
