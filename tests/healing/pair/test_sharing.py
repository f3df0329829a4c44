from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, ResNetConfig, ResNetForImageClassification

from cur.healing import load_student, share_
from cur.healing.pair.sharing import check_pair
from cur.integrations import CompressConfig, compress, save
from cur.integrations.files.reading import CheckpointError
from cur.integrations.nn import compressed_modules, factored
from tests.models import make

Make = Callable[..., PreTrainedModel]


def shared(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    other = {parameter.data_ptr() for parameter in b.parameters()}
    return {name for name, parameter in a.named_parameters() if parameter.data_ptr() in other}


def test_equal_tensors_are_shared(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    layers = tuple(f"{name}." for name in compressed_modules(student))
    student.model.norm.weight.data += 1
    size = sum(p.numel() * 4 for n, p in student.named_parameters() if not n.startswith(layers)) - 32 * 4
    assert share_(student, teacher) >= size
    assert shared(student, teacher) == {
        name for name, _ in student.named_parameters() if not name.startswith(layers) and name != "model.norm.weight"
    }
    assert share_(student, teacher) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", factored())
def test_a_student_is_loaded_around_its_teacher(
    kind: str, layout: str, make_teacher: Make, make_student: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    teacher = make_teacher(kind)
    student = make_student(teacher, layout=layout)
    norm = student.base_model.norm if kind == "llama" else student.base_model.ln_f
    norm.weight = torch.nn.Parameter(2 * norm.weight.detach())  # no longer the teacher's
    save(student, None, tmp_path / "student")
    dense = teacher(windows).logits
    loaded = load_student(tmp_path / "student", teacher)
    assert torch.equal(loaded(windows).logits, student(windows).logits)
    assert torch.equal(
        loaded(windows).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "student")(windows).logits
    )
    assert torch.equal(teacher(windows).logits, dense)
    layers = tuple(f"{name}." for name in compressed_modules(loaded))
    own = {name for name, _ in loaded.named_parameters()} - shared(loaded, teacher)
    assert {name for name in own if not name.startswith(layers)} <= {
        name for name, _ in loaded.named_parameters() if "norm" in name or "ln_f" in name
    }
    save(loaded, None, tmp_path / "again")


def test_checkpoints_that_do_not_fit(
    student: PreTrainedModel, teacher: PreTrainedModel, make_teacher: Make, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_student(tmp_path, teacher)
    save(student, None, tmp_path / "student")
    with pytest.raises(CheckpointError):
        load_student(tmp_path / "student", make_teacher("gpt2"))
    path = tmp_path / "student" / "cur_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        load_student(tmp_path / "student", teacher)


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_model_of_the_same_shape_does_not_teach(
    dtype: torch.dtype, reported: bool, make_teacher: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    student = make_teacher("llama")
    report = compress(student, windows, CompressConfig(layers=2, targets=("q_proj",), rank=6))
    assert report.kept
    save(student.to(dtype), None, tmp_path / "student", report=report if reported else None)
    load_student(tmp_path / "student", make_teacher("llama").to(dtype))
    with pytest.raises(CheckpointError, match=r"is not the dense model that .* was made from.* --teacher"):
        load_student(tmp_path / "student", make_teacher("llama", seed=1).to(dtype))
    other = make_teacher("llama")
    other.model.norm.weight.data[0] = 2.0  # one number
    with pytest.raises(CheckpointError, match="is not the dense model"):
        load_student(tmp_path / "student", other.to(dtype))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_compressed_experts_are_refused_in_a_sentence(kind: str, windows: torch.Tensor) -> None:
    student, teacher = make(kind), make(kind)
    compress(student, windows, CompressConfig(layers=1, targets=("q_proj", "experts.down_proj"), rank=6))
    with pytest.raises(
        ValueError, match=r"`student` has compressed experts \(.*experts.down_proj.*`exclude` \"experts"
    ):
        check_pair(student, teacher)
    others = make(kind)
    compress(others, windows, CompressConfig(layers=1, targets=("q_proj",), rank=6))
    check_pair(others, teacher)


def test_compressed_convolutions_are_refused_in_a_sentence() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck")
    student, teacher = (ResNetForImageClassification(config).eval() for _ in range(2))
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    compress(student, [images], CompressConfig(layers="all", targets="all-linear", rank=2))
    with pytest.raises(ValueError, match=r"compressed convolutions \(.*linear.*`exclude` and their names"):
        check_pair(student, teacher)
