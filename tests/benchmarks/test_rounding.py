"""The benchmark of rounding a whole model runs, says what it stores, and goes on where it ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import rounding_methods, rounding_model
from benchmarks.baselines import magnitudes
from benchmarks.divergence import References
from benchmarks.tiny import WORDS, tokenizer
from cur._lib.interval import interval
from cur.integrations import batches, collect, linear_modules

METHODS = list(rounding_methods.METHODS)


def quiet(done: int, total: int | None) -> None:
    """Show nothing."""


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=WORDS, initializer_range=0.2, **shape)).eval()


@pytest.fixture
def known(llama: LlamaForCausalLM) -> rounding_methods.Known:
    windows = torch.randint(WORDS, (4, 16), generator=torch.Generator().manual_seed(0))
    names = linear_modules(llama, "all-linear", blocks=[0, 1])
    statistics = collect(llama, list(batches(windows, batch_size=1)), modules=names, moments="full", gradients=names)
    first = [group[0] for group in rounding_methods.sharing(statistics, names)]
    return rounding_methods.Known(llama, names, statistics, magnitudes(llama, windows, first), windows)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_rounds_the_blocks_and_nothing_else(method: str, known: rounding_methods.Known) -> None:
    before = {name: value.clone() for name, value in known.dense.state_dict().items()}
    model, stored = rounding_methods.METHODS[method](known, 4, 64)
    after = model.state_dict()
    assert after.keys() == before.keys()
    rounded = {f"{name}.weight" for name in known.names}
    assert len(rounded) == 14
    for name, value in before.items():
        assert torch.equal(known.dense.state_dict()[name], value)  # the dense model is for the next method, too
        assert torch.equal(after[name], value) == (name not in rounded)
        # a grid of four bits is off by few percent of a normal matrix's norm
        assert float((after[name] - value).norm() / value.norm()) < 0.3
    weights = sum(before[name].numel() for name in rounded)
    assert weights / 2 < stored < 0.8 * weights


def test_bytes_by_method(known: rounding_methods.Known) -> None:
    stored = {method: rounding_methods.METHODS[method](known, 4, 32)[1] for method in METHODS}
    shapes = [known.dense.get_submodule(name).weight.shape for name in known.names]
    # inputs of 24 are a group, those of 64 are two
    groups = sum(m * (1 if n == 24 else 2) for m, n in shapes)
    weights = sum(m * n for m, n in shapes)
    assert stored["nearest"] == stored["GPTQ"] == stored["both sides"] == weights / 2 + 2.5 * groups
    # packed into whole bytes
    assert stored["nearest"] <= stored["ours, block after block"] < 1.05 * stored["nearest"]
    assert stored["HQQ"] == weights / 2 + 4 * groups
    assert stored["torchao"] == weights / 2 + 2 * groups
    # what q, k and v read, o, gate and up, and down
    assert stored["AWQ"] == stored["nearest"] + 2 * 2 * (24 + 24 + 24 + 64)


def test_one_side_is_plain_gptq_and_two_lose_less_under_both_moments(known: rounding_methods.Known) -> None:
    loss = {}
    for method in ("nearest", "GPTQ", "both sides"):
        model, _ = rounding_methods.METHODS[method](known, 3, 64)
        total = 0.0
        for name in known.names:
            E = known.weight(name) - model.get_submodule(name).weight.detach().double()
            G, H = known.statistics.second_moment(name), known.statistics.output_moment(name)
            total += float(torch.sum((H @ E) * (E @ G)))
        loss[method] = total
    assert loss["both sides"] < loss["GPTQ"] < loss["nearest"]


@pytest.mark.parametrize("method", METHODS)
def test_the_last_group_of_a_row_may_be_shorter(method: str, known: rounding_methods.Known) -> None:
    known.statistics.check(known.dense)
    sizes = {}
    for group in (16, 24, 64):
        model, sizes[group] = rounding_methods.METHODS[method](known, 3, group)
        name = "model.layers.0.self_attn.v_proj"  # 24 inputs: 16 and 8
        W, Q = known.weight(name), model.get_submodule(name).weight.detach().double()
        assert float((W - Q).norm() / W.norm()) < 0.6
        if method != "AWQ":  # whose columns have scales of their own
            numbers = [len(row.unique()) for row in Q[:, : min(group, 24)]]
            assert max(numbers) <= 8
    assert sizes[16] > sizes[24] > sizes[64]


def test_divergence_and_top_tokens_are_those_of_the_logits(llama: LlamaForCausalLM, monkeypatch: Any) -> None:
    monkeypatch.setattr("cur.integrations.report.endings._CHUNK", 5 * 4 * WORDS)
    windows = {
        name: torch.randint(WORDS, (2, 12), generator=torch.Generator().manual_seed(place))
        for place, name in enumerate("ab")
    }
    reference = References(llama, windows, quiet)
    torch.manual_seed(1)
    other = LlamaForCausalLM(llama.config).eval()
    other.lm_head = llama.lm_head
    found = reference.compare(other, quiet)
    for name, text in windows.items():
        for place, window in enumerate(text):
            with torch.no_grad():
                p, q = (model(window[None]).logits[0].double().log_softmax(-1) for model in (llama, other))
            assert math.isclose(found[name]["kl"][place], float((p.exp() * (p - q)).sum(-1).mean()), rel_tol=1e-4)
            assert found[name]["same"][place] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    exact = reference.compare(llama, quiet)
    assert exact == {name: {"kl": [0.0, 0.0], "same": [1.0, 1.0]} for name in "ab"}


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert math.isclose(half, 4.302652729 / math.sqrt(3), rel_tol=1e-8)
    assert interval([1.0]) == (1.0, math.inf)


def test_a_run_goes_on_where_it_ended(llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: Any) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    text = " ".join(f"w{4 + (7 * place * place) % 97}" for place in range(900))
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(rounding_model, "topics", {"a": text})
    out, picture = tmp_path / "results.json", tmp_path / "picture.svg"

    def run(*options: str) -> list[dict[str, Any]]:
        places = {"model": tmp_path / "model", "wikitext": tmp_path, "cache": tmp_path / "cache", "out": out}
        given = [part for name, place in {**places, "picture": picture}.items() for part in (f"--{name}", str(place))]
        sizes = ["--length", "32", "--windows", "2", "--calibration", "4", "--threads", "1", "--groups", "64"]
        rounding_model.main([*given, *sizes, *options])
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
        return rows

    monkeypatch.setattr("os.cpu_count", lambda: 1)
    first = run("--bits", "4", "--only", "nearest")
    assert [(row["method"], row["bits"], row["group"]) for row in first] == [("nearest", 4, 64)]
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    statistics = [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").iterdir())]
    assert len(statistics) == 2
    both = run("--bits", "8", "4", "--only", "GPTQ", "nearest")
    assert [(row["method"], row["bits"]) for row in both] == [
        ("nearest", 8), ("GPTQ", 8), ("nearest", 4), ("GPTQ", 4)
    ]  # fmt: skip
    assert both[2] == first[0]
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").iterdir())] == statistics
    assert {len(values) for row in both for values in row["kl"].values()} == {2}
    more = run("--bits", "4", "--only", "nearest", "--windows", "3")
    assert len(more) == 4
    assert more[2]["windows"] == 3
    assert more[2]["kl"]["WikiText-2"][:2] == pytest.approx(first[0]["kl"]["WikiText-2"], rel=1e-4)
    # other moments, other rows
    assert len(run("--bits", "4", "--only", "nearest", "--calibration", "5")) == 1
