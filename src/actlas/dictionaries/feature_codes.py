"""The codes of a whole corpus with the tokens they belong to: what every question about meaning starts from.

    read = read_codes(model, sae, corpus("prose"), max_tokens=100_000)
    read.tokens        int64 [n]         read.window    int64 [n]: which window of text a token is in
    read.indices       int64 [n, k]      read.values    float32 [n, k]

A hundred thousand tokens of a dictionary with 32 active features are 40 MB, so all of it is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.model import Model


@dataclass(frozen=True, eq=False)
class CorpusCodes:
    """Codes of consecutive tokens.

    Attributes:
        codes: `[n]` tokens' codes; empty at massive activations.
        tokens: int64 `[n]`, token ids.
        window: int64 `[n]`, number of the window of text; windows follow one another.
        position: int64 `[n]`, position in the document.
        documents: the document's id of each window.
        groups: what each window's document belongs to (its domain, say); may be empty strings.
        massive: tokens whose activation was massive.
    """

    codes: Codes
    tokens: Tensor
    window: Tensor
    position: Tensor
    documents: tuple[str, ...]
    groups: tuple[str, ...]
    massive: int

    def __len__(self) -> int:
        return len(self.tokens)

    def active(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (feature, row, value) of every active place, sorted by feature, largest value first."""
        places = self.codes.active.numpy()
        rows = np.broadcast_to(np.arange(len(self))[:, None], places.shape)[places]
        features, values = self.codes.indices.numpy()[places], self.codes.values.numpy()[places]
        order = np.lexsort((rows, -values, features))
        return features[order], rows[order], values[order]


def read_codes(
    model: Model,
    lens: Dictionary,
    corpus: Iterable[Any],
    *,
    max_tokens: int = 60_000,
    context: int = 128,
    batch_tokens: int = 2048,
) -> CorpusCodes:
    """Read a corpus through a dictionary.

    Args:
        model: whose activations are read.
        lens: the dictionary; negative codes (ITDA's) count by their magnitude.
        corpus: strings or documents; a document's `group["domain"]` is kept.
        max_tokens: stop after so many tokens.
        context: tokens in a window, at most the model's own context.

    Raises:
        InputError: the corpus is empty. FingerprintError: the dictionary is of another model.
    """
    if lens.fingerprint is not None:
        lens.fingerprint.check(model.fingerprint, "the dictionary")
    documents = list(corpus)
    context = min(context, model.context_length or context)
    domains = {
        str(d.id): str(getattr(d, "group", {}).get("domain", "")) for d in documents if hasattr(d, "id")
    }
    codes: list[Codes] = []
    tokens: list[Tensor] = []
    window: list[Tensor] = []
    position: list[Tensor] = []
    names: list[str] = []
    massive = 0
    with progress("reading features", total=max_tokens, unit="tokens") as advance:
        for trace in model.stream(
            documents, lens.site, context=context, batch_tokens=batch_tokens, max_tokens=max_tokens
        ):
            assert trace.mask is not None and trace.tokens is not None
            mask = trace.mask
            x = lens.flat(trace[lens.site].detach())[mask].float()
            skipped = lens.massive(x)
            found = lens.encode(x)
            values = torch.where(skipped.unsqueeze(-1), 0.0, found.values.float()).abs()
            codes.append(Codes(found.indices, values, lens.features).to("cpu"))
            massive += int(skipped.sum())
            tokens.append(trace.tokens[mask].cpu())
            rows = torch.arange(mask.shape[0]).unsqueeze(1).expand(mask.shape) + len(names)
            window.append(rows[mask.cpu()])
            columns = torch.arange(mask.shape[1]).expand(mask.shape)
            offsets = torch.tensor(trace.offsets).unsqueeze(1)
            position.append((columns + offsets)[mask.cpu()])
            names += [str(d) for d in trace.documents]
            advance(int(mask.sum()))
    if not tokens:
        raise InputError("the corpus has no text; give at least one document with some")
    return CorpusCodes(
        Codes.cat(codes), torch.cat(tokens), torch.cat(window), torch.cat(position),
        tuple(names), tuple(domains.get(n, "") for n in names), massive,
    )  # fmt: skip
