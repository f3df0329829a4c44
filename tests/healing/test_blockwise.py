from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cur.healing import HealingConfig, HealingReport, Objectives, heal, heal_blockwise
from cur.integrations import load_model, save
from cur.integrations.blockwise import JournalError, Skeleton, load_skeleton
from cur.integrations.nn import compressed_modules

Make = Callable[..., PreTrainedModel]
Settings = Callable[..., HealingConfig]


@pytest.fixture
def places(make_teacher: Make, make_student: Make, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The function that writes a teacher and a student in several shards: ``places("llama")``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    def write(kind: str = "llama", **options: Any) -> tuple[Path, Path]:
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"0": 0}, unk_token="0")), unk_token="0")
        teacher = make_teacher(kind)
        student = make_student(teacher, **options)
        teacher.save_pretrained(tmp_path / "teacher", max_shard_size="20kB")
        words.save_pretrained(tmp_path / "teacher")
        save(student, words, tmp_path / "student", max_shard_size="20kB")
        return tmp_path / "student", tmp_path / "teacher"

    return write


def by_blocks(
    student: Path, teacher: Path, windows: Any, config: HealingConfig, *, out: str = "parts", **options: Any
) -> HealingReport:
    skeletons = load_skeleton(student), load_skeleton(teacher)
    return heal_blockwise(*skeletons, windows, student.parent / out, config, **options)


def healed(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return {name: tensor for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("llama", "cur", {"precision": "bfloat16"}),
        ("llama", "folded", {"objectives": Objectives(kl=0.0, hidden=0.5, modules=1.0), "accumulate": 2}),
        ("gpt2", "interpolative", {}),
    ],
)
def test_the_cores_are_those_of_the_models_in_memory(
    kind: str,
    layout: str,
    options: dict[str, Any],
    places: Callable[..., tuple[Path, Path]],
    windows: torch.Tensor,
    settings: Settings,
) -> None:
    student, teacher = places(kind, layout=layout)
    config = settings(scope="block", metric_windows=0, **options)
    dense = load_model(teacher).model
    whole = load_model(student).model
    expected = heal(whole, dense, windows, config)
    report = by_blocks(student, teacher, windows, config)
    found = healed(student.parent / "parts")
    assert same(found, {name: tensor for name, tensor in whole.state_dict().items()})
    assert not same(found, healed(student))
    assert (report.fits, report.trainable, report.steps) == (expected.fits, expected.trainable, expected.steps)
    assert report.best_step == expected.best_step
    for one, other in zip([report.before, *report.curve], [expected.before, *expected.curve], strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert sorted(path.name for path in student.parent.iterdir()) == ["parts", "student", "teacher"]
