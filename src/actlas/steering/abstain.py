"""Abstain: answer with a fixed message, and nothing else, where a gate is open.

The logits of the last prompt token are set so that only the message's first token is possible, those of
the next token so that only its second is, and so on to the end-of-text token:

    logits_i = 0 at message[i], -10000 elsewhere          i = 0 at the last prompt token

So the message comes out the same under greedy decoding, sampling and beams, with and without a KV cache.
This is abstention (Effective Skill Unlearning through Intervention and Abstention, section on key space
detection) and not unlearning: the weights keep the skill, and whoever removes the edit has it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.contrast import Where
from actlas.core.edit import ActivationEdit, Edit, Here, register_edit
from actlas.core.errors import InputError, ModelError
from actlas.core.methods import method
from actlas.steering.hypercube import fit_hyper_box

if TYPE_CHECKING:
    from actlas.core.lens import Lens
    from actlas.core.model import Model
    from actlas.core.sites import Site

MESSAGE = "I am sorry, but I cannot help with that."
_NEVER = -1e4


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class Abstain(ActivationEdit):
    """Say a message instead of an answer; see the module's docstring. Its site is `logits`.

    Attributes:
        message: token ids; after the last of them it is repeated (end-of-text tokens stop generation).
        text: the message as text, for people.
    """

    message: tuple[int, ...] = ()
    text: str = ""

    @classmethod
    def say(cls, model: Model, message: str = MESSAGE) -> Abstain:
        """Return the edit that says a message, for a model with a tokenizer.

        Raises:
            ModelError: the model has no tokenizer or no end-of-text token.
            InputError: the message is empty.
        """
        if model.tokenizer is None or model.tokenizer.eos_token_id is None:
            raise ModelError(f"{model.name} has no tokenizer with an end-of-text token, so it cannot abstain")
        ids = model.tokenizer(message, add_special_tokens=False)["input_ids"]
        if not message.strip() or not ids:
            raise InputError("the message is empty; give what to say instead of an answer")
        made = cls("logits", (*map(int, ids), int(model.tokenizer.eos_token_id)), message)
        bound = made.bind(model.fingerprint)
        assert isinstance(bound, Abstain)
        return bound

    def guarded(self, lens: Lens, threshold: float = 0.0) -> Edit:
        """Return the edit behind a lens that decides once, on the query's last token."""
        return self.when(lens, threshold, per="sequence", reduce="last")

    def check(self, site: Site) -> None:
        if site.kind != "logits":
            raise InputError(f"Abstain edits 'logits', not {site.name}")
        if not self.message:
            raise InputError("Abstain has no message; make it with Abstain.say(model, message)")
        if self.strength != 1.0:
            raise InputError(
                f"Abstain has strength {self.strength:g}; it is said whole or not at all (1 or 0)"
            )

    def change(self, x: Tensor, here: Here) -> Tensor:
        positions = here.run.positions(x.device)[:, -x.shape[1] :]
        ends = here.run.prompt_mask(x.device).sum(1, keepdim=True)
        place = positions - (ends - 1)
        ids = torch.tensor(self.message, device=x.device)
        if int(ids.max()) >= x.shape[-1]:
            raise InputError(
                f"the message has token {int(ids.max())}, but {here.site.name} has {x.shape[-1]} tokens"
            )
        wanted = ids[place.clamp(0, len(ids) - 1)]
        said = torch.full_like(x, _NEVER).scatter_(-1, wanted.unsqueeze(-1), 0.0)
        return torch.where((place >= 0).unsqueeze(-1), said, x)

    def describe(self) -> str:
        return f"{super().describe()}: say {self.text[:40]!r}"

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        ids = tuple(int(i) for i in record["message"])
        return super()._rebuild({**record, "message": ids}, tensors)


@method(
    "abstain",
    room="steering",
    returns="Edit",
    data="labelled",
    summary="refuse queries whose keys lie in a skill's hypercube (label 1), answer all others",
    example="actlas fit abstain smollm2 queries.jsonl -o no-maths/",
    papers=("skill-unlearning",),
)
def fit_abstain(
    model: Model,
    data: Any,
    site: str | None = None,
    *,
    message: str = MESSAGE,
    multiplier: float | Literal["auto"] = "auto",
    position: Where = "last",
    held_out: float = 0.25,
    seed: int = 0,
) -> Edit:
    """Fit a hyper box around the queries with label 1 and abstain inside it.

    Args:
        model, data, site, multiplier, position, held_out, seed: see `fit_hyper_box`.
        message: what to say.

    Returns:
        The gated edit; its `measurements` are those of the box.
    """
    said = Abstain.say(model, message)
    box = fit_hyper_box(
        model, data, site, multiplier=multiplier, position=position, held_out=held_out, seed=seed
    )
    return said.guarded(box).with_measurements(box.measurements)
