"""Compression of transformer models: measure, plan, swap, save.

Importing this package needs the ``transformers`` extra. It also registers the checkpoint format: after
``import cur.integrations`` a compressed directory loads with ``AutoModelForCausalLM.from_pretrained``.
"""

from cur._lib.moved import former_names
from cur.integrations import _requirements  # noqa: F401  (first: it explains what is missing)
from cur.integrations.compress import carry_out_, compress
from cur.integrations.measure.collect import collect, collect_gradients
from cur.integrations.measure.statistics import Statistics
from cur.integrations.measure.text import batches, dataset_texts, embedded_text, read_text, token_windows
from cur.integrations.model.learning import trainable
from cur.integrations.model.loading import DEFAULT_MODEL, LoadedModel, load_model
from cur.integrations.model.targets import block_stacks, decoder_layers, linear_modules
from cur.integrations.model.usage import used_as
from cur.integrations.nn import CURLinear, FoldedLinear, InterpolativeLinear
from cur.integrations.pipeline import compress_model, evaluate_model, plan_model
from cur.integrations.plan.blocks import choose_blocks
from cur.integrations.plan.config import BudgetConfig, CompressConfig
from cur.integrations.plan.make import make_plan
from cur.integrations.plan.plan import Plan, PlanEntry
from cur.integrations.report.data import CompressionReport, LayerReport
from cur.integrations.report.divergence import Divergence, Reference, divergence
from cur.integrations.report.perplexity import Perplexity, perplexity
from cur.integrations.store.checkpoint import dense_export, save
from cur.integrations.store.module import load_into

__getattr__ = former_names(__name__, ("cur.integrations.compress", "cur.integrations.plan.blocks"))

__all__ = [
    "BudgetConfig",
    "CURLinear",
    "CompressConfig",
    "CompressionReport",
    "DEFAULT_MODEL",
    "Divergence",
    "FoldedLinear",
    "InterpolativeLinear",
    "LayerReport",
    "LoadedModel",
    "Perplexity",
    "Plan",
    "PlanEntry",
    "Reference",
    "Statistics",
    "batches",
    "block_stacks",
    "carry_out_",
    "choose_blocks",
    "collect",
    "collect_gradients",
    "compress",
    "compress_model",
    "dataset_texts",
    "decoder_layers",
    "dense_export",
    "divergence",
    "embedded_text",
    "evaluate_model",
    "linear_modules",
    "load_into",
    "load_model",
    "make_plan",
    "perplexity",
    "plan_model",
    "read_text",
    "save",
    "token_windows",
    "trainable",
    "used_as",
]
