"""Dialogues of neurofeedback: sentences, each with a score, as a chat model's own earlier turns.

    system      what the score is
    user        Say something.
    assistant   I found the film wonderful. [Score: {1}]
    user        Say something.
    assistant   The soup was awful. [Score: {0}]
    ...

A dialogue knows which tokens are the sentences (their activations are read) and which are the labels (the
model's prediction of them is read one token earlier). Both labels must be tokens of their own, so that
their logits can be compared; a tokenizer for which they are not is refused.

Source: "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations"
(2025) and its code; the wording of system text and requests is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.measure.likelihood import output_logits, takes_option

if TYPE_CHECKING:
    from actlas.core.model import Model

SYSTEM = (
    "You will say sentences. Each is followed by a score, which was measured from your own internal activity "
    "while you said it: 1 if the activity was high, 0 if it was low. Look for what the score depends on."
)
REQUEST = "Say something."
IMITATE = "Say something for which the score will be [Score: {{{label}}}]."
SCORE = " [Score: {"
CLOSE = "}]"


@dataclass(frozen=True)
class Dialogue:
    """A rendered dialogue.

    Attributes:
        ids: its tokens.
        sentences: first and one past the last token of each sentence, in order.
        labels: index of the token of each score.
    """

    ids: tuple[int, ...]
    sentences: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]


class Chat:
    """Renders dialogues for one chat model.

    Raises:
        ModelError: no causal language model with a chat template and a fast tokenizer.
        InputError: the labels are not tokens of their own for this tokenizer.
    """

    def __init__(self, model: Model) -> None:
        tokenizer = model.tokenizer
        if model.kind != "causal-lm" or tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"{model.name} is no chat model: it needs a tokenizer with a chat template")
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"the tokenizer of {model.name} gives no character offsets; use a fast one")
        self.model = model
        self.labels = self._label_ids()

    def render(
        self,
        sentences: Sequence[str],
        labels: Sequence[int] = (),
        *,
        system: str | None = SYSTEM,
        imitate: int | None = None,
        last: str | None = None,
    ) -> Dialogue:
        """Return the dialogue of some sentences with their labels.

        Args:
            sentences: one for each turn of the assistant.
            labels: 0 or 1 for each sentence; empty leaves the scores out.
            system: the text that explains the score, or `None`.
            imitate: ask at the end for a sentence with this label.
            last: the sentence that answers this request; `None` ends with the open turn of the assistant.

        Raises:
            InputError: an empty sentence, as many labels as sentences are not given, or a template that
                rewrites what is said.
        """
        if labels and len(labels) != len(sentences):
            raise InputError(f"{len(sentences)} sentences need as many labels, not {len(labels)}")
        said = [s.strip() for s in sentences]
        turns = [(REQUEST, text) for text in said]
        scores = [f"{SCORE}{label}{CLOSE}" for label in labels] or [""] * len(said)
        if imitate is not None:
            turns.append((IMITATE.format(label=imitate), "" if last is None else last.strip()))
            said, scores = said + [turns[-1][1]], scores + [""]
        if any(not text for text in said[: len(said) - (imitate is not None and last is None)]):
            raise InputError("a sentence of the dialogue is empty; leave it out")
        messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        for (request, sentence), score in zip(turns, scores, strict=True):
            messages.append({"role": "user", "content": request})
            if sentence:
                messages.append({"role": "assistant", "content": sentence + score})
        is_open = imitate is not None and last is None
        text = self._template(messages, is_open)
        return self._located(text, messages, turns, scores)

    def _located(
        self, text: str, messages: list[dict[str, str]], turns: list[tuple[str, str]], scores: list[str]
    ) -> Dialogue:
        """Tokenize a rendered dialogue and find the tokens of its sentences and labels."""
        out = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = (list(side) for side in zip(*out["offset_mapping"], strict=True))
        spans, places, at = [], [], 0
        for (request, sentence), score in zip(turns, scores, strict=True):
            at = self._find(text, request, at) + len(request)
            if not sentence:
                continue
            if not score:  # nothing after it to find it by: it follows the header of its turn
                at = max(at, self._header(text, messages))
            at = self._find(text, sentence + score, at)
            end = at + len(sentence)
            inside = [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > at and a < end]
            spans.append((inside[0], inside[-1] + 1))
            if score:
                places.append(starts.index(end + len(SCORE)))
            at = end + len(score)
        return Dialogue(tuple(out["input_ids"]), tuple(spans), tuple(places))

    def _header(self, text: str, messages: list[dict[str, str]]) -> int:
        """Return where the last turn's own words begin, or 0 if the template does not say."""
        before = self._template(messages[:-1], True)
        return len(before) if text.startswith(before) else 0

    def label_logits(self, dialogues: Sequence[Dialogue], batch: int = 4) -> list[Tensor]:
        """Return `logit(1) - logit(0)` right before each label, float64 `[labels]` for each dialogue.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
        """
        keeps = takes_option(self.model, "logits_to_keep")
        zero, one = self.labels
        found: list[Tensor] = []
        for some in _batches(dialogues, batch):
            inputs = self._padded(some)
            places = [torch.tensor(d.labels) - 1 for d in some]
            options: dict[str, Any] = {}
            if keeps:
                kept = torch.cat(places).unique()
                options = {"logits_to_keep": kept.to(self.model.device)}
                places = [torch.searchsorted(kept, p) for p in places]
            logits = output_logits(self.model, inputs, **options)
            for row, where in enumerate(places):
                z = logits[row, where.to(logits.device)].double()
                gap = z[:, one] - z[:, zero]
                if not bool(torch.isfinite(gap).all()):
                    raise NonFiniteError(f"the logits of {self.model.name} hold NaN or infinity at a label")
                found.append(gap.cpu())
        return found

    def read(self, dialogues: Sequence[Dialogue], site: str, batch: int = 4) -> Tensor:
        """Return the mean activation over the tokens of each dialogue's last sentence, float64 `[n, d]`."""
        rows = []
        for some in _batches(dialogues, batch):
            x = self.model.trace(self._padded(some), [site])[site].flatten(2)
            for row, dialogue in enumerate(some):
                first, stop = dialogue.sentences[-1]
                rows.append(x[row, first:stop].double().mean(0).cpu())
        return torch.stack(rows)

    def alone(self, sentences: Sequence[str], site: str, batch: int = 16) -> Tensor:
        """Return each sentence's activation when the model says it without any score, `[n, d]`."""
        made = [self.render([s], system=None) for s in sentences]
        order = sorted(range(len(made)), key=lambda i: len(made[i].ids))
        rows = self.read([made[i] for i in order], site, batch)
        return rows[torch.tensor(order).argsort()]

    def say(self, dialogues: Sequence[Dialogue], tokens: int, temperature: float, seed: int) -> list[str]:
        """Return what the model says in each open turn: its first line, without any score."""
        texts = []
        for number, some in enumerate(_batches(dialogues, 8)):
            encoded = self._padded(some, left=True)
            made = self.model.generate(
                encoded, max_new_tokens=tokens, temperature=temperature, seed=seed + number
            )
            texts += [t.strip().split("\n")[0].split("[")[0].strip() for t in made.texts]
        return texts

    def _padded(self, dialogues: Sequence[Dialogue], left: bool = False) -> dict[str, Any]:
        pad = self.model._encoder.pad_id
        width = max(len(d.ids) for d in dialogues)
        limit = self.model.context_length
        if limit is not None and width > limit:
            raise InputError(
                f"a dialogue has {width} tokens; {self.model.name} takes {limit}: use fewer examples"
            )
        ids = torch.full((len(dialogues), width), pad)
        mask = torch.zeros_like(ids)
        for row, dialogue in enumerate(dialogues):
            n = len(dialogue.ids)
            where = slice(width - n, width) if left else slice(0, n)
            ids[row, where] = torch.tensor(dialogue.ids)
            mask[row, where] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        return self.model.encode(inputs, padding_side="left" if left else "right")

    def _template(self, messages: list[dict[str, str]], is_open: bool) -> str:
        tokenizer = self.model.tokenizer

        def render(what: list[dict[str, str]]) -> str:
            return str(tokenizer.apply_chat_template(what, tokenize=False, add_generation_prompt=is_open))

        try:
            return render(messages)
        except Exception as error:  # jinja's: many templates know no system role
            if messages[0]["role"] != "system":
                raise ModelError(f"the chat template of {self.model.name} fails: {error}") from error
        first, second, *rest = messages
        merged = {"role": "user", "content": f"{first['content']}\n\n{second['content']}"}
        return render([merged, *rest])

    def _find(self, text: str, part: str, at: int) -> int:
        found = text.find(part, at)
        if found < 0:
            raise InputError(
                f"the chat template of {self.model.name} rewrites {part[:60]!r}; it cannot be used"
            )
        return found

    def _label_ids(self) -> tuple[int, int]:
        ids = []
        for label in (0, 1):
            text = f"So.{SCORE}{label}{CLOSE}"
            out = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            place = len(f"So.{SCORE}")
            found = [i for i, span in enumerate(out["offset_mapping"]) if tuple(span) == (place, place + 1)]
            if len(found) != 1:
                raise InputError(
                    f"the label {label} after {SCORE!r} is not a token of its own for {self.model.name}; "
                    "its logit cannot be read"
                )
            ids.append(int(out["input_ids"][found[0]]))
        if ids[0] == ids[1]:
            raise InputError(f"the labels 0 and 1 are the same token for {self.model.name}")
        return ids[0], ids[1]


def _batches(dialogues: Sequence[Dialogue], size: int) -> list[list[Dialogue]]:
    return [list(dialogues[i : i + size]) for i in range(0, len(dialogues), size)]
