"""CETT: how much of an MLP's output is lost when neurons with small outputs are dropped.

    sample_neurons(model, corpus, *, tokens=2048, sample=1024) -> Neurons
    cett_thresholds(model, corpus, cett, ...) -> {site: threshold}
    Neurons.thresholds(cett) .cett(site, threshold) .ratio(thresholds) .to_edit(thresholds)

A neuron's output is `n_i = W_down[:, i] h_i`, of norm `|h_i| ||W_down[:, i]||`. With a threshold eps

    CETT(eps) = mean over tokens of  || sum_{i: ||n_i|| < eps} n_i ||  /  || MLP(x) ||

("cumulative errors of tail truncation"). One shared value of CETT gives each layer its own threshold: the
largest of 65,536 candidates, evenly spaced from the least neuron-output norm to the 0.99 quantile, that
keeps the layer's CETT at or below it. Intermediates come from a dense pass; in a sparse pass earlier layers
shift the inputs of later ones.

Source: Luo et al. 2024, "Sparsing Law" (arXiv 2411.02335), section 4.1, and its code
(`model_utils.calc_sparsity`); CETT is from Zhang et al. 2024, "ReLU^2 wins".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError, ModelError
from actlas.core.layout import apply_linear, find, weight_matrix
from actlas.measure.likelihood import Window, select
from actlas.measure.sparse_edits import MaskBelow

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site

CANDIDATES = 65_536
_BATCH_TOKENS = 512


@dataclass
class Layer:
    """The sampled inputs of one down projection.

    Attributes:
        act: MLP activations of the sampled tokens, [n, d_mlp].
        weight: down projection, [d_model, d_mlp] (the model's own tensor).
        columns: norm of each of its columns, [d_mlp].
        out: norm of the MLP's output for each token, with its bias, [n].
        low, high: least and 0.99-quantile neuron-output norm.
        known: candidate number -> CETT, so far.
    """

    act: Tensor
    weight: Tensor
    columns: Tensor
    out: Tensor
    low: float
    high: float
    known: dict[int, float] = field(default_factory=dict)

    def threshold(self, candidate: int) -> float:
        """Return a candidate threshold by its number, 0 to 65,535."""
        return self.low + (self.high - self.low) * candidate / (CANDIDATES - 1)

    def cett(self, threshold: float) -> float:
        """Return CETT at a threshold, averaged over the sampled tokens."""
        tail = torch.where(self.act.abs() * self.columns < threshold, self.act, 0.0) @ self.weight.T
        return float((tail.norm(dim=1) / self.out).double().mean())

    def at(self, candidate: int) -> float:
        """Return CETT at a candidate, computed once."""
        if candidate not in self.known:
            self.known[candidate] = self.cett(self.threshold(candidate))
        return self.known[candidate]

    def ratio(self, threshold: float) -> float:
        """Return the share of neurons that stay active (zero outputs never do)."""
        size = self.act.abs() * self.columns
        return float(((size >= threshold) & (size > 0)).double().mean())


@dataclass
class Neurons:
    """Sampled MLP activations of every layer; answers which thresholds give a CETT.

    Attributes:
        layers: by site name (`blocks.i.mlp.act`), in order.
        tokens: how many tokens were sampled.
        fingerprint: the model that they came from.
    """

    layers: dict[str, Layer]
    tokens: int
    fingerprint: Any = None

    def thresholds(self, cett: float, tolerance: float = 0.0) -> dict[str, float]:
        """Return the threshold of each layer for one shared CETT.

        Args:
            cett: not negative; 0 drops nothing but exact zeros.
            tolerance: stop a layer's search when its CETT lies below `cett` by less than this share of
                it; 0 searches to the last candidate.

        Raises:
            InputError: a negative value.
        """
        if not cett >= 0:
            raise InputError(f"cett must not be negative, not {cett}")
        if cett == 0:
            return dict.fromkeys(self.layers, 0.0)
        return {
            site: layer.threshold(_largest(layer, cett, tolerance)) for site, layer in self.layers.items()
        }

    def cett(self, thresholds: Mapping[str, float]) -> dict[str, float]:
        """Return each layer's CETT at given thresholds."""
        return {site: layer.cett(thresholds[site]) for site, layer in self.layers.items()}

    def ratio(self, thresholds: Mapping[str, float]) -> float:
        """Return the activation ratio on the sampled tokens, averaged over layers."""
        shares = [layer.ratio(thresholds[site]) for site, layer in self.layers.items()]
        return sum(shares) / len(shares)

    def to_edit(self, thresholds: Mapping[str, float]) -> Edit:
        """Return the inference rule `|h_i| < eps / ||W_down[:, i]||  ->  0` as an edit, layer by layer."""
        edits = []
        for site, layer in self.layers.items():
            bound = thresholds[site] / layer.columns.double()
            bound = bound.nan_to_num(0.0, posinf=torch.finfo(torch.float32).max).float()
            edits.append(MaskBelow(site, bound))
        edit = compose(edits)
        return edit if self.fingerprint is None else edit.bind(self.fingerprint)


def _largest(layer: Layer, cett: float, tolerance: float) -> int:
    """Return the largest candidate whose CETT is at most `cett`.

    CETT grows with the threshold (nearly: vectors may cancel), so a bracket is narrowed: by
    interpolation while a tolerance allows to stop early, by halves otherwise.
    """
    low, high = 0, CANDIDATES
    if tolerance:
        low = max((i for i, c in layer.known.items() if c <= cett), default=0)
        high = min((i for i, c in layer.known.items() if c > cett and i > low), default=CANDIDATES)
    step = 0
    while high - low > 1:
        if tolerance and low and layer.known.get(low, 0.0) >= cett * (1 - tolerance):
            break
        middle = (low + high) // 2
        below, above = layer.known.get(low), layer.known.get(high)
        if tolerance and step % 2 == 0 and below is not None and above is not None and above > below:
            # CETT is close to linear in a narrow bracket; aim slightly below the target
            aim = low + (high - low) * (cett * (1 - tolerance / 2) - below) / (above - below)
            middle = min(high - 1, max(low + 1, round(aim)))
        step += 1
        if layer.at(middle) <= cett:
            low = middle
        else:
            high = middle
    return low


def mlp_sites(model: Model) -> list[Site]:
    """Return the `mlp.act` sites of the predicting tower that exist.

    Raises:
        ModelError: there are none (no layout, or mixture-of-experts blocks only).
    """
    prefix = f"{model.tower.name}." if model.tower is not None and model.tower.name else ""
    wanted = f"{prefix}blocks."
    found = [
        s for s in model.sites() if s.kind == "mlp.act" and s.absent is None and s.name.startswith(wanted)
    ]
    if not found:
        raise ModelError(
            f"{model.name} has no mlp.act sites: its layout is unknown or every MLP is a mixture"
        )
    return found


def sample_neurons(
    model: Model,
    corpus: Iterable[Any],
    *,
    tokens: int = 2048,
    sample: int = 1024,
    context: int = 512,
    per_document: int | None = None,
    skip_first: int = 0,
    seed: int = 0,
) -> Neurons:
    """Run a dense pass and keep the MLP activations of a random sample of its tokens.

    Args:
        model: a causal language model; edits that are installed apply.
        corpus: documents or strings.
        tokens, context, per_document: which tokens are read; see `likelihood.nll`.
        sample: how many of them are kept at most (`sample x layers x d_mlp` numbers in memory).
        skip_first: leave out so many first tokens of each window.
        seed: of the sample.

    Raises:
        ModelError: no causal language model, or no MLP activations to read.
        InputError: no tokens are left.
    """
    sites = mlp_sites(model)
    chosen = select(model, corpus, tokens=tokens, context=context, per_document=per_document)
    sizes = [max(0, len(w.ids) - skip_first) for w in chosen.windows]
    total = sum(sizes)
    if total == 0:
        raise InputError(f"no tokens are left after the first {skip_first} of each window")
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(total, generator=generator)[:sample].sort().values
    kept: dict[str, list[Tensor]] = {s.name: [] for s in sites}
    done = 0
    for batch in _batches(chosen.windows):
        rows = _pad([w.ids for w in batch])
        trace = model.trace(rows, sites)
        mask = rows["attention_mask"].bool()
        mask[:, :skip_first] = False
        count = int(mask.sum())
        here = picked[(picked >= done) & (picked < done + count)] - done
        done += count
        for s in sites:
            kept[s.name].append(trace[s.name][mask.to(trace[s.name].device)][here].float())
    layers = {s.name: _layer(model, s, torch.cat(kept.pop(s.name))) for s in sites}
    return Neurons(layers, len(picked), model.fingerprint)


def cett_thresholds(model: Model, corpus: Iterable[Any], cett: float, **options: Any) -> dict[str, float]:
    """Return the threshold of each layer's neuron-output norms for one shared CETT.

    Options are those of `sample_neurons`; the search goes to the last of the 65,536 candidates.
    """
    return sample_neurons(model, corpus, **options).thresholds(cett)


def _layer(model: Model, site: Site, act: Tensor) -> Layer:
    down = find(model.module, site.module)
    assert down is not None
    weight = weight_matrix(down).detach().float()
    columns = weight.norm(dim=0)
    size = act.abs() * columns
    out = apply_linear(down, act.to(weight_matrix(down).dtype)).detach().float().norm(dim=1)
    flat = size.flatten()
    stride = max(1, flat.numel() // CANDIDATES)
    high = float(flat[::stride].double().sort().values[int(0.99 * (len(flat[::stride]) - 1))])
    return Layer(
        act, weight, columns, out.clamp_min(torch.finfo(torch.float32).tiny), float(size.min()), high
    )


def _batches(windows: Iterable[Window]) -> Iterable[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        longest = max([len(window.ids), *(len(w.ids) for w in batch)])
        if batch and longest * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _pad(rows: list[tuple[int, ...]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
