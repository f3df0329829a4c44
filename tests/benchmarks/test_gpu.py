from __future__ import annotations

from pathlib import Path

import pytest


def test_the_benchmark_of_devices_runs_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu  # type: ignore[import-not-found]

    found = gpu.main(["--shape", "tiny", "--device", "cpu", "--windows", "2", "--length", "16"])
    before, after = found["parameters"]
    assert after < before
    assert {"calibrate", "plan", "decompose", "factorizations alone"} <= found["seconds"].keys()
    assert found["peak, GB"] is None


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err
