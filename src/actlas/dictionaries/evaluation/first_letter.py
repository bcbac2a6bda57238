"""Feature absorption and splitting on the first-letter task (Chanin et al. 2024; SAEBench).

A model's activation at a word says which letter the word begins with, and a linear probe p per letter
reads it. A dictionary should have a feature for it. Two things go wrong instead:

* splitting: several features share the letter. With F1(k) the score of a logistic regression on the k
  most positive features of an L1 probe, features count while F1(k) > best so far + 0.03;
* absorption: the letter's features S stay silent on a word, and a feature of that word carries the
  letter's direction in their place.

For a held-out word of the letter that the probe gets right, with z the codes, c_j = cos(p, d_j),
proj_j = z_j |d_j| c_j, P = x . p/|p|, M = sum of proj over S, and A the sum of the 3 largest proj_j > 0
outside S among features with c_j >= 0.1:

    absorption fraction = 0                       if M >= P or A/P < 0.4
                          1                       if M <= 0
                          a / (a + M)             else, a = min(A, P - M)
    full absorption     = S silent, P > 0, and the one feature of largest proj has c >= 0.025 and
                          proj / P >= 0.4

    mean_absorption_fraction_score, mean_full_absorption_score, mean_num_split_features: means over the
    letters whose probe has F1 > 0.6

Numbers as in SAEBench's code. Here words are read where they stand (a causal model has not seen what
follows), words are lower-case with a space before them, and codes are brought to one scale before the L1
probe, so that its penalty means the same for every dictionary. SAEBench advises models of a billion
parameters and dictionaries of 16,000 features or more; smaller ones are short of both.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actlas.core.dictionary import Dictionary
from actlas.core.measurement import Measurement
from actlas.dictionaries.evaluation.letter_words import Words, read_words
from actlas.measure.samples import mean_measurement, missing

if TYPE_CHECKING:
    from actlas.core.model import Model

Array = NDArray[np.float64]
F1_JUMP, PROBE_F1, LEAST_COSINE, FULL_COSINE, SHARE, ABSORBERS = 0.03, 0.6, 0.1, 0.025, 0.4, 3


@dataclass(frozen=True)
class LetterScore:
    """What one letter shows: F1 of its probe and of its k-sparse probes, its features, its absorption."""

    letter: str
    probe_f1: float
    sparse_f1: tuple[float, ...]
    features: tuple[int, ...]
    fractions: tuple[float, ...]
    full: tuple[bool, ...]


def first_letter(
    model: Model,
    lenses: Mapping[str, Dictionary],
    *,
    per_letter: int = 40,
    examples: int = 2,
    most: int = 10,
    seed: int = 0,
) -> list[Measurement]:
    """Measure absorption and splitting of dictionaries of one site.

    Args:
        model: the model.
        lenses: dictionaries by name.
        per_letter, examples: see `read_words`.
        most: largest k of the k-sparse probes.
        seed: of words, split and bootstrap.
    """
    site = next(iter(lenses.values())).site
    words = read_words(model, site, per_letter=per_letter, examples=examples, seed=seed)
    probes = _probes(words)
    out = []
    for name, lens in lenses.items():
        scores = letter_scores(lens, words, probes, most=most)
        out += letter_measurements(scores, {"dictionary": name}, seed)
    return out


def _probes(words: Words) -> dict[int, tuple[Array, float]]:
    """Return a linear probe (weight, bias) for each letter, fitted on the training words."""
    from sklearn.linear_model import LogisticRegression

    x = words.x.double().numpy()
    centre = x[words.train].mean(0)
    scale = max(float(x[words.train].std()), 1e-12)
    found = {}
    for letter in np.unique(words.letter):
        model = LogisticRegression(max_iter=1000, class_weight="balanced", C=0.1)
        model.fit((x[words.train] - centre) / scale, words.letter[words.train] == letter)
        weight = model.coef_[0] / scale
        found[int(letter)] = weight, float(model.intercept_[0] - weight @ centre)
    return found


@torch.no_grad()
def letter_scores(
    lens: Dictionary, words: Words, probes: Mapping[int, tuple[Array, float]], *, most: int = 10
) -> list[LetterScore]:
    """Return the scores of every letter; see the module's text."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    codes = lens.encode(words.x)
    z = codes.dense().double().cpu().numpy()
    active = np.abs(z[z != 0])
    scale = float(active.mean()) if len(active) else 1.0
    atoms = lens.atoms.detach().double().cpu()
    lengths = atoms.norm(dim=1).clamp_min(1e-300)
    weights = _l1_weights(z[words.train] / scale, words.letter[words.train], sorted(probes))
    x, test = words.x.double().numpy(), ~words.train
    out = []
    for row, (letter, (weight, bias)) in enumerate(sorted(probes.items())):
        truth = words.letter == letter
        said = x @ weight + bias > 0
        order = np.argsort(-weights[row], kind="stable")
        scores: list[float] = []
        features: tuple[int, ...] = ()
        best = -100.0
        for k in range(1, min(most, lens.features) + 1):
            own = order[:k]
            model = LogisticRegression(max_iter=500, class_weight="balanced")
            model.fit(z[words.train][:, own] / scale, truth[words.train])
            scores.append(
                float(f1_score(truth[test], model.predict(z[test][:, own] / scale), zero_division=0))
            )
            if scores[-1] <= best + F1_JUMP:
                break
            best, features = scores[-1], tuple(int(f) for f in own)
        unit = torch.from_numpy(weight / np.linalg.norm(weight))
        cosines = (atoms @ unit / lengths).numpy()
        hits = np.flatnonzero(test & truth & said)
        pairs = [
            absorption(z[i] * lengths.numpy() * cosines, z[i], cosines, float(x[i] @ unit.numpy()), features)
            for i in hits
        ]
        out.append(
            LetterScore(
                string.ascii_lowercase[letter],
                float(f1_score(truth[test], said[test], zero_division=0)),
                tuple(scores),
                features,
                tuple(p[0] for p in pairs),
                tuple(p[1] for p in pairs),
            )
        )
    return out


def absorption(
    projection: Array, z: Array, cosines: Array, whole: float, features: Iterable[int]
) -> tuple[float, bool]:
    """Return the absorption fraction of one word and whether it is fully absorbed.

    Args:
        projection: each feature's part of the probe's direction, `[m]`. z: codes `[m]`.
        cosines: of each atom with the probe, `[m]`. whole: the activation along the probe.
        features: those that stand for the letter.
    """
    own = np.zeros(len(z), dtype=bool)
    own[list(features)] = True
    main = float(projection[own].sum())
    others = projection[~own & (cosines >= LEAST_COSINE) & (projection > 0)]
    absorbers = float(np.sort(others)[::-1][:ABSORBERS].sum())
    if whole <= 0 or main >= whole or absorbers / whole < SHARE:
        fraction = 0.0
    elif main <= 0:
        fraction = 1.0
    else:
        part = min(absorbers, whole - main)
        fraction = min(max(part / (part + main), 0.0), 1.0)
    top = int(projection.argmax())
    full = (
        not bool((z[own] > 1e-8).any())
        and whole > 0
        and bool(cosines[top] >= FULL_COSINE)
        and bool(projection[top] / whole >= SHARE)
    )
    return fraction, full


def _l1_weights(z: Array, letter: NDArray[np.int64], letters: Sequence[int], decay: float = 0.01) -> Array:
    """Return one-against-rest weights with an L1 penalty, `[letters, m]`: SAEBench's loss, on all rows."""
    x = torch.from_numpy(z).float()
    y = torch.from_numpy(np.stack([letter == one for one in letters], axis=1)).float()
    positive = (len(y) - y.sum(0)) / y.sum(0).clamp_min(1)
    weight = torch.zeros(x.shape[1], len(letters), requires_grad=True)
    bias = torch.zeros(len(letters), requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.01)
    steps = 200
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, (1e-5 / 0.01) ** (1 / steps))
    with torch.enable_grad():
        for _ in range(steps):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                x @ weight + bias, y, pos_weight=positive
            )
            loss = loss + decay * weight.abs().sum(0).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return weight.detach().T.double().numpy()


def letter_measurements(
    scores: Sequence[LetterScore], group: Mapping[str, str], seed: int = 0
) -> list[Measurement]:
    """Return the means over the letters that the probe knows, with bootstraps over letters."""
    known = [s for s in scores if s.probe_f1 > PROBE_F1 and s.fractions]
    note = f"{len(known)} of {len(scores)} letters have a probe with F1 above {PROBE_F1}"
    columns = {
        "mean_absorption_fraction_score": [float(np.mean(s.fractions)) for s in known],
        "mean_full_absorption_score": [float(np.mean(s.full)) for s in known],
        "mean_num_split_features": [float(len(s.features)) for s in known],
        "first_letter_top_1_f1": [s.sparse_f1[0] for s in known],
    }
    out = []
    for name, values in columns.items():
        unit = "features" if "split" in name else "fraction"
        if not values:
            out.append(missing(name, unit, note, group=group))
            continue
        better: Any = "higher" if name.endswith("f1") else "lower"
        out.append(
            mean_measurement(
                name, unit, values, seed=seed, over="letters", better=better, group=group, note=note
            )
        )
    f1 = [s.probe_f1 for s in scores]
    out.append(
        mean_measurement("first_letter_probe_f1", "fraction", f1, seed=seed, over="letters", group=group)
    )
    return out
