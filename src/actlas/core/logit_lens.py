"""The logit lens: what the model would say if it had to answer from an earlier layer.

    logits_l(x) = unembed(final_norm(x))          at every block's residual stream
    (with a tuned lens: unembed(final_norm(x + A_l x + b_l)), see `actlas.core.tuned_lens`)

After nostalgebraist (2020), "interpreting GPT: the logit lens". At the last block the lens gives the
model's own logits. Logits of one site at a time are held, in chunks of positions, so a table over all
layers of a long prompt needs little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError
from actlas.core.layout import RESIDUAL_KINDS, weight_matrix
from actlas.core.lens import Lens
from actlas.core.trace import Trace

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.tuned_lens import TunedLens

_CHUNK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class LayerGuess:
    """What one layer would answer, for every real token of one row.

    Attributes:
        site: whose residual stream was read.
        ids: int64 `[pos, k]`, the most likely next tokens, best first.
        probabilities: float32 `[pos, k]`.
        entropy: float32 `[pos]`, of the whole next-token distribution, in nats.
        kl: float32 `[pos]`, KL(final || layer) in nats.
        agrees: bool `[pos]`, whether the best token is the model's own.
    """

    site: str
    ids: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    agrees: Tensor


@dataclass(frozen=True)
class LogitLensTable:
    """Tokens x layers: the logit lens of one prompt.

    Attributes:
        tokens: the text of each position's token.
        layers: one `LayerGuess` per site, first layer first.
        strings: `[layer][position]` -> the k best tokens as text.
    """

    tokens: list[str]
    layers: list[LayerGuess]
    strings: list[list[list[str]]] = field(repr=False)

    @property
    def sites(self) -> list[str]:
        """The sites, first layer first."""
        return [layer.site for layer in self.layers]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one JSON-able record for each layer and position."""
        for layer, names in zip(self.layers, self.strings, strict=True):
            for position, token in enumerate(self.tokens):
                yield {
                    "site": layer.site,
                    "position": position,
                    "token": token,
                    "top": names[position],
                    "probabilities": [round(p, 6) for p in layer.probabilities[position].tolist()],
                    "entropy": float(layer.entropy[position]),
                    "kl": float(layer.kl[position]),
                    "agrees": bool(layer.agrees[position]),
                }


@dataclass(kw_only=True, eq=False)
class LogitLens(Lens):
    """Reads residual-stream activations as next-token distributions. It is the model's own: not fitted.

    Attributes:
        model: the model whose final norm and output head are used.
        tuned: translators for each site; `None` for the plain logit lens.
    """

    model: Model
    tuned: TunedLens | None = None
    site: str = "blocks.*.resid_post"

    def __post_init__(self) -> None:
        if self.model.unembed_module is None:
            raise ModelError(
                f"{self.model.name} ({self.model.kind}) has no output head over a vocabulary, "
                "so it has no logit lens; give a language model"
            )
        self.fingerprint = self.model.fingerprint

    @property
    def channels(self) -> int:
        return self.model.d_model or 0

    @property
    def features(self) -> int:
        return self.model.vocab_size or 0

    def logits(self, x: Tensor, site: str | None = None) -> Tensor:
        """Return the logits that an activation stands for.

        Args:
            x: `[..., d_model]`, in the model's dtype or another (it is converted).
            site: where it was read; needed with a tuned lens.

        Returns:
            `[..., vocab]`, in the model's dtype.
        """
        if self.tuned is not None:
            if site is None:
                raise InputError("a tuned lens has one translator a site; say which: logits(x, site)")
            if site != self._last().name:
                x = self.tuned.translate(x, site)
        return self.model.unembed(x.to(self.model.device, self.model.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Return the logits `[..., vocab]` of the plain lens."""
        return self.logits(x, self.site if self.tuned is not None else None)

    def direction(self, feature: int) -> Tensor:
        """Return a token's row of the output head `[d_model]`, of unit length."""
        head = self.model.unembed_module
        assert head is not None
        row = weight_matrix(head)[feature].detach().to(torch.float32)
        return torch.nn.functional.normalize(row, dim=0)

    def top(
        self,
        prompt: Any,
        k: int = 5,
        sites: str | Iterable[str] | None = None,
        row: int = 0,
    ) -> LogitLensTable:
        """Return the k best next tokens for every position and layer, with probabilities.

        Args:
            prompt: text, ids, or a trace that has read `sites` and the last block's `resid_post`.
            k: how many tokens.
            sites: residual-stream sites; default every block's `resid_post`.
            row: which row of a batch.

        Raises:
            SiteError: a site that does not exist; InputError: one that is not the residual stream.
        """
        resolved = self._sites(sites)
        last = self._last()
        wanted = {s.name: s for s in (*resolved, last)}
        trace = prompt if isinstance(prompt, Trace) else self.model.trace(prompt, list(wanted.values()))
        if trace.mask is None or not 0 <= row < len(trace.mask):
            raise InputError(f"the logit lens needs token inputs with a row {row}")
        real = trace.mask[row]
        with torch.no_grad():
            final = trace[last.name][row][real]
            layers = [self._guess(site.name, trace[site.name][row][real], final, k) for site in resolved]
        names = [[self.model.token_strings(ids) for ids in layer.ids.tolist()] for layer in layers]
        return LogitLensTable(trace.token_strings(row), layers, names)

    def _guess(self, site: str, x: Tensor, final: Tensor, k: int) -> LayerGuess:
        vocabulary = self.model.vocab_size or k
        found: list[tuple[Tensor, ...]] = []
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = self.logits(x[part], site).to(torch.float32)
            target = self.model.unembed(final[part]).to(torch.float32).log_softmax(-1)
            said = logits.log_softmax(-1)
            best = said.topk(min(k, vocabulary, said.shape[-1]), -1)
            entropy = -(said.exp() * said).sum(-1)
            kl = (target.exp() * (target - said)).sum(-1)
            agrees = best.indices[:, 0] == target.argmax(-1)
            found.append((best.indices, best.values.exp(), entropy, kl, agrees))
        ids, probabilities, entropy, kl, agrees = (torch.cat(t).cpu() for t in zip(*found, strict=True))
        return LayerGuess(site, ids, probabilities, entropy, kl, agrees)

    def _sites(self, sites: str | Iterable[str] | None) -> list[Site]:
        resolved = self.model.resolve(self.site if sites is None else sites)
        for site in resolved:
            if site.kind not in RESIDUAL_KINDS:
                raise InputError(
                    f"the logit lens reads the residual stream, e.g. blocks.5.resid_post, not {site.name}"
                )
        return resolved

    def _last(self) -> Site:
        last = (self.model.n_blocks or 1) - 1
        tower = self.model.tower
        prefix = f"{tower.name}." if tower is not None and tower.name else ""
        return self.model.resolve(f"{prefix}blocks.{last}.resid_post")[0]

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise InputError("a logit lens is the model's own and is not saved; save its tuned lens")
