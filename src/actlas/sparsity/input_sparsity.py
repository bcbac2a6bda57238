"""Input sparsity of linear layers: what all rules share, from one calibration to one edit.

    y = W (m * x),      m_i = 1 where |x_i| c_i >= t

A rule is a factor c for every layer, and a share of inputs that each layer skips; the threshold t is the
quantile of the calibration's scores at that share. Three rules of factors are here:

    magnitude       c_i = 1                     (TEAL, Liu et al. 2024, arXiv 2408.14690)
    wina            c_i = ||W[:, i]||           (WINA, Chen et al. 2025, arXiv 2505.19427)
    wina-released   the norm in k_proj and gate_proj, 1 elsewhere: what WINA's released code does

    calibration = calibrate_inputs(model, corpus)
    edit = skip_inputs(model, calibration, uniform(layers, 0.5), factors(model, layers, "wina"))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from actlas.core.calibration import Calibration, calibrate
from actlas.core.edit import Edit, compose
from actlas.core.errors import InputError
from actlas.core.skip_inputs import SkipInputs
from actlas.measure.linear_layers import LinearLayer, linear_layers

if TYPE_CHECKING:
    from actlas.core.model import Model

Score = Literal["magnitude", "wina", "wina-released"]
Select = Literal["threshold", "topk"]
Phase = Literal["all", "generated"]
_WITH_NORMS = ("k_proj", "gate_proj")


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return a share of skipped inputs, checked.

    Raises:
        InputError: it does not lie in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise InputError(
            f"{name} is the share of inputs that is skipped and must lie in [0, 1), not {sparsity}"
        )
    return float(sparsity)


def calibrate_inputs(
    model: Model,
    corpus: Any,
    *,
    tokens: int = 4096,
    context: int = 256,
    rows: int = 512,
    seed: int = 0,
    beside: Sequence[str] = (),
) -> Calibration:
    """Read a corpus once and keep a sample of every linear layer's input.

    Args:
        model: a model with a layout.
        corpus: text; or a calibration made here, which is checked and returned.
        tokens, context: how much is read, in windows of how many tokens.
        rows: tokens in the sample, the same ones at every site.
        seed: of the sample.
        beside: further sites.

    Raises:
        FingerprintError: a calibration of another model.
        NonFiniteError: NaN or infinity at a site.
    """
    wanted = [*dict.fromkeys(layer.reads for layer in linear_layers(model)), *beside]
    if isinstance(corpus, Calibration):
        corpus.fingerprint.check(model.fingerprint, "the calibration")
        for site in wanted:
            if site not in corpus.sites:
                raise InputError(f"the calibration has no rows of {site}; make it with calibrate_inputs")
        return corpus
    context = min(context, model.context_length or context)
    stats = ("moments", "rows")
    return calibrate(model, corpus, wanted, stats, rows=rows, max_tokens=tokens, context=context, seed=seed)


def uniform(layers: Iterable[LinearLayer], sparsity: float) -> dict[str, float]:
    """Return the same share for every layer, by path."""
    share = check_sparsity(sparsity)
    return {layer.path: share for layer in layers}


def factors(model: Model, layers: Iterable[LinearLayer], score: Score) -> dict[str, Tensor | float]:
    """Return the factors c of a rule by layer path.

    Raises:
        InputError: an unknown rule.
    """
    if score not in get_args(Score):
        raise InputError(f"score is {score!r}; it must be one of {', '.join(get_args(Score))}")
    return {
        layer.path: layer.column_norms(model)
        if score == "wina" or (score == "wina-released" and layer.name in _WITH_NORMS)
        else 1.0
        for layer in layers
    }


def threshold_at(scores: Tensor, share: float) -> float:
    """Return the value below which a share of the scores lies: `floor(share * n)` of them, but for ties."""
    flat = scores.flatten()
    k = int(share * flat.numel())
    return 0.0 if k == 0 else float(flat.kthvalue(min(k + 1, flat.numel())).values)


def skip_inputs(
    model: Model,
    calibration: Calibration,
    shares: Mapping[str, float],
    factor: Mapping[str, Tensor | float],
    *,
    select: Select = "threshold",
    phase: Phase = "all",
) -> Edit:
    """Return the edit under which each layer skips its share of inputs.

    Args:
        model: the model.
        calibration: of `calibrate_inputs`.
        shares: path -> share of skipped inputs; a layer that is missing or has 0 stays dense.
        factor: path -> c.
        select: one threshold a layer, or exactly the top of each token (slower to decode).
        phase: all tokens, or generated ones only.

    Raises:
        InputError: nothing is skipped, a layer without calibration rows, an unknown option.
    """
    if select not in get_args(Select):
        raise InputError(f"select is {select!r}; it must be 'threshold' or 'topk'")
    made: list[Edit] = []
    for layer in linear_layers(model):
        share = check_sparsity(shares.get(layer.path, 0.0))
        if share == 0.0:
            continue
        c = factor[layer.path]
        if select == "topk":
            made.append(SkipInputs(layer.input_site, c, keep=1 - share))
            continue
        scores = calibration[layer.reads].rows.abs() * (c.cpu() if isinstance(c, Tensor) else c)
        made.append(SkipInputs(layer.input_site, c, threshold_at(scores, share)))
    return finish(model, made, phase)


def finish(model: Model, made: Sequence[Edit], phase: Phase) -> Edit:
    """Compose edits, limit them to a phase and bind them to the model.

    Raises:
        InputError: there are none, or an unknown phase.
    """
    if phase not in get_args(Phase):
        raise InputError(f"phase is {phase!r}; it must be 'all' or 'generated'")
    if not made:
        raise InputError("a sparsity of 0 skips nothing; give one between 0 and 1")
    edit = compose(made)
    if phase == "generated":
        edit = edit.at(phase="generated")
    return edit.bind(model.fingerprint)
