"""Output probes: what they find that hand-made scores miss, controls, saving, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actlas.core.errors import ArtifactError, InputError, NonFiniteError, ShapeError
from actlas.core.lens import Lens
from actlas.core.methods import find_method
from actlas.measure.output_signature import SCORES, OutputSignature, output_signature, signature_scores
from actlas.security.output_detectors import Training, fit_detector, summary_features
from actlas.security.output_probe import OutputProbe, _tpr, fit_output_probe, out_of_fold
from tests.measure.small_models import llama

QUICK = {"epochs": 20, "width": 16, "lr": 1e-2, "dropout": 0.0, "batch": 16}


def planted(n: int = 120, rows: int = 4, k: int = 8, seed: int = 0) -> tuple[OutputSignature, np.ndarray]:
    """Signatures whose label is the gap between second and third log-probability: no hand-made score sees it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    top = -torch.linspace(0.5, 8, k).expand(n, rows, k).clone()
    top[:, :, 1] = top[:, :, 2] + torch.where(y == 1, 1.1, 0.1)[:, None]
    top += 0.02 * torch.randn(n, rows, k, generator=generator)
    noise = torch.randn(4, n, rows, generator=generator)
    los = OutputSignature(
        sorted=top.sort(-1, descending=True).values,
        actual=-2 + 0.5 * noise[0],
        rank=torch.randint(0, 20, (n, rows), generator=generator),
        mean=-9 + 0.01 * noise[1],
        std=2 + 0.01 * noise[2],
        entropy=2 + 0.3 * noise[3],
        spread=torch.ones(n, rows),
        mask=torch.ones(n, rows, dtype=torch.bool),
        vocabulary=50,
    )
    return los, y.numpy()


def test_it_finds_what_hand_made_scores_miss(tmp_path: Path) -> None:
    los, y = planted()
    made = fit_output_probe(None, (los, y), folds=2, **QUICK)
    by = {(m.name, m.group["detector"]): m for m in made.measurements}
    own = by["output-probe AUC", "los-net"]
    assert own.value > 0.9 and own.low is not None and own.low > 0.8
    for name in (*SCORES, "atp-r", "logistic"):
        assert by["output-probe AUC", name].value < 0.75, name
    assert by["output-probe AUC", "los-net, shuffled labels"].value < 0.8
    gap = by["AUC above the best hand-made score", "los-net"]
    assert gap.low is not None and gap.low > 0 and "best hand-made score (" in gap.note
    assert by["output-probe TPR at 5% FPR", "los-net"].value > 0.6
    right = ((made.score(los) > 0).numpy() == (y == 1)).mean()
    assert right > 0.9
    with pytest.raises(InputError, match="saved for a model"):
        made.save(tmp_path / "none")
    again = Lens.load(made.save(tmp_path / "los", llama()))
    assert isinstance(again, OutputProbe) and torch.equal(again.score(los), made.score(los))
    assert again.measurements == made.measurements
    assert sorted(p.name for p in (tmp_path / "los").iterdir()) == ["manifest.json", "tensors.safetensors"]


@pytest.mark.parametrize("kind", ["logistic", "mean log-prob", "length", "atp-r"])
def test_every_kind_saves_and_scores(kind: str, tmp_path: Path) -> None:
    model = llama()
    texts = [("the cat sat", " on a mat" + " and the dog ran" * (i % 2)) for i in range(24)]
    items = [((f"{i} {a}", b), i % 2) for i, (a, b) in enumerate(texts)]
    made = fit_output_probe(
        model, items, kind=kind, top_k=20, folds=2, baselines=False, controls=0, epochs=3, width=16
    )
    again = OutputProbe.load(made.save(tmp_path / "p"), model)
    pairs = [i[0] for i in items]
    torch.testing.assert_close(again.judge(model, pairs), made.judge(model, pairs))
    if kind == "length":  # the length gives this data set away, and is seen to
        assert made.measurements[0].value == 1.0
    if kind == "mean log-prob":
        los = output_signature(model, pairs, top_k=20)
        np.testing.assert_allclose(made.score(los), signature_scores(los)[kind], rtol=1e-6)


def test_groups_stay_together_and_scores_are_ranks() -> None:
    los, y = planted(60)
    groups = np.arange(60) // 4
    seen: list[set[int]] = []

    class Spy(OutputSignature):
        def at(self, index: object) -> OutputSignature:
            if isinstance(index, torch.Tensor):
                seen.append({int(groups[i]) for i in index})
            return super().at(index)

    spied = Spy(**los._tensors(), vocabulary=50)
    found = out_of_fold("mean log-prob", spied, y, groups, 5, Training(), 0)
    assert len(seen) == 10 and all(not fit & test for fit, test in zip(seen[::2], seen[1::2], strict=True))
    assert found.min() > 0 and found.max() < 1


def test_sign_of_length_comes_from_training_data() -> None:
    los, y = planted(40)
    mask = los.mask.clone()
    mask[torch.tensor(y == 1), 2:] = False  # positives are short
    short = OutputSignature(**{**los._tensors(), "mask": mask}, vocabulary=50)
    made = fit_detector("length", short, y, np.arange(40), Training(), 0)
    assert made.state.item() == -1 and made.score(short)[y == 1].min() > made.score(short)[y == 0].max()
    assert summary_features(short).shape[0] == 40 and np.isfinite(summary_features(short)).all()


def test_the_rate_at_five_percent_is_brute_force() -> None:
    generator = np.random.default_rng(0)
    y, scores = generator.integers(0, 2, 200).astype(float), generator.integers(0, 30, 200).astype(float)
    scores += 10 * y
    wanted = max(
        (scores[y == 1] >= t).mean() for t in [*np.unique(scores), 99] if (scores[y == 0] >= t).mean() <= 0.05
    )
    assert _tpr(y, scores, np.ones((1, 200)))[0] == pytest.approx(wanted)
    assert _tpr(y, np.zeros(200), np.ones((1, 200)))[0] == 0  # ties give nothing away


def test_the_same_seed_gives_the_same_probe() -> None:
    los, y = planted(40)
    state = torch.get_rng_state()
    one, two = (fit_detector("los-net", los, y, np.arange(40), Training(epochs=2, width=16), 3) for _ in "ab")
    assert torch.equal(one.state, two.state) and torch.equal(torch.get_rng_state(), state)


def test_it_is_registered_and_reads_texts() -> None:
    info = find_method("output-probe")
    assert info.returns == "Lens" and info.data == "labelled" and info.open
    pairs = [(f"the cat sat {w}", f"the dog ran {w}") for w in ("on", "a", "mat", "and", "after")]
    made = info.fit(llama(), pairs, kind="logistic", top_k=10, folds=2, baselines=False)
    assert made.fingerprint is not None and made.measurements[0].n == 10


def test_bad_input_is_refused_in_one_line() -> None:
    los, y = planted(40)
    for data, options, message in (
        ((los, np.ones(40)), {}, "every label is 1"),
        ((los, y + 1.0), {}, "labels must be 0 or 1, not 2"),
        ((los, y), {"kind": "forest"}, "kind is 'forest'"),
        ((los, y), {"groups": np.arange(40) // 20}, "only 2 groups; 5 folds"),
        ((los, y), {"groups": [1]}, "40 items but 1 groups"),
        ((los, y), {"speed": 3}, "options of the training are width"),
        ((los, y), {"folds": 1}, "folds is 1"),
        ([("a", 1)], {}, "need a model"),
    ):
        with pytest.raises(InputError, match=message):
            fit_output_probe(None, data, **options)
    with pytest.raises(ShapeError, match="as many labels"):
        fit_output_probe(None, (los, y[:3]))
    with pytest.raises(NonFiniteError, match="labels hold NaN"):
        fit_output_probe(None, (los, np.where(y, 1.0, np.nan)))
    made = fit_output_probe(
        None, (los, y), kind="los-net", folds=2, baselines=False, controls=0, epochs=1, width=16
    )
    with pytest.raises(InputError, match="reads an OutputSignature, not a Tensor"):
        made.score(torch.zeros(3, 8))
    other = OutputSignature(**{**los._tensors(), "sorted": los.sorted[..., :4]}, vocabulary=50)
    with pytest.raises(ShapeError, match="reads 8 of 50"):
        made.score(other)
    with pytest.raises(InputError, match="has .* parameters, not"):
        OutputProbe(state=made.state[:5], network=made.network, top_k=8, rows=4, vocabulary=50)
    with pytest.raises(InputError, match="no network of type 'Foreign'"):
        OutputProbe(
            state=made.state, network={"type": "Foreign", "config": {}}, top_k=8, rows=4, vocabulary=50
        )
    with pytest.raises(ArtifactError, match="unknown kind"):
        OutputProbe(kind="oracle", state=made.state, top_k=8, rows=4, vocabulary=50)
