"""PYRA: adapt a ViT with low-rank changes while its tokens are merged, and modulate what is merged away.

Before a merge, with M_s the r tokens that go and M_t their partners (both `[r, d]`, weighted by size):

    P  = LayerNorm(M_s + M_t)
    dD = W_r^T P          (1 x d, W_r in R^{r x 1})        dr = P W_D^T      (r x 1, W_D in R^{1 x d})
    M_s <- M_s + (2 sigmoid(dr) - 1) * 2 sigmoid(dD) * M_s

W_D begins at 0, so that training starts from plain token merging, exactly. Trained are W_r, W_D, the norms,
LoRA on the query, key and value projections (W + B A * 2), and the classifier:

    edit = tune_pyra(model, pixels, labels, schedule=(12, 10, 8, 6), seed=0)
    with model.edit(edit): model.logits(images)

Source: Xiong et al. 2024, "PYRA: Parallel Yielding Re-Activation" (arXiv 2403.09192), section 3, and the
released code, in which merging stands between attention and MLP. There the separate learning rate never
reaches PYRA's weights (it looks for another name); here it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actlas.core.edit import Edit, WholeEdit, register_edit
from actlas.core.errors import InputError, ModelError, NonFiniteError
from actlas.core.layout import find, join
from actlas.core.methods import method
from actlas.core.model import Model
from actlas.core.swap import SwapModule
from actlas.core.token_merging import check_schedule, install_slim_blocks

if TYPE_CHECKING:
    from actlas.core.installation import Installation

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Reactivation(nn.Module):
    """Modulate r tokens of width d that are merged away; see the module docstring."""

    def __init__(self, r: int, d: int) -> None:
        super().__init__()
        self.r = r
        self.norm = nn.LayerNorm(d)
        self.w_r = nn.Parameter(torch.empty(r, 1).uniform_(-1, 1))
        self.w_d = nn.Parameter(torch.zeros(1, d))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the changed source tokens, `[batch, r, d]`."""
        if source.shape[1] != self.r:
            raise InputError(f"{source.shape[1]} tokens are merged, and PYRA was built for {self.r}")
        p = self.norm(source + target)
        by_channel = self.w_r.T @ p
        by_token = p @ self.w_d.T
        return source + (2 * by_token.sigmoid() - 1) * (2 * by_channel.sigmoid() * source)


class LowRankChange(nn.Module):
    """A frozen linear map and a trained change of low rank: `W x + 2 B A x`.

    Args:
        linear: the frozen map; it stays the model's own.
        change: A `[rank, in]` and B `[out, rank]`.
    """

    def __init__(self, linear: nn.Module, change: nn.Module) -> None:
        super().__init__()
        self.linear, self.change = linear, change

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with its change."""
        out: Tensor = self.linear(x) + 2 * self.change(x)
        return out


class Adapters(nn.Module):
    """Everything that is trained: low-rank changes, a classifier, and PYRA's weights where tokens go.

    Args:
        d: width of the model.
        classes: classes of the new task.
        schedule: tokens that go after each block's attention.
        rank: of the low-rank changes.
        reactivate: with PYRA's weights; without, it is LoRA with plain token merging.
    """

    def __init__(
        self, d: int, classes: int, schedule: Sequence[int], rank: int, *, reactivate: bool = True
    ) -> None:
        super().__init__()
        self.config = {
            "d": d,
            "classes": classes,
            "schedule": list(schedule),
            "rank": rank,
            "reactivate": reactivate,
        }
        self.low_rank = nn.ModuleList()
        for _ in range(len(schedule) * len(_PROJECTIONS)):
            down, up = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)
            nn.init.zeros_(up.weight)
            self.low_rank.append(nn.Sequential(down, up))
        self.head = nn.Linear(d, classes)
        self.pyra = nn.ModuleDict(
            {str(i): Reactivation(r, d) for i, r in enumerate(schedule) if r and reactivate}
        )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Tokens that go after each block's attention."""
        return tuple(self.config["schedule"])  # type: ignore[arg-type]


@register_edit
@dataclass(frozen=True, eq=False, repr=False)
class TunedTokens(WholeEdit):
    """A ViT adapted to a task, with fewer tokens: low-rank changes, classifier, merging, PYRA.

    Attributes:
        adapters: what was trained.
    """

    whole: ClassVar[str] = "it changes the number of tokens of all images"

    adapters: Adapters

    def describe(self) -> str:
        kind = "PYRA" if len(self.adapters.pyra) else "LoRA"
        schedule = self.adapters.schedule
        return f"{kind} with {sum(schedule)} tokens merged over {len(schedule)} blocks"

    def _attach(self, installation: Installation) -> None:
        adapters, model = self.adapters, installation.model
        made = dict(adapters.pyra.items())
        pyra = [made.get(str(i)) for i in range(len(adapters.schedule))]
        install_slim_blocks(installation, adapters.schedule, modulate=pyra)
        tower = model.tower
        assert tower is not None
        for i in range(tower.n_blocks):
            for j, name in enumerate(_PROJECTIONS):
                path = join(tower.blocks, str(i), tower.attention, name)
                linear = find(model.module, path)
                assert linear is not None
                change = adapters.low_rank[len(_PROJECTIONS) * i + j]
                installation.swap(SwapModule(path, LowRankChange(linear, change)))
        installation.swap(SwapModule("classifier", adapters.head))

    def _record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"adapters": self.adapters.config}, dict(self.adapters.state_dict())

    @classmethod
    def _rebuild(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        adapters = Adapters(**record["adapters"])
        adapters.load_state_dict(dict(tensors))
        return cls(adapters.eval())


def tune_pyra(
    model: Model,
    pixels: Tensor,
    labels: Tensor,
    *,
    schedule: Sequence[int],
    rank: int = 8,
    reactivate: bool = True,
    epochs: int = 10,
    batch: int = 32,
    lr: float = 1e-3,
    pyra_lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> TunedTokens:
    """Adapt an image classifier to labelled images while its tokens are merged. The model is not changed.

    Args:
        model: a ViT classifier.
        pixels: `[n, channels, height, width]`, as the model takes them.
        labels: classes from 0, int64 `[n]`; the new classifier has one output more than the greatest.
        schedule: tokens that go after each block's attention; zeros: plain LoRA.
        rank: of the low-rank changes of query, key and value.
        reactivate: with PYRA; without, LoRA and token merging.
        epochs, batch: passes over the images; images a step.
        lr: of the low-rank changes and the classifier, AdamW with cosine decay.
        pyra_lr: of PYRA's weights (searched from 1e-5 to 3e-3 in the paper).
        weight_decay: of all.
        seed: of the start and the order of the images.

    Raises:
        ModelError: no ViT classifier.
        InputError: a schedule that does not fit, no images, or labels that do not fit them.
        NonFiniteError: the loss became NaN or infinite.
    """
    check_schedule(model, schedule)
    if find(model.module, "classifier") is None or model.d_model is None:
        raise ModelError(f"{model.name} ({model.kind}) has no classifier to adapt")
    if labels.ndim != 1 or len(labels) != len(pixels) or not len(labels) or int(labels.min()) < 0:
        raise InputError(
            f"labels have shape {list(labels.shape)} for {len(pixels)} images; give one class from 0 for each"
        )
    for name, value in (("rank", rank), ("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # PYRA's weights are drawn last, so that arms with and without it start alike.
        adapters = Adapters(model.d_model, int(labels.max()) + 1, schedule, rank, reactivate=reactivate)
    adapters.to(model.device).train()
    edit = TunedTokens(adapters)
    pyra = list(adapters.pyra.parameters())
    others = [*adapters.low_rank.parameters(), *adapters.head.parameters()]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}]
    if pyra:
        groups.append({"params": pyra, "lr": pyra_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    steps = epochs * -(-len(labels) // batch)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    frozen = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        with model.edit(edit):
            for _ in range(epochs):
                for part in torch.randperm(len(labels), generator=order).split(batch):
                    logits = model.module(pixel_values=pixels[part].to(model.device)).logits
                    loss = F.cross_entropy(logits, labels[part].to(model.device))
                    if not bool(torch.isfinite(loss)):
                        raise NonFiniteError(f"the loss became {float(loss)}; use a smaller lr than {lr:g}")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()
    finally:
        for p, grad in frozen:
            p.requires_grad_(grad)
    adapters.eval().requires_grad_(False)
    return edit.bind(model.fingerprint)  # type: ignore[return-value]


@method(
    "pyra",
    room="training",
    returns="Edit",
    data="labelled",
    summary="adapt a ViT with LoRA while its tokens are merged, modulating what is merged away",
    example="actlas.training.pyra.fit_pyra(model, [(pixels, label), ...], schedule=(8, 8, 8, 8))",
    papers=("pyra",),
)
def fit_pyra(
    model: Model, data: Sequence[tuple[Tensor, int]], *, schedule: Sequence[int], **options: Any
) -> TunedTokens:
    """Return the adapted model as an edit; see `tune_pyra`.

    Args:
        model: a ViT classifier.
        data: images `[channels, height, width]` with their classes.
        schedule: tokens that go after each block's attention.
        options: of `tune_pyra`.

    Raises:
        InputError: data that are no labelled images.
    """
    rows = list(data)
    if not rows or not all(isinstance(row[0], Tensor) and row[0].ndim == 3 for row in rows):
        raise InputError(
            "PYRA needs labelled images, (pixels [channels, height, width], class); text is no image"
        )
    pixels, labels = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
    return tune_pyra(model, pixels, labels, schedule=schedule, **options)
