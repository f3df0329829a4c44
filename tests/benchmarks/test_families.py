"""A sample of the sweep over families, drawn by what had gone wrong with some of them."""

from __future__ import annotations

from pathlib import Path

import pytest

SAMPLE = {
    "causal/qwen2_moe": "layers too small to gain, and experts that few tokens reach",
    "causal/exaone_moe": "buffers among the stored tensors",
    "causal/bart": "cross attention without a text to read",
    "seq2seq/marian": "parameters that checkpoints leave out, as the model computes them",
    "masked/bert": "every token sees all others",
    "masked/deberta": "blocks that hand on more than the hidden state",
    "seq2seq/t5": "an encoder and its decoder, with a bias of positions from the first block of each",
    "seq2seq/longt5": "an encoder whose blocks return less than those of its decoder",
    "speech/whisper": "features that are longer than what is made of them",
    "audio/audio-spectrogram-transformer": "sound, without embeddings of tokens and without a tokenizer",
    "image/vit": "images, with one row of logits for each",
    "image/siglip": "layers that the module around them fills by the names of their parts",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_comes_through_clean(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import family_steps  # type: ignore[import-not-found]

    kind, _, family = name.partition("/")
    outcome = family_steps.reload(kind, tmp_path, family_steps.walk(kind, family, tmp_path))
    assert not outcome.why
    assert {step: said for step, said in outcome.steps.items() if said not in ("ok", "-")} == {}
    assert set(outcome.steps) == set(family_steps.STEPS)
    assert {step for step, said in outcome.steps.items() if said == "-"} <= {"generate"}


def test_every_kind_has_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tiny  # type: ignore[import-not-found]

    for kind in tiny.KINDS:
        assert len(tiny.families(kind)) > 5
    assert len(SAMPLE) == 12
    assert all(family in tiny.families(kind) for kind, family in (name.split("/") for name in SAMPLE))
