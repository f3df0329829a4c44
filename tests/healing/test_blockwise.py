from __future__ import annotations

import copy
import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cur.healing import HealingConfig, HealingReport, Objectives, Status, heal, heal_blockwise
from cur.integrations import CompressConfig, compress, load_model, save
from cur.integrations.blockwise import JournalError, StreamedModel, load_streamed
from cur.integrations.blockwise.hidden_states import HiddenStates

ROOT = Path(__file__).parents[2]

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
    opened = load_streamed(student), load_streamed(teacher)
    return heal_blockwise(*opened, windows, student.parent / out, config, **options)


def healed(directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return dict(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("llama", "cur", {"precision": "bfloat16"}),
        ("llama", "folded", {"objectives": Objectives(kl=0.0, hidden=0.5, modules=1.0), "accumulate": 2}),
        ("gpt2", "interpolative", {}),
        ("qwen2", "cur", {}),
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
    assert same(found, dict(whole.state_dict()))
    assert not same(found, healed(student))
    assert (report.fits, report.trainable, report.steps) == (expected.fits, expected.trainable, expected.steps)
    assert report.best_step == expected.best_step
    for one, other in zip([report.before, *report.curve], [expected.before, *expected.curve], strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert sorted(path.name for path in student.parent.iterdir()) == ["parts", "student", "teacher"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from cur.healing import HealingConfig, heal_blockwise
from cur.integrations.blockwise import load_streamed

directory, stage, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
windows = torch.load(directory / "windows.pt")

def watch(status):
    if (status.stage, status.step) == (stage, moment):
        os.kill(os.getpid(), signal.SIGKILL)

config = HealingConfig(scope="block", metric_windows=0, natural_steps=0, steps=6, held_out=4, evaluate_every=3,
                       save_every=2, warmup=2, precision="float32")
opened = load_streamed(directory / "student"), load_streamed(directory / "teacher")
heal_blockwise(*opened, windows, directory / "parts", config, progress=watch)
"""


@pytest.mark.parametrize(("stage", "moment"), [("heal", 9)])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_cores(
    stage: str,
    moment: int,
    places: Callable[..., tuple[Path, Path]],
    windows: torch.Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = places()
    config = settings(scope="block", metric_windows=0)
    expected = by_blocks(student, teacher, windows, config, out="at-once")
    torch.save(windows, student.parent / "windows.pt")
    code = [sys.executable, "-c", KILLED, str(student.parent), stage, str(moment)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (student.parent / "parts").exists()
    loaded: list[int] = []
    original = StreamedModel.load_block
    monkeypatch.setattr(StreamedModel, "load_block", lambda self, index: (loaded.append(index), original(self, index)))
    report = by_blocks(student, teacher, windows, config)
    # The second compressed block was under way: nothing before it is loaded again, but to be written.
    assert loaded[:2] == [2, 2]
    assert same(healed(student.parent / "parts"), healed(student.parent / "at-once"))
    assert (report.curve, report.fits) == (expected.curve, expected.fits)
    logs = [(student.parent / name / "healing.jsonl").read_text() for name in ("parts", "at-once")]
    assert logs[0] == logs[1]


def test_damaged_states_of_a_run_are_made_again(
    places: Callable[..., tuple[Path, Path]], windows: torch.Tensor, settings: Settings
) -> None:
    student, teacher = places()
    config = settings(scope="block", metric_windows=0)

    def stop(status: Status) -> None:
        if status.step == 9:
            raise KeyboardInterrupt

    by_blocks(student, teacher, windows, config, out="at-once")
    with pytest.raises(KeyboardInterrupt):
        by_blocks(student, teacher, windows, config, progress=stop)
    for file in (student.parent / ".parts.run" / "states").rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    by_blocks(student, teacher, windows, config)
    assert same(healed(student.parent / "parts"), healed(student.parent / "at-once"))


def test_what_is_refused(
    places: Callable[..., tuple[Path, Path]], windows: torch.Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = places()
    config = settings(scope="block", metric_windows=0)
    for wrong, message in (
        (settings(), "`scope` must be 'block'"),
        (settings(scope="block"), "`metric_windows` must be 0"),
        (settings(scope="block", metric_windows=0, workers=2), "`workers` must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            by_blocks(student, teacher, windows, wrong)
    with pytest.raises(ValueError, match="the teacher must be the dense model"):
        by_blocks(student, student, windows, config)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "write", full)
        with pytest.raises(OSError, match=r"no space left.*start the same command again: it goes on"):
            by_blocks(student, teacher, windows, config)
    with pytest.raises(JournalError, match="unfinished run with another text"):
        by_blocks(student, teacher, windows.flip(0), config)
    assert not (student.parent / "parts").exists()


def test_memory_does_not_grow_with_depth(windows: torch.Tensor, settings: Settings, tmp_path: Path) -> None:
    """What is held at once, in bytes of parameters, is that of the same blocks whatever the depth."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    held: dict[int, int] = {}
    for depth in (4, 10):
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"0": 0}, unk_token="0")), unk_token="0")
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 61}
        torch.manual_seed(0)
        teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **shape)).eval()
        student, dense = tmp_path / f"student-{depth}", tmp_path / f"teacher-{depth}"
        teacher.save_pretrained(dense)
        words.save_pretrained(dense)
        small = copy.deepcopy(teacher)
        compress(small, windows, CompressConfig(layers=2, rank=6))
        save(small, words, student)
        opened = load_streamed(student), load_streamed(dense)

        def watch(_: Status, opened: Any = opened, depth: int = depth) -> None:
            found = {p.data_ptr(): p.nbytes for s in opened for p in s.model.parameters() if not p.is_meta}
            held[depth] = max(held.get(depth, 0), sum(found.values()))

        heal_blockwise(*opened, windows, tmp_path / "out", settings(scope="block", metric_windows=0), progress=watch)
        shutil.rmtree(tmp_path / "out")
    block = sum(parameter.nbytes for parameter in teacher.model.layers[0].parameters())
    assert held[4] == held[10]
    assert block < held[10] < 2 * block
