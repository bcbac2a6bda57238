"""Distributed alignment search (DAS): learn the directions whose patch carries a variable.

    patch = das(model, "ioi", "blocks.19.mlp.act", variant="Pos")
    patch.measurements                 # effect on prompts it was not learned on, and the illusion test
    loss = CE(model(base with the subspace of source), answer of the swapped variable)

The directions are the orthonormal basis of a free matrix (by QR), learned with Adam while the model stays
fixed. Only the last token is patched, so a step costs that token in the blocks behind the site
(`circuits.last_token`). What is learned is tested for the illusion before it is handed back.

Source: Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
Representations"; settings of Makelov, Lange and Nanda 2023: Adam 0.01 with linear decay to a tenth, batches
of 20.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.circuits.illusion import IllusionReport, illusion_test
from actlas.circuits.interchange import Interchange, as_pairs
from actlas.circuits.readers import Readers, later_blocks, readers_of
from actlas.circuits.subspace import SubspacePatch, interchange, orthonormal
from actlas.core.errors import InputError
from actlas.core.methods import method
from actlas.core.progress import progress

if TYPE_CHECKING:
    from actlas.core.model import Model

_HEADS = 4  # query heads that count as readers of a residual stream, by attribution


@method(
    "das",
    room="circuits",
    returns="Edit",
    data="task",
    summary="directions whose patch swaps a task's variable, with the test for the subspace illusion",
    example="actlas fit das smollm2 ioi --site blocks.21.resid_post --option variant=Pos -o das/",
    papers=("subspace-patching-illusion",),
)
def das(
    model: Model,
    data: Any,
    *,
    site: str,
    rank: int = 1,
    n: int = 64,
    held_out: float = 0.5,
    steps: int = 60,
    batch: int = 20,
    lr: float = 0.01,
    variant: str | None = None,
    both: bool = False,
    readers: Sequence[str] | None = None,
    check: bool = True,
    force: bool = False,
    seed: int = 0,
) -> SubspacePatch:
    """Learn a subspace at a site's last token, and test it on prompts that it was not learned on.

    Args:
        model: a causal language model.
        data: a task (its name, or its items with counterfactuals), or `PromptPairs`.
        site: one site.
        rank: number of directions.
        n: at most so many pairs.
        held_out: share of them that is kept for the test; prompts that share their wording with a
            learned one by chance are possible, so give items with disjoint names for a strict test.
        steps, batch, lr: of Adam; the rate falls linearly to a tenth.
        variant: which attribute of the items the other prompt changes; `None`: their counterfactual.
        both: learn from both directions of every pair.
        readers: what reads the site, for the illusion test; see `circuits.readers`.
        check: run the illusion test (on by default).
        force: go on although the model fails the task.
        seed: of start, batches, split and controls.

    Returns:
        The patch, without a source yet: `patch.from_inputs(model, prompts)`.

    Raises:
        InputError: unusable pairs or sizes.
    """
    pairs = as_pairs(model, data, n=n, variant=variant, force=force, seed=seed)
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; it must lie between 0 and 1, e.g. 0.5")
    if len(pairs) < 4:
        raise InputError(f"{len(pairs)} pairs cannot be split into learning and test; give at least 4")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    kept = min(max(2, round(len(pairs) * held_out)), len(pairs) - 2)
    learned = Interchange.of(model, pairs.take(order[kept:]), site, both=both)
    directions = learn(learned, rank=rank, steps=steps, batch=batch, lr=lr, seed=seed)
    name = model.resolve(site)[0].name
    patch = SubspacePatch(name, directions)
    if check:
        report = subspace_faithfulness(
            model, patch, pairs.take(order[:kept]), readers=readers, both=both, seed=seed
        )
        patch = patch.with_measurements(report.measurements)  # type: ignore[assignment]
    bound = patch.bind(model.fingerprint)
    assert isinstance(bound, SubspacePatch)
    return bound


def learn(
    data: Interchange,
    *,
    rank: int = 1,
    steps: int = 60,
    batch: int = 20,
    lr: float = 0.01,
    seed: int = 0,
    what: str = "learning a subspace",
) -> Tensor:
    """Return the learned directions, orthonormal rows `[rank, d]` (`[d]` for rank 1), float32.

    Raises:
        InputError: a rank or a number of steps that makes no sense here.
    """
    width = data.base.shape[1]
    if not 1 <= rank <= width:
        raise InputError(f"rank is {rank}; it must lie between 1 and the site's {width} channels")
    if steps < 1 or batch < 1:
        raise InputError(f"steps={steps} and batch={batch}; both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    start = torch.nn.functional.normalize(torch.randn(rank, width, generator=generator), dim=1)
    free = start.to(data.base.device).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=lr)
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - 0.9 * step / max(steps, 1))
    size = min(batch, len(data))
    order = torch.empty(0, dtype=torch.long)
    with progress(what, steps, "steps") as advance:
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(data), generator=generator)
            rows, order = order[:size], order[size:]
            rows = rows.to(data.base.device)
            patched = interchange(data.base[rows], data.source[rows], free)
            logits = data.logits(patched, rows, grad=True).float()
            loss = torch.nn.functional.cross_entropy(logits, data.target[rows])
            (free.grad,) = torch.autograd.grad(loss, [free])
            optimiser.step()
            fall.step()
            advance(note=f"loss {float(loss.detach()):.3f}")
    found = orthonormal(free.detach()).T.contiguous()
    return found[0] if rank == 1 else found


def subspace_faithfulness(
    model: Model,
    patch: SubspacePatch | Tensor,
    data: Any,
    *,
    site: str | None = None,
    readers: Readers | Sequence[str] | None = None,
    both: bool = False,
    n: int = 64,
    variant: str | None = None,
    controls: int = 5,
    seed: int = 0,
) -> IllusionReport:
    """Run the illusion test (`circuits.illusion`) of a subspace at the last token of a task's prompts.

    Args:
        model: a causal language model.
        patch: a patch, or directions `[d]` or `[r, d]` together with `site`. Any direction can be tested:
            a probe's, a steering vector, a knob.
        data: see `das`; not the prompts that it was learned on.
        site: where, for bare directions.
        readers: what reads the site, as names or as a map. `None`: `W_out` or `W_O`; for a residual site
            the query heads through which the patch works most, by attribution.
        both, n, variant, seed: see `das`.
        controls: random subspaces of equal rank.

    Raises:
        InputError: no site, pairs that differ in nothing at this site, ...
    """
    if isinstance(patch, SubspacePatch):
        site, directions = patch.site, patch.directions
    elif site is None:
        raise InputError("bare directions need a site; say which")
    else:
        directions = patch
    pairs = as_pairs(model, data, n=n, variant=variant, force=True, seed=seed)
    swap = Interchange.of(model, pairs, site, both=both)
    return faithfulness_of(model, swap, directions, readers=readers, controls=controls, seed=seed)


def faithfulness_of(
    model: Model,
    swap: Interchange,
    directions: Tensor,
    *,
    readers: Readers | Sequence[str] | None = None,
    controls: int = 5,
    seed: int = 0,
) -> IllusionReport:
    """Run the illusion test of directions on prompts that are ready to be patched."""
    where = swap.runs.site
    if not isinstance(readers, Readers):
        if readers is None and where.kind not in ("mlp.act", "attn.z"):
            readers = strongest_readers(model, swap, directions)
        readers = readers_of(model, where.name, readers)
    return illusion_test(
        swap.run,
        swap.base,
        swap.source,
        directions,
        readers,
        neurons=where.kind == "mlp.act",
        controls=controls,
        seed=seed,
        group={"site": where.name},
    )


def strongest_readers(model: Model, data: Interchange, directions: Tensor, heads: int = _HEADS) -> list[str]:
    """Return the query heads after a residual site through which a patch works most.

    A head's part is, to first order, -g . (q_patched - q_clean), summed over prompts, with q its query at
    the last token and g the gradient of the logit difference.

    Raises:
        InputError: no attention comes after the site.
    """
    site = data.runs.site.name
    blocks = later_blocks(model, site)
    if not blocks:
        raise InputError(f"no attention comes after {site}; only the output head reads it")
    names = [f"blocks.{b}.attn.q" for b in blocks]

    def difference(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        picked = [last.gather(1, ids.unsqueeze(1)) for ids in (data.answer, data.target)]
        return (picked[0] - picked[1]).sum()

    clean = data.runs.trace(names, grad=True)
    gradients = clean.gradients(difference)
    source = data.source.reshape(-1, 1, *data.runs.values.shape[1:])
    patched = data.runs.trace(names, edit=SubspacePatch(site, directions, source))
    parts = torch.stack(
        [-(gradients[q] * (patched[q] - clean[q].detach())).flatten(0, 1).sum((0, -1)) for q in names]
    )
    order = parts.flatten().argsort(descending=True)[:heads].tolist()
    count = parts.shape[1]
    return [f"blocks.{blocks[i // count]}.attn.q[head={i % count}]" for i in order]
