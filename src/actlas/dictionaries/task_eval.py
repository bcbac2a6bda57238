"""Judge a dictionary on a task whose variables are known, against a supervised dictionary of the same task.

    report = dictionary_task_eval(model, sae, task("ioi", model.tokenizer, n=640, words=16))
    print(report)

Approximation. LD is the logit difference of the prompts' answers, LD_mean that with every activation
replaced by the mean, x_hat the reconstruction:

    sufficiency = (LD[x_hat] - LD_mean) / (LD - LD_mean)                1: the reconstruction is enough
    necessity   = (LD - LD[mean + x - x_hat]) / (LD - LD_mean)          1: nothing is left without it

Control. `x_cf` is the activation of the same prompt with an attribute changed; x becomes an edited vector
by exchanging at most m features (`exchanges`), or one supervised vector for each changed attribute:

    edit success = share of prompts on which the edited run predicts the same token as the run with x_cf
    edit effect  = (LD - LD[edited]) / (LD - LD[x_cf])                  1: as large as the full patch

An attribute that the model hardly uses at this site changes few predictions, so success is high without
any edit; the unedited run is therefore shown beside it, and the effect, which has 0 there, is the better
guide. How much of x an edit overwrites is its weight.

Interpretability. F1 of single features for each attribute's values (`attribute_f1`).

Controls, always: the unedited run (0 by definition of the effect), the full patch (1), as many random
features, and two dictionaries that nobody trained, of random activations and of random directions, as
wide and as sparse as the one that is judged. Fit and test prompts are apart. With several sites, one
dictionary for each, all are patched together.

Source: Makelov, Lange and Nanda 2024, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", sections 3 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actlas.core.dictionary import Dictionary
from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.dictionaries.attribute_f1 import F1Table, Sign
from actlas.dictionaries.evaluation.controls import control_dictionaries
from actlas.dictionaries.exchanges import Exchanged, exchange_agnostic, exchange_by_score, exchange_random
from actlas.dictionaries.supervised import SupervisedDictionary, attributes_of, changed, fit_supervised
from actlas.dictionaries.task_measures import edit_measures, f1_measures, share_measure, structure_measures
from actlas.dictionaries.task_runs import BATCH, Outcome, Position
from actlas.dictionaries.task_setup import Setup, set_up

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.data.task_items import TaskItem

Selection = Literal["agnostic", "f1"]
SHORT = "edit effect short of supervised"


@dataclass(frozen=True)
class TaskReport:
    """What `dictionary_task_eval` found.

    Attributes:
        measurements: everything, by name and group (`dictionary`, `change`, `choice`, `exchanges`).
        note: how many prompts there were, and which were left out.
    """

    measurements: list[Measurement] = field(default_factory=list)
    note: str = ""

    def get(self, name: str, **group: str) -> Measurement:
        """Return the one measurement of this name and group.

        Raises:
            InputError: none or several fit.
        """
        found = [
            m
            for m in self.measurements
            if m.name == name and all(m.group.get(k) == v for k, v in group.items())
        ]
        if len(found) != 1:
            raise InputError(f"{len(found)} measurements are called {name!r} with {group}; one was wanted")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {"note": self.note, "measurements": [m.to_json() for m in self.measurements]}

    def __str__(self) -> str:
        return "\n".join([self.note, *map(str, self.measurements)])


def dictionary_task_eval(
    model: Model,
    dictionary: Dictionary | Mapping[str, Dictionary] | None,
    task: Sequence[TaskItem],
    *,
    site: str | Sequence[str] | None = None,
    test: int = 128,
    exchanges: Sequence[int] = (1, 2, 4, 8),
    changes: Sequence[str] | None = None,
    choices: Sequence[Selection] = ("agnostic", "f1"),
    codebooks: Sequence[Literal["mean", "mse"]] = ("mean", "mse"),
    parametrisation: str | Sequence[str] = "independent",
    controls: bool = True,
    position: Position = "last",
    sign: Sign = "positive",
    name: str = "dictionary",
    batch: int = BATCH,
    seed: int = 0,
) -> TaskReport:
    """Judge a dictionary, or one dictionary for each site, on a task.

    Args:
        model: a causal language model with a tokenizer.
        dictionary: an unsupervised dictionary; several by name of their site; `None` judges only the
            supervised ones (give `site` then).
        task: items with `attributes` (or `group`) and changed prompts: `variants` by attribute, and
            `counterfactual`, which is called `"all"`. Made with the model's tokenizer.
        site: where, for `dictionary=None`; else each dictionary's own.
        test: how many prompts, the last ones, are kept for testing; the others fit the supervised
            dictionaries and the F1 tables.
        exchanges: numbers m of features that may be exchanged.
        changes: attributes to change, `"all"` for the counterfactual; default: all that the items have.
        choices: how the features are chosen.
        codebooks, parametrisation: of the supervised dictionaries.
        controls: also measure random features, random dictionaries and shuffled labels.
        position: which token's activation.
        sign: when a feature counts as active; see `attribute_f1`.
        name: what the dictionary is called in the results.
        batch: prompts in one forward pass.
        seed: of random controls and intervals.

    Raises:
        InputError: too few prompts, a change that no item has, attribute values that the fitting prompts
            lack (all are listed), a dictionary of another width.
    """
    setup = set_up(model, dictionary, task, site, test, changes, position, batch)
    found: list[Measurement] = []
    lenses: dict[str, dict[str, Dictionary]] = {}
    supervised = {
        f"supervised {codebook}": {
            s: fit_supervised(
                None, (setup.fit[s], setup.fit_attributes), s,
                method=codebook, parametrisation=parametrisation, seed=seed,
            )
            for s in setup.sites
        }
        for codebook in codebooks
    }  # fmt: skip
    for label, fitted in supervised.items():
        for lens in fitted.values():
            found += [m.with_group(dictionary=label) for m in lens.measurements]
            every = [attributes_of(i) for i in setup.changed_items()]
            lens.encode_values([*map(attributes_of, setup.test_items), *every])  # lists what is missing
    if setup.dictionaries:
        lenses[name] = setup.dictionaries
        if controls:
            for s, d in setup.dictionaries.items():
                active = float(d.encode(setup.fit[s]).l0.double().mean())
                for label, control in control_dictionaries(d, setup.fit[s], active, seed).items():
                    lenses.setdefault(label, {})[s] = control
    tables = {
        label: setup.tables(by_site, sign if label == name else "any") for label, by_site in lenses.items()
    }
    found += _approximation(setup, lenses, supervised, seed)
    for change in setup.changes:
        found += _control(setup, lenses, supervised, tables, change, exchanges, choices, controls, name, seed)
    for label, by_site in lenses.items():
        for s, d in by_site.items():
            codes_fit, codes_test = d.encode(setup.fit[s]), d.encode(setup.runs.values[s])
            group = {"dictionary": label, "site": s}
            signed: Sign = sign if label == name else "any"  # pursuits give codes of both signs
            for attribute in setup.attributes:
                labels = [a[attribute] for a in setup.fit_attributes]
                truth = [attributes_of(i)[attribute] for i in setup.test_items]
                found += f1_measures(
                    codes_fit, labels, codes_test, truth, sign=signed, seed=seed,
                    shuffle=controls and label == name, group={**group, "attribute": attribute},
                )  # fmt: skip
            structure = structure_measures(
                tables[label][s], codes_fit, setup.fit[s], setup.fit_attributes, signed, group
            )
            found += [m for m in structure if label == name or m.name != "attribute size"]
    return TaskReport(found, setup.note)


def _approximation(
    setup: Setup,
    lenses: Mapping[str, Mapping[str, Dictionary]],
    supervised: Mapping[str, Mapping[str, SupervisedDictionary]],
    seed: int,
) -> list[Measurement]:
    """Return sufficiency and necessity of every dictionary."""
    runs, values = setup.runs, setup.runs.values
    base = runs.run({s: setup.mean(s).expand_as(values[s]) for s in setup.sites})
    known = [attributes_of(i) for i in setup.test_items]
    hats: dict[str, dict[str, Tensor]] = {
        label: {s: d.decode(d.encode_values(known)) for s, d in by_site.items()}
        for label, by_site in supervised.items()
    }
    for label, by_site in lenses.items():
        hats[label] = {s: d.reconstruct(values[s]).float() for s, d in by_site.items()}
    out = []
    top, bottom = runs.clean.difference, base.difference
    for label, hat in hats.items():
        left = runs.run({s: setup.mean(s) + values[s] - hat[s] for s in setup.sites})
        for what, above in (
            ("sufficiency", runs.run(hat).difference - bottom),
            ("necessity", top - left.difference),
        ):
            out.append(share_measure(what, above, top - bottom, seed, {"dictionary": label}))
    return out


def _control(
    setup: Setup,
    lenses: Mapping[str, Mapping[str, Dictionary]],
    supervised: Mapping[str, Mapping[str, SupervisedDictionary]],
    tables: Mapping[str, Mapping[str, Mapping[str, F1Table]]],
    change: str,
    exchanges: Sequence[int],
    choices: Sequence[Selection],
    controls: bool,
    name: str,
    seed: int,
) -> list[Measurement]:
    """Return success, effect and weight of every way to change one attribute."""
    runs, target = setup.runs, setup.counterfactuals[change].values
    full = runs.run(target)
    before = [attributes_of(i) for i in setup.test_items]
    after = [attributes_of(i) for i in setup.counterfactuals[change].items]
    out: list[Measurement] = []
    ceiling: list[Outcome] = []  # the first supervised edit, which the others are held against

    def add(new: Outcome, weight: Tensor | None, count: Tensor | None, **group: str) -> None:
        own = {"change": change, **group}
        out.extend(edit_measures(runs.clean, full, new, weight, count, seed, own))
        if group["choice"] == "supervised" and not ceiling:
            ceiling.append(new)
        elif ceiling and group["choice"] != "supervised":
            short = new.difference - ceiling[0].difference
            whole = runs.clean.difference - full.difference
            out.append(share_measure(SHORT, short, whole, seed, own, f"of {next(iter(supervised))}"))

    add(runs.clean, None, None, dictionary="none", choice="unedited")
    add(full, None, None, dictionary="none", choice="full patch")
    for label, fitted in supervised.items():
        edited = {s: d.exchange(runs.values[s], before, after) for s, d in fitted.items()}
        weight = torch.stack([_supervised_weight(d, before, after) for d in fitted.values()]).mean(0)
        count = torch.tensor([len(changed(a, b)) for a, b in zip(before, after, strict=True)])
        add(runs.run(edited), weight, count, dictionary=label, choice="supervised", exchanges="1")
    for label, by_site in lenses.items():
        ways: dict[str, dict[str, dict[int, Exchanged]]] = {}
        for s, d in by_site.items():
            x, x_cf = runs.values[s], target[s]
            if "agnostic" in choices:
                ways.setdefault("agnostic", {})[s] = exchange_agnostic(d, x, x_cf, exchanges)
            if "f1" in choices and label == name:
                old, new = _scores(tables[label][s], before, after)
                ways.setdefault("f1", {})[s] = exchange_by_score(d, x, x_cf, old, new, exchanges)
            if controls and label == name:
                ways.setdefault("random features", {})[s] = exchange_random(d, x, x_cf, exchanges, seed=seed)
        for way, found in ways.items():
            for m in sorted(set(exchanges)):
                parts = [found[s][m] for s in by_site]
                weight = torch.stack([p.weight for p in parts]).mean(0)
                count = torch.stack([p.count for p in parts]).sum(0)
                new_run = runs.run({s: found[s][m].x.float() for s in by_site})
                add(new_run, weight, count, dictionary=label, choice=way, exchanges=str(m))
    return out


def _scores(
    tables: Mapping[str, F1Table], before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]
) -> tuple[Tensor, Tensor]:
    """Return each feature's F1 for the old and for the new value of what changes (the best of several)."""
    old, new = [], []
    f1 = {attribute: table.f1 for attribute, table in tables.items()}
    for a, b in zip(before, after, strict=True):
        names = changed(a, b)
        old.append(torch.stack([f1[n][:, tables[n].index(a[n])] for n in names]).amax(0))
        new.append(torch.stack([f1[n][:, tables[n].index(b[n])] for n in names]).amax(0))
    return torch.stack(old), torch.stack(new)


def _supervised_weight(
    d: SupervisedDictionary, before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]
) -> Tensor:
    """Return the weight of the vectors that a supervised edit takes out, `[n]`."""
    old, new = d.encode_values(before), d.encode_values(after)
    part = d.decode(old) - d.bias
    shares = (d.vectors[old.indices] * part.unsqueeze(1)).sum(2) / part.square().sum(1, keepdim=True)
    return (shares * (old.indices != new.indices)).sum(1)
