"""What every weight method needs: which layers, in which format, which text, and one way to finish.

    chosen = targets(model, WeightFormat(bits=3, group_size=64))
    texts = split_text(corpus, tokens=1024, context=256)      # .fit to calibrate on, .held_out to measure on
    edit = finish(model, modules, method="rtn", texts=texts, ...)

Formats are those of `core.numbers`. A group size that is asked for must divide the inputs of every layer (the
message lists those that do); without one, each layer gets the legal size nearest to 64. Layers outside the
blocks (embeddings, heads) keep their numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError, NonFiniteError, did_you_mean
from actlas.core.layout import find, weight_matrix
from actlas.core.numbers import QuantSpec, nearest_group
from actlas.core.quant_edit import QuantEdit, already_on_grid
from actlas.core.quant_linear import QuantLinear
from actlas.measure.quant_price import fit_measurements
from actlas.measure.rounding import CONVOLUTIONS, weighted_modules

if TYPE_CHECKING:
    from actlas.core.model import Model

LEAST_TOKENS = 64
BATCH_TOKENS = 512  # of a calibration pass; more would take memory and save no time
_DEFAULT_GROUP = 64


@dataclass(frozen=True)
class WeightFormat:
    """How weights are to be stored.

    Attributes:
        bits: of one code.
        group_size: inputs that share a scale; `None`: for each layer the legal size nearest to 64; 0: a whole
            output channel.
        symmetric: integers around 0, without zero points.
        format: a format by name (`"nf4-g64"`, `"int3-channel"`, `"mxfp4"`) instead of the three above.
        formats: path of a layer -> its own format by name, for mixed precision.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    format: str = ""
    formats: Mapping[str, str] | None = None

    def spec(self, path: str, columns: int) -> QuantSpec:
        """Return the format of one layer with `columns` inputs, checked.

        Raises:
            InputError: bits that do not exist, or a group size that does not divide the inputs.
        """
        own = (self.formats or {}).get(path, self.format)
        if own:
            spec = QuantSpec.parse(own)
        else:
            size = nearest_group(columns, _DEFAULT_GROUP) if self.group_size is None else self.group_size
            if size < 0:
                raise InputError(f"a group size must not be negative: {size} (0 means whole channels)")
            whole = size == 0 or (self.group_size is None and size == columns)
            spec = QuantSpec(
                self.bits,
                symmetric=self.symmetric,
                granularity="channel" if whole else "group",
                group_size=None if whole else size,
            )
        spec.check(columns, path)
        return spec


@dataclass(frozen=True)
class Target:
    """A layer that will be quantised.

    Attributes:
        path: of the module.
        module: `nn.Linear` or `Conv1D`.
        spec: its format.
    """

    path: str
    module: nn.Module
    spec: QuantSpec

    @property
    def weight(self) -> Tensor:
        """Its weight `[out, in]`, detached, in float32 or wider."""
        weight = weight_matrix(self.module).detach()
        return weight if weight.dtype.itemsize >= 4 else weight.float()


def names_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return names that are given as a sequence, or as text with commas (as on the command line)."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return tuple(given)


def targets(model: Model, form: WeightFormat, skip: str | Sequence[str] = ()) -> list[Target]:
    """Return the linear layers of a model's blocks with their formats, in module order.

    Args:
        model: the model; one without a known layout gives all of its linear layers.
        form: the format.
        skip: paths, or last parts of them (`"down_proj"`), that keep their numbers.

    Raises:
        InputError: a name in `skip` or `formats` that there is not; a format that does not fit.
        ModelError: there is nothing to quantise, or it is quantised already.
        NonFiniteError: NaN or infinities in a weight.
    """
    skip = names_of(skip)
    linear = {
        path: module
        for path, module in weighted_modules(model.module).items()
        if not isinstance(module, CONVOLUTIONS)
    }
    if model.layout is not None:
        roots = tuple(f"{tower.blocks}." for tower in model.layout.towers)
        linear = {path: module for path, module in linear.items() if path.startswith(roots)}
    done = [path for path, module in model.module.named_modules() if isinstance(module, QuantLinear)]
    if done:
        raise ModelError(f"{model.name} is quantised already (at {done[0]}); take that edit out first")
    if not linear:
        raise ModelError(f"{model.name} has no linear layers to quantise")
    names = {path.rpartition(".")[2] for path in linear} | set(linear)
    for name in [*skip, *(form.formats or {})]:
        if name not in names:
            hint = (
                did_you_mean(name, names)
                or f"; there are {', '.join(sorted(n for n in names if '.' not in n))}"
            )
            raise InputError(f"no linear layer is called {name!r}{hint}")
    out, empty = [], []
    for path, module in linear.items():
        if path in skip or path.rpartition(".")[2] in skip:
            continue
        weight = weight_matrix(module)
        if not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteError(
                f"{path}: {bad} of {weight.numel()} weights are NaN or infinite; check the model"
            )
        if bool((weight == 0).all(1).any()):
            empty.append(path)
        out.append(Target(path, module, form.spec(path, weight.shape[1])))
    if empty:
        warnings.warn(
            f"{len(empty)} layers (the first is {empty[0]}) have outputs whose weights are all 0; they stay",
            stacklevel=3,
        )
    if not out:
        raise InputError("all layers are skipped; there is nothing to quantise")
    return out


# Text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Text to calibrate on, and other text to measure on.

    Attributes:
        fit: documents for calibration, each cut to about one window.
        held_out: the documents after them.
        tokens: how many tokens of `fit` are to be read.
        context: length of a window.
    """

    fit: list[str]
    held_out: list[Any]
    tokens: int
    context: int


def split_text(
    model: Model, corpus: Iterable[Any] | None, *, tokens: int, context: int, seed: int = 0
) -> Texts:
    """Take documents for calibration from a corpus until there are enough tokens; the rest is held out.

    Args:
        model: whose tokenizer counts.
        corpus: strings or documents; `None`: the bundled prose.
        tokens: for calibration; one window of each document.
        context: tokens in a window.
        seed: of the bundled corpus's order.

    Raises:
        InputError: fewer than 64 tokens asked for or given.
    """
    if tokens < LEAST_TOKENS:
        raise InputError(f"{tokens} calibration tokens are too few; ask for at least {LEAST_TOKENS}")
    if context < 2:
        raise InputError(f"a window has at least 2 tokens, not {context}")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer; give one to actlas.wrap(module, tokenizer)")
    if corpus is None:
        from actlas.data import corpus as bundled

        corpus = bundled("prose", seed=seed)
    context = min(context, model.context_length or context)
    documents, fit, found, used = list(corpus), [], 0, 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        ids = model.tokenizer(text[: 16 * context], add_special_tokens=False, verbose=False)["input_ids"]
        used += 1
        if ids:
            share = min(1.0, context / len(ids))
            fit.append(text[: max(1, int(share * min(len(text), 16 * context)))])
            found += min(len(ids), context)
        if found >= tokens:
            break
    if found < LEAST_TOKENS:
        raise InputError(
            f"the calibration text has {found} tokens; at least {LEAST_TOKENS} are needed, 1,000 are better"
        )
    return Texts(fit, documents[used:], tokens, context)


# Finishing ----------------------------------------------------------------------------------------


def grid_note(model: Model, chosen: Sequence[Target]) -> str:
    """Say so if the weights already lie on a grid of few bits, as those of GGUF files do."""
    some = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
    found = {already_on_grid(target.weight) for target in some}
    if len(found) != 1 or (grid := found.pop()) is None:
        return ""
    bits, group = grid
    return (
        f"the weights of {model.name} already lie on a grid of {bits} bits in groups of {group}, so that "
        "format loses nothing here, and results near it flatter every method"
    )


def finish(
    model: Model,
    chosen: Sequence[Target],
    modules: Mapping[str, nn.Module],
    *,
    method: str,
    texts: Texts | None,
    parameters: Mapping[str, Tensor] | None = None,
    errors: Mapping[str, float] | None = None,
    note: str = "",
    evaluate: int = 0,
    seed: int = 0,
) -> Edit:
    """Return the edit, bound to the model, with its prices on held-out text.

    Args:
        model: the model.
        chosen: the layers.
        modules: path -> replacement.
        method: what made them.
        texts: `held_out` is measured on; `None` measures nothing.
        parameters: exact folds.
        errors: path -> relative error of the layer's output on the calibration text.
        note: for people.
        evaluate: tokens of held-out text to measure on; 0: none.
        seed: of the bootstrap.
    """
    said = "; ".join(part for part in (note, grid_note(model, chosen)) if part)
    edit = QuantEdit(modules, parameters or {}, method=method, note=said, errors=errors or {})
    bound = edit.bind(model.fingerprint)
    if texts is None or not evaluate:
        return bound
    return bound.with_measurements(
        fit_measurements(model, texts.held_out, bound, tokens=evaluate, context=texts.context, seed=seed)
    )


def layer_of(model: Model, path: str) -> nn.Module:
    """Return a module by path."""
    module = find(model.module, path)
    assert module is not None
    return module
