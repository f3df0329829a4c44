"""What arrives at layers while those before them get compressed, and layers fitted to it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DebertaConfig, DebertaModel, PreTrainedModel, T5Config, T5EncoderModel

from cur.integrations import BudgetConfig, batches, collect, compress, decoder_layers, linear_modules
from cur.integrations.measure.propagation import InputMoments, in_order, spread
from cur.integrations.nn import InterpolativeLinear, compressed_modules, dense_weight, swap_
from tests.models import FAMILIES, VOCABULARY, batch, make
from tests.models import make as tiny

_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}

MADE: dict[str, Callable[[], PreTrainedModel]] = {
    # Blocks that return a bias of positions, and a position embedding of their own, for those behind them.
    "encoder of t5": lambda: T5EncoderModel(T5Config(**FAMILIES["t5"].options)).eval(),
    "deberta": lambda: DebertaModel(DebertaConfig(**FAMILIES["bert"].options, **_DEBERTA)).eval(),
}


def inside(model: PreTrainedModel) -> list[str]:
    return linear_modules(model, "all-linear", blocks=range(len(decoder_layers(model))))


def halved(model: PreTrainedModel, name: str) -> nn.Linear:
    """A linear layer of half the weight."""
    weight, bias, _ = dense_weight(model.get_submodule(name), name)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight.data.copy_(weight / 2)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def inputs_of(model: PreTrainedModel, names: list[str], given: list[Any]) -> dict[str, torch.Tensor]:
    """What layers get at all real tokens of some text."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0]))
        for name, to in found.items()
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool().flatten() for batch in given]
    return {
        name: torch.cat([x.reshape(-1, x.shape[-1])[mask] for x, mask in zip(rows, masks, strict=True)]).double()
        for name, rows in found.items()
    }


@pytest.mark.parametrize("padded", [False, True])
def test_moments_are_those_of_the_whole_models(
    causal_model: PreTrainedModel, windows: torch.Tensor, padded: bool
) -> None:
    given = list(batches(windows, batch_size=4))
    if padded:
        given[0]["attention_mask"][1, 15:] = 0
    names = inside(causal_model)
    before = copy.deepcopy(causal_model.state_dict())
    seen: dict[str, InputMoments] = {}
    made: dict[str, nn.Module] = {}

    def make(name: str, propagated: InputMoments) -> nn.Module:
        seen[name], made[name] = propagated, halved(causal_model, name)
        return made[name]

    in_order(causal_model, given, names, make)
    assert set(seen) == set(names)
    assert all(torch.equal(value, before[key]) for key, value in causal_model.state_dict().items())
    student = copy.deepcopy(causal_model)
    swap_(student, made)
    X, Z = inputs_of(causal_model, names, given), inputs_of(student, names, given)
    for name in names:
        scale = float(Z[name].square().mean())
        student_moment, cross = Z[name].T @ Z[name] / len(Z[name]), X[name].T @ Z[name] / len(Z[name])
        torch.testing.assert_close(seen[name].student, student_moment, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(seen[name].cross, cross, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "encoder of t5", "deberta"])
def test_every_stack_goes_on_from_what_those_before_it_give(name: str) -> None:
    model = MADE[name]() if name in MADE else tiny(name)
    fed = [batch(name if name in FAMILIES else "bert", count=2, seed=seed) for seed in (1, 2)]
    for one in fed if "labels" in fed[0] else ():  # as the texts of an encoder and of its decoder seldom are, padded
        one["labels"] = one["labels"].clone()
        one["labels"][0, 6:] = -100
    if "attention_mask" in fed[0]:
        fed[0]["attention_mask"][1, 15:] = 0
    names = inside(model)
    seen: dict[str, InputMoments] = {}
    made: dict[str, nn.Module] = {}

    def make(name: str, propagated: InputMoments) -> nn.Module:
        seen[name], made[name] = propagated, halved(model, name)
        return made[name]

    in_order(model, fed, names, make)
    assert set(seen) == set(names)
    student = copy.deepcopy(model)
    swap_(student, made)
    whole = [collect(one, fed, modules=names, moments="full") for one in (model, student)]
    X, Z = ({name: one.second_moment(name) for name in names} for one in whole)
    for name in names:
        scale = float(Z[name].diagonal().mean())
        torch.testing.assert_close(seen[name].student, Z[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
        bound = float(
            (X[name].diagonal() * Z[name].diagonal()).sum()
        )  # Cauchy and Schwarz, of tokens that belong together
        assert 0.0 < float(seen[name].cross.diagonal().square().sum()) <= (1 + 1e-4) * bound


WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def streams_of(model: PreTrainedModel, writers: tuple[str, ...], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The residual stream at all tokens before each writer of every block adds to it."""
    found: dict[str, torch.Tensor] = {}
    state: list[torch.Tensor] = []
    hooks = []
    for prefix, block in decoder_layers(model):
        hooks.append(
            block.register_forward_pre_hook(
                lambda _, args, options: state.append(args[0] if args else options["hidden_states"]), with_kwargs=True
            )
        )
        for writer in writers:

            def add(_: nn.Module, __: Any, output: torch.Tensor, name: str = f"{prefix}.{writer}") -> None:
                found[name] = state[-1].flatten(0, -2).double()
                state.append(state[-1] + output.reshape(state[-1].shape))

            hooks.append(block.get_submodule(writer).register_forward_hook(add))
    with torch.no_grad():
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_what_the_residual_stream_misses(
    kind: str, make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model(kind)
    names = inside(model)
    given = list(batches(windows, batch_size=4))
    seen: dict[str, InputMoments] = {}
    made: dict[str, nn.Module] = {}

    def make(name: str, propagated: InputMoments) -> nn.Module:
        seen[name], made[name] = propagated, halved(model, name)
        return made[name]

    in_order(model, given, names, make)
    student = copy.deepcopy(model)
    swap_(student, made)
    dense, ours = (streams_of(one, WRITERS[kind], windows) for one in (model, student))
    Z = inputs_of(student, names, given)
    assert any(name.endswith(WRITERS[kind]) for name in names)
    for name in names:
        missing = seen[name].missing
        if not name.endswith(WRITERS[kind]):
            assert missing is None
            continue
        assert missing is not None
        expected = (dense[name] - ours[name]).T @ Z[name] / len(Z[name])
        assert name.startswith(decoder_layers(model)[0][0]) or float(expected.abs().max()) > 0
        torch.testing.assert_close(missing, expected, rtol=1e-3, atol=1e-4 * float(Z[name].square().mean() ** 0.5))


def test_no_stream_where_outputs_are_not_just_added(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor
) -> None:
    model = make_model("llama")
    for _, block in decoder_layers(model):
        block.register_forward_hook(lambda _, __, output: 1.1 * output)
    seen: list[InputMoments] = []

    def make(name: str, propagated: InputMoments) -> nn.Module:
        seen.append(propagated)
        return halved(model, name)

    in_order(model, batches(windows, batch_size=6), inside(model), make)
    assert seen
    assert all(propagated.missing is None for propagated in seen)


def test_only_the_layers_asked_for_and_outside_blocks_none(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    asked = ["model.layers.3.mlp.down_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    seen: list[str] = []

    def make(name: str, _: InputMoments) -> nn.Module:
        seen.append(name)
        return halved(llama, name)

    in_order(llama, batches(windows, batch_size=6), asked, make)
    assert seen == ["model.layers.1.self_attn.v_proj", "model.layers.3.mlp.down_proj"]


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of a dense model, of a compressed one, and a weight."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    Z = X @ torch.diag(torch.linspace(0.5, 1.5, 7).double()) + 0.1 * torch.randn(X.shape, generator=generator).double()
    return X, Z, torch.randn(5, 7, generator=generator, dtype=torch.float64)


def test_without_correction_the_dense_layer_is_the_best(data: tuple[torch.Tensor, ...]) -> None:
    X, Z, W = data
    M, B = InputMoments(Z.T @ Z / 300, X.T @ Z / 300).problem(W, correction=0.0, damping=1e-2)
    torch.testing.assert_close(torch.linalg.solve(M, B, left=False), W, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("correction", [0.5, 1.0])
def test_the_solution_is_least_squares_drawn_to_the_dense_layer(
    data: tuple[torch.Tensor, ...], correction: float
) -> None:
    X, Z, W = data
    M, B = InputMoments(Z.T @ Z / 300, X.T @ Z / 300).problem(W, correction=correction, damping=1e-3)
    ours = torch.linalg.solve(M, B, left=False)
    squares = Z.square().mean(0)
    ridge = 1e-3 * float(squares.mean()) + 1e-2 * float(squares.median())
    root = (300 * ridge) ** 0.5 * torch.eye(7, dtype=torch.float64)
    wanted = (Z + correction * (X - Z)) @ W.T
    stacked = torch.linalg.lstsq(torch.cat([Z, root]), torch.cat([wanted, root @ W.T])).solution.T
    torch.testing.assert_close(ours, stacked, rtol=1e-9, atol=1e-10)


def test_the_solution_makes_up_for_what_the_stream_misses(data: tuple[torch.Tensor, ...]) -> None:
    X, Z, W = data
    e = torch.randn(300, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    M, B = InputMoments(Z.T @ Z / 300, X.T @ Z / 300, e.T @ Z / 300).problem(W, correction=0.5, damping=1e-3)
    squares = Z.square().mean(0)
    ridge = 1e-3 * float(squares.mean()) + 1e-2 * float(squares.median())
    root = (300 * ridge) ** 0.5 * torch.eye(7, dtype=torch.float64)
    wanted = (Z + X) @ W.T / 2 + e / 2
    stacked = torch.linalg.lstsq(torch.cat([Z, root]), torch.cat([wanted, root @ W.T])).solution.T
    torch.testing.assert_close(torch.linalg.solve(M, B, left=False), stacked, rtol=1e-9, atol=1e-10)


class Fickle(nn.Module):
    """Calls two layers in an order that the input decides, only one of them, or one twice."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.dense = nn.Linear(32, 32), nn.Linear(32, 32), dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in {4: "ab", 3: "aba", 2: "ba", 1: "b"}[len(x)]:
            x = self.get_submodule(name)(x)
        return self.dense(x)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_layers_out_of_turn_are_named(llama: PreTrainedModel, windows: torch.Tensor, last: int) -> None:
    feed_forward = llama.model.layers[1].mlp
    llama.model.layers[1].mlp = Fickle(feed_forward).eval()
    names = ["model.layers.1.mlp.a", "model.layers.1.mlp.b"]
    given = list(batches(windows.repeat(2, 1)[: 4 + last], batch_size=4))

    def make(name: str, _: InputMoments) -> nn.Module:
        return halved(llama, name)

    wrong = "called more often in" if last == 3 else "not called in its turn in"
    with pytest.raises(RuntimeError, match=rf"mlp\.\w is {wrong} one of the batches.*; exclude"):
        in_order(llama, given, names, make)
    assert not any("forward" in vars(module) for module in llama.modules())


def test_copies_of_blocks_are_let_go(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    def blocks() -> int:
        kind = type(llama.model.layers[0])
        return sum(type(one) is kind for one in gc.get_objects())

    gc.collect()
    before = blocks()
    gc.disable()
    try:
        in_order(llama, batches(windows, batch_size=6), inside(llama), lambda name, _: halved(llama, name))
        assert blocks() <= before + 1
    finally:
        gc.enable()


def lost(model: PreTrainedModel, dense: PreTrainedModel, windows: torch.Tensor) -> float:
    """Divergence of a model's predictions from the dense one's."""
    with torch.no_grad():
        ours, theirs = (m(input_ids=windows).logits.double().log_softmax(-1) for m in (model, dense))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("method", ["best", "rows"])
def test_fitted_layers_lose_less(
    make_model: Callable[..., PreTrainedModel], windows: torch.Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random text has no structure: a fit to it needs more of it than one to a language.
    monkeypatch.setattr("cur.integrations.measure.propagation._TOKENS_PER_INPUT", 100)
    dense, found = make_model("llama"), {}
    text = torch.cat([windows, torch.randint(3, 101, (90, 24), generator=torch.Generator().manual_seed(1))])
    for correction in (0.0, 0.5):
        model = make_model("llama")
        config = BudgetConfig(keep=0.6, method=method, correction=correction, own_text=0)
        report = compress(model, text, config)
        assert report.plan.correction == correction
        found[correction] = lost(model, dense, text), report.after.parameters
    assert found[0.5][0] < 0.97 * found[0.0][0]
    assert found[0.5][1] == found[0.0][1]


def test_kept_rows_stay_the_models_own(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    weights = {name: llama.get_submodule(name).weight.detach().clone() for name in inside(llama)}
    report = compress(llama, windows, BudgetConfig(keep=0.6, method="rows", correction=1.0))
    layers = compressed_modules(llama)
    assert layers
    for done in report.layers:
        layer = layers[done.name]
        assert isinstance(layer, InterpolativeLinear)
        assert torch.equal(layer.R.weight, weights[done.name][list(done.rows)])


def test_statistics_alone_fit_nothing(make_model: Callable[..., PreTrainedModel], windows: torch.Tensor) -> None:
    from cur.integrations.compress import measure

    config = BudgetConfig(keep=0.6, own_text=0)
    models = [make_model("llama") for _ in range(2)]
    statistics = measure(models[0], batches(windows, batch_size=4), config)
    compress(models[0], statistics, config)
    compress(models[1], windows, BudgetConfig(keep=0.6, own_text=0, correction=0.0))
    assert compressed_modules(models[0])
    ours, plain = (model.state_dict() for model in models)
    assert all(torch.equal(value, plain[key]) for key, value in ours.items())


def test_the_mode_of_layers_is_that_of_the_model(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    llama.train()
    compress(llama, windows, BudgetConfig(keep=0.6))
    assert all(module.training for module in llama.modules())


def test_text_for_a_fit_comes_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cur.integrations.measure.propagation._TOKENS_PER_INPUT", 20)
    given = list(batches(torch.arange(40)[:, None].expand(40, 100), batch_size=2))
    found = [int(batch["input_ids"][0, 0]) for batch in spread(given, 40)]  # 800 tokens, of 200 a batch
    assert found == [4, 14, 24, 34]
    assert spread(given, 10**6) == given
    assert len(spread(given, 1)) == 1


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_corrections_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="`correction` must be between 0 and 1"):
        BudgetConfig(keep=0.5, correction=value)


@pytest.mark.parametrize(("kind", "chosen", "length"), [("mixtral", 3, 4), ("mixtral", 1, 2), ("qwen2_moe", 3, 4)])
@pytest.mark.parametrize("gradients", [False, True])
def test_experts_that_get_every_token_of_the_first_batch_alone_are_left_out(
    kind: str, chosen: int, length: int, gradients: bool
) -> None:
    model = make(kind, num_experts_per_tok=chosen)
    tokens = torch.randint(3, VOCABULARY, (40, length), generator=torch.Generator().manual_seed(3))
    # With so few tokens at a time some of the four experts gets all of them now and then.
    report = compress(model, tokens, BudgetConfig(keep=0.7, own_text=0.0, gradients=gradients))
    assert any(".experts." in layer.name for layer in report.layers)
    assert torch.isfinite(model(tokens).logits).all()
