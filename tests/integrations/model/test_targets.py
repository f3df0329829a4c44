from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cur.integrations import block_stacks, decoder_layers, linear_modules
from cur.integrations.model.targets import found_stacks, holds_linear, left_dense, networks, targeted_singly
from tests.models import make

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def test_blocks_are_found_in_every_architecture(any_model: PreTrainedModel) -> None:
    blocks = decoder_layers(any_model)
    assert len(blocks) == any_model.config.num_hidden_layers
    assert all(any_model.get_submodule(name) is block for name, block in blocks)
    inside = {id(part) for _, block in blocks for part in block.modules()}
    heads = {"lm_head", "embed_out", "predictions.transform.dense", "predictions.decoder", "decoder"}
    outside = [
        name for name, part in any_model.named_modules() if isinstance(part, nn.Linear) and id(part) not in inside
    ]
    assert all(any(name.endswith(head) for head in heads) for name in outside)


def test_blocks_of_a_model_without_config() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ModuleList([nn.Linear(2, 2)])
            self.norms = nn.ModuleList([nn.LayerNorm(2) for _ in range(5)])
            self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(7)]) for _ in range(3)])

    assert [name for name, _ in decoder_layers(Net())] == ["blocks.0", "blocks.1", "blocks.2"]


def test_an_encoder_decoder_has_two_stacks() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    names = [[name for name, _ in stack] for stack in block_stacks(model)]
    assert names == [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]]
    assert [name for name, _ in decoder_layers(model)] == [*names[0], *names[1]]


def test_stacks_of_one_length_are_all_there() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.config.is_encoder_decoder = False
    assert [len(stack) for stack in block_stacks(model)] == [2, 2]


def test_blocks_of_a_stack_may_differ() -> None:
    (stack,) = block_stacks(make("olmo_hybrid"))
    assert len({type(block) for _, block in stack}) == 2
    assert [name for name, _ in stack] == [f"model.layers.{index}" for index in range(4)]


def test_stacks_of_another_length_than_the_configuration_says() -> None:
    model = make("hrm_text")
    assert [[len(stack), stack[0][0]] for stack in block_stacks(model)] == [
        [4, "model.L_module.layers.0"],
        [4, "model.H_module.layers.0"],
    ]
    assert model.config.num_hidden_layers not in (4, 8)


def test_blocks_in_a_sequence() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    class Other(nn.Sequential):
        pass

    model = nn.Sequential(nn.Linear(3, 3), block(), block(), block(), Other(nn.Linear(3, 3)))
    assert [name for name, _ in decoder_layers(model)] == ["1", "2", "3"]


def stage(width: int, depth: int = 2, kind: type[nn.Module] = nn.ModuleList) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 40), nn.Linear(40, width))

    blocks = [block() for _ in range(depth)]
    return kind(blocks) if kind is nn.ModuleList else nn.Sequential(*blocks)


def names_of(stacks: list[list[tuple[str, nn.Module]]]) -> list[list[str]]:
    return [[name for name, _ in stack] for stack in stacks]


def test_the_blocks_of_each_stage_are_a_stack() -> None:
    def within(part: nn.Module) -> nn.Module:
        return nn.ModuleDict({"blocks": part, "down": nn.Linear(8, 8)})

    for kind in (nn.ModuleList, nn.Sequential):
        model = nn.ModuleDict({"stages": nn.ModuleList([within(stage(w, kind=kind)) for w in (8, 16, 16)])})
        wanted = [[f"stages.{part}.blocks.{index}" for index in range(2)] for part in range(3)]
        assert names_of(block_stacks(model)) == wanted
        assert [names_of(network) for network in networks(block_stacks(model))] == [wanted]


def test_lists_of_one_width_are_one_stack_and_others_stages_which_may_have_one_block() -> None:
    model = nn.ModuleDict({"block": nn.ModuleList([stage(8, 1), stage(8, 2)])})
    assert names_of(block_stacks(model)) == [["block.0.0", "block.1.0", "block.1.1"]]
    model = nn.ModuleDict({"block": nn.ModuleList([stage(8, 1), stage(16, 2)])})
    assert names_of(block_stacks(model)) == [["block.0.0"], ["block.1.0", "block.1.1"]]


def test_a_list_within_blocks_of_one_width_makes_no_stages() -> None:
    class Block(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 12 + count)) for _ in range(count)])

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(2), Block(3), Block(4)])})
    assert names_of(block_stacks(model)) == [["layers.0", "layers.1", "layers.2"]]
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    assert [len(network) for network in networks(block_stacks(model))] == [1, 1]


def test_some_blocks_of_a_class_may_hold_no_linear_layer() -> None:
    class Block(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(4, 4, size)

    model = nn.ModuleDict({"layer": nn.ModuleList([Block(size) for size in (3, 1, 3, 1)])})
    assert names_of(block_stacks(model)) == [[f"layer.{index}" for index in range(4)]]
    assert [holds_linear(block) for _, block in decoder_layers(model)] == [False, True, False, True]


def test_no_stack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no stack of blocks .*; name the modules to compress"):
        decoder_layers(nn.Linear(2, 2))
    assert found_stacks(nn.Linear(2, 2)) == []


def test_all_linear_leaves_the_head_alone(causal_model: PreTrainedModel) -> None:
    found = linear_modules(causal_model, "all-linear")
    head = causal_model.get_output_embeddings()
    assert found
    assert all(causal_model.get_submodule(name) is not head for name in found)
    blocks = decoder_layers(causal_model)
    per_block = {sum(name.startswith(block + ".") for name in found) for block, _ in blocks}
    assert len(per_block) == 1
    assert len(found) == len(blocks) * per_block.pop()


def test_conv1d_counts_as_linear(make_model: Callable[..., PreTrainedModel]) -> None:
    found = linear_modules(make_model("gpt2"), ["c_attn"])
    assert found == [f"transformer.h.{index}.attn.c_attn" for index in range(5)]


def test_names_are_exact_or_dotted_ends_in_model_order(llama: PreTrainedModel) -> None:
    expected = [f"model.layers.{i}.{part}" for i in range(5) for part in ("self_attn.q_proj", "mlp.gate_proj")]
    assert linear_modules(llama, ["gate_proj", "self_attn.q_proj"]) == expected
    assert linear_modules(llama, [expected[3], expected[3]]) == [expected[3]]
    with pytest.raises(ValueError, match="'ate_proj' matches no module; did you mean 'gate_proj'"):
        linear_modules(llama, ["ate_proj"])


def test_a_string_is_a_regular_expression_for_the_full_name(llama: PreTrainedModel) -> None:
    assert linear_modules(llama, r".*\.[02]\..*\.q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    with pytest.raises(ValueError, match="'q_proj' matches no module"):
        linear_modules(llama, "q_proj")


def test_layers_and_exclude_narrow(llama: PreTrainedModel) -> None:
    found = linear_modules(llama, "all-linear", blocks=[3, 1], exclude=["mlp.up_proj", "o_proj"])
    parts = [part for part in PARTS if part not in ("up_proj", "o_proj")]
    assert [name.rpartition(".")[2] for name in found] == parts * 2
    assert {name.split(".")[2] for name in found} == {"1", "3"}
    assert linear_modules(llama, "all-linear", exclude=r".*(self_attn|down|up).*") == [
        f"model.layers.{i}.mlp.gate_proj" for i in range(5)
    ]


def test_the_head_is_taken_when_listed(llama: PreTrainedModel) -> None:
    assert linear_modules(llama, ["lm_head"]) == ["lm_head"]
    with pytest.raises(ValueError, match="matches only the output head lm_head"):
        linear_modules(llama, "lm_.*")


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([], {}, "must name at least one module"),
        ([""], {}, "no empty name"),
        ("", {}, "no empty name"),
        (["q_proj", "qq"], {}, "'qq' matches no module; .*linear modules here end in down_proj, gate_proj"),
        (
            ["model.norm"],
            {},
            r"names 1 module\(s\), 'model.norm' first, none of them linear: they are LlamaRMSNorm",
        ),
        (["mlp"], {}, r"names 5 module\(s\), .* they are LlamaMLP"),
        (["q_proj"], {"exclude": ["self_attn", "q_proj"]}, "`exclude` .* leaves none of the 5 modules"),
        (
            ["layers.0.self_attn.q_proj"],
            {"blocks": [1, 2]},
            r"selects no linear module inside the blocks \[1, 2\]",
        ),
        (["q_proj"], {"blocks": [5]}, r"`blocks` must be between 0 and 4 for this model, got \[5\]"),
        ("q_proj[", {}, "`targets` .* is not a regular expression"),
        (["q_proj"], {"exclude": "(("}, "`exclude` .* is not a regular expression"),
    ],
)
def test_what_selects_nothing_says_why(
    llama: PreTrainedModel, targets: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_modules(llama, targets, **options)


def test_no_linear_module_at_all() -> None:
    with pytest.raises(ValueError, match="the model has no linear module"):
        linear_modules(nn.Sequential(nn.ReLU()), ["fc"])


def test_experts_have_names_of_their_own(mixtral: MixtralForCausalLM) -> None:
    every = linear_modules(mixtral, "all-linear")
    assert len(every) == 2 * (4 + 2 * 3)
    assert every[4:6] == [f"model.layers.0.mlp.experts.gate_up_proj.{index}" for index in range(2)]
    assert linear_modules(mixtral, ["down_proj"], blocks=[1]) == [
        f"model.layers.1.mlp.experts.down_proj.{index}" for index in range(3)
    ]
    assert linear_modules(mixtral, ["layers.1.mlp.experts.down_proj.2"]) == ["model.layers.1.mlp.experts.down_proj.2"]
    assert len(linear_modules(mixtral, "all-linear", exclude=["experts"])) == 8
    with pytest.raises(ValueError, match=r"names 2 module\(s\), .* none of them linear: they are MixtralTopKRouter"):
        linear_modules(mixtral, ["gate"])


def test_experts_of_another_kind_are_left_dense(mixtral: MixtralForCausalLM) -> None:
    for block in mixtral.model.layers:
        del block.mlp.experts.has_gate
    found = left_dense(mixtral, "all-linear")
    assert list(found) == [
        f"model.layers.{block}.mlp.experts.{part}" for block in range(2) for part in ("gate_up_proj", "down_proj")
    ]
    assert all("does not keep to transformers' interface of experts" in sentence for sentence in found.values())
    assert left_dense(mixtral, "all-linear", exclude=["experts"]) == {}
    assert left_dense(mixtral, ["q_proj"]) == {}
    assert linear_modules(mixtral, "all-linear") == linear_modules(mixtral, "all-linear", exclude=["experts"])
    for target in ("experts", "mlp.experts", "gate_up_proj", "experts.down_proj"):
        with pytest.raises(ValueError, match=f"'{target}' names no linear layer: .* is one parameter of shape"):
            linear_modules(mixtral, [target])
    with pytest.raises(ValueError, match="'w1' matches no module"):
        linear_modules(mixtral, ["w1"])


def test_three_dimensions_alone_do_not_make_experts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(3, 4, 5)
            self.position = nn.Parameter(torch.zeros(1, 4, 6))
            self.inner = nn.Sequential(nn.Linear(3, 3))

    assert linear_modules(Net(), "all-linear") == ["inner.0"]


def test_a_tower_of_the_same_length_is_not_the_stack_of_text() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**sizes, "vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    (stack,) = block_stacks(Gemma3ForConditionalGeneration(config))
    assert [name for name, _ in stack] == [f"model.language_model.layers.{index}" for index in range(3)]


def test_linear_layers_without_names_are_there_as_well() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="matches no module; linear modules here end in 0, 2"):
        linear_modules(model, ["fc"])


class _Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(50, 16), nn.Conv1d(16, 16, 3)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("all-linear", "none of them linear: they are Conv1d, Embedding; tables of embeddings are targets by name, or"),
        (["nothing"], "the model has no linear module, and tables of embeddings here end in words"),
        (["mix"], "they are Conv1d; tables of embeddings are targets by name, or as 'all-embeddings': words"),
    ],
)
def test_tables_are_named_where_no_layer_is_linear(targets: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_modules(_Tables(), targets)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Embedding(8, 8)])
def test_a_model_that_is_a_layer_itself_is_told_what_to_do(layer: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"`model` must hold the layers to replace, .* as `torch.nn.Sequential\(layer\)`"
    ):
        linear_modules(layer, "all-linear")


def test_a_letter_of_all_linear_names_no_layer() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    assert targeted_singly(net, "all-linear") == set()
    assert targeted_singly(net, "[ab]") == set()
    assert targeted_singly(net, "a") == targeted_singly(net, ["a"]) == {"a"}


def test_a_list_of_lists_of_blocks_is_one_stack() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
            self.stages = nn.ModuleList([nn.ModuleList([block() for _ in range(n)]) for n in (1, 2)])

    assert [name for name, _ in decoder_layers(Net())] == ["stages.0.0", "stages.1.0", "stages.1.1"]


def test_towers_are_no_part_of_a_model_that_reads_text() -> None:
    inner = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = GitConfig(vocab_size=101, vision_config={**inner, "image_size": 16, "patch_size": 8}, **inner)
    model = GitForCausalLM(config)
    assert [name for name, _ in decoder_layers(model)] == [f"git.encoder.layer.{index}" for index in range(3)]
    # of a model that reads images the tower is all there is
    assert len(decoder_layers(model.git.image_encoder)) == 3
