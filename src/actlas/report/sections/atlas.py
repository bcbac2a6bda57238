"""The activation atlas: what happens to activations layer by layer, from one pass over text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actlas.core.errors import ModelError
from actlas.core.measurement import Measurement
from actlas.report.content import DataUse, Figure, SectionResult, Table, Tile, plain, show_number
from actlas.report.plots import heat, lines
from actlas.report.registry import Context, section

Points = list[tuple[float, float, float | None, float | None]]
SITES = {
    "resid_post": "residual stream",
    "attn.out": "attention output",
    "mlp.out": "MLP output",
    "mlp.act": "MLP neurons",
}
LABELS = {
    "activation-norm": "median norm",
    "token-kurtosis": "excess kurtosis of a token's channels",
    "channel-kurtosis": "excess kurtosis of a channel",
    "outlier-channels": "outlier channels",
    "effective-rank": "effective rank",
    "participation-ratio": "participation ratio",
    "logit-lens-agreement": "logit-lens agreement",
    "attention-entropy": "attention entropy, nats",
    "attention-sink-mass": "attention on the first token",
    "massive-activations": "massive activations, share of tokens",
}


@section("atlas", title="Activation atlas by layer", order=40, needs=("causal-lm", "encoder"), cost=1.8)
def atlas(context: Context) -> SectionResult:
    """Read every block once: norms, tails, rank, logit lens and attention."""
    from actlas.data import corpus
    from actlas.measure.geometry import atlas as measure_atlas

    model = context.model
    if model.layout is None or model.tokenizer is None:
        raise ModelError(
            f"{model.name} has no {'layout' if model.layout is None else 'tokenizer'} to read layers by"
        )
    text = corpus("mixed", seed=context.seed)
    found = measure_atlas(
        model,
        text,
        seed=context.seed,
        tokens=context.budget.atlas_tokens,
        per_document=64 if context.budget.quick else 128,
    )
    by_name = _Atlas(found)
    figures = [f for f in (_norms(by_name), _lens(by_name), _rank(by_name), _tails(by_name)) if f]
    figures += [f for f in (_attention(by_name), _heads(by_name)) if f]
    documents = max((m.n for m in found if m.name == "activation-norm"), default=0)
    tables = [t for t in (by_name.summary(), _massive(by_name)) if t]
    windows = dict.fromkeys(m.note for m in found if m.name == "attention-entropy" and m.note)
    notes = [f"Attention was read in {plain(note)}; it depends on their length." for note in windows]
    tiles = []
    rank = by_name.layers("effective-rank")
    if rank:
        last = rank[-1]
        of = last.details.get("of", "?")
        tiles.append(Tile("Effective rank, last layer", last, remark=f"of {of} dimensions", rank=40))
    intro = (
        f"One pass over {context.budget.atlas_tokens:,} tokens reads every block. Tokens with massive "
        "activations (a few channels thousands of times larger than the rest, mostly at the first "
        "token) are counted apart and left out of everything else, because they would drown it. Bands "
        "are 95% intervals over documents."
    )
    used = text.take(min(max(documents, 1), len(text)))
    data = DataUse("mixed", len(used), "documents", used.hash, text.source)
    return SectionResult(intro, (), figures, tables, notes, tiles, [data], details=found)


class _Atlas:
    """The atlas's measurements by name and site."""

    def __init__(self, found: Sequence[Measurement]) -> None:
        self._by: dict[tuple[str, str], list[Measurement]] = {}
        for m in found:
            self._by.setdefault((m.name, m.group.get("site", "")), []).append(m)
        for group in self._by.values():
            group.sort(key=lambda m: int(m.group["layer"]))

    def layers(self, name: str, site: str = "") -> list[Measurement]:
        return self._by.get((name, site), [])

    def points(self, name: str, site: str = "") -> Points:
        return [(int(m.group["layer"]), m.value, m.low, m.high) for m in self.layers(name, site)]

    def summary(self) -> Table | None:
        rows = []
        for (name, site), group in self._by.items():
            known = [m for m in group if math.isfinite(m.value)]
            if not known or name not in LABELS:
                continue
            peak = max(known, key=lambda m: m.value)
            where = f" ({SITES.get(site, site)})" if site else ""
            first, middle, last = known[0], known[len(known) // 2], known[-1]
            rows.append(
                (
                    LABELS[name] + where,
                    *(show_number(m.value) for m in (first, middle, last)),
                    f"{show_number(peak.value)} in layer {peak.group['layer']}",
                )
            )
        if not rows:
            return None
        columns = ("Quantity", "First layer", "Middle", "Last", "Largest")
        return Table(
            "Layers at a glance", columns, tuple(rows), "Every layer with its interval is in card.json."
        )


def _norms(a: _Atlas) -> Figure | None:
    series = {SITES[s]: a.points("activation-norm", s) for s in ("resid_post", "attn.out", "mlp.out")}
    series = {k: v for k, v in series.items() if v}
    stream = series.get("residual stream")
    if not stream:
        return None
    text = (
        f"Median norm of a token's activation. The residual stream goes from {stream[0][1]:.3g} after "
        f"the first block to {stream[-1][1]:.3g} after the last; what a block adds is the attention and "
        "MLP output."
    )
    return lines("Size of activations", text, series, x="layer", y="median norm", log=True)


def _lens(a: _Atlas) -> Figure | None:
    points = a.points("logit-lens-agreement")
    if not points:
        return None
    half = next((int(x) for x, y, _, _ in points if y >= 0.5), None)
    text = (
        "Share of tokens at which reading the residual stream with the output head already gives the "
        f"model's own first choice. {'No layer' if half is None else f'Layer {half} is the first that'} "
        "reaches a half."
    )
    return lines(
        "Logit lens",
        text,
        {"agreement": points},
        x="layer",
        y="agreement with the end",
        percent=True,
        domain=(0, 1),
    )


def _rank(a: _Atlas) -> Figure | None:
    series = {
        "effective rank": a.points("effective-rank"),
        "participation ratio": a.points("participation-ratio"),
    }
    if not series["effective rank"]:
        return None
    width = a.layers("effective-rank")[0].details.get("of")
    text = (
        f"How many of {width} directions the residual stream uses: by the entropy of its singular "
        "values (effective rank) and by energy (participation ratio), which a few strong directions "
        "pull down."
    )
    return lines("Directions in use", text, series, x="layer", y="dimensions", log=True)


def _tails(a: _Atlas) -> Figure | None:
    series = {
        SITES["resid_post"]: a.points("token-kurtosis", "resid_post"),
        SITES["mlp.act"]: a.points("token-kurtosis", "mlp.act"),
    }
    series = {k: v for k, v in series.items() if v}
    if not series:
        return None
    text = (
        "Excess kurtosis over the channels of a token: 0 is Gaussian, large means that few channels "
        "carry most. Heavy tails make activations hard to quantise and easy to sparsify."
    )
    return lines("Heavy tails", text, series, x="layer", y="excess kurtosis", log=True)


def _attention(a: _Atlas) -> Figure | None:
    sink = a.points("attention-sink-mass")
    entropy = [
        (int(m.group["layer"]), float(m.details["normalised"]), None, None)
        for m in a.layers("attention-entropy")
        if "normalised" in m.details
    ]
    if not sink:
        return None
    text = (
        "Attention on the first token (the sink), and entropy of the attention as a share of the "
        "largest possible; both are means over heads and queries."
    )
    series: dict[str, Points] = {"on the first token": sink, "entropy, share of the largest": list(entropy)}
    return lines("Attention", text, series, x="layer", y="share", percent=True, domain=(0, 1), wide=True)


def _heads(a: _Atlas) -> Figure | None:
    cells = [
        (int(m.group["layer"]), head, float(mass))
        for m in a.layers("attention-sink-mass")
        for head, mass in enumerate(m.details.get("heads", ()))
    ]
    if not cells:
        return None
    high = sum(1 for _, _, mass in cells if mass > 0.5)
    text = (
        f"Share of each head's attention that goes to the first token. {high} of {len(cells)} heads put "
        "more than half of it there, which in practice means that they do little for most tokens."
    )
    title, what = "Attention sinks by head", "attention on the first token"
    return heat(title, text, cells, x="layer", y="head", value=what, percent=True)


def _massive(a: _Atlas) -> Table | None:
    rows = []
    for m in a.layers("massive-activations"):
        if m.value > 0:
            channels = ", ".join(str(c) for c in list(m.details.get("channels", {}))[:4])
            tokens = ", ".join(repr(t) for t in list(m.details.get("tokens", {}))[:4])
            largest = show_number(float(m.details.get("largest", math.nan)))
            rows.append((f"layer {m.group['layer']}", f"{m.value:.2%}", largest, channels, tokens))
    if not rows:
        return None
    if len(rows) > 6:
        step = (len(rows) - 1) / 5
        rows = [rows[round(i * step)] for i in range(6)]
    columns = ("Where", "Share of tokens", "Largest value", "Channels", "At tokens such as")
    return Table("Massive activations", columns, tuple(rows), "At most six layers are listed.")
