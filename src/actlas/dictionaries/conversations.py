"""Conversations as a source of activations: the chat template applied, each conversation alone.

    labelled = tokenise(model, chats(200))                         # ids, and which are the template's
    rows = token_rows(model, labelled, "blocks.15.resid_post", packing="conversation", tokens=12_000)
    sae = fit_sae(model, rows.x, rows.site, ...)                   # any trainer: rows are rows
    sae = fit_sae(model, labelled, "blocks.15.resid_post", ...)    # the same, read while it trains

A dictionary for a chat model should see what the model sees in use. FAST (Li et al. 2025, "Training
Superior Sparse Autoencoders for Instruct Models") runs each conversation alone, in its template, and mixes
only the activations. Its baselines cut concatenated text into blocks of one length: the first token of most
blocks is then not the template's, and tokens attend across conversations.

    packing="conversation"   one conversation is one sequence: positions from 0, no attention between two
    packing="block"          conversations one after the other, cut into blocks of `block` tokens

Every token keeps whether it belongs to the template (`special`: markers, role names, line breaks around
them), whose turn it is in (`roles`), and where it stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.calibration.massive import massive_rows
from actlas.core.errors import InputError, ModelError
from actlas.core.streaming import TokenDocument, Window, batches, encode_windows
from actlas.dictionaries.chat_template import ChatTemplate, label_tokens
from actlas.dictionaries.sources import MASSIVE

if TYPE_CHECKING:
    from actlas.core.model import Model

Packing = Literal["conversation", "block"]
TEXT = "text"  # the role of text outside conversations


@dataclass(frozen=True)
class LabelledTokens(TokenDocument):
    """One conversation (or one plain document) in tokens; a corpus of these can be streamed.

    Attributes:
        id: of the conversation.
        ids: token ids.
        special: whether each token is the template's and not part of anybody's message.
        roles: whose turn each token belongs to.
        truncated: whether the end was cut off; a truncated conversation has lost its end marker.
    """

    special: tuple[bool, ...]
    roles: tuple[str, ...]
    truncated: bool = False


@dataclass(frozen=True)
class LabelledWindow(Window):
    """One sequence that the model will see; `offset` is 0, since its positions start anew.

    Attributes:
        special, roles: as in `LabelledTokens`.
        sources: of each token, the number of its conversation.
        positions: of each token, its position in its conversation.
    """

    special: tuple[bool, ...] = ()
    roles: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenRows:
    """Activations of one site with what is known about each row.

    Attributes:
        site: the site.
        x: `[n, d]`, float32, heads joined.
        token: token ids `[n]`.
        special: bool `[n]`, see `LabelledTokens`.
        role: `[n]`, index into `roles`.
        place: `[n]`, position in the sequence that the model saw.
        position: `[n]`, position in the conversation.
        conversation: `[n]`, number of the conversation.
        massive: bool `[n]`, rows with a massive activation (the attention sink, usually the first token), on
            which no dictionary is fitted by default.
        roles: names of the roles.
        packing: how the sequences were made.
    """

    site: str
    x: Tensor
    token: Tensor
    special: Tensor
    role: Tensor
    place: Tensor
    position: Tensor
    conversation: Tensor
    massive: Tensor
    roles: tuple[str, ...]
    packing: str

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: Tensor | slice) -> TokenRows:
        """Return some of the rows, chosen by a bool mask, indices or a slice."""
        held: dict[str, Any] = {k: v[which] if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return TokenRows(**held)


def tokenise(
    model: Model, conversations: Iterable[Any], *, max_tokens: int | None = None
) -> list[LabelledTokens]:
    """Apply the model's chat template and say what each token is.

    Args:
        model: an instruct model; base models have no template.
        conversations: with `.messages` and `.id` (see `actlas.data.chats`), or lists of
            `{"role", "content"}`.
        max_tokens: cut longer conversations; default the model's context. (The paper cuts at 8,192.)

    Raises:
        ModelError: no chat template, or a tokenizer that does not say which characters a token covers.
        InputError: no conversation, one without messages, or one that the template refuses or rewrites.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{model.name} has no chat template, so it is not a chat model; give plain documents"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"the tokenizer of {model.name} gives no character offsets; use a fast tokenizer")
    limit = min(n for n in (max_tokens, model.context_length, 2**31) if n is not None)
    if limit < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
    template = ChatTemplate(tokenizer)
    found = []
    for i, conversation in enumerate(conversations):
        messages = getattr(conversation, "messages", conversation)
        name = str(getattr(conversation, "id", i))
        text, segments = template.render(messages, name)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        special, roles = label_tokens(encoded["offset_mapping"], segments)
        ids = tuple(encoded["input_ids"])
        found.append(LabelledTokens(name, ids[:limit], special[:limit], roles[:limit], len(ids) > limit))
    if not found:
        raise InputError("there are no conversations; give at least one")
    return found


def tokenise_text(model: Model, corpus: Iterable[Any]) -> list[LabelledTokens]:
    """Return plain documents in tokens, for blocks of pre-training text; nothing in them is special."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read text")
    found = []
    for i, document in enumerate(corpus):
        text = document if isinstance(document, str) else document.text
        ids = tuple(model.tokenizer(text, verbose=False)["input_ids"])
        name = str(i) if isinstance(document, str) else str(document.id)
        found.append(LabelledTokens(name, ids, (False,) * len(ids), (TEXT,) * len(ids)))
    if not found:
        raise InputError("the corpus is empty; give at least one document")
    return found


def pack(
    labelled: Sequence[LabelledTokens], packing: Packing = "conversation", *, block: int = 256
) -> Iterator[LabelledWindow]:
    """Yield the sequences that the model will see.

    Args:
        labelled: conversations, in order.
        packing: see the module's text.
        block: tokens in a block; a last, shorter block is yielded too.

    Raises:
        InputError: an unknown packing, or blocks of no tokens.
    """
    if packing not in ("conversation", "block"):
        raise InputError(f"packing is {packing!r}; it must be 'conversation' or 'block'")
    if block < 1:
        raise InputError(f"block is {block}; it must be at least 1 token")
    if packing == "conversation":
        for i, one in enumerate(labelled):
            n = len(one.ids)
            yield LabelledWindow(one.id, 0, one.ids, one.special, one.roles, (i,) * n, tuple(range(n)))
        return
    tokens = [
        (token, one.special[j], one.roles[j], i, j)
        for i, one in enumerate(labelled)
        for j, token in enumerate(one.ids)
    ]
    for number, start in enumerate(range(0, len(tokens), block)):
        ids, special, roles, sources, positions = zip(*tokens[start : start + block], strict=True)
        yield LabelledWindow(f"block/{number}", 0, ids, special, roles, sources, positions)


@torch.no_grad()
def token_rows(
    model: Model,
    labelled: Sequence[LabelledTokens],
    site: str,
    *,
    packing: Packing = "conversation",
    block: int = 256,
    tokens: int | None = None,
    batch_tokens: int = 2048,
) -> TokenRows:
    """Read a site over conversations, one row a token, padding left out. Installed edits apply.

    Args:
        model: the model.
        labelled: from `tokenise` or `tokenise_text`.
        site: one site.
        packing, block: see `pack`.
        tokens: exactly so many rows, from the start; packings are compared at equal tokens.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        InputError: several sites, or fewer tokens than asked for.
    """
    where = model.resolve(site)
    if len(where) != 1:
        raise InputError(f"rows are read at one site; {site!r} names {len(where)}")
    windows = list(pack(labelled, packing, block=block))
    available = sum(len(w.ids) for w in windows)
    if tokens is not None and not 1 <= tokens <= available:
        raise InputError(f"tokens is {tokens}; the conversations have {available}")
    kept: list[LabelledWindow] = []
    left = available if tokens is None else tokens
    for window in windows:  # a window that is cut is run whole, so that its tokens are what they would be
        if left <= 0:
            break
        kept.append(window)
        left -= len(window.ids)
    pieces = []
    for held in batches(kept, batch_tokens):
        trace = model._run(encode_windows(model, held), where)
        pieces.append(trace.rows(where[0].name).flatten(1).float().cpu())
    x = torch.cat(pieces)
    roles = tuple(dict.fromkeys(r for w in kept for r in w.roles))
    number = {role: i for i, role in enumerate(roles)}
    rows = TokenRows(
        site=where[0].name,
        x=x,
        token=torch.tensor([t for w in kept for t in w.ids]),
        special=torch.tensor([s for w in kept for s in w.special]),
        role=torch.tensor([number[r] for w in kept for r in w.roles]),
        place=torch.tensor([i for w in kept for i in range(len(w.ids))]),
        position=torch.tensor([p for w in kept for p in w.positions]),
        conversation=torch.tensor([s for w in kept for s in w.sources]),
        massive=massive(x),
        roles=roles,
        packing=packing,
    )
    return rows[: tokens or len(rows)]


def massive(x: Tensor) -> Tensor:
    """Return which rows `[n, d]` hold massive activations, by themselves or beside the others, bool `[n]`."""
    norm = x.norm(dim=1)
    return massive_rows(x) | (norm > MASSIVE * norm.median())
