"""What could be imported before it was moved still can be, with a warning that names the new place."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

import cur
from cur._lib.moved import MOVED
from cur.integrations import linear_modules

FORMER = {
    "cur.integrations.account": [
        "Account",
        "check_hashes",
        "compare",
        "read_account",
        "write_account",
    ],
    "cur.integrations": [
        "apply_plan_",
        "choose_layers",
    ],
    "cur.integrations.adapters": [
        "refuse_adapter_directory",
        "refuse_adapters",
    ],
    "cur.integrations.arriving": [
        "Arriving",
        "in_order",
        "spread",
    ],
    "cur.integrations.beside": [
        "ACCOUNT",
        "HISTORY",
        "PAGE",
        "PLAN",
        "REPORT",
        "carry",
        "missing_files",
        "name_of",
        "source_of",
    ],
    "cur.integrations.budget": [
        "METHODS",
        "BudgetConfig",
        "error_curves",
        "joint_curves",
        "plan_budget",
    ],
    "cur.integrations.calibration": [
        "Statistics",
        "collect",
        "collect_gradients",
    ],
    "cur.integrations.card": [
        "model_card",
    ],
    "cur.integrations.checkpoint": [
        "PAGE",
        "PLAN",
        "REPORT",
        "CURConfig",
        "CURQuantizer",
        "CheckpointError",
        "check_target",
        "dense_export",
        "mark_",
        "read_config",
        "save",
    ],
    "cur.integrations.choice": [
        "CHOICES",
        "choose_layers",
        "inner_blocks",
    ],
    "cur.integrations.config": [
        "DEFAULT_RANK",
        "CompressConfig",
    ],
    "cur.integrations.curves": [
        "Cut",
        "LayerCurve",
        "NeuronCurve",
        "unit",
    ],
    "cur.integrations.disk": [
        "ByteCosts",
    ],
    "cur.integrations.evaluate": [
        "Perplexity",
        "perplexity",
    ],
    "cur.integrations.experts": [
        "LinearExperts",
        "eager_experts",
        "is_experts",
        "release_",
        "rolled",
        "unroll_",
        "unrolled",
    ],
    "cur.integrations.factorize": [
        "as_json",
        "factorize",
        "finite_weight",
        "guide",
        "interpolative_layer",
        "link_weights",
        "plain_certificate",
        "report_on",
    ],
    "cur.integrations.gradients": [
        "OutputGradients",
        "draw",
    ],
    "cur.integrations.inspect": [
        "CheckpointSummary",
        "LayerSummary",
        "summarize",
    ],
    "cur.integrations.layers": [
        "ALL_LINEAR",
        "block_stacks",
        "decoder_layers",
        "is_linear",
        "linear_modules",
    ],
    "cur.integrations.layouts": [
        "PURPOSES",
        "choose_layout",
        "fastest_rank",
        "ranks_of",
    ],
    "cur.integrations.limits": [
        "check_windows",
        "positions",
    ],
    "cur.integrations.models": [
        "DEFAULT_MODEL",
        "LoadedModel",
        "load_model",
    ],
    "cur.integrations.moments": [
        "Moments",
        "x_norm",
    ],
    "cur.integrations.neurons": [
        "neuron_groups",
    ],
    "cur.integrations.opening": [
        "Opened",
        "auto_class",
        "model_class",
        "open_checkpoint",
        "quiet",
        "stored_dtype",
    ],
    "cur.integrations.origin": [
        "KeptDigest",
        "Origin",
        "changed_modules",
        "kept_digest",
        "kept_names",
        "origin_of",
        "set_origin_",
    ],
    "cur.integrations.outputs": [
        "OutputChange",
        "activation_of",
        "output_changes",
        "spectral_norm_bound",
    ],
    "cur.integrations.page": [
        "can_draw",
        "report_page",
    ],
    "cur.integrations.plan": [
        "FORMAT_VERSION",
        "IMPORTANCES",
        "LINKS",
        "METHODS",
        "PRECISIONS",
        "SUBSPACES",
        "Plan",
        "PlanEntry",
        "PlanError",
        "fingerprint",
        "is_multiple",
    ],
    "cur.integrations.plan.blocks": [
        "choose_layers",
    ],
    "cur.integrations.planning": [
        "candidates",
        "chosen_blocks",
        "layer_entries",
        "make_plan",
        "plan_of",
    ],
    "cur.integrations.precision": [
        "NAMES",
        "PRECISIONS",
        "Precision",
        "check",
        "continued",
        "slowdown",
    ],
    "cur.integrations.pruning": [
        "FittedBefore",
        "fit_before",
        "keep_neurons",
        "neuron_curves",
    ],
    "cur.integrations.quantizer": [
        "ADVICE",
        "FORMAT_VERSION",
        "METHOD",
        "CURConfig",
        "CURQuantizer",
        "CheckpointError",
        "describe",
        "mark_",
        "refuse_other_formats",
    ],
    "cur.integrations.report": [
        "CompressionReport",
        "LayerReport",
        "Size",
        "model_size",
        "versions",
        "weight_bytes",
    ],
    "cur.integrations.rounding": [
        "round_layer",
    ],
    "cur.integrations.rows": [
        "ROWS",
        "Conversation",
        "read_rows",
        "texts_of",
    ],
    "cur.integrations.sampling": [
        "own_text",
        "sample_windows",
    ],
    "cur.integrations.spectra": [
        "EXACT_UP_TO",
        "singular_values",
        "spectrum",
    ],
    "cur.integrations.statistics": [
        "Statistics",
        "by_stack",
    ],
    "cur.integrations.stored": [
        "CONFIG",
        "CheckpointError",
        "check_config",
        "digest_of",
        "read_object",
    ],
    "cur.integrations.tensors": [
        "ModelFiles",
        "conversions",
        "has_weights",
        "names_in_model",
        "open_weights",
        "without_weights",
    ],
    "cur.integrations.text": [
        "batches",
        "dataset_texts",
        "embedded_text",
        "evenly",
        "read_text",
        "token_windows",
    ],
    "cur.integrations.blockwise.shards": [
        "DTYPES",
        "ShardError",
        "Shards",
        "StoredTensor",
        "header_of",
    ],
    "cur.integrations.blockwise": [
        "Skeleton",
        "Team",
        "TeamError",
        "load_skeleton",
    ],
    "cur.integrations.blockwise.skeleton": [
        "Skeleton",
        "load_skeleton",
    ],
    "cur.integrations.blockwise.states": [
        "States",
    ],
    "cur.integrations.blockwise.tunnel": [
        "Tunnel",
    ],
    "cur.integrations.blockwise.team": [
        "Team",
        "TeamError",
    ],
    "cur.healing.pair": [
        "Loss",
        "Pair",
        "only_cores",
        "outputs_of",
    ],
    "cur.healing.stack": [
        "Entry",
        "Outputs",
        "ReachedError",
        "Stack",
    ],
    "cur.healing.cache": [
        "Taught",
        "TeacherCache",
    ],
    "cur.healing.sharing": [
        "check_pair",
        "check_teacher",
        "load_student",
        "share_",
        "twin",
    ],
    "cur.healing.cores": [
        "Coordinates",
        "Core",
        "cores_of",
    ],
    "cur.healing.objectives": [
        "output_losses",
        "relative_distance",
        "token_weights",
    ],
    "cur.healing.data": [
        "Text",
    ],
    "cur.healing.moments": [
        "MOMENT_SAMPLES",
        "LayerMoments",
    ],
    "cur.healing.closed_form": [
        "LayerFit",
        "LeastSquares",
        "closed_form_",
        "solve_block_",
    ],
    "cur.healing.natural": [
        "natural_step_",
        "search",
    ],
    "cur.healing.learner": [
        "Learner",
    ],
    "cur.healing.train": [
        "Goal",
        "Progress",
        "Status",
        "Task",
        "look",
        "saving_memory",
        "summary",
        "train",
    ],
    "cur.healing.state": [
        "StateError",
        "StateFile",
        "digest",
    ],
    "cur.healing.logs": [
        "Log",
    ],
    "cur.importance": [
        "Weight",
        "diagonal",
        "factor",
        "matrix",
        "wanda",
    ],
    "cur.integrations.plan.importance": [
        "guide",
        "link_weights",
    ],
    "cur.integrations.nn.int8": [
        "Int8Embedding",
        "Int8Linear",
    ],
    "cur.truncation": [
        "WeightedSVD",
        "square_errors",
        "weighted_svd",
    ],
    "cur.own_rows": [
        "OwnRows",
        "own_rows",
    ],
    "cur.own_inputs": [
        "STEPS",
        "OwnInputs",
        "own_inputs",
    ],
}
"""Public names by the modules in which they were."""


def test_every_moved_module_is_listed():
    assert set(MOVED) <= set(FORMER)


@pytest.mark.parametrize("former", FORMER)
def test_former_names_are_found(former):
    assert FORMER[former]
    for name in FORMER[former]:
        if former in MOVED:
            sys.modules.pop(former, None)
        with pytest.warns(DeprecationWarning, match=rf"{former}.* has moved to cur\."):
            found = getattr(importlib.import_module(former), name)
        assert found is not None


def test_a_name_that_was_changed_is_named():
    sys.modules.pop("cur.integrations.blockwise.team", None)
    with pytest.warns(
        DeprecationWarning, match=r"blockwise\.team has moved to cur\.integrations\.blockwise\.distributed"
    ):
        former = importlib.import_module("cur.integrations.blockwise.team")
    with pytest.warns(DeprecationWarning, match=r"blockwise\.team\.Team has moved to .*\.distributed\.ProcessGroup$"):
        found = former.Team
    assert found is importlib.import_module("cur.integrations.blockwise").ProcessGroup


def test_a_name_that_was_never_there_is_not_found():
    sys.modules.pop("cur.integrations.layers", None)
    with pytest.warns(DeprecationWarning, match="has moved"):
        former = importlib.import_module("cur.integrations.layers")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        former.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("cur.integrations.plan").nothing  # noqa: B018


def test_a_function_can_be_called_whatever_was_imported_before():
    sys.modules.pop("cur.own_rows", None)
    function = cur.own_rows
    try:
        with pytest.warns(DeprecationWarning, match=r"cur\.own_rows has moved to cur\.weighted\.rows"):
            importlib.import_module("cur.own_rows")
        assert cur.own_rows(np.eye(3)[:, :2]).shape == function(np.eye(3)[:, :2]).shape
    finally:
        cur.own_rows = function


def test_a_former_module_is_an_attribute_of_its_package():
    sys.modules.pop("cur.importance", None)
    vars(cur).pop("importance", None)
    with pytest.warns(DeprecationWarning, match=r"cur\.importance has moved to cur\.weights and cur\.scores"):
        assert cur.importance.factor is cur.weights.factor
    assert cur.importance.wanda is cur.scores.wanda
    with pytest.raises(AttributeError, match="module 'cur' has no attribute 'nothing'"):
        cur.nothing  # noqa: B018


def test_former_options_are_taken():
    A = np.diag([1.0, 5.0, 3.0, 0.0])
    with pytest.warns(DeprecationWarning, match="`method` of select is `select` now"):
        rows, columns = cur.select(A, rank=2, method="norm")
    assert (rows.tolist(), columns.tolist()) == ([1, 2], [1, 2])
    with pytest.raises(TypeError, match="`method` is the former name of `select`; give one of them"):
        cur.select(A, rank=2, method="norm", select="norm")
    blocks = [torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2)]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
    with pytest.warns(DeprecationWarning, match="`layers` of linear_modules is `blocks` now"):
        assert linear_modules(model, "all-linear", layers=[1]) == ["layers.1.0"]
