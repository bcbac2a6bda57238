"""Recode: a gradient step on an error signal at run time, as an edit of a transformer's residual stream.

    h' = h - eta * d signal(unembed(h)) / d h            at every position, `steps` times

    sharper = Recode("blocks.29.resid_post", "entropy", step=0.02)
    towards = Recode("blocks.29.resid_post", "target_nll", target=model.tokenizer.encode(" Paris")[0])

`"entropy"` makes the prediction surer of itself; `"target_nll"` raises one given token. The next token of the
text is never looked at: an edit decodes from what it changed, so that would tell it the answer. The signal is
read through the model's own final norm and head, exact after the last block and a logit lens before it. The
gradient is a constant to whoever differentiates through the edit. With `unit="resid"` the step is a fraction
of the state's length along the gradient's direction; with `"raw"` it is eta itself. A negative strength
walks the other way.

Source: "Recoding latent sentence representations" (2020), carried over from recurrent states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from actlas.core.edit import ActivationEdit, Edit, Here, register_edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.measurement import Measurement
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.sites import Site
from actlas.measure.samples import mean_measurement
from actlas.training.recoding_signals import entropy

_ROWS = 256  # positions that are decoded at once


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Recode(ActivationEdit):
    """See the module docstring.

    Attributes:
        signal: `"entropy"`, or `"target_nll"` of one token.
        target: its id.
        step: see `unit`; 0 or more.
        steps: how often.
        unit: `"resid"` or `"raw"`.
        random_seed: walk in random directions of the same length instead (a control).
    """

    signal: Literal["entropy", "target_nll"] = "entropy"
    target: int | None = None
    step: float = 0.02
    steps: int = 1
    unit: Literal["resid", "raw"] = "resid"
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if self.signal not in ("entropy", "target_nll"):
            raise InputError(f"signal is {self.signal!r}; it must be 'entropy' or 'target_nll'")
        if (self.target is None) == (self.signal == "target_nll"):
            raise InputError("give target= (a token id) with signal='target_nll', and only there")
        if not 0 <= self.step < math.inf or self.steps < 1:
            raise InputError(f"step is {self.step:g} and steps {self.steps}; they must be at least 0 and 1")
        if self.unit not in ("resid", "raw"):
            raise InputError(f"unit is {self.unit!r}; it must be 'resid' or 'raw'")

    def check(self, site: Site) -> None:
        """Raise unless the site is the residual stream."""
        if not site.kind.startswith("resid"):
            raise InputError(f"{site.name} cannot be decoded; recode the residual stream, e.g. resid_post")

    def value(self, x: Tensor, here: Here) -> Tensor:
        model = here.installation.model
        if self.target is not None and model.vocab_size is not None and self.target >= model.vocab_size:
            raise InputError(f"target is token {self.target}; {model.name} has {model.vocab_size} tokens")
        flat = x.detach().reshape(-1, x.shape[-1])
        flat = flat.to(torch.promote_types(x.dtype, torch.float32))
        moved = torch.cat([self._walk(part, model, i) for i, part in enumerate(flat.split(_ROWS))])
        return x + (moved - flat).reshape(x.shape).to(x.dtype)

    def _walk(self, h: Tensor, model: Model, part: int) -> Tensor:
        generator = None
        if self.random_seed is not None:
            generator = torch.Generator().manual_seed(self.random_seed + part)
        for _ in range(self.steps):
            with torch.enable_grad():
                state = h.detach().requires_grad_()
                logits = _decode(model, state.to(model.dtype)).to(h.dtype)
                delta = entropy(logits)
                if self.target is not None:
                    wanted = torch.full((len(h),), self.target, device=h.device)
                    delta = F.cross_entropy(logits, wanted, reduction="none")
                (g,) = torch.autograd.grad(delta.sum(), state)
            if not bool(torch.isfinite(g).all()):
                raise NonFiniteError(f"the gradient of {self.describe()} is NaN or infinite")
            length = g.norm(dim=-1, keepdim=True)
            if generator is not None:
                drawn = torch.randn(g.shape, generator=generator).to(g)
                g = drawn * (length / drawn.norm(dim=-1, keepdim=True))
            if self.unit == "resid":
                g = g / length.clamp_min(1e-30) * h.norm(dim=-1, keepdim=True)
            h = h - self.step * g
        return h


def _decode(model: Model, x: Tensor) -> Tensor:
    """Return logits as `model.unembed` does, past the hooks of whoever reads or edits norm and head."""
    head: Any = model.unembed_module
    if head is None or model.tower is None:
        raise ModelError(f"{model.name} has no output head over a vocabulary, so no state can be recoded")
    norm: Any = model.final_norm_module
    x = x if norm is None else norm.forward(x)
    logits: Tensor = head.forward(x * model.tower.logit_scale if model.tower.logit_scale != 1.0 else x)
    cap = model.tower.softcap
    return torch.tanh(logits / cap) * cap if cap else logits


@method(
    "recode",
    room="training",
    returns="Edit",
    data="corpus",
    summary="a gradient step at run time that lowers the entropy of predictions, or raises one token",
    example="actlas fit recode smollm2 prose --option step=0.02 -o recode/",
    papers=("recoding-rnn",),
)
def fit_recode(
    model: Model,
    data: Iterable[Any],
    site: str | None = None,
    *,
    signal: Literal["entropy", "target_nll"] = "entropy",
    target: int | None = None,
    step: float = 0.02,
    steps: int = 1,
    unit: Literal["resid", "raw"] = "resid",
    documents: int = 8,
    tokens: int = 64,
    seed: int = 0,
) -> Edit:
    """Return the edit with what it does on a corpus: entropy and loss, beside a random walk of equal length.

    Args:
        model: a decoder with an output head.
        data: texts or documents.
        site: in the residual stream; default after the last block.
        signal, target, step, steps, unit: see `Recode`.
        documents, tokens: of the corpus that are read, and tokens of each.
        seed: of the control and of intervals.

    Raises:
        InputError: wrong settings, or no text.
    """
    if documents < 1 or tokens < 2:
        raise InputError(f"documents is {documents} and tokens {tokens}; give at least 1 and 2")
    where = site or f"blocks.{(model.n_blocks or 1) - 1}.resid_post"
    edit = Recode(where, signal, target, step, steps, unit)
    control = Recode(where, signal, target, step, steps, unit, random_seed=seed)
    rows = []
    for document in data:
        text = document if isinstance(document, str) else document.text
        ids = model.encode(text, truncate=True)["input_ids"][:, :tokens]
        if ids.shape[1] > 1:
            rows.append(ids)
        if len(rows) == documents:
            break
    if not rows:
        raise InputError("the corpus has no text of 2 tokens or more")
    base = [_entropy_and_loss(model, ids, None) for ids in rows]
    found: list[Measurement] = []
    for name, used in (("gradient", edit), ("random", control)):
        made = [_entropy_and_loss(model, ids, used) for ids in rows]
        for i, what in enumerate(("entropy", "loss")):
            rise = [m[i] - b[i] for m, b in zip(made, base, strict=True)]
            group = {"direction": name}
            found.append(mean_measurement(f"rise of the {what}", "nats/token", rise, group=group, seed=seed))
    return edit.bind(model.fingerprint).with_measurements(found)


def _entropy_and_loss(model: Model, ids: Tensor, edit: Edit | None) -> tuple[float, float]:
    if edit is None:
        logits = model.logits(ids)
    else:
        with model.edit(edit):
            logits = model.logits(ids)
    nll = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    return float(entropy(logits[0].float()).mean()), float(nll)
