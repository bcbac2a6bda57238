"""What notices a trojan: the audit's looks, by how the vector was injected, and monitors, by its strength.

Every detection rate stands beside the false-alarm rate of the same detector on the plain model, both with
Wilson's 95% intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.statistics import mean_measurement, rate_measurement
from actlas.security.audit import TEXTS, audit
from actlas.security.fingerprint import StateFingerprint, differences, fingerprint
from actlas.security.injection import WAYS, injected
from actlas.security.inventory import inventory
from actlas.security.monitors import calibrated, clean_texts, token_rows
from actlas.security.reexecution import reexecute
from actlas.security.trojan import Trojan

if TYPE_CHECKING:
    from actlas.core.model import Model

STRENGTHS = (0.2, 0.4, 0.8, 1.6)


def monitored(
    model: Model,
    trojan: Trojan,
    prompts: Sequence[str],
    clean: Mapping[str, Sequence[Any]],
    site: str,
    *,
    strengths: Sequence[float] = STRENGTHS,
    false_alarms: float = 0.05,
    texts: int = 160,
    tokens: int = 32,
    seed: int = 0,
) -> list[Measurement]:
    """Return how often monitors raise an alarm on attacked and on plain prompts.

    Args:
        prompts: what is monitored.
        clean: calibration texts, by what kind of text they are.
        site: where monitors read.
        strengths: multiples of the fitted vector.
        texts, tokens: at most so many calibration texts, of so many tokens.

    Returns:
        For each calibration and monitor: alarms on plain prompts (false), and on the same prompts under
        the attack at each strength (detected), with Wilson's intervals. The `known` monitor is given the
        attack's own direction where it reads: the most that a defender can hope for.
    """
    at = model.resolve(site)[0].name
    kinds: list[tuple[Any, Any]] = [("norm", None), ("direction", None)]
    if (own := trojan.directions.get(at)) is not None:
        kinds.append(("known", own))
    read: dict[str, list[Tensor]] = {"0": token_rows(model, prompts, at)}
    for strength in strengths:
        with model.edit(trojan.direction.steer(-strength, unit="raw")):
            read[f"{strength:g}"] = token_rows(model, prompts, at)
    found = []
    for said, given in clean.items():
        rows = token_rows(model, clean_texts(model, given, texts, tokens), at)
        for kind, direction in kinds:
            monitor = calibrated(rows, at, kind, direction, false_alarms, seed=seed)
            for level, watched in read.items():
                alarms = monitor.of_rows(watched) > monitor.threshold
                if level == "0":
                    found.append(monitor.rate("false alarms", alarms, calibrated=said))
                else:
                    found.append(monitor.rate("attacks detected", alarms, calibrated=said, strength=level))
    return found


def noticed(
    model: Model,
    trojan: Trojan,
    *,
    ways: Sequence[str] = WAYS,
    trials: int = 2,
    known: StateFingerprint | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Return how often each look of the audit finds the vector, by how it was injected.

    Half of the trials inject the attack's vector at its site, the others a random vector of equal norm at
    a random block. The plain model is audited as often, on different texts: those are the false alarms.

    Raises:
        InputError: no trials, or edits installed already.
    """
    if trials < 1:
        raise InputError(f"trials is {trials}; each way must be tried at least once")
    if model.installed:
        raise InputError("edits are installed; the audit is measured on a plain model")
    generator = np.random.default_rng(seed)
    known = known or fingerprint(model)
    blocks = model.n_blocks or 1
    own = int(trojan.site.split(".")[1])
    looks = ("inventory", "re-execution", "fingerprint")
    hits: dict[tuple[str, str], list[bool]] = {}
    exact: list[float] = []
    with progress("injections", (len(ways) + 1) * trials) as advance:
        for way in ways:
            for trial in range(trials):
                block, vector = own, -trojan.strength * trojan.direction.vector
                if trial % 2 or (way == "pre-hook" and own == blocks - 1):
                    block = int(generator.integers(0, blocks - 1))
                    vector = trojan.strength * trojan.direction.random(1000 * seed + trial).vector
                with injected(model, block, vector, way):
                    changes = reexecute(model, model.encode(list(TEXTS), truncate=True))
                    seen = [bool(inventory(model)), any(c.is_vector for c in changes)]
                    seen.append(bool(differences(known, fingerprint(model))))
                if changes and changes[0].is_vector:
                    cosine = torch.nn.functional.cosine_similarity(changes[0].vector, vector.cpu(), dim=0)
                    exact.append(float(cosine))
                for look, hit in zip(looks, seen, strict=True):
                    hits.setdefault((look, way), []).append(hit)
                advance()
        false: list[bool] = []
        for trial in range(trials):
            text = TEXTS[trial % len(TEXTS)] * (1 + trial)
            false.append(not audit(model, known, texts=[text]).clean)
            advance()
    found = [
        rate_measurement("injections detected", values, group={"look": look, "way": way}, seed=seed)
        for (look, way), values in hits.items()
    ]
    every = [any(hits[look, way][t] for look in looks) for way in ways for t in range(trials)]
    found.append(
        rate_measurement("injections detected", every, group={"look": "any", "way": "all"}, seed=seed)
    )
    vectors = [w for w in ways if w not in ("late hook", "bias")]
    shown = [hit for way in vectors for hit in hits["re-execution", way]]
    if shown:
        group = {"look": "re-execution", "way": "all but triggers and weights"}
        found.append(rate_measurement("injections detected", shown, group=group, seed=seed))
    found.append(rate_measurement("audit false alarms", false, group={"look": "any"}, seed=seed))
    if exact:
        found.append(
            mean_measurement(
                "cosine of the vector found with the one injected", "cosine", exact, seed=seed, over="trials"
            )
        )
    return found
