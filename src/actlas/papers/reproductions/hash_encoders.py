"""hash-encoders: the on/off pattern of rectifiers is a code of the input.

He, Lei et al. 2021, "Neural networks behave as hash encoders: an empirical study". Multilayer
perceptrons with batch normalisation are trained on scikit-learn's digits over a sweep of widths,
training times and sample sizes; their codes are tested for determinism (does each image have its own?)
and categorisation (do codes alone tell the digits apart?). Then the same for a language model: the
signs of SmolLM2's gates at one layer, as codes of tokens in context.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.code_measures import (
    code_categorisation,
    gate_code_neighbours,
    linear_region_diameter,
    redundancy_ratio,
)
from actlas.measure.codes import ActivationCode
from actlas.measure.statistics import mean_measurement, rate_measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

TRAIN = 1400
REDUNDANCY = "redundancy of codes"


def judge(m: Measured) -> list[Check]:
    """Central: the redundancy of training codes never rises with width beyond the intervals (after full
    training) and is below 0.01 at the greatest width; and K-nearest-neighbours on codes is at most 15
    points below the network itself there. Also: redundancy falls from each training time to the next (at
    the width of the other sweeps); more training samples lower the redundancy of test codes; weight decay
    and label noise move it less than halving the width does; and on SmolLM2 the nearest gate code in
    Hamming distance holds the same token more often than chance, with redundancy below 0.05.
    """
    widths = sorted(m.every(REDUNDANCY, sweep="width", inputs="train"), key=lambda x: int(x.group["width"]))
    rises = [f"{a.group['width']} to {b.group['width']}" for a, b in _pairs(widths) if _low(b) > _high(a)]
    said = ", ".join(f"{x.group['width']}: {x.value:.3f}" for x in widths)
    last = widths[-1]
    checks = [
        Check(
            "redundancy falls with width",
            not rises,
            said + (f"; rises {rises}" if rises else ""),
            central=True,
        ),
        Check.below("codes are nearly unique at the greatest width", last, 0.01, central=True),
        Check.below(
            "K-NN on codes comes close to the network", m["network minus K-NN on codes"], 0.15, central=True
        ),
    ]
    times = sorted(m.every(REDUNDANCY, sweep="epochs", inputs="train"), key=lambda x: int(x.group["epochs"]))
    said = ", ".join(f"{x.group['epochs']}: {x.value:.3f}" for x in times)
    checks.append(
        Check("redundancy falls with training time", all(_high(b) < _low(a) for a, b in _pairs(times)), said)
    )
    few, many = (
        m.get(REDUNDANCY, sweep="samples", inputs="test", end="few"),
        m.get(REDUNDANCY, sweep="samples", inputs="test", end="many"),
    )
    if few and many:
        checks.append(
            Check(
                "more training samples lower it",
                _high(many) < _low(few),
                f"{few.value:.3f} to {many.value:.3f}",
            )
        )
    base = m.get(REDUNDANCY, sweep="arms", arm="plain", inputs="train")
    half = m.get(REDUNDANCY, sweep="arms", arm="half the width", inputs="train")
    for arm in ("weight decay", "label noise"):
        found = m.get(REDUNDANCY, sweep="arms", arm=arm, inputs="train")
        if base and half and found:
            moved, by_width = abs(found.value - base.value), abs(half.value - base.value)
            said = f"{moved:.3f} against {by_width:.3f}"
            checks.append(Check(f"{arm} moves it less than width does", moved < by_width, said))
    same = m.get("code-neighbour-same-token")
    if same is None or same.baseline is None:
        checks.append(Check("neighbouring gate codes hold the same token", None, "not measured in this run"))
    else:
        said = f"{same}; chance {same.baseline.value:.3f}"
        checks.append(
            Check("neighbouring gate codes hold the same token", _low(same) > same.baseline.value, said)
        )
        checks.append(Check.below("gate codes of tokens are nearly unique", m.get("code-redundancy"), 0.05))
    return checks


def _pairs(x: list[Measurement]) -> list[tuple[Measurement, Measurement]]:
    return list(itertools.pairwise(x))


def _low(m: Measurement) -> float:
    return m.value if m.low is None else m.low


def _high(m: Measurement) -> float:
    return m.value if m.high is None else m.high


@reproduction(
    "hash-encoders",
    claim="In trained rectifier networks of sufficient width nearly every input has its own on/off code, "
    "and codes of one class lie close together.",
    judge=judge,
    quick={
        "widths": (4, 8, 16, 32, 64, 128),
        "sweep_width": 16,
        "epochs": (0, 3, 40),
        "samples": (175, 1400),
        "seeds": 4,
        "site": "blocks.15.mlp.gate",
        "tokens": 2048,
    },
    full={
        "widths": (4, 8, 16, 32, 64, 128, 256),
        "sweep_width": 16,
        "epochs": (0, 1, 3, 10, 40, 100),
        "samples": (175, 350, 700, 1400),
        "seeds": 10,
        "site": "blocks.15.mlp.gate",
        "tokens": 8192,
    },
)
def hash_encoders(
    *,
    seed: int,
    widths: Sequence[int],
    sweep_width: int,
    epochs: Sequence[int],
    samples: Sequence[int],
    seeds: int,
    site: str,
    tokens: int,
) -> Findings:
    """Run it.

    Args:
        seed: seed of splits, weights and batches.
        widths: units of the one hidden layer.
        sweep_width: width for the other sweeps; one at which codes still collide.
        epochs: training times, from 0; widths are compared at 40, or at the longest below.
        samples: training-set sizes.
        seeds: networks of each kind.
        site: where SmolLM2's gates are read.
        tokens: token positions that are coded; 0 leaves the language model out.
    """
    data = _Digits(seed)
    trained = max(e for e in epochs if e <= 40)
    measured: list[Measurement] = []
    jobs = len(widths) + len(epochs) + len(samples) + 4
    with progress("hash codes of digits", jobs * seeds, "networks") as advance:

        def sweep(group: dict[str, str], **options: Any) -> dict[str, list[float]]:
            found: dict[str, list[float]] = {}
            for s in range(seeds):
                for key, value in _one_network(data, 100 * seed + s, **options).items():
                    found.setdefault(key, []).append(value)
                advance()
            for key, values in found.items():
                name, _, inputs = key.partition(", ")
                full = {**group, **({"inputs": inputs} if inputs else {})}
                measured.append(
                    mean_measurement(name, _unit(name), values, seed=seed, over="networks", group=full)
                )
            return found

        for width in widths:
            group = {"sweep": "width", "width": str(width)}
            found = sweep(group, width=width, epochs=trained, categorise=True, regions=width == sweep_width)
        gap = np.subtract(found["network accuracy"], found["accuracy of K-NN on codes"])
        for time in epochs:
            sweep(
                {"sweep": "epochs", "epochs": str(time)},
                width=sweep_width,
                epochs=time,
                regions=True,
                categorise=time == 0,
            )
        for n in samples:
            end = "few" if n == min(samples) else "many" if n == max(samples) else "between"
            sweep(
                {"sweep": "samples", "samples": str(n), "end": end},
                width=sweep_width,
                epochs=trained,
                samples=n,
            )
        arms: dict[str, dict[str, Any]] = {
            "plain": {},
            "half the width": {"width": sweep_width // 2},
            "weight decay": {"weight_decay": 1e-2},
            "label noise": {"label_noise": 0.2},
        }
        for arm, options in arms.items():
            sweep({"sweep": "arms", "arm": arm}, **{"width": sweep_width, "epochs": trained, **options})
    measured.append(
        mean_measurement("network minus K-NN on codes", "fraction", gap, seed=seed, over="networks")
    )
    if tokens:
        measured += _gate_codes(site, tokens, seed)
    m = Measured(measured)
    last = m.get(REDUNDANCY, sweep="width", width=str(widths[-1]), inputs="train")
    assert last is not None
    headline = (
        f"redundancy {last.value:.3f} at width {widths[-1]}, "
        f"K-NN on codes {100 * float(np.mean(gap)):.1f} points below the network"
    )
    return Findings(measured, headline, NOTE, _plots(m))


NOTE = (
    "Published: redundancy near 0 for wide networks on MNIST and CIFAR-10, K-NN and logistic regression "
    "on codes close to the network, and size, time and sample size matter while regularisation and noise "
    "do not. Official code: drops constant units over training and test data jointly and relabels K-means"
    " clusters greedily; here units are dropped on the training set only and clusters are matched one to "
    "one. Ours: 1,400 of scikit-learn's digits, one hidden layer, batch normalisation before the "
    "rectifier, Adam at 1e-2 with a tenfold decay every 20 epochs. Redundancy depends on the number of "
    "inputs: training values are over 1,400 images (or the sample size), test and noise values over 397. "
    "Controls: networks at 0 epochs (random hashes), codes of noise images, K-NN with shuffled labels, "
    "K-NN on pixels."
)


class _Digits:
    """scikit-learn's digits, split once: 1,400 for training, 397 for the test, and 397 noise images."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
        self.train, self.test = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
        self.noise = torch.rand(self.test[0].shape, generator=generator)


def _train(
    x: Tensor, y: Tensor, seed: int, width: int, epochs: int, weight_decay: float, label_noise: float
) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(width)
    net = nn.Sequential(nn.Linear(x.shape[1], width), norm, nn.ReLU(), nn.Linear(width, 10))
    flip = torch.rand(len(y), generator=generator) < label_noise
    y = torch.where(flip, torch.randint(0, 10, y.shape, generator=generator), y)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 20, 0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            if len(batch) < 2:
                continue
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()
    if not epochs:  # an untrained network still needs the statistics that its normalisation uses
        norm.momentum = 1.0
        with torch.no_grad():
            net(x)
    return net.eval()


def _one_network(
    data: _Digits,
    seed: int,
    *,
    width: int,
    epochs: int,
    samples: int = TRAIN,
    weight_decay: float = 0.0,
    label_noise: float = 0.0,
    categorise: bool = False,
    regions: bool = False,
) -> dict[str, float]:
    """Train one network; return its redundancy, accuracy and, if asked, categorisation and region size."""
    x, y = data.train[0][:samples], data.train[1][:samples]
    test, labels = data.test
    net = _train(x, y, seed, width, epochs, weight_decay, label_noise)
    with torch.no_grad():
        accuracy = float((net(test).argmax(1) == labels).float().mean())
    code = ActivationCode(net).fit(x)
    if not code.width:
        return {f"{REDUNDANCY}, {part}": 1.0 for part in ("train", "test", "noise")} | {
            "network accuracy": accuracy
        }
    codes = {"train": code.encode(x), "test": code.encode(test), "noise": code.encode(data.noise)}
    out = {f"{REDUNDANCY}, {part}": redundancy_ratio(c) for part, c in codes.items()}
    out["network accuracy"] = accuracy
    if categorise:
        found = code_categorisation(codes["train"], y, codes["test"], labels, width=code.width, seed=seed)
        out |= {_CATEGORISED[m.name]: m.value for m in found}
        rng = np.random.default_rng(seed)
        wrong = code_categorisation(
            codes["train"],
            rng.permutation(y.numpy()),
            codes["test"],
            labels,
            width=code.width,
            methods=("knn",),
        )
        out["accuracy of K-NN on codes with shuffled labels"] = wrong[0].value
    if regions:
        out["region diameter"] = linear_region_diameter(net, test[:100], seed=seed).value
    return out


_CATEGORISED = {
    "code-kmeans-accuracy": "accuracy of K-means on codes",
    "code-kmeans-purity": "purity of K-means on codes",
    "code-knn-accuracy": "accuracy of K-NN on codes",
    "code-logistic-accuracy": "accuracy of logistic regression on codes",
}


def _knn_on_pixels(data: _Digits) -> Measurement:
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, labels) = data.train, data.test
    hits = KNeighborsClassifier(9).fit(x.numpy(), y.numpy()).predict(test.numpy()) == labels.numpy()
    return rate_measurement("accuracy of K-NN on pixels", hits, better="higher")


def _unit(name: str) -> str:
    return "input units" if name == "region diameter" else "fraction"


def _gate_codes(site: str, tokens: int, seed: int) -> list[Measurement]:
    from actlas.data import corpus
    from actlas.models import load

    texts = corpus("mixed", seed=seed)
    return gate_code_neighbours(load("smollm2"), texts, site=site, tokens=tokens)


def _plots(m: Measured) -> list[Plot]:
    rows = [
        {"width": int(x.group["width"]), "redundancy": max(x.value, 1e-4), "inputs": x.group["inputs"]}
        for x in m.every(REDUNDANCY, sweep="width")
    ]
    names = {"network accuracy": "network", "accuracy of K-NN on codes": "K-NN on codes"}
    names |= {
        "accuracy of logistic regression on codes": "logistic on codes",
        "accuracy of K-means on codes": "K-means on codes",
    }
    accuracy = [
        {"width": int(x.group["width"]), "test accuracy": x.value, "by": label}
        for name, label in names.items()
        for x in m.every(name, sweep="width")
        if "inputs" not in x.group
    ]
    return [
        Plot("Redundancy of codes by width", rows, x="width", y="redundancy", color="inputs", log="xy"),
        Plot(
            "Accuracy from codes alone, by width", accuracy, x="width", y="test accuracy", color="by", log="x"
        ),
    ]
