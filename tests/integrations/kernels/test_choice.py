from __future__ import annotations

from typing import Any

import pytest
import torch

from cur.integrations.kernels import GridWeight, Kernel, KernelSettings, choice, limit, times
from cur.integrations.kernels.choice import best, candidates, choose, size_class
from tests.integrations.kernels.grids import make

EXACT, INT8 = KernelSettings(memory=10**6), KernelSettings("int8", memory=10**6)


def fake(name: str, held: int = 1, **facts: Any) -> Kernel:
    return Kernel(
        name,
        lambda state, x: x,
        lambda weight, dtype: name,
        facts.pop("takes", lambda weight, dtype: True),
        lambda weight, dtype: held,
        **facts,
    )


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", None)
    monkeypatch.setattr(choice, "_said", set())
    monkeypatch.setattr(limit, "_taken", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Seconds by kernel, to be set by a test, and the measurements that were made."""
    found: dict[str, Any] = {"seconds": {}, "runs": []}

    def measured(runs: dict[str, Any], x: torch.Tensor) -> dict[str, float]:
        found["runs"].append((list(runs), tuple(x.shape), x.dtype))
        return {name: found["seconds"][name] for name in runs}

    monkeypatch.setattr(times, "measured", measured)
    return found


def chosen(kernels: list[Kernel], weight: GridWeight, size: int = 1, settings: KernelSettings = EXACT) -> str:
    return choose(weight, torch.float32, size, settings, lambda one: None, kernels).name


def test_tokens_belong_to_the_next_size_that_is_timed() -> None:
    assert [size_class(tokens) for tokens in (1, 2, 4, 5, 17, 64, 65, 5000)] == [1, 4, 4, 16, 64, 64, 128, 128]


def test_the_fastest_is_chosen_and_measured_once(clock: dict[str, Any]) -> None:
    kernels, weight = [fake("slow"), fake("fast"), fake("slower")], make(4, 8)
    clock["seconds"] = {"slow": 2.0, "fast": 1.0, "slower": 3.0}
    assert chosen(kernels, weight) == chosen(kernels, make(4, 8)) == "fast"
    assert clock["runs"] == [(["slow", "fast", "slower"], (1, 8), torch.float32)]
    # Another number of tokens, grid or dtype is another case.
    chosen(kernels, weight, size=16)
    chosen(kernels, make(4, 8, bits=3))
    chosen(kernels, make(4, 8, symmetric=True))
    chosen(kernels, make(4, 64, group=32))
    assert len(clock["runs"]) == 5


def test_one_that_is_new_is_measured_with_the_others(clock: dict[str, Any]) -> None:
    weight = make(4, 8)
    clock["seconds"] = {"a": 2.0, "b": 1.5, "c": 1.0}
    assert chosen([fake("a"), fake("b")], weight) == "b"
    assert chosen([fake("a"), fake("b"), fake("c")], weight) == "c"
    assert chosen([fake("a"), fake("b")], weight) == "b"
    assert len(clock["runs"]) == 2


def test_a_tenth_of_the_time_is_not_worth_more_memory() -> None:
    weight, kernels = make(4, 8), [fake("large", 100), fake("small", 10)]
    assert best(kernels, {"large": 1.0, "small": 1.05}, weight, torch.float32).name == "small"
    assert best(kernels, {"large": 1.0, "small": 1.2}, weight, torch.float32).name == "large"


def test_what_rounds_inputs_is_tried_only_where_it_is_allowed(clock: dict[str, Any]) -> None:
    kernels = [fake("exact"), fake("other"), fake("rounds", exact=False)]
    clock["seconds"] = {"exact": 2.0, "other": 3.0, "rounds": 1.0}
    weight = make(4, 8)
    assert chosen(kernels, weight, settings=INT8) == "rounds"
    # That its time is known does not make it a candidate.
    assert chosen(kernels, weight) == "exact"
    assert KernelSettings().activations == "exact"


def test_candidates_fit_the_tokens_the_weight_the_packages_and_the_memory() -> None:
    weight = make(4, 8)
    kernels = [
        fake("any"),
        fake("few", most=4),
        fake("not this", takes=lambda weight, dtype: dtype == torch.float64),
        fake("missing", needs=("no_such_package",)),
        fake("large", 10**7, expands=True),
        fake("small", 10**5, expands=True),
    ]

    def names(size: int) -> list[str]:
        return [one.name for one in candidates(weight, torch.float32, size, EXACT, kernels)]

    assert names(4) == ["any", "few", "small"]
    assert names(16) == ["any", "small"]
    owner = fake("owner")
    limit.claim(owner, 950_000, torch.device("cpu"))
    assert names(16) == ["any"]
    del owner
    assert names(16) == ["any", "small"]


def test_a_missing_package_is_named_once_where_nothing_but_multiplying_out_is_left() -> None:
    weight = make(4, 8)
    plain, missing = fake("plain", plain=True), fake("missing", needs=("no_such_package",))
    with pytest.warns(UserWarning, match="no_such_package cannot be imported"):
        chosen([plain, missing], weight)
    chosen([plain, missing], weight)


def test_no_package_is_named_where_another_kernel_is_there(clock: dict[str, Any]) -> None:
    clock["seconds"] = {"plain": 1.0, "other": 2.0}
    chosen([fake("plain", plain=True), fake("other"), fake("missing", needs=("no_such_package",))], make(4, 8))


@pytest.mark.parametrize(("settings", "named"), [({"activations": "int4"}, "activations"), ({"memory": -1}, "memory")])
def test_settings_are_checked(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        KernelSettings(**settings)


def test_copies_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    one = Kernel("one", lambda state, x: x + state, lambda w, d: made.append(None) or len(made), None, lambda w, d: 1)
    monkeypatch.setattr(times, "copies", lambda size, tokens: 3)
    found = choice.around(one, make(4, 8), torch.float32, 1, 7)
    assert (len(found), made) == (3, [])
    assert found[0](0) == 7
    assert [run(0) for run in found] == [7, 1, 2]
    assert len(list(found)) == 3
    assert len(made) == 2
