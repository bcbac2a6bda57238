"""What a dictionary adds over the untrained ones: each headline number minus its control, paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actlas.core.measurement import Measurement
from actlas.measure.compare import difference

#: Numbers whose difference from the controls is reported.
HEADLINES = (
    "explained_variance",
    "cossim",
    "ce_loss_score",
    "kl_div_score",
    "sae_top_1_test_accuracy",
    "sae_top_5_test_accuracy",
    "first_letter_top_1_f1",
)
_STARTS = ("tpp_threshold", "scr_metric")


def over_controls(found: Sequence[Measurement], own: str, seed: int = 0) -> list[Measurement]:
    """Return `"<name> over <control>"` for every headline number and control.

    Args:
        found: measurements with a `dictionary` in their group.
        own: the dictionary that is evaluated; every other one is a control.
        seed: of the paired bootstrap.
    """
    by_key = {(m.name, tuple(sorted(m.group.items()))): m for m in found}
    out = []
    for m in found:
        headline = m.name in HEADLINES or (m.name.startswith(_STARTS) and not m.name.endswith("_only"))
        if not headline or m.group.get("dictionary") != own:
            continue
        for control in dict.fromkeys(g for x in found if (g := x.group.get("dictionary")) and g != own):
            other = by_key.get((m.name, tuple(sorted({**m.group, "dictionary": control}.items()))))
            if other is None:
                continue
            group = {k: v for k, v in m.group.items() if k != "dictionary"}
            made = difference(other, m, seed)
            details = {k: v for k, v in made.details.items() if not isinstance(v, np.ndarray)}
            out.append(replace(made, name=f"{m.name} over {control}", group=group, details=details))
    return out
