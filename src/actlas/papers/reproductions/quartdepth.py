"""quartdepth: do log-polished activations, compensation and K-FAC rounding help a depth network at 4 bits?

Shen et al. 2025. A small encoder-decoder that was trained on rendered scenes (a floor, a wall, boxes,
spheres; exact depth); heavy-tailed numbers for the polishing alone; and EfficientNet-Lite0 as a network with
real weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actlas.core.measurement import Better, Measurement
from actlas.core.progress import progress
from actlas.measure.samples import mean_measurement, rate_measurement
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction

STEPS = ("direct", "polished", "and compensated", "and rounded by AdaRound")


def judge(m: Measured) -> list[Check]:
    """Central: at 4-bit weights and activations polishing does not raise the depth network's AbsRel on unseen
    scenes (interval of polished minus direct not wholly above 0), compensation lowers the squared difference
    from the float network's log depth (interval of the paired difference below 0), and so does AdaRound after
    it. Also, exact or constructed: the polishing map has an inverse to 1e-5; on Student t numbers with 2
    degrees of freedom polished rounding has less relative error on the bulk (|x| below the knee) than even
    steps; compensation satisfies the normal equations to 1e-6 without damping, and the minus sign of the
    printed formula makes the error larger than none; AbsRel falls from direct to all steps (interval below
    0); and EfficientNet-Lite0 (4-bit weights, 8-bit activations) agrees with its float self on more images
    when polished and compensated than directly rounded (interval of the difference above 0).
    """
    raised = m["AbsRel of polished minus direct"]
    checks = [
        Check(
            "polishing does not raise AbsRel",
            raised.low is None or raised.low <= 0,
            str(raised),
            central=True,
        ),
        Check.below(
            "compensation brings the depth nearer",
            m["difference of compensated minus polished"],
            0.0,
            central=True,
        ),
        Check.below(
            "AdaRound brings it nearer", m["difference of AdaRound minus compensated"], 0.0, central=True
        ),
        Check.below("the map has an inverse", m["largest relative error of the inverse map"], 1e-5),
        Check.below("polished rounding is better on the bulk", m["bulk error polished over even"], 1.0),
        Check.below("the normal equations hold", m["residual along the inputs"], 1e-6),
        Check.above("a minus sign would do harm", m["error with a minus sign over none"], 1.0),
        Check.below("AbsRel falls over all steps", m["AbsRel of all steps minus direct"], 0.0),
    ]
    agreement = m.get("agreement of compensated minus direct")
    checks.append(Check.above("EfficientNet-Lite0 agrees with itself more often", agreement, 0.0))
    return checks


@reproduction(
    "quartdepth",
    claim="At 4-bit weights and activations, log-polished activations, closed-form compensation and K-FAC "
    "rounding keep a depth network's accuracy, each adding to the one before.",
    judge=judge,
    quick={"scenes": 512, "calibration": 128, "iterations": 150, "photos": 64, "side": 128, "training": 900},
    full={
        "scenes": 4096,
        "calibration": 512,
        "iterations": 1000,
        "photos": 200,
        "side": 224,
        "training": 900,
    },
)
def quartdepth(
    *, seed: int, scenes: int, calibration: int, iterations: int, photos: int, side: int, training: int
) -> Findings:
    """Run it.

    Args:
        seed: of scenes and rounding (not of the trained network).
        scenes: unseen scenes to measure on.
        calibration: scenes to calibrate on.
        iterations: of AdaRound for each layer.
        photos: crops of photographs for EfficientNet-Lite0, half of them for calibration; 0 leaves it out.
        side: their height and width.
        training: steps of the depth network, which is cached.
    """
    import torch

    from actlas.papers.reproductions.rendered_scenes import depth_errors, depth_network
    from actlas.papers.reproductions.rendered_scenes import scenes as render
    from actlas.quantize.quartdepth import quartdepth_network

    network = depth_network(training)
    images, depths = render(scenes, seed + 50)
    calls: list[Any] = [((part,), {}) for part in render(calibration, seed + 60)[0].split(32)]
    with torch.no_grad():
        want = network(images)
    arms: dict[str, dict[str, Any]] = {
        STEPS[0]: {"polish": False, "compensation": False, "iterations": 0},
        STEPS[1]: {"compensation": False, "iterations": 0},
        STEPS[2]: {"iterations": 0},
        STEPS[3]: {"iterations": iterations},
        "all but polishing": {"polish": False, "iterations": iterations},
        "direct, one range a tensor": {
            "polish": False,
            "compensation": False,
            "iterations": 0,
            "per_channel": False,
        },
        "polished, one range a tensor": {"compensation": False, "iterations": 0, "per_channel": False},
        "W4A8 direct": {"a_bits": 8, "polish": False, "compensation": False, "iterations": 0},
    }
    relative: dict[str, np.ndarray] = {}
    near: dict[str, np.ndarray] = {}
    gap: dict[str, np.ndarray] = {}
    base, base_near = depth_errors(want, depths)
    relative["float"], near["float"] = base.numpy(), base_near.numpy()
    with progress("QuartDepth", len(arms), "arms") as advance:
        for name, options in arms.items():
            soft = quartdepth_network(network, calls, seed=seed, **options)
            with torch.no_grad():
                out = soft.network(images)
            a, b = depth_errors(out, depths)
            relative[name], near[name] = a.numpy(), b.numpy()
            gap[name] = (out - want).square().flatten(1).mean(1).double().numpy()
            advance()

    def mean(name: str, unit: str, values: np.ndarray, better: Better = "lower", **group: str) -> Measurement:
        return mean_measurement(
            name,
            unit,
            values,
            seed=seed,
            over="scenes",
            better=better,
            group=group,
        )

    measured = [mean("AbsRel", "fraction", v, arm=n) for n, v in relative.items()]
    measured += [mean("delta_1", "fraction", v, "higher", arm=n) for n, v in near.items()]
    measured += [mean("difference from the float log depth", "squared", v, arm=n) for n, v in gap.items()]
    measured += [
        mean("AbsRel of polished minus direct", "fraction", relative[STEPS[1]] - relative[STEPS[0]]),
        mean("AbsRel of all steps minus direct", "fraction", relative[STEPS[3]] - relative[STEPS[0]]),
        mean("difference of polished minus direct", "squared", gap[STEPS[1]] - gap[STEPS[0]]),
        mean("difference of compensated minus polished", "squared", gap[STEPS[2]] - gap[STEPS[1]]),
        mean("difference of AdaRound minus compensated", "squared", gap[STEPS[3]] - gap[STEPS[2]]),
    ]
    measured += exact_properties(seed)
    if photos:
        measured += agreement(photos, side, seed)
    rows = [{"arm": n, "AbsRel": float(v.mean())} for n, v in relative.items()]
    said = " to ".join(f"{relative[n].mean():.4f}" for n in STEPS)
    return Findings(
        measured,
        headline=f"AbsRel at W4A4 from direct to all steps: {said}; float {base.mean():.4f}",
        note=NOTE,
        plots=[Plot("Depth error on unseen scenes", rows, "arm", "AbsRel", mark="bar")],
    )


def exact_properties(seed: int) -> list[Measurement]:
    """The map and its inverse, heavy tails, the normal equations and the sign."""
    import torch

    from actlas.core.act_quantizer import ActQuantizer
    from actlas.core.polish import depolish, knee_of, polish
    from actlas.quantize.compensation import compensate

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.distributions.StudentT(2.0).sample((1, 16, 8192)).float()
        inputs = (torch.randn(2000, 24) @ torch.randn(24, 24)).double()
        weight = torch.randn(16, 24).double()
    knee = knee_of(x[0]).view(1, 16, 1)
    back = depolish(polish(x.double(), knee.double()), knee.double())
    inverse = float(((back - x).abs() / x.abs().clamp_min(1e-3)).max())
    bulk = x.abs() < knee
    errors = []
    for bent in (False, True):
        quantizer = ActQuantizer(4, segments=(1,) * 16, polished=bent)
        quantizer.calibrate(x, rule="minmax")
        off = (quantizer(x) - x).square()
        errors.append(
            (float(off.mean() / x.square().mean()), float(off[bulk].mean() / x[bulk].square().mean()))
        )
    step = float(inputs.abs().max()) / 3
    seen = (inputs / step).round() * step
    new = compensate(weight, inputs, seen, damp=0.0)
    want = inputs @ weight.T
    rest = want - seen @ new.T
    along = float((seen.T @ rest).abs().max() / (seen.T @ want).abs().max())
    none = float((want - seen @ weight.T).square().mean())
    minus = float((want - seen @ (2 * weight - new).T).square().mean())

    def one(name: str, value: float, unit: str = "ratio", n: int = 1) -> Measurement:
        return Measurement(name, value, unit, n, seed=seed, interval="exact")

    return [
        one("largest relative error of the inverse map", inverse, n=x.numel()),
        one("error polished over even", errors[1][0] / errors[0][0], n=x.numel()),
        one("bulk error polished over even", errors[1][1] / errors[0][1], n=int(bulk.sum())),
        one("residual along the inputs", along, n=len(inputs)),
        one("error compensated over none", float(rest.square().mean()) / none, n=len(inputs)),
        one("error with a minus sign over none", minus / none, n=len(inputs)),
    ]


def agreement(photos: int, side: int, seed: int) -> list[Measurement]:
    """How often EfficientNet-Lite0 has the same first choice as its float self, with and without repair."""
    import torch

    import actlas
    from actlas.data.pictures import images
    from actlas.quantize.quartdepth import quartdepth_network

    model = actlas.load("efficientnet-lite0")
    network = model.module
    pixels = images("photos", photos, size=side, seed=seed).pixels * 2 - 1
    half = photos // 2
    calls: list[Any] = [((part,), {}) for part in pixels[:half].split(10)]
    test = pixels[half:]
    with torch.no_grad():
        want = network(test).argmax(-1)
    same = {}
    arms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("direct", {"polish": False, "compensation": False, "iterations": 0}),
        ("polished and compensated", {"iterations": 0}),
    )
    for name, options in arms:
        soft = quartdepth_network(
            network, calls, predicts="categorical", seed=seed, w_bits=4, a_bits=8, **options
        )
        with torch.no_grad():
            same[name] = (soft.network(test).argmax(-1) == want).numpy()
    measured = [
        rate_measurement(
            "agreement of EfficientNet-Lite0 at W4A8", v, seed=seed, group={"arm": n}, better="higher"
        )
        for n, v in same.items()
    ]
    return [
        *measured,
        mean_measurement(
            "agreement of compensated minus direct",
            "fraction",
            same["polished and compensated"].astype(float) - same["direct"].astype(float),
            seed=seed,
            over="photographs",
            better="higher",
        ),
    ]


NOTE = (
    "Published: competitive accuracy at W4A4 on Metric3D and Depth Anything; the released code has no "
    "reconstruction modules, so formulas come from a summary, whose minus sign in the compensation is wrong "
    "(see the exact checks). Ours: a network of 0.1 million parameters on 32 x 32 renderings; a knee and a "
    "range for each channel; ranges by a search for the least L_2.4 error of the values themselves, for "
    "bent values after bending back; Fisher factors from targets drawn from the network's own output, so "
    "that no labels are needed. Its ReLU activations have light tails (the largest value of a channel is "
    "about 1.3 times its 95th percentile in the decoder, 3 times in the encoder), so that polishing has "
    "little to repair here. Tried before the run, on other scenes: with one range a tensor and the search "
    "in bent units polishing made AbsRel worse (0.130 to 0.148), which is why the error is now measured "
    "after bending back; then 0.1300 to 0.1301 with one range a tensor, 0.1252 to 0.1252 with one a "
    "channel, and 0.1206 after compensation. Polished codes need a table before they are multiplied: no "
    "faster integer products."
)
