from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cur import NumericalError
from cur.integrations import Statistics, batches, collect, collect_gradients, decoder_layers, linear_modules
from cur.integrations.measure import gradients
from cur.integrations.model.running import model_inputs
from cur.integrations.model.usage import used_as
from tests.models import batch, make

LENGTHS = (24, 5, 17, 1, 11, 24)


def names_of(model: PreTrainedModel) -> list[str]:
    return linear_modules(model, "all-linear", blocks=range(len(decoder_layers(model))))


@pytest.fixture
def nothing() -> Statistics:
    return Statistics(tokens=1, samples=1, square_sums={}, counts={})


def padded(windows: torch.Tensor, side: str, size: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(windows), size):
        lengths = LENGTHS[start : start + size]
        width = max(lengths)
        ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(width - length, width)
            ids[index, place] = windows[start + index, :length]
            mask[index, place] = 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def test_they_are_the_gradients_of_the_summed_loss(
    any_model: PreTrainedModel, windows: torch.Tensor, nothing: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = windows.roll(3, dims=1)
    monkeypatch.setattr(gradients, "_draw", lambda *_, **__: labels.flatten())
    modules = names_of(any_model)
    measured = collect_gradients(any_model, [windows], nothing, modules=modules)

    outputs: dict[str, torch.Tensor] = {}
    handles = [
        any_model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, output)
        )
        for name in modules
    ]
    logits = any_model(input_ids=windows).logits
    for handle in handles:
        handle.remove()
    loss = -logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
    assert set(outputs) == set(modules)
    for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        g = gradient.double().flatten(0, -2)
        expected = g.T @ g / len(g)
        scale = float(expected.abs().max())
        torch.testing.assert_close(measured.output_moment(name), expected, rtol=1e-4, atol=1e-5 * scale)


def outputs_by_name(model: PreTrainedModel, modules: list[str], batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a model returns, and what these of its modules do, each with its graph."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, to=name: outputs.update({to: output}))
        for name in modules
    ]
    found = model(**batch)
    for handle in handles:
        handle.remove()
    return found, outputs


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit"])
def test_models_of_every_kind_have_gradients(name: str, nothing: Statistics) -> None:
    model, fed = make(name), batch(name, count=3)
    modules = names_of(model)
    tokens = fed["labels"].shape[1] if "labels" in fed else 1
    kept = torch.ones(3, tokens, dtype=torch.bool)
    if "labels" in fed:  # of the decoder, whose padding says nothing
        fed["labels"] = fed["labels"].clone()
        fed["labels"][1, 7:] = -100
        kept[1, 7:] = False
    measured = collect_gradients(model, [fed], nothing, modules=modules)
    output, outputs = outputs_by_name(model, modules, model_inputs(model, fed))
    logits = output.logits.reshape(3, tokens, -1)
    labels = gradients._draw(logits.detach(), kept, seed=0, first=0)
    loss = nn.functional.cross_entropy(logits[kept], labels, reduction="sum")
    assert set(outputs) == set(modules)
    for key, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        g = gradient.double().flatten(0, -2)
        expected = g.T @ g
        found = measured.output_products[key]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=key)
        if measured.output_counts[key] != len(g):  # padding has no gradient and does not count
            assert measured.output_counts[key] == int(kept.sum())


def test_without_logits_they_are_those_of_the_change_of_the_output(nothing: Statistics) -> None:
    model, fed = make("bert").bert, batch("bert", count=400)
    last = "encoder.layer.3.output.dense"
    measured = collect_gradients(model, [fed], nothing, modules=[last])
    # With the last normalisation in between, E[g g^T] is J^T J of that; its scale drops out of one direction alone.
    with torch.no_grad():
        _, outputs = outputs_by_name(model, [last, "encoder.layer.3.attention.output"], dict(fed))
        x = (outputs[last] + outputs["encoder.layer.3.attention.output"]).flatten(0, 1)
        norm = model.get_submodule("encoder.layer.3.output.LayerNorm")
        J = torch.func.vmap(torch.func.jacrev(norm))(x).double()
        expected = (J.mT @ J).mean(0)
    found = measured.output_moment(last)
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_batch_size_nor_padding_matters(
    causal_model: PreTrainedModel, windows: torch.Tensor, nothing: Statistics, side: str
) -> None:
    modules = names_of(causal_model)
    plain = collect_gradients(causal_model, padded(windows, side, 1), nothing, modules=modules)
    other = collect_gradients(causal_model, padded(windows, side, 3), nothing, modules=modules)
    assert set(plain.output_counts.values()) == {sum(LENGTHS)}
    assert other.output_counts == plain.output_counts
    for name in modules:
        scale = float(plain.output_products[name].abs().max())
        torch.testing.assert_close(
            other.output_products[name], plain.output_products[name], rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_labels_follow_the_model_s_own_predictions() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0]).expand(40, 500, 5)
    kept = torch.ones(40, 500, dtype=torch.bool)
    labels = gradients._draw(logits, kept, seed=3, first=0)
    shares = torch.bincount(labels, minlength=5) / len(labels)
    p = logits[0, 0].softmax(-1)
    assert shares[2] == 0
    # Five standard deviations of a share of 20,000 draws.
    assert bool(((shares - p).abs() <= 5 * (p * (1 - p) / len(labels)).sqrt() + 1e-12).all())
    later = gradients._draw(logits[1:], kept[1:], seed=3, first=1)
    assert torch.equal(labels[500:], later)
    assert not torch.equal(labels, gradients._draw(logits, kept, seed=4, first=0))


def test_at_the_head_they_are_the_fisher_information(
    llama: PreTrainedModel, windows: torch.Tensor, nothing: Statistics
) -> None:
    row = windows[:1, :4]
    measured = collect_gradients(llama, [row.expand(400, 4)] * 5, nothing, modules=["lm_head"])
    with torch.no_grad():
        p = llama(row).logits[0].double().softmax(-1)
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert measured.output_counts == {"lm_head": 8000}
    found = measured.output_moment("lm_head")
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_they_join_the_statistics_of_the_inputs(llama: PreTrainedModel, windows: torch.Tensor) -> None:
    modules = names_of(llama)
    before = collect(llama, batches(windows, batch_size=3), modules=modules)
    after = collect_gradients(llama, batches(windows, batch_size=3), before, modules=modules[:2])
    assert after.square_sums is before.square_sums
    assert not before.output_products
    assert list(after.output_products) == modules[:2]
    assert torch.equal(after.output_moment(modules[0]), after.output_moment(modules[0]).T)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_pass_does_it_all(causal_model: PreTrainedModel, windows: torch.Tensor, side: str) -> None:
    given, modules = padded(windows, side, 3), names_of(causal_model)
    blocks = [name for name, _ in decoder_layers(causal_model)]
    apart = collect(causal_model, given, modules=modules, moments="full", layers=blocks)
    apart = collect_gradients(causal_model, given, apart, modules=modules)
    passes: list[int] = []
    handle = causal_model.get_submodule(blocks[0]).register_forward_hook(lambda *_: passes.append(1))
    once = collect(causal_model, given, modules=modules, moments="full", layers=blocks, gradients=modules)
    handle.remove()
    assert len(passes) == len(given)
    assert (once.counts, once.output_counts) == (apart.counts, apart.output_counts)
    assert once.text_hash == apart.text_hash
    assert once.angles is not None
    torch.testing.assert_close(once.angles, apart.angles, rtol=1e-4, atol=1e-6)
    for name in modules:
        for kind in ("second_moment", "output_moment"):
            found, expected = getattr(once, kind)(name), getattr(apart, kind)(name)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name)


def test_activations_need_not_be_kept(any_model: PreTrainedModel, windows: torch.Tensor) -> None:
    modules, inside = names_of(any_model), [name for name, _ in decoder_layers(any_model)]
    kept: list[int] = []
    found = []
    for saving in (False, True):
        tensors: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):  # noqa: B023
            options: dict[str, Any] = {"moments": "full", "layers": inside, "gradients": modules}
            found.append(
                collect(
                    any_model, batches(windows, batch_size=3), modules=modules, **options, gradient_checkpointing=saving
                )
            )
        kept.append(sum(x.nbytes for x in tensors))
    assert kept[1] < kept[0] / 2
    assert found[0].counts == found[1].counts
    assert found[0].output_counts == found[1].output_counts
    for name in modules:
        for kind in ("second_moment", "output_moment"):
            plain, saved = (getattr(one, kind)(name) for one in found)
            torch.testing.assert_close(saved, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()), msg=name)
    assert not any("forward" in block.__dict__ for _, block in decoder_layers(any_model))


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, windows: torch.Tensor, nothing: Statistics) -> None:
    llama.model.norm.weight.requires_grad_(False)
    llama.train()
    before = [parameter.requires_grad for parameter in llama.parameters()]
    collect_gradients(llama, [windows], nothing, modules=["model.layers.0.mlp.up_proj"])
    assert [parameter.requires_grad for parameter in llama.parameters()] == before
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert llama.training
    assert not any(part._forward_hooks for part in llama.modules())


def test_what_cannot_be_measured_says_so(llama: PreTrainedModel, windows: torch.Tensor, nothing: Statistics) -> None:
    def go(model: nn.Module, modules: Any, given: Any) -> None:
        collect_gradients(model, given, nothing, modules=modules)

    with pytest.raises(ValueError, match="`modules` is empty"):
        go(llama, [], [windows])
    with pytest.raises(ValueError, match="`modules` names what"):
        go(llama, ["absent"], [windows])
    with pytest.raises(ValueError, match="`batches` is empty"):
        go(llama, ["lm_head"], [])
    with pytest.raises(TypeError, match="Linear has none"):
        go(nn.Linear(2, 2), [""], [windows])
    with pytest.raises(ValueError, match="must have `decoder_input_ids` or `labels`"):
        go(make("t5"), ["decoder.block.0.layer.0.SelfAttention.q"], [windows])
    llama.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no gradient reached idle"):
        go(llama, ["idle"], [windows])
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        go(llama, ["lm_head"], [windows])


def test_a_loss_that_is_never_a_number_is_not_blamed_on_a_module() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    said = "`loss` is not finite; what the model returns is finite"
    with used_as(net, loss=lambda output, _: output.mean() * torch.nan), pytest.raises(NumericalError, match=said):
        collect(net, [torch.ones(3, 4)], modules=["0"], gradients=["0"])
