"""What sparsity costs and saves: one protocol for every rule.

    price = sparsity_price(model, corpus, edit)                       # achieved sparsity, weights, loss, KL
    compare_rules(model, corpus, {"magnitude": a, "wina": b})         # all on the same tokens, and paired

*Weights touched* is the share of the weights of the blocks' linear layers that a token needs, counted on
the evaluated tokens under the edit, not taken from what was asked for:

    a layer whose inputs are skipped         rows x (inputs that are not zero)
    up_proj where the gate decides           (rows of active neurons) x (inputs that are not zero)
    gate_proj and up_proj with frozen sets   (rows of active neurons) x (inputs that are not zero)
    a replaced layer                         what its `weights_touched` says

Embeddings, norms and attention's products with the cache are the same for every rule and are left out.
The loss is compared on the same tokens with a bootstrap over documents drawn for both runs together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.errors import InputError
from actlas.core.installation import EditHadNoEffect, PassWatcher
from actlas.core.measurement import Measurement
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.likelihood import Losses, nll
from actlas.measure.linear_layers import LinearLayer, linear_layers
from actlas.measure.paired import perplexity_ratio
from actlas.measure.samples import mean_measurement
from actlas.measure.statistics import paired_difference

if TYPE_CHECKING:
    from actlas.core.model import Model

_GATED = ("gate_proj", "up_proj")


@dataclass
class Touched:
    """Weights that were needed, counted over real tokens.

    Attributes:
        needed, held: by layer path, summed over tokens.
        active, inputs: inputs of each layer that were not zero, and all of them.
    """

    needed: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> float:
        """Share of weights touched."""
        return sum(self.needed.values()) / sum(self.held.values())

    @property
    def sparsity(self) -> float:
        """Share of inputs that were zero, over all layers."""
        return 1 - sum(self.active.values()) / sum(self.inputs.values())

    @property
    def per_layer(self) -> dict[str, float]:
        """Share of weights touched, by layer path."""
        return {path: self.needed[path] / held for path, held in self.held.items() if held}

    def add(self, path: str, needed: Tensor, held: float, active: Tensor, inputs: int) -> None:
        """Count some tokens; `needed` and `active` are `[n]`."""
        n = len(active)
        for store, value in (
            (self.needed, float(needed.double().sum())),
            (self.held, held * n),
            (self.active, float(active.double().sum())),
            (self.inputs, float(inputs * n)),
        ):
            store[path] = store.get(path, 0.0) + value


@contextmanager
def count_touched(model: Model, edit: Edit | None = None) -> Iterator[Touched]:
    """Count the weights that every pass of the block needs. Enter it inside `model.edit(edit)`.

    Args:
        model: the model.
        edit: what is installed; tells which rows of gate_proj and up_proj may be left out.
    """
    found, watcher, handles = Touched(), PassWatcher(model), []
    rows = _row_rules(model, edit)
    waiting: dict[int, list[tuple[str, Tensor]]] = {}  # layers whose rows down_proj's inputs decide

    def reader(layer: LinearLayer) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            run = watcher.of(model.resolve(layer.input_site)[0])
            if x.ndim == 3 and run.length is not None and x.shape[1] == run.length:
                x = x[run.real(x.device)]
            x = x.flatten(0, -2)
            own = getattr(module, "weights_touched", None)
            active = (x != 0).sum(1)
            if own is not None:
                found.add(layer.path, own(x), layer.size, module.inputs_kept(x), layer.columns)
                return
            found.add(layer.path, active * layer.rows, layer.size, active, layer.columns)
            if (layer.block, layer.name) in rows:
                waiting.setdefault(layer.block, []).append((layer.path, active))
            if layer.name == "down_proj":
                for path, inputs in waiting.pop(layer.block, ()):
                    found.needed[path] -= float((inputs * (layer.columns - active)).double().sum())

        return hook

    watcher.start()
    try:
        for layer in linear_layers(model):
            handles.append(layer.module(model).register_forward_pre_hook(reader(layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
        watcher.stop()


def _row_rules(model: Model, edit: Edit | None) -> set[tuple[int, str]]:
    """Return the layers (block, name) of which only the rows of active neurons are needed."""
    found: set[tuple[int, str]] = set()
    for part in edit.parts() if edit is not None else ():
        if isinstance(part, SkipInputs):
            for site in model.resolve(part.site):
                if site.block is not None and site.kind == "mlp.gate":
                    found.add((site.block, "up_proj"))
                elif site.block is not None and site.kind == "mlp.act" and part.frozen is not None:
                    found |= {(site.block, name) for name in _GATED}
    return found


@dataclass(frozen=True)
class Priced:
    """One rule, evaluated.

    Attributes:
        losses: loss and divergence from the dense model, by document.
        touched: what was needed.
    """

    losses: Losses
    touched: Touched


def run_sparse(
    model: Model, corpus: Iterable[Any], edit: Edit, *, against_base: bool = False, **options: Any
) -> Priced:
    """Score text under an edit and count the weights it needs.

    Args:
        model, corpus, edit: as in `sparsity_price`.
        against_base: also compare with the dense model, in two further passes (which must not be counted).
        **options: of `likelihood.nll`.
    """
    corpus = list(corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditHadNoEffect)
        with model.edit(edit):
            with count_touched(model, edit) as touched:
                losses = nll(model, corpus, **options)
            if against_base:
                losses = nll(model, corpus, against_base=True, **options)
    return Priced(losses, touched)


def sparsity_price(
    model: Model,
    corpus: Iterable[Any],
    edit: Edit,
    *,
    base: Losses | None = None,
    name: str = "",
    seed: int = 0,
    **options: Any,
) -> list[Measurement]:
    """Measure what an edit of activation sparsity saves and costs.

    Args:
        model: a causal language model without other edits.
        corpus: text.
        edit: the edit.
        base: the dense losses on the same text and options, if known.
        name: label of the rule, for the groups.
        seed: of the bootstrap.
        **options: of `likelihood.nll`; `against_base=True` adds the divergence, for one more pass.

    Returns:
        `weights-touched`, `achieved-sparsity`, `perplexity-ratio` and, if asked, `kl-to-dense`.
    """
    corpus = list(corpus)
    if base is None:
        base = nll(model, corpus, **{**options, "against_base": False})
    found = run_sparse(model, corpus, edit, **options)
    group = {"rule": name} if name else {}
    n = int(found.losses.tokens.sum())
    out = [
        Measurement("weights-touched", found.touched.weights, "fraction", n, group=group, better="lower"),
        Measurement("achieved-sparsity", found.touched.sparsity, "fraction", n, group=group),
        perplexity_ratio(base, found.losses, seed=seed, group=group),
    ]
    if found.losses.divergence is not None:
        values = found.losses.divergence / found.losses.tokens
        out.append(
            mean_measurement("kl-to-dense", "nats/token", values, found.losses.tokens, seed=seed, group=group)
        )
    return out


def compare_rules(
    model: Model,
    corpus: Iterable[Any],
    rules: Mapping[str, Edit],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    equal: float = 0.02,
    base: Losses | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Measurement]:
    """Measure several rules on the same tokens, and against each other.

    Args:
        model, corpus, base, seed, options: as in `sparsity_price`.
        rules: name -> edit.
        pairs: (rule, the rule that it is compared with); default: each with the first.
        equal: two rules are compared only if their weights touched differ by no more than this.

    Returns:
        The measurements of `sparsity_price` for each rule, grouped by `rule`, and for each pair
        `extra-loss` (nats a token, paired bootstrap over documents; negative where the rule is better).
        Where budgets are not equal, its value is NaN and the note says so.

    Raises:
        InputError: fewer than two rules, or a pair with a rule that is not there.
    """
    names = list(rules)
    if pairs is None:
        pairs = [(name, names[0]) for name in names[1:]]
    unknown = [name for pair in pairs for name in pair if name not in rules]
    if len(rules) < 2 or unknown:
        given = ", ".join(names) or "none"
        raise InputError(f"a comparison needs two rules by name{_quoted(unknown)}; given {given}")
    corpus = list(corpus)
    if base is None:
        base = nll(model, corpus, **{**options, "against_base": False})
    found = {
        name: sparsity_price(model, corpus, edit, base=base, name=name, seed=seed, **options)
        for name, edit in rules.items()
    }
    out = [m for rows in found.values() for m in rows]
    return out + [_extra(found[over], found[name], name, over, equal, seed) for name, over in pairs]


def _quoted(names: Sequence[str]) -> str:
    return f", and {names[0]!r} is not one" if names else ""


def _extra(
    first: list[Measurement], other: list[Measurement], name: str, reference: str, equal: float, seed: int
) -> Measurement:
    a, b = first[2], other[2]
    off = other[0].value - first[0].value
    group = {"rule": name, "over": reference}
    note = f"weights touched {other[0].value:.3f} and {first[0].value:.3f}"
    if abs(off) > equal:
        return Measurement(
            "extra-loss", float("nan"), "nats/token", a.n, group=group, note=f"not at equal budgets: {note}"
        )
    assert a.samples is not None and b.samples is not None
    drawn = paired_difference(a.samples, b.samples, a.weights, seed=seed)
    return Measurement(
        "extra-loss",
        drawn.value,
        "nats/token",
        drawn.n,
        drawn.low,
        drawn.high,
        "paired bootstrap over documents",
        seed,
        group=group,
        better="lower",
        note=note,
        details={"weights_difference": off},
    )
