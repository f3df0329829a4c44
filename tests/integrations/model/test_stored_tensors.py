from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from cur.integrations.model import stored_tensors
from cur.integrations.model.stored_tensors import ModelFiles, without_weights


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


def test_all_that_is_made_of_one_stored_tensor_is_found_by_its_name(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model("llama")
    state = model.state_dict()
    parts = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    fused = torch.cat([state.pop(name) for name in parts])
    fused_name = "model.layers.0.mlp.both.weight"
    model.save_pretrained(tmp_path, state_dict={**state, fused_name: fused})
    converter = [("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"])]
    monkeypatch.setattr(
        stored_tensors,
        "conversions",
        lambda _: [WeightConverter(*pair, operations=[Chunk(dim=0)]) for pair in converter],
    )
    files = ModelFiles(tmp_path, without_weights(tmp_path, type(model)))
    for name in parts:
        assert files.holds(name)
        found = dict(files.read(name))
        assert found.keys() == set(parts)
        assert torch.equal(found[name], model.state_dict()[name])
    assert fused_name not in files.unread
    assert not files.holds("model.layers.0.mlp.other.weight")
