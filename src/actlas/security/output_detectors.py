"""Detectors over output signatures: what is fitted, and how a fitted one scores.

    los-net      a transformer over sorted log-probabilities, actual log-probability and rank
    atp-r        the same without the sorted log-probabilities (ATP+R)
    logistic     L2-regularised logistic regression on summary features: mean, minimum, maximum and spread
                 of log-probability, entropy and log rank, hand-made scores, the first row, number of rows
    mean log-prob, min log-prob, entropy, min-k, min-k++, rank      hand-made: nothing is fitted
    length       the number of rows, with the sign that separates the training data better

A fitted detector is numbers only: a vector `state` and, for a network, its configuration. Networks are
found by name among the modules that Actlas itself registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actlas.core.errors import InputError
from actlas.core.methods import import_rooms
from actlas.core.probe_quality import auc
from actlas.core.swap import MODULE_TYPES
from actlas.measure.output_signature import SCORES, OutputSignature, signature_scores

Array = NDArray[np.float64]
Index = NDArray[np.int64]
NETWORKS = ("los-net", "atp-r")
KINDS = (*NETWORKS, "logistic", *SCORES)


@dataclass(frozen=True)
class Training:
    """How networks are trained: AdamW, linear warm-up over a tenth of the steps, then linear decay.

    Attributes:
        width, layers, dropout: of the network.
        epochs: at most so many; the epoch of the best validation AUC (then loss) is kept.
        patience: stop after so many epochs without a better one.
        lr, weight_decay, batch: of AdamW.
    """

    width: int = 64
    layers: int = 1
    dropout: float = 0.3
    epochs: int = 60
    patience: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-3
    batch: int = 64


@dataclass(frozen=True)
class Detector:
    """A fitted detector.

    Attributes:
        kind: see the module's table.
        state: float32 `[p]`: a network's parameters in their order; centre, scale, weight and bias of the
            logistic regression; a sign.
        network: type and configuration of a network; empty otherwise.
    """

    kind: str
    state: Tensor
    network: Mapping[str, Any] = field(default_factory=dict)

    def score(self, los: OutputSignature) -> Tensor:
        """Return one score for each text, float32 `[n]`; higher speaks for label 1."""
        if self.kind in NETWORKS:
            return _run(build(self.network, self.state), los)
        if self.kind == "logistic":
            x = torch.tensor(summary_features(los), dtype=torch.float32)
            centre, scale, weight = self.state[:-1].reshape(3, x.shape[1])
            return ((x - centre) / scale) @ weight + self.state[-1]
        return torch.tensor(signature_scores(los)[self.kind], dtype=torch.float32) * self.state[0]


def fit_detector(
    kind: str, los: OutputSignature, y: Index, groups: Index, training: Training, seed: int
) -> Detector:
    """Fit one detector on signatures with labels 0 and 1; `groups` stay together in the validation split.

    Raises:
        InputError: an unknown kind.
    """
    if kind in NETWORKS:
        return _fit_network(kind, los, y, groups, training, seed)
    if kind == "logistic":
        from sklearn.linear_model import LogisticRegression

        x = summary_features(los)
        centre, scale = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1.0)
        fitted = LogisticRegression(C=1.0, max_iter=2000).fit((x - centre) / scale, y)
        state = np.concatenate([centre, scale, fitted.coef_[0], fitted.intercept_])
        return Detector(kind, torch.tensor(state, dtype=torch.float32))
    if kind not in SCORES:
        raise InputError(f"there is no detector {kind!r}; there are {', '.join(KINDS)}")
    sign = 1.0
    if kind == "length":
        sign = 1.0 if _area(y, signature_scores(los)["length"]) >= 0.5 else -1.0
    return Detector(kind, torch.tensor([sign]))


def summary_features(los: OutputSignature) -> Array:
    """Return features of each text for the logistic regression, `[n, 18]`."""
    mask = los.mask.numpy()
    columns = []
    for x in (los.actual, los.entropy, los.rank.float().log1p()):
        rows = [r[m] for r, m in zip(x.double().numpy(), mask, strict=True)]
        columns += [[float(f(r)) for r in rows] for f in (np.mean, np.min, np.max, np.std)]
    made = signature_scores(los)
    columns += [made[name].tolist() for name in ("min-k", "min-k++", "length")]
    first = [x.double().numpy()[:, 0].tolist() for x in (los.actual, los.entropy, los.spread)]
    return np.array([*columns, *first], dtype=np.float64).T


def build(network: Mapping[str, Any], state: Tensor) -> nn.Module:
    """Build a network from its configuration and parameters.

    Raises:
        InputError: a type that Actlas does not register, or as many parameters as do not fit.
    """
    module = _make(network)
    count = sum(p.numel() for p in module.parameters())
    if state.shape != (count,):
        raise InputError(
            f"a {network.get('type')} of this size has {count} parameters, not {list(state.shape)}"
        )
    nn.utils.vector_to_parameters(state.clone(), module.parameters())
    return module.eval()


def _make(network: Mapping[str, Any]) -> nn.Module:
    name = str(network.get("type"))
    if name not in MODULE_TYPES:
        import_rooms()
    if name not in MODULE_TYPES:
        raise InputError(f"no network of type {name!r} is known; upgrade Actlas")
    module: nn.Module = MODULE_TYPES[name].from_config(network["config"])
    return module


def _run(module: nn.Module, los: OutputSignature) -> Tensor:
    with torch.no_grad():
        return torch.cat([_forward(module, los.at(slice(i, i + 256))) for i in range(0, len(los), 256)])


def _forward(module: nn.Module, los: OutputSignature) -> Tensor:
    out: Tensor = module(los.sorted.float(), los.actual, los.rank, los.mean, los.std, los.mask)
    return out


def _fit_network(
    kind: str, los: OutputSignature, y: Index, groups: Index, training: Training, seed: int
) -> Detector:
    ranked_only = kind == "atp-r"
    config = {
        "top_k": 0 if ranked_only else los.top_k,
        "vocabulary": los.vocabulary,
        "rows": los.mask.shape[1],
        "width": training.width,
        "layers": training.layers,
        "dropout": training.dropout,
        "ranked_only": ranked_only,
    }
    network = {"type": "LOSNet", "config": config}
    fit, check = _validation(y, groups, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _make(network)
        state = _train(module, los, y, fit, check, training)
    return Detector(kind, state, network)


def _train(
    module: nn.Module, los: OutputSignature, y: Index, fit: Index, check: Index, training: Training
) -> Tensor:
    """Train and return the parameters of the best epoch."""
    target = torch.tensor(y, dtype=torch.float32)
    optimiser = torch.optim.AdamW(module.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    steps = training.epochs * -(-len(fit) // training.batch)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / max(1, steps - warm)))
    )
    held = los.at(torch.tensor(check))
    best, kept, since = (-np.inf, -np.inf), _parameters(module), 0
    for _ in range(training.epochs):
        module.train()
        order = torch.tensor(fit)[torch.randperm(len(fit))]
        for some in order.split(training.batch):
            optimiser.zero_grad()
            logits = _forward(module, los.at(some))
            nn.functional.binary_cross_entropy_with_logits(logits, target[some]).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            rate.step()
        module.eval()
        found = _run(module, held)
        loss = float(nn.functional.binary_cross_entropy_with_logits(found, target[torch.tensor(check)]))
        quality = (_area(y[check], found.double().numpy()), -loss)
        since += 1
        if quality > best:
            best, kept, since = quality, _parameters(module), 0
        if since >= training.patience:
            break
    return kept


def _parameters(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def _validation(y: Index, groups: Index, seed: int) -> tuple[Index, Index]:
    """Hold out about a fifth of the groups for choosing the epoch."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(5, *(len(np.unique(groups[y == c])) for c in (0, 1)))
    if folds < 2:
        raise InputError("a network needs texts of each label from at least two sources; give more")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fit, check in splitter.split(y, y, groups):
        if len(np.unique(y[check])) == 2 and len(np.unique(y[fit])) == 2:
            return fit, check
    raise InputError("no validation split has both labels; give more texts, or groups that mix the labels")


def _area(y: Index, scores: Array) -> float:
    return float(auc(y.astype(np.float64), scores, np.ones((1, len(y))))[0])
