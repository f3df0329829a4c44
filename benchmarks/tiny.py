"""Make a tiny random model of any family that transformers registers, and what it is fed.

One shrinker serves all: a field of a configuration says by its name what it counts, so a table of names gives widths,
heads, blocks, experts and vocabularies their sizes, in configurations within configurations as well. Where a model
cannot be built or run with all of them, groups of names are left as they are, one after the other. Models are counted
on the meta device before memory is taken for one.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

__all__ = ["KINDS", "NotBuiltError", "Tiny", "families", "make", "tokenizer"]

MOST = 3_000_000
WORDS = 101
LENGTH = 24
BLOCKS = 4
SIDE = 64
_SPECIAL = 8  # the first tokens are special ones


class NotBuiltError(Exception):
    """Says that transformers itself builds or runs no tiny model of a family, and why."""


@dataclass(frozen=True)
class Kind:
    """What a family is registered for: the auto class, the name of its mapping, and what it is fed."""

    auto: str
    mapping: str
    feed: str


KINDS = {
    "causal": Kind("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text"),
    "masked": Kind("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "text"),
    "seq2seq": Kind("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "text"),
    "image": Kind("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "images"),
    "audio": Kind("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "sound"),
    "ctc": Kind("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", "sound"),
    "speech": Kind("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "sound"),
}


def families(kind: str) -> list[str]:
    """Return the model types that the installed transformers registers for a kind."""
    return sorted(getattr(modeling_auto, KINDS[kind].mapping))


# What a field counts, by its whole name; the first pattern that fits gives the largest value. But for the number of
# blocks of a model, of which those between the first and the last are compressed, a value is never raised.
_SIZES: dict[str, list[tuple[str, int]]] = {
    "vocabularies": [
        (r"(.*_)?vocab(_size)?(_base|_per_layer_input)?|.*_group_vocab|n_positions_vocab", WORDS),
        (r"codebook_size|num_codevectors_per_group|num_buckets_hash", 8),
    ],
    "blocks": [
        (
            r"(.*_)?num_kv_shared_layers|first_k_dense_replace|(num|moe)_(first_)?dense_layers|.*_offset|num_mem_blocks",
            1,
        ),
        (r".*_(period|interval|frequency|step|every_n(_layers)?)|layer_group_size|full_attn_interval", 2),
        (r"(encoder|decoder|speech_encoder|t2u_(en|de)coder)_(num_hidden_)?layers|num_(en|de)coder_layers", BLOCKS),
        (
            r"(conf_)?(num_)?(hidden_)?layers|n_layers?|depth|num_blocks|num_(self_attends_per_block|layers_per_stack)",
            BLOCKS,
        ),
        (r"num_global_layers|num_sparse_(en|de)coder_layers|num_timestamp_prediction_layers|max_n_layers", 2),
    ],
    "experts": [
        (r".*experts_per_tok(en)?|.*num_experts_per_tok|.*(top_?k|topk)(_experts)?|moe_k", 2),
        (r"topk_group|n_shared_experts|num_shared_experts", 1),
        (r"n_group|num_expert_group|n_expert_groups?", 2),
        (r"(n|num|moe)_?(.*_)?(num_)?experts|zero_expert_num|n_experts", 4),
        (r"expert_capacity", 64),
    ],
    "head sizes": [
        (r"(.*_)?(head_dim|head_size|d_kv|d_head|dim_head|kv_channels|key_dim)|mamba_d_head", 8),
        (r"rotary_dim", 8),
        (r".*_lora_rank|(.*_)?lowrank|.*_rank", 8),
    ],
    "heads": [
        (r".*(kv|key_value|key)_(n_)?heads|multi_query_heads|kv_n_heads|num_query_groups", 2),
        (r"(n_|num_)?mamba_(n_|num_)?heads|mamba_n_heads", 4),
        (r"(.*_)?((num|n)_)?(.*_)?heads?(_per_ngram)?|n_heads?|num_heads", 4),
        (r"n_groups|mamba_n_groups|o_groups", 2),
        (r"num_groups", 4),
    ],
    "widths": [
        (r".*(intermediate|ffn|feed_?forward|_ff|mlp|dff|inner).*(size|dim|ff|hidden)?", 48),
        (r"d_ff|d_inner|dim_ff|n_inner|ffn_dim", 48),
        (r"expand|mamba_expand", 1),
        (r"state_size|ssm_state_size|mamba_d_state|d_state", 8),
        (
            r"(.*_)?(hidden|embed|emb|embedding|model|projection|proj|output|pooler|entity_emb|word_embed_proj|latent)_(size|dim)",
            32,
        ),
        (r"d_model|n_embd|dim|d_latents|hidden_dim|embed_dim|adapter_(in|out)_dim|input_dim|dim_model(_base)?", 32),
        (
            r"conv_channels|.*channel(s)?_dim|classifier_proj_size|(proj_)?codevector_dim|(.*_)?subsampling_conv_channels",
            32,
        ),
        (r".*_(embed_dim|hidden_dim|hidden_size|units|out_channel|output_size|projection_size)|.*bottleneck_size", 32),
        (r"(attention_)?hidden_size(_.*)?|lru_width|hidden_size_global", 32),
    ],
    "lengths": [
        (r"(.*_)?max_(.*_)?position(s|_embeddings)|n_positions|n_ctx|max_(source|target)_positions|context_length", 64),
        (r"max_seq(uence)?_len(gth)?|(.*_)?max_length|(max_)?seq(_)?len(gth)?|segment_means_seq_len", 64),
        (
            r"(.*_)?(sliding|attention)_?(window)(_size)?|(.*_)?block_size|(.*attn_|attention_|mamba_)?chunk_(size|length)",
            8,
        ),
        (r"context_size", 16),
        (r"window_size|keep_window_size|num_landmarks", 4),
        (r"num_conv_pos_embeddings", 16),
    ],
    "images": [(r"image_size|crop_size", SIDE)],
}
_STEPS = {
    "initializer_range": 0.1,
    "init_std": 0.1,
    "init_method_std": 0.1,
}  # 0.02 leaves so small a model nearly linear


def _size(name: str, value: int, groups: list[str]) -> int:
    for group in groups:
        for pattern, most in _SIZES[group]:
            if re.fullmatch(pattern, name):
                return min(value, most) if value > 0 else value
    return value


def _widths(values: list[int], groups: list[str]) -> list[int]:
    """Divide widths of stages by one power of two, so that each stays a multiple of what it was."""
    if "widths" not in groups:
        return values
    factor = 1
    while all(value % (2 * factor) == 0 and value // (2 * factor) % 4 == 0 for value in values):
        factor *= 2
    return [value // factor for value in values]


def _sample(values: list[Any], count: int) -> list[Any]:
    """Take so many of the entries of a list, the first of each value among them, in their order."""
    first = {str(value): index for index, value in reversed(list(enumerate(values)))}
    chosen = sorted(first.values())[:count]
    chosen += [index for index in range(len(values)) if index not in chosen][: count - len(chosen)]
    return [values[index] for index in sorted(chosen)]


def _ints(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(one) is int for one in value)


def _list(name: str, value: list[Any], layers: int, groups: list[str]) -> list[Any]:
    blocks = min(layers, BLOCKS)
    if len(value) == layers and layers > BLOCKS and "blocks" in groups:
        short = _sample(list(value), blocks)
        return [_size(name, one, groups) for one in short] if _ints(short) else short
    if not _ints(value):
        return value
    if re.search(r"(_idxs|_indexes|_indices|layers)$", name):  # numbers of blocks
        return [one for one in value if one < blocks] or [1]
    if re.search(r"heads", name):
        return value  # of stages
    if re.search(r"depth|num_blocks|num_block_repeats|numb_of_layers", name):
        return [min(one, 2) for one in value]
    if re.search(r"(hidden|conv|embed|tdnn|out_channel|mid_channel|in_channel|unit).*(size|dim|channel)", name):
        return _widths(list(value), groups)
    return [_size(name, one, groups) for one in value]


def _changes(config: PretrainedConfig, groups: list[str], *, fill: bool) -> dict[str, Any]:
    """Return the fields of a configuration that get another value, those of configurations in it included.

    Fields that a family makes from others are left to it. With `fill` they are not, and fields that are None and count
    something are numbers as well: the defaults of some families lack them.
    """
    kind = type(config)
    defaults = {name: getattr(kind, name, None) for name in vars(config)}
    blocks = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = vars(config).get(blocks)
    layers = layers if type(layers) is int else 0
    stages = any(name in vars(config) for name in ("depths", "depth", "num_block_repeats", "stage_num_blocks"))
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("id2label", "label2id", "num_labels"):
            continue
        new: Any = value
        if isinstance(value, PretrainedConfig):
            new = {"model_type": value.model_type, **_changes(value, groups, fill=fill)}
        elif value is None and fill and _fillable(kind, name):
            new = _size(name, 1 << 20, groups)
            new = 4 if new == 1 << 20 else new
        elif value is None and fill and name == "pad_token_id":
            new = 0
        elif isinstance(value, bool) or value is None:
            continue
        elif re.fullmatch(r".*_token_(id|index)|(boi|eoi|boa|eoa|image|audio|video).*_(id|index)|pad_index", name):
            if type(value) is int and value >= WORDS and "vocabularies" in groups:
                new = {"pad": 0, "bos": 1, "eos": 2}.get(name[:3], 3 + sum(map(ord, name)) % 5)
        elif type(value) is int and defaults[name] is None and not fill:
            continue  # made from other fields
        elif type(value) is int and name == blocks and "blocks" in groups:
            new = max(_size(name, value, groups), BLOCKS)
        elif type(value) is int:
            # Heads that all had keys of their own keep them: not every family can share.
            alone = value == vars(config).get("num_attention_heads") and re.search("kv|key_value", name)
            new = _size("num_heads" if alone else name, value, groups)
            if stages and new < value and re.search("embed_dim|hidden_size", name):
                new = _widths([value], groups)[0]
        elif (
            type(value) is float
            and "widths" in groups
            and re.fullmatch(r"(width|depth)_(coefficient|multiplier)", name)
        ):
            new = min(value, 0.25)
        elif name in _STEPS:
            new = _STEPS[name]
        elif isinstance(value, (list, tuple)) and (defaults[name] is not None or _ints(value) or fill):
            new = _list(name, list(value), layers, groups)
            if list(value) == new or (defaults[name] is None and len(value) == layers and not fill):
                continue  # made from other fields
        if new != value:
            found[name] = new
    return found


def _fillable(kind: type[PretrainedConfig], name: str) -> bool:
    return "int" in str(inspect.get_annotations(kind).get(name, ""))


def _config(family: str, groups: list[str], *, fill: bool = False, **more: Any) -> PretrainedConfig:
    kind = CONFIG_MAPPING[family]
    default = kind()
    changes = {**_changes(default, groups, fill=fill), **more}
    return kind(**changes)


@dataclass(frozen=True)
class Tiny:
    """A tiny model in evaluation mode, the batches that it is measured on, and those that it is compared by."""

    model: PreTrainedModel
    batches: list[dict[str, torch.Tensor]]
    inputs: dict[str, torch.Tensor]
    left: tuple[str, ...]
    """Groups of names that were left as they are."""


def make(kind: str, family: str) -> Tiny:
    """Make a tiny random model of a family.

    Raises
    ------
    NotBuiltError
        If transformers builds or runs none; with the reason of the attempt in which most was made small.
    """
    first = ""
    for left, fill in itertools.product(_attempts(), (False, True)):
        groups = [name for name in _SIZES if name not in left]
        try:
            model = _built(kind, family, groups, fill=fill)
            batches, inputs = _fed(model, KINDS[kind].feed)
            _normalize_(model, batches[0])
            return Tiny(model, batches, inputs, left)
        except Exception as error:  # noqa: BLE001 - whatever the code of a family raises
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise NotBuiltError(first)


def _attempts() -> Iterator[tuple[str, ...]]:
    for count in range(3):
        yield from itertools.combinations(_SIZES, count)


def _built(kind: str, family: str, groups: list[str], *, fill: bool) -> PreTrainedModel:
    config = _config(family, groups, fill=fill)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    auto = getattr(transformers, KINDS[kind].auto)
    name = getattr(modeling_auto, KINDS[kind].mapping)[family]
    config.architectures = [name if isinstance(name, str) else name[0]]
    with torch.device("meta"):
        count = sum(part.numel() for part in auto.from_config(config).parameters())
    if count > MOST:
        raise NotBuiltError(f"{count:,} parameters are left")
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config).eval()
    with torch.no_grad():
        for part in model.parameters():
            # What a family fills from a checkpoint alone is whatever was in memory.
            if part.is_floating_point() and not bool((part.abs() < 1e3).all()):
                part.normal_(std=0.1)
    return model


def _fed(model: PreTrainedModel, feed: str) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return batches on which a model runs: the first form of those that are known that it takes."""
    first: Exception | None = None
    for form in _FEEDS[feed](model):
        try:
            batches = [form(3, seed) for seed in (1, 2)]
            inputs = form(2, 3)
            with torch.no_grad():
                found = logits(model, inputs)
            if not bool(torch.isfinite(found).all()):
                raise NotBuiltError("logits are not finite")
            return batches, inputs
        except Exception as error:  # noqa: BLE001 - whatever the code of a family raises
            first = first or error
    raise first or NotBuiltError("no form of input is known for it")


def _normalize_(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Let batch norms have the moments of a batch, in place: with those of a new model, signals die out on the way."""
    norms = {part: part.momentum for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        logits(model, batch)
    for norm, momentum in norms.items():
        norm.eval().momentum = momentum


def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the main output of a model."""
    cache = {"use_cache": False} if "use_cache" in _accepted(model) else {}
    with torch.no_grad():
        output = model(**inputs, **cache)
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


Form = Callable[[int, int], dict[str, torch.Tensor]]


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(count: int, length: int, seed: int, most: int) -> torch.Tensor:
    return torch.randint(min(_SPECIAL, most // 2), most, (count, length), generator=_drawn(seed))


def _words(model: PreTrainedModel) -> int:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return WORDS
    return min(int(getattr(embeddings, "num_embeddings", WORDS)), WORDS)


def _accepted(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _decoding(model: PreTrainedModel) -> Form:
    """Return what the decoder of an encoder-decoder reads, if the model is one."""
    most = min(_words(model), WORDS)

    def read(count: int, seed: int) -> dict[str, torch.Tensor]:
        if not model.config.is_encoder_decoder:
            return {}
        return {"decoder_input_ids": _ids(count, 15, seed + 100, most)}

    return read


def _text(model: PreTrainedModel) -> Iterator[Form]:
    accepted, decoded = _accepted(model), _decoding(model)

    def plain(count: int, seed: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
        ids = _ids(count, length, seed, _words(model))
        mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in accepted else {}
        return {"input_ids": ids, **mask, **decoded(count, seed)}

    yield plain
    yield lambda count, seed: plain(count, seed, 64)
    yield lambda count, seed: {"inputs": _ids(count, LENGTH, seed, WORDS)}
    yield from _images(model)
    yield from _sound(model)


def _field(model: PreTrainedModel, *names: str) -> Iterator[Any]:
    """Yield the values of fields with these names in a configuration and in those within it."""
    inner = [value for value in vars(model.config).values() if isinstance(value, PretrainedConfig)]
    for name, config in itertools.product(names, [model.config, *inner]):
        value = getattr(config, name, None)
        if value is not None:
            yield value


def _images(model: PreTrainedModel) -> Iterator[Form]:
    channels = next(_field(model, "num_channels"), 3)
    size = next(_field(model, "image_size"), SIDE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)

    def pixels(count: int, seed: int, name: str = "pixel_values") -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, channels, height, width, generator=_drawn(seed))}

    def patches(count: int, seed: int) -> dict[str, torch.Tensor]:
        side = next(_field(model, "patch_size"))
        return {
            "pixel_values": torch.randn(count, 16, channels * side * side, generator=_drawn(seed)),
            "pixel_attention_mask": torch.ones(count, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((count, 2), 4),
        }

    yield pixels
    yield patches
    yield lambda count, seed: {"input_ids": _ids(count, LENGTH, seed, _words(model))}
    yield lambda count, seed: pixels(count, seed, "inputs")


def _sound(model: PreTrainedModel) -> Iterator[Form]:
    accepted, decoded = _accepted(model), _decoding(model)
    bins = [
        *_field(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size"),
        *_field(model, "input_dim", "hidden_size"),
        80,
    ]
    lengths = [2 * n for n in _field(model, "max_source_positions")] + list(_field(model, "max_length")) + [64, 1024]
    names = [name for name in ("input_values", "input_features") if name in accepted]

    def form(name: str, shape: tuple[int, ...]) -> Form:
        def fed(count: int, seed: int) -> dict[str, torch.Tensor]:
            said = decoded(count, seed)
            if "decoder_input_values" in accepted:
                values = torch.randn(count, 16, next(iter(bins)), generator=_drawn(seed + 100))
                said = {"decoder_input_values": values}
            return {name: torch.randn(count, *shape, generator=_drawn(seed)), **said}

        return fed

    for name in names:
        yield form(name, (4000,))
        for width, length in dict.fromkeys(itertools.product(bins, lengths)):
            yield form(name, (width, length))
            yield form(name, (length, width))
        yield form(name, (1, 4000))
    if "input_ids" in accepted:
        ids = {"input_ids", "attention_mask"} & accepted

        def text(count: int, seed: int) -> dict[str, torch.Tensor]:
            found = _ids(count, LENGTH, seed, _words(model))
            both = {"input_ids": found, "attention_mask": torch.ones_like(found)}
            return {**{key: both[key] for key in sorted(ids)}, **decoded(count, seed)}

        yield text


_FEEDS: dict[str, Callable[[PreTrainedModel], Iterator[Form]]] = {"text": _text, "images": _images, "sound": _sound}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token for each word."""
    words = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    words |= {f"w{index}": index for index in range(len(words), WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
