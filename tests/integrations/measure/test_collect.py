from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from cur import NumericalError
from cur.integrations import Statistics, batches, collect, collect_gradients, decoder_layers, linear_modules
from cur.integrations.model.unrolling import unrolled

LENGTHS = (24, 5, 17, 1, 11, 24)


def names_of(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    blocks = [name for name, _ in decoder_layers(model)]
    return linear_modules(model, "all-linear", blocks=range(len(blocks))), blocks


def unpadded(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    rows = [row[None, :length] for row, length in zip(windows, LENGTHS, strict=True)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def padded(windows: torch.Tensor, side: str, size: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(windows), size):
        lengths = LENGTHS[start : start + size]
        width = max(lengths) + 2
        ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(width - length, width)
            ids[index, place] = windows[start + index, :length]
            mask[index, place] = 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def assert_same(ours: Statistics, theirs: Statistics, *, digits: float = 2e-5) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.samples == theirs.samples
    assert ours.counts == theirs.counts
    assert ours.text_hash == theirs.text_hash
    for kind in ("square_sums", "products"):
        one, other = getattr(ours, kind), getattr(theirs, kind)
        assert list(one) == list(other)
        for name in one:
            scale = float(other[name].abs().max())
            torch.testing.assert_close(one[name], other[name], rtol=digits, atol=digits * scale, msg=name)
    assert ours.angles is not None
    assert theirs.angles is not None
    torch.testing.assert_close(ours.angles, theirs.angles, rtol=0, atol=digits)


def test_sums_are_those_of_the_inputs(any_model: PreTrainedModel, windows: torch.Tensor) -> None:
    modules, _ = names_of(any_model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        any_model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().double().flatten(0, -2))
        )
        for name in modules
    ]
    with torch.no_grad():
        any_model(input_ids=windows)
    for handle in handles:
        handle.remove()
    measured = collect(any_model, [windows], modules=modules, moments="full")
    assert modules
    for name in modules:
        x = torch.cat(seen[name])
        assert measured.counts[name] == len(x) == windows.numel()
        expected = x.T @ x / len(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(measured.second_moment(name), expected, rtol=1e-9, atol=1e-9 * scale)
        torch.testing.assert_close(measured.x_norm(name), x.norm(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_neither_batch_size_nor_padding_matters(
    any_model: PreTrainedModel, windows: torch.Tensor, side: str, size: int
) -> None:
    modules, layers = names_of(any_model)
    plain = collect(any_model, unpadded(windows), modules=modules, moments="full", layers=layers)
    assert plain.tokens == sum(LENGTHS)
    other = collect(any_model, padded(windows, side, size), modules=modules, moments="full", layers=layers)
    assert_same(other, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_experts_see_no_padding(windows: torch.Tensor, side: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config).eval()
    modules, layers = names_of(model)
    assert "model.layers.1.mlp.experts.down_proj.3" in modules
    plain = collect(model, unpadded(windows), modules=modules, moments="full", layers=layers)
    assert plain.counts["model.layers.1.mlp.experts.down_proj.3"] < plain.tokens
    other = collect(model, padded(windows, side, 3), modules=modules, moments="full", layers=layers)
    assert_same(other, plain)
    with unrolled(model):
        drawn = [
            collect_gradients(model, text, plain, modules=modules)
            for text in (unpadded(windows), padded(windows, side, 3))
        ]
    for name, product in drawn[0].output_products.items():
        scale = float(product.abs().max())
        torch.testing.assert_close(drawn[1].output_products[name], product, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_a_model_that_numbers_its_positions_itself(windows: torch.Tensor) -> None:
    config = RobertaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = RobertaForMaskedLM(config).eval()
    nn.init.normal_(model.roberta.embeddings.position_embeddings.weight)
    modules, layers = names_of(model)
    plain = collect(model, unpadded(windows), modules=modules, layers=layers)
    for side in ("left", "right"):
        assert_same(collect(model, padded(windows, side, 3), modules=modules, layers=layers), plain)


def test_diagonal_and_full_agree(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    modules, _ = names_of(llama)
    diagonal = collect(llama, batches(windows, batch_size=4), modules=modules)
    full = collect(llama, batches(windows, batch_size=4), modules=modules, moments="full")
    assert not diagonal.products
    for name in modules:
        torch.testing.assert_close(diagonal.square_sums[name], full.square_sums[name], rtol=1e-12, atol=0)
        product = full.products[name]
        assert torch.equal(product, product.T)
        smallest = float(torch.linalg.eigvalsh(product)[0])
        assert smallest > -1e-12 * float(product.trace())
    with pytest.raises(KeyError, match=r"no second moments .*moments='full'"):
        diagonal.second_moment(modules[0])
    with pytest.raises(KeyError, match="no statistics of 'nothing'"):
        diagonal.x_norm("nothing")


def test_wide_inputs_are_summed_in_blocks() -> None:
    # Wider than one block of the triangle, and not a multiple of it.
    x = torch.randn(50, 333, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(333, 2)
    model = Wrapped(layer)
    product = collect(model, [{"input_ids": x}], modules=["layer"], moments="full").products["layer"]
    expected = x.double().T @ x.double()
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-10)


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(input_ids.float())


def test_modules_called_with_one_tensor_share_one_sum(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    modules, _ = names_of(llama)
    sums = collect(llama, batches(windows, batch_size=1), modules=modules).square_sums
    block = "model.layers.2."
    q, k, v, o = (sums[f"{block}self_attn.{part}_proj"] for part in "qkvo")
    gate, up, down = (sums[f"{block}mlp.{part}_proj"] for part in ("gate", "up", "down"))
    assert q is k
    assert q is v
    assert gate is up
    assert len({id(total) for total in (q, o, gate, down)}) == 4


class Branches(nn.Module):
    """Two layers called with one tensor, changed in place in between; then the first one again."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.in_place = in_place

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = input_ids.float()
        first = self.a(x)
        if self.in_place:
            x += 1
        return self.a(first + self.b(x))


def test_a_tensor_changed_in_place_is_another_input() -> None:
    x = torch.arange(8).view(2, 4)
    measured = collect(Branches(in_place=True), [x], modules=["b"]).square_sums["b"]
    both = collect(Branches(in_place=True), [x], modules=["a", "b"]).square_sums["b"]
    expected = (x.double() + 1).square().sum(0)
    assert torch.equal(measured, expected)
    assert torch.equal(both, expected)


def test_a_module_called_twice_counts_twice() -> None:
    x = torch.arange(8).view(2, 4)
    model = Branches(in_place=False)
    measured = collect(model, [x, x], modules=["a", "b"])
    # The other one is called once, with the first tensor alone.
    assert measured.counts == {"a": 8, "b": 4}
    with torch.no_grad():
        second = model.a(x.float()) + model.b(x.float())
    expected = 2 * (x.double().square() + second.double().square()).sum(0)
    torch.testing.assert_close(measured.square_sums["a"], expected, rtol=1e-12, atol=0)
    assert torch.equal(measured.square_sums["b"], 2 * x.double().square().sum(0))


class Parting(nn.Module):
    """Layers called with one tensor, of which one gets others as well, before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.w = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = input_ids.float()
        other = x.flip(0) * 3
        both = self.w(other) + self.q(x) + self.k(x) + self.v(x) + self.k(other)
        return both + self.w(x)


@pytest.mark.parametrize("moments", ["diagonal", "full"])
def test_modules_share_sums_as_long_as_their_inputs_are_the_same(moments: str) -> None:
    parts = [torch.arange(8).view(2, 4), torch.arange(8, 16).view(2, 4) % 5]
    names = ["q", "k", "v", "w"]
    together = collect(Parting(), parts, modules=names, moments=moments)
    for name in names:
        alone = collect(Parting(), parts, modules=[name], moments=moments)
        assert together.counts[name] == alone.counts[name] == (8 if name in "kw" else 4)
        torch.testing.assert_close(together.square_sums[name], alone.square_sums[name], rtol=1e-12, atol=0)
        if moments == "full":
            torch.testing.assert_close(together.products[name], alone.products[name], rtol=1e-12, atol=0)
    assert together.square_sums["q"] is together.square_sums["v"]


def test_angles_are_those_of_the_last_token(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    _, layers = names_of(llama)
    outputs: list[torch.Tensor] = []
    handles = [llama.get_submodule(n).register_forward_hook(lambda _, __, y: outputs.append(y)) for n in layers]
    with torch.no_grad():
        first = llama.get_input_embeddings()(windows)
        llama(input_ids=windows)
    for handle in handles:
        handle.remove()
    states = [state[:, -1].double() for state in (first, *outputs)]
    measured = collect(llama, batches(windows, batch_size=4), modules=[], layers=layers)
    assert measured.angles is not None
    assert list(measured.angular) == list(range(len(layers)))
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            cosine = torch.cosine_similarity(one, other, dim=1).clamp(-1, 1)
            expected = float(torch.arccos(cosine).mean()) / math.pi
            assert float(measured.angles[i, j]) == pytest.approx(expected, abs=1e-7)
        if i:
            assert measured.angular[i - 1] == float(measured.angles[i - 1, i])


def test_small_angles_keep_their_digits() -> None:
    class Turn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tensor([0.0, 1e-9], dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Turn()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.block(input_ids)

    x = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    measured = collect(Model(), [x], modules=[], layers=["block"])
    # arccos would give 0: the cosine of so small an angle rounds to 1.
    assert measured.angular[0] == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_the_head_runs_only_when_it_is_measured(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    calls: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda *_: calls.append(1))
    collect(llama, [windows], modules=["model.layers.0.mlp.up_proj"])
    assert not calls
    measured = collect(llama, [windows], modules=["lm_head"])
    handle.remove()
    assert calls
    assert measured.counts == {"lm_head": windows.numel()}


def test_labels_are_ignored(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    name = "model.layers.1.mlp.up_proj"
    plain = collect(llama, [{"input_ids": windows}], modules=[name])
    labelled = collect(llama, [{"input_ids": windows, "labels": windows}], modules=[name])
    assert torch.equal(plain.square_sums[name], labelled.square_sums[name])


def test_progress_counts_samples(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    calls: list[tuple[int, int | None]] = []
    parts = batches(windows, batch_size=4)

    def watch(done: int, total: int | None) -> None:
        calls.append((done, total))

    collect(llama, parts, modules=["lm_head"], progress=watch)
    collect(llama, iter(parts), modules=["lm_head"], progress=watch)
    assert calls == [(4, 6), (6, 6), (4, None), (6, None)]


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    modules, layers = names_of(llama)
    llama.train()
    llama.model.layers[1].eval()
    modes = [part.training for part in llama.modules()]

    def broken() -> Iterator[torch.Tensor]:
        yield windows
        raise KeyboardInterrupt

    before = hooks(llama)
    collect(llama, [windows], modules=modules, layers=layers)
    with pytest.raises(KeyboardInterrupt):
        collect(llama, broken(), modules=modules, layers=layers)
    assert hooks(llama) == before
    assert [part.training for part in llama.modules()] == modes
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_broken_weights_are_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    name = "model.layers.3.mlp.up_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight[1, 2] = torch.nan
    with pytest.raises(NumericalError, match=rf"the weight '{name}.weight' holds NaN or infinity"):
        collect(llama, [windows], modules=[name])
    # One that is not measured is found from where its harm shows.
    with pytest.raises(
        NumericalError, match=r"the input of 'model.layers.3.mlp.down_proj' .*'model.layers.3.mlp.up_proj.weight'"
    ):
        collect(llama, [windows], modules=["model.layers.2.mlp.up_proj", "model.layers.3.mlp.down_proj"])


def test_overflowing_activations_are_named(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    _, layers = names_of(llama)
    llama.to(torch.float16)
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight.fill_(60000.0)
    with pytest.raises(
        NumericalError, match=r"the output of 'model.layers.2' .* 'model.layers.2.mlp.down_proj' is the first"
    ):
        collect(llama, [windows], modules=[], layers=layers)
    with pytest.raises(NumericalError, match=r"the input of 'model.layers.3.self_attn.q_proj' is not finite"):
        collect(llama, [windows], modules=["model.layers.3.self_attn.q_proj"])


def test_half_precision_inputs_do_not_overflow_in_the_sums(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    name = "model.layers.1.self_attn.q_proj"
    llama.to(torch.float16)
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight.fill_(5000.0)
    total = collect(llama, [windows], modules=[name]).square_sums[name]
    assert float(total.max()) > float(torch.finfo(torch.float16).max)
    assert bool(torch.isfinite(total).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"modules": ["model.layers.9.mlp"]},
            ValueError,
            "`modules` names what LlamaForCausalLM does not have",
        ),
        ({"modules": "lm_head"}, TypeError, "`modules` must be a sequence of names"),
        ({"modules": []}, ValueError, "all empty"),
        ({"modules": ["lm_head"], "layers": ["model.layers.7"]}, ValueError, "`layers` names what"),
        ({"modules": ["lm_head"], "moments": "half"}, ValueError, "`moments` must be 'diagonal' or 'full'"),
        (
            {"modules": [], "layers": ["model.layers"]},
            ValueError,
            "`layers` must be blocks that run in order",
        ),
    ],
)
def test_bad_arguments(
    llama: PreTrainedModel, windows: torch.Tensor, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        collect(llama, [windows], **options)


def test_bad_batches(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    def go(batch: Any) -> None:
        collect(llama, batch, modules=["lm_head"])

    with pytest.raises(ValueError, match="`batches` is empty"):
        go([])
    mask = torch.ones_like(windows)
    mask[1] = 0
    with pytest.raises(ValueError, match="sample 1 of a batch is all padding"):
        go([{"input_ids": windows, "attention_mask": mask}])
    with pytest.raises(TypeError, match="a batch must be a mapping of tensors or one tensor"):
        go(["text"])


def test_padding_without_one_row_per_token_is_refused(windows: torch.Tensor) -> None:
    class Pooled(Wrapped):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(input_ids.float()[:, :8])

    model = Pooled(nn.Linear(8, 2))
    assert collect(model, batches(windows, batch_size=6), modules=["layer"]).counts == {"layer": 6}
    with pytest.raises(ValueError, match=r"'layer' has shape \(3, 8\), which has not one row per token"):
        collect(model, padded(windows, "right", 3), modules=["layer"])


def test_a_module_that_nothing_reaches_is_named(windows: torch.Tensor) -> None:
    model = Wrapped(nn.Linear(24, 2))
    model.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no input reached idle"):
        collect(model, [windows], modules=["layer", "idle"])


def test_the_hash_follows_the_text(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    def text_hash(batch: Any) -> str:
        return collect(llama, batch, modules=["model.layers.0.mlp.up_proj"]).text_hash

    whole = text_hash([windows])
    assert text_hash(batches(windows.to(torch.int32), batch_size=5)) == whole
    assert text_hash([windows.flip(0)]) != whole
    assert text_hash([windows.reshape(12, 12)]) != whole


class Questions(TorchDispatchMode):
    """Counts the transfers for which a host waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_its_device_no_more_often_for_more_layers(
    llama: PreTrainedModel, windows: torch.Tensor
) -> None:
    blocks = [name for name, _ in decoder_layers(llama)]

    def waits(modules: list[str], batches: int) -> int:
        with Questions() as questions:
            collect(llama, [windows] * batches, modules=modules, layers=blocks)
        return questions.count

    one, every = ["model.layers.0.mlp.gate_proj"], linear_modules(llama, "all-linear")
    assert len(every) > 30
    assert waits(every, 3) - waits(every, 1) == waits(one, 3) - waits(one, 1) <= 8
