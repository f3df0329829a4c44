"""The inputs of layers while those before them get compressed, block after block."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from cur.integrations.measure.inputs import add_gram_, mirror_
from cur.integrations.model.blocks import BlockCall, BlockWalk, HollowError
from cur.integrations.model.experts import inside_experts
from cur.integrations.model.hooks import Hook, forwards_replaced, hooked, inputs_of
from cur.integrations.model.masks import decoder_mask, padding_mask, token_rows
from cur.integrations.model.pauses import Course, layer_groups, out_of_turn, pauses
from cur.integrations.model.precision import Precision
from cur.integrations.model.running import evaluating, model_inputs
from cur.integrations.model.usage import first_tensor
from cur.integrations.nn import is_linear

__all__ = ["InputMoments", "fitting_fault", "in_order", "spread"]

# Multiple of the median square of an input feature by which the fit is drawn to the dense layer. Against the median, as
# a few features of the first tokens can be a thousand times the others and would hide the ridge, or be all it leaves.
_RIDGE = 1e-2

# Tokens per input feature of the widest layer that a fit takes: with 28 a model of 135 million parameters lost less
# than with 20, and with 20 than with 10; the passes over text are what takes time.
_TOKENS_PER_INPUT = 28

# Layers of a block that may add to the residual stream: attention, another one, and the feed-forward network.
_WRITERS = 3

Make: TypeAlias = "Callable[[str, InputMoments], Layer]"
"""Called with a layer's name and its input moments; returns a callable with the same input and output shapes that
replaces it."""

Layer: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Second moments of the inputs of a layer in the dense model, ``x``, and where layers before are compressed, ``z``.

    Attributes
    ----------
    student, cross : Tensor, shape (n, n)
        ``E[z z^T]`` and ``E[x z^T]``, float64.
    missing : Tensor, shape (m, n), or None
        ``E[e z^T]``, if the layer's output is added to a residual stream: ``e`` is the stream of the dense model at
        this place less that of the compressed one.
    """

    student: Tensor
    cross: Tensor
    missing: Tensor | None = None

    def problem(self, W: Tensor, *, correction: float, damping: float) -> tuple[Tensor, Tensor]:
        r"""Return the moment ``M`` of the inputs, with a ridge, and ``B``, in the problem of fitting a layer to them.

        The wanted outputs are ``W (z + s (x - z)) + s e`` with ``s`` the correction and ``e`` the error of the residual
        stream, if there is one. ``s = 0`` asks for the outputs of the dense layer on the inputs that compressed layers
        give, ``s = 1`` for the output of the dense model. Full correction would shrink layers wherever their input is
        uncertain, as every regression on noisy inputs does. The squared error of a weight ``V`` is, up to a constant,
        ``tr(V M V^T - 2 V B^T)``.

        Parameters
        ----------
        W : Tensor, shape (m, n)
            The dense weight, to which the ridge draws.
        correction : float
            The share ``s`` of the earlier error that is corrected.
        damping : float
            Multiple of the mean eigenvalue of the moment in the ridge.

        Returns
        -------
        M : Tensor, shape (n, n)
        B : Tensor, shape (m, n)

        References
        ----------
        MPIFA (arXiv 2501.19090) mixes the wanted outputs so, without a weight of the outputs and without the stream.
        """
        M, cross = self.student.to(W), self.cross.to(W)
        squares = M.diagonal()
        ridge = damping * float(squares.mean()) + _RIDGE * float(squares.median())
        eye = ridge * torch.eye(len(M), dtype=M.dtype, device=M.device)
        B = W @ (correction * cross + (1.0 - correction) * M + eye)
        if self.missing is not None:
            B = B + correction * self.missing.to(W)
        return M + eye, B


def spread(given: Sequence[Mapping[str, Any]], width: int) -> list[Mapping[str, Any]]:
    """Return as many batches, from all over the text, as a fit of layers with `width` inputs needs, or all.

    Parameters
    ----------
    given : sequence of mapping
        The batches to choose from.
    width : int
        The number of inputs of the widest layer.
    """
    firsts = [first_tensor(batch) for batch in given]
    tokens = [0 if first is None else first.shape[:2].numel() for first in firsts]
    count = min(len(given), -(-_TOKENS_PER_INPUT * width * len(given) // max(sum(tokens), 1)))
    return [given[(2 * place + 1) * len(given) // (2 * count)] for place in range(count)]


def in_order(
    model: nn.Module,
    given: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    make: Make,
    *,
    precision: str = "auto",
    loaded: Callable[[int], AbstractContextManager[object]] | None = None,
) -> None:
    """Go through the blocks of a model and make a replacement of each layer from its inputs; nothing is changed.

    Layers are made in the order in which their block calls them, those that are called with one tensor (query, key and
    value) together, and the next ones see what these give. A decoder reads what its compressed encoder gives. Layers
    outside the blocks, and those that are not called once with every token (experts), are left out.

    Each block runs twice per batch: once dense, and once pausing before each layer until its replacement exists. In
    between other batches run: between its layers a block must keep nothing but local variables.

    Memory: one block, the hidden states of all batches some four times, the inputs of one block's layers, and for all
    batches what the block holds where it pauses: query, key and value, and the probabilities of attention if these are
    computed as such.

    Parameters
    ----------
    model : nn.Module
        A transformer, with one stack of blocks or several.
    given : sequence of mapping
        Batches of text to run the model on.
    names : sequence of str
        The names of the layers to replace.
    make : callable
        Called to make the replacement of a layer, see :data:`Make`; the precision of the passes does not apply to it.
    precision : str, default "auto"
        The precision of matrix products in the passes: ``"float32"``, ``"bfloat16"``, or what is faster on the device;
        see :class:`~cur.integrations.model.precision.Precision`.
    loaded : callable, optional
        Called with the number of a block, returns a context in which its weights are in memory; with the first of a
        stack, also those of all that the model runs before it but blocks. By default all are in memory.

    Raises
    ------
    RuntimeError
        If a block does not call its layers in the same order in every batch.
    """
    walk = BlockWalk(model)
    passes = Precision.of(model, precision)
    loaded = loaded or nullcontext
    ended: list[_Ends] = [_Ends() for _ in given]
    changed = False
    first = 0
    with evaluating(model):
        for number, stack in enumerate(walk.stacks):
            ways: list[_Way] = []
            for place, (prefix, block) in enumerate(stack):
                inside = [name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")]
                with loaded(first + place), passes.products():
                    if not ways:
                        ways = [
                            _Way.entering(walk, batch, number, ends, changed=changed)
                            for batch, ends in zip(given, ended, strict=True)
                        ]
                    changed = _through(prefix, block, place, ways, inside, make, passes, changed=changed)
            for ends, way in zip(ended, ways, strict=True):
                ends.theirs.append(way.theirs)
                ends.ours.append(way.ours)
            first += len(stack)


def fitting_fault(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Sequence[str],
    *,
    precision: str = "auto",
    loaded: Callable[[int], AbstractContextManager[object]] | None = None,
) -> str | None:
    """Say why layers cannot be made in order, as :func:`in_order` does; None if they can.

    That is found out by doing so with one batch, on which each layer is its own replacement.

    Parameters
    ----------
    model : nn.Module
        A transformer, with one stack of blocks or several, which is not changed.
    batch : mapping
        The batch to run it on.
    names : sequence of str
        The names of the layers to replace.
    precision : str, default "auto"
        The precision of matrix products in the passes, as for :func:`in_order`.
    loaded : callable, optional
        Has the weights of a block in memory, as for :func:`in_order`.

    Returns
    -------
    str or None
        What is in the way, None if nothing is.

    Raises
    ------
    HollowError
        If it cannot be done because not all blocks are in memory.
    """
    try:
        in_order(model, [batch], names, lambda name, _: model.get_submodule(name), precision=precision, loaded=loaded)
    except HollowError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # whatever a block says that is held on its way
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"the blocks of {type(model).__name__} cannot be copied, or held before a layer ({reason})"
    return None


@dataclass(eq=False)
class _Ends:
    """The hidden states with which the stacks so far end, for one batch: in the dense model and the compressed one."""

    theirs: list[Tensor] = field(default_factory=list)
    ours: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class _Way:
    """The way of one batch through the blocks of a stack, in the dense model and where layers are compressed."""

    theirs: Tensor
    ours: Tensor
    dense: list[BlockCall]
    """What each block is called with besides the hidden state, in the dense model."""
    compressed: list[BlockCall]
    """The same where layers of stacks before are compressed."""
    mask: Tensor | None
    other: Tensor | None
    """The padding mask of what the blocks read besides the hidden state: of an encoder, in its decoder."""

    @classmethod
    def entering(cls, walk: BlockWalk, batch: Mapping[str, Any], number: int, ends: _Ends, *, changed: bool) -> _Way:
        theirs, dense = walk.calls(batch, number, ends.theirs)
        ours, compressed = walk.calls(batch, number, ends.ours) if changed else (theirs, dense)
        mask = other = padding_mask(model_inputs(walk.model, batch))
        if walk.decodes(number):
            mask = decoder_mask(batch)
        return cls(theirs, ours, dense, compressed, mask, other)


def _through(
    prefix: str,
    block: nn.Module,
    place: int,
    ways: Sequence[_Way],
    inside: Sequence[str],
    make: Make,
    passes: Precision,
    *,
    changed: bool,
) -> bool:
    """Make the replacements of layers of one block, and take all batches through it; says if anything changed yet."""
    at = [way.dense[place] for way in ways]
    theirs = [way.theirs for way in ways]
    groups = layer_groups(block, at[0], theirs[0], inside)
    added = _added(block, at[0], theirs[0]) if groups else []
    streams = [_Stream(hidden) for hidden in theirs]
    seen = []
    for way, stream in zip(ways, streams, strict=True):
        with inputs_of(block, [group[0] for group in groups]) as inputs, stream.watching(block, added):
            way.theirs = way.dense[place](block, way.theirs)
        seen.append(inputs)
    student = copy.deepcopy(block) if groups else block
    with _pausing(student, groups, added) as replacements:
        courses = [_Course(way.compressed[place], student, way.ours) for way in ways]
        for group in groups:
            first = group[0]
            # Layers that share their input, as query, key and value do, do not write to the stream.
            lacking = streams if group == [first] and first in added else None
            if not all(first in inputs for inputs in seen):
                raise out_of_turn(first)
            # Let go of as they are used: of all batches they are as large as the hidden states.
            dense = [inputs.pop(first) for inputs in seen]
            masks = [way.other if call.reads(x) else way.mask for way, call, x in zip(ways, at, dense, strict=True)]
            propagated = _moments(first, courses, dense, masks, lacking, passes)
            # Factorizations must not be rounded to the precision of the passes.
            with passes.exact():
                for name in group:
                    replacements[name] = make(f"{prefix}.{name}", propagated)
        # Up to the first replacement both models have the same states: one pass serves both.
        changed = changed or bool(groups)
        for way, course in zip(ways, courses, strict=True):
            way.ours = course.to_the_end() if changed else way.theirs
    return changed


class _Course(Course):
    """The way of one batch through a block, with its residual stream."""

    def __init__(self, call: BlockCall, block: nn.Module, hidden: Tensor) -> None:
        super().__init__(call, block, hidden)
        self.stream = hidden
        """The residual stream so far: the input of the block and the outputs that its layers have added to it."""


@contextmanager
def _pausing(block: nn.Module, groups: Sequence[Sequence[str]], added: Sequence[str]) -> Iterator[dict[str, Layer]]:
    """Let courses through a block pause before the first layer of each group, and call the replacements of layers."""
    replacements: dict[str, Layer] = {}

    def instead(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        return lambda _: lambda *args, **__: replacements[name](*args)

    def add(_: nn.Module, __: Any, output: Tensor) -> None:
        course: Any = getcurrent()
        course.stream = course.stream + output.reshape(course.stream.shape)  # some blocks flatten tokens

    summing: list[Hook] = [(block.get_submodule(name), "after", add) for name in added]
    made = [(block.get_submodule(name), instead(name)) for name in itertools.chain(*groups)]
    with hooked([*pauses(block, [group[0] for group in groups]), *summing]), forwards_replaced(made):
        yield replacements


def _moments(
    name: str,
    courses: Sequence[_Course],
    dense: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    streams: Sequence[_Stream] | None,
    passes: Precision,
) -> InputMoments:
    """Go on to a layer and sum the products of its inputs with themselves and the dense model's.

    If the states of the dense model's residual stream are given, also the products of the inputs with its error.
    """
    n, width = dense[0].shape[-1], courses[0].stream.shape[-1]
    place: dict[str, Any] = {"dtype": torch.float64, "device": dense[0].device}
    student, cross = torch.zeros(n, n, **place), torch.zeros(n, n, **place)
    missing = None if streams is None else torch.zeros(width, n, **place)
    tokens = 0
    for number, (course, x, mask) in enumerate(zip(courses, dense, masks, strict=True)):
        z, x = (token_rows(rows, mask, name).float() for rows in (course.to_layer(name), x))
        # Products in single precision, for speed; their rounding lies far below the ridge.
        with passes.exact():
            if streams is not None and missing is not None:
                e = streams[number].before[name] - course.stream
                missing += token_rows(e, mask, name).float().T @ z
            add_gram_(student, z)
            cross += x.T @ z
        tokens += len(z)
    mirror_(student)
    return InputMoments(student / tokens, cross / tokens, None if missing is None else missing / tokens)


class _Stream:
    """The residual stream of the dense model, while a block runs."""

    def __init__(self, hidden: Tensor) -> None:
        self.state = hidden
        self.before: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, block: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Keep the state of the stream before each of the named layers adds to it."""

        def add(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def after(_: nn.Module, __: Any, output: Tensor) -> None:
                self.before[name] = self.state
                self.state = self.state + output.reshape(self.state.shape)  # some blocks flatten tokens

            return after

        with hooked([(block.get_submodule(name), "after", add(name)) for name in names]):
            yield


def _added(block: nn.Module, call: BlockCall, hidden: Tensor) -> list[str]:
    """Return the layers that write to the residual stream; none if they cannot be told.

    They are found by trying which outputs of the right shape sum up, with the input of the block, to its output.
    """
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: outputs.setdefault(name, []).append(output)

    experts = inside_experts(block)
    layers = [(name, module) for name, module in block.named_modules() if is_linear(module) and name not in experts]
    with hooked([(module, "after", keep(name)) for name, module in layers]):
        after = call(block, hidden)
    fitting = {
        name: seen[0].reshape(hidden.shape)
        for name, seen in outputs.items()
        if len(seen) == 1 and seen[0].numel() == hidden.numel() and seen[0].shape[-1] == hidden.shape[-1]
    }
    if after.shape != hidden.shape:  # what adds to the stream is not all that happens to it
        return []
    scale = float((after - hidden).abs().max())
    for count in range(1, min(len(fitting), _WRITERS) + 1):
        for some in itertools.combinations(fitting, count):
            total = sum((fitting[name] for name in some), start=hidden)
            if float((total - after).abs().max()) <= 1e-3 * scale:
                return list(some)
    return []
