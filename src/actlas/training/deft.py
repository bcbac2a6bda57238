"""DEFT: parameter-efficient fine-tuning that also makes the model activate fewer neurons.

    edit = deft(model, corpus, weight=1.0)           # adapters, trained with a density loss
    with model.edit(edit): ...

    L = L_task + weight * mean over MLPs of mean a^2 / (a^2 + eps),      only adapters are trained

`weight=0` is plain PEFT, the baseline. The density that is reported is the share of activations that are
exactly non-zero on held-out text. With GELU or SiLU exact zeros are underflow (float32 GELU below -5.5, SiLU
below about -88), so the density at 1% of each token's RMS is reported too; padding counts nowhere.

Source: Runwal et al. 2024, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density
    in
Transformers" (arXiv 2402.01911), and its code (eps = 1e-7, weight 1, adapters with reduction 16, or LoRA).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.measure.activation_sparsity import activation_sparsity
from actlas.measure.likelihood import nll
from actlas.measure.paired import perplexity_ratio
from actlas.training.adapters import LoRA, bottleneck_adapters, frozen, trainable
from actlas.training.density import DEFT_EPS, ActivationPenalty, Kind
from actlas.training.language_loop import corpus_tokens, train_language, windows


@method(
    "deft",
    room="training",
    returns="Edit",
    data="corpus",
    summary="fine-tune adapters or LoRA with a density loss, so that fewer MLP neurons are active",
    example="actlas fit deft smollm2 prose --steps 50 --adapter lora -o adapted/",
    papers=("deft",),
)
def deft(
    model: Model,
    data: Any,
    *,
    weight: float = 1.0,
    adapter: Literal["bottleneck", "lora"] = "bottleneck",
    kind: Kind = "soft_l0",
    eps: float = DEFT_EPS,
    steps: int = 200,
    lr: float = 1e-3,
    batch: int = 8,
    context: int = 128,
    reduction: int = 16,
    rank: int = 8,
    held_out: float = 0.1,
    tokens: int = 4096,
    seed: int = 0,
) -> Edit:
    """Return adapters trained on a corpus with a density loss.

    Args:
        model: a causal language model with a layout; its weights are not touched.
        data: a corpus; its last part is held out for the numbers.
        weight: of the density loss; 0 is plain PEFT.
        adapter: `"bottleneck"` (after each MLP) or `"lora"` (on the MLP's linear maps).
        kind, eps: of the density loss; see `density.density_loss`.
        steps, lr, batch, context: of training.
        reduction, rank: size of the adapters.
        held_out, tokens: share of documents, and tokens of them, on which it is measured.
        seed: of windows and adapters.

    Returns:
        The edit; its measurements are the density (exact, and at 1% of the RMS) before and after, and the
        perplexity over that of the model as it was.

    Raises:
        InputError, ModelError, NonFiniteError: bad sizes, no causal language model, a diverging loss.
    """
    if adapter not in ("bottleneck", "lora"):
        raise InputError(f"adapter is {adapter!r}; it must be 'bottleneck' or 'lora'")
    if model.kind != "causal-lm":
        raise ModelError(f"{model.name} is of kind {model.kind}; a causal-lm is needed")
    documents = list(data)
    if not 0 < held_out < 1 or len(documents) < 2:
        raise InputError(
            f"held_out={held_out:g} of {len(documents)} documents: some must be left on either side"
        )
    cut = min(len(documents) - 1, max(1, round(len(documents) * (1 - held_out))))
    learn, test = documents[:cut], documents[cut:]
    penalties = [ActivationPenalty(model, kind=kind, eps=eps, weight=weight)] if weight else []
    size: dict[str, Any] = {"tokens": tokens, "context": context}
    base, sparse_before = nll(model, test, **size), _density(model, test, size, "before")
    drawn = windows(
        corpus_tokens(model, learn, context), steps=steps, batch=batch, context=context, seed=seed
    )
    with ExitStack() as stack:
        _freeze(model, stack)
        edit: Edit
        if adapter == "lora":
            lora = LoRA(model, rank, seed=seed)
            with lora.installed():
                train_language(
                    model, drawn, lora.parameters, steps=steps, lr=lr, penalties=penalties, what="deft"
                )
            edit = lora.edit()
        else:
            edit = bottleneck_adapters(model, reduction=reduction, seed=seed)
            with model.edit(edit):
                train_language(
                    model, drawn, trainable(edit), steps=steps, lr=lr, penalties=penalties, what="deft"
                )
            edit = frozen(edit)
    with model.edit(edit):
        after, sparse_after = nll(model, test, **size), _density(model, test, size, "after")
    note = penalties[0].describe() if penalties else "plain PEFT, no density loss"
    ratio = perplexity_ratio(base, after, seed=seed, note=note)
    return edit.bind(model.fingerprint).with_measurements([*sparse_before, *sparse_after, ratio])


def _density(model: Model, test: Any, size: dict[str, Any], when: str) -> list[Measurement]:
    """Return the share of active MLP entries, exact and at 1% of the RMS."""
    found = activation_sparsity(model, test, thresholds=(0.01,), **size)
    return [
        Measurement(
            "density", 1 - m.value, "fraction", m.n,
            None if m.high is None else 1 - m.high, None if m.low is None else 1 - m.low, m.interval,
            group={"when": when, "above": m.group["threshold"]}, note=m.note, better="lower",
        )
        for m in found
        if m.group["layer"] == "all"
    ]  # fmt: skip


def _freeze(model: Model, stack: ExitStack) -> None:
    """Freeze the model's own weights until the stack closes."""
    for parameter in model.module.parameters():
        stack.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(False)
