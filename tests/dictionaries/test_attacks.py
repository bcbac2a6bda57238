"""What goes wrong in use: misfit sizes, broken rows and folders, padding, caches, low precision, two at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.codes import Codes
from actlas.core.dictionary import Dictionary
from actlas.core.edit import Edit
from actlas.core.errors import (
    ActlasError,
    ArtifactError,
    FingerprintError,
    InputError,
    NonFiniteError,
    ShapeError,
)
from actlas.core.lens import Lens
from actlas.core.model import Model
from actlas.core.pca import PCA
from actlas.dictionaries import RowsSource, TrainSettings, fit_sae, train
from actlas.dictionaries.evaluation.controls import UnitDirections
from actlas.dictionaries.itda import fit_itda
from actlas.dictionaries.sae import SAE, architecture
from actlas.dictionaries.supervised import fit_supervised
from tests.core.families import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore::actlas.core.installation.EditHadNoEffect")
SITE = "blocks.1.resid_post"
D = 32
SAES = ("topk", "batchtopk", "matryoshka", "gradient", "relu", "gated", "jumprelu")
OPTIONS = {"topk": {"k": 4}, "batchtopk": {"k": 4}, "matryoshka": {"k": 4}, "gradient": {"k": 4}}


def rows(n: int = 200, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def an_sae(kind: str) -> SAE:
    sae = architecture(kind).create(SITE, D, 64, seed=0, **OPTIONS.get(kind, {}))
    x = rows(512)
    source = RowsSource(x, gradient=rows(512, seed=1))
    return train(sae, source, TrainSettings(tokens=2048, batch=128), show=False)


def supervised() -> Dictionary:
    items = [{"a": "xyz"[i % 3], "b": "pq"[i // 3 % 2]} for i in range(200)]
    return fit_supervised(None, (rows(), items), SITE)


MAKERS: dict[str, Callable[[], Dictionary]] = {
    **{kind: lambda kind=kind: an_sae(kind) for kind in SAES},  # type: ignore[misc]
    "itda": lambda: fit_itda(None, rows(), SITE, k=4),
    "directions": lambda: UnitDirections(site=SITE, directions=torch.eye(D), centre=torch.zeros(D), k=4),
    "supervised": supervised,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def lens(request: pytest.FixtureRequest) -> Dictionary:
    return MAKERS[request.param]()


# -- sizes -------------------------------------------------------------------------------------------


def test_activations_of_another_width_are_refused(lens: Dictionary, toy: Model) -> None:
    for width in (D - 1, D + 1, 1):
        with pytest.raises(ShapeError, match=f"reads {D} channels"):
            lens.encode(rows(3, width))
    with (
        pytest.raises(ShapeError, match=f"reads {D} channels"),
        toy.edit(replace(lens, site="blocks.1.mlp.act").substitute()),
    ):
        pass
    with (
        pytest.raises(ShapeError, match="channels"),
        toy.edit(replace(lens, site="blocks.1.mlp.act").edit({0: 0.0})),
    ):
        pass


def test_codes_of_another_dictionary_are_refused(lens: Dictionary) -> None:
    codes = Codes(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), lens.features + 1)
    with pytest.raises(ShapeError, match="features"):
        lens.decode(codes)
    with pytest.raises(InputError, match=f"0 to {lens.features - 1}"):
        lens.edit({lens.features: 1.0})
    with pytest.raises(InputError, match=f"0 to {lens.features - 1}"):
        lens.substitute(without=[lens.features])
    with pytest.raises(InputError, match="0 to"):
        lens.direction(-1)


def test_no_rows_give_no_codes(lens: Dictionary) -> None:
    codes = lens.encode(rows(0))
    assert codes.shape == (0,) and codes.features == lens.features
    assert lens.decode(codes).shape == (0, D)


def test_any_leading_axes_are_kept(lens: Dictionary) -> None:
    x = rows(24)
    whole, alone = lens.reconstruct(x.reshape(2, 3, 4, D)), lens.reconstruct(x)
    assert whole.shape == (2, 3, 4, D)
    torch.testing.assert_close(whole.reshape(24, D), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lens.reconstruct(x[0]), alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "gradient"])
@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_beyond_the_width_is_refused(kind: str, k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}"):
        architecture(kind).create(SITE, D, 64, k=k)
    with pytest.raises(InputError, match=f"k is {k}"):
        fit_sae(None, rows(), SITE, architecture=kind, width=64, k=k)


@pytest.mark.parametrize("width", [0, -3, "0x", "x", "many", "-1x", "nanx", "infx"])
def test_a_width_that_is_none_is_refused(width: int | str) -> None:
    with pytest.raises(InputError, match="width"):
        fit_sae(None, rows(), SITE, width=width)


# -- rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_named(bad: float) -> None:
    x = rows()
    x[17, 3] = bad
    for fit in (
        lambda: fit_sae(None, x, SITE, width=64, k=4, tokens=500),
        lambda: fit_itda(None, x, SITE, k=4),
    ):
        with pytest.raises(NonFiniteError, match="17"):
            fit()


def test_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ShapeError, match="y has 9 rows"):
        RowsSource(rows(), rows(9))
    with pytest.raises(InputError, match="channels"):
        train(
            architecture("topk").create(SITE, 31, 64, k=4),
            RowsSource(rows()),
            TrainSettings(tokens=100),
            show=False,
        )
    with pytest.raises(InputError, match="no rows"):
        RowsSource(rows(0))
    with pytest.raises(ActlasError):
        fit_sae(None, torch.zeros(200, D), SITE, width=64, k=4)


def test_a_training_that_blows_up_leaves_the_dictionary_as_it_was() -> None:
    sae = architecture("topk").create(SITE, D, 64, k=4)
    before = {n: t.clone() for n, t in sae._tensors().items()}
    sae.W_enc[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        train(sae, RowsSource(rows()), TrainSettings(tokens=1000, batch=100), show=False)
    assert all(torch.equal(t, before[n]) for n, t in sae._tensors().items() if n != "W_enc")


def test_a_row_of_an_activation_that_is_nan_does_not_spoil_the_others(lens: Dictionary) -> None:
    x = rows(6)
    alone = lens.reconstruct(x)
    x[2, 0] = torch.nan
    try:
        found = lens.reconstruct(x)
    except NonFiniteError:
        return
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], alone[others])


# -- folders -----------------------------------------------------------------------------------------


def test_a_dictionary_of_another_model_is_refused(lens: Dictionary, toy: Model, tmp_path: Path) -> None:
    folder = lens.save(tmp_path / "lens", toy)
    other = BY_NAME["gpt2"].model()
    with pytest.raises(FingerprintError):
        Lens.load(folder, other)
    back = Lens.load(folder, toy)
    assert isinstance(back, Dictionary)
    for edit in (back.substitute(), back.edit({0: 0.0}), back.edit(0, 1.0)):
        with pytest.raises(FingerprintError), other.edit(edit):
            pass
    torch.testing.assert_close(back.reconstruct(rows(9)), lens.reconstruct(rows(9)))


def test_damaged_folders_are_refused(lens: Dictionary, toy: Model, tmp_path: Path) -> None:
    folder = lens.save(tmp_path / "lens", toy)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    cut = copy("cut")
    data = (cut / "tensors.safetensors").read_bytes()
    (cut / "tensors.safetensors").write_bytes(data[: len(data) // 2])
    gone = copy("gone")
    (gone / "tensors.safetensors").unlink()
    empty = copy("empty")
    (empty / "manifest.json").write_text("")
    kind = copy("kind")
    manifest = json.loads((kind / "manifest.json").read_text())
    manifest["lens"]["type"] = "Nonsense"
    (kind / "manifest.json").write_text(json.dumps(manifest))
    less = copy("less")
    manifest = json.loads((less / "manifest.json").read_text())
    manifest["lens"]["unheard_of"] = 3
    (less / "manifest.json").write_text(json.dumps(manifest))
    for broken in (cut, gone, empty, kind, less, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError):
            Lens.load(broken, toy)


def test_a_lens_of_another_kind_is_no_dictionary(toy: Model, tmp_path: Path) -> None:
    pca = PCA(
        site=SITE,
        mean=torch.zeros(D),
        components=torch.eye(D)[:2],
        variance=torch.ones(2),
        total=2.0,
        count=5,
    )
    folder = pca.save(tmp_path / "pca", toy)
    with pytest.raises(ArtifactError, match="PCA"):
        SAE.load(folder, toy)


# -- inside a model ----------------------------------------------------------------------------------


def test_two_substitutions_at_one_site_apply_one_after_the_other(lens: Dictionary, toy: Model) -> None:
    second = UnitDirections(site=SITE, directions=torch.eye(D)[:8], centre=torch.zeros(D), k=3)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    plain = toy.trace(ids, SITE)[SITE]
    expected = second.reconstruct(lens.reconstruct(plain))
    with toy.edit(lens.substitute(), second.substitute()):
        torch.testing.assert_close(toy.trace(ids, SITE)[SITE], expected, rtol=1e-4, atol=1e-4)
    with toy.edit(lens.substitute() + second.substitute()):
        torch.testing.assert_close(toy.trace(ids, SITE)[SITE], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(toy.trace(ids, SITE)[SITE], plain)


def test_padding_does_not_change_a_row(lens: Dictionary, toy: Model) -> None:
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11"]
    edit = lens.substitute() + lens.edit({1: ("add", 1.0)})
    with toy.edit(edit):
        alone = [toy.logits(text)[0, -1] for text in texts]
        for side in ("right", "left"):
            encoded = toy.encode(texts, padding_side=side)
            logits = toy.logits(encoded)
            last = -1 if side == "left" else 2
            torch.testing.assert_close(logits[1, last], alone[1], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(logits[0, -1], alone[0], rtol=1e-3, atol=1e-3)


def test_generating_with_a_cache_gives_the_tokens_of_full_passes(lens: Dictionary, toy: Model) -> None:
    with toy.edit(lens.substitute()):
        found = toy.generate("w3 w14 w15 w9", max_new_tokens=6).tokens[0]
        ids = toy.encode("w3 w14 w15 w9")["input_ids"]
        for token in found:
            assert int(toy.logits(ids)[0, -1].argmax()) == int(token)
            ids = torch.cat([ids, torch.tensor([[int(token)]])], 1)


def test_a_padded_batch_generates_what_its_prompts_generate_alone(lens: Dictionary, toy: Model) -> None:
    prompts = ["w3 w14 w15 w9 w2 w6", "w5 w35"]
    edit = lens.edit({1: ("add", 3.0)}).at(phase="generated") + lens.substitute(error="keep", without=[0])
    with toy.edit(edit):
        together = toy.generate(prompts, max_new_tokens=4).tokens
        for i, prompt in enumerate(prompts):
            alone = toy.generate(prompt, max_new_tokens=4).tokens[0]
            assert [int(t) for t in together[i]] == [int(t) for t in alone]


def test_edits_per_request_touch_only_their_rows(lens: Dictionary, toy: Model) -> None:
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(3))
    plain = toy.trace(ids, SITE)[SITE]
    with toy.edit(lens.substitute().at(rows=[1])):
        found = toy.trace(ids, SITE)[SITE]
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(found[1], lens.reconstruct(plain[1]), rtol=1e-4, atol=1e-4)


def test_massive_rows_pass_every_kind_untouched(lens: Dictionary, toy: Model) -> None:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    plain = toy.trace(ids, SITE)[SITE]
    norm = plain.norm(dim=-1)
    limited = replace(lens, skip_above=float(norm.median()))
    with toy.edit(limited.substitute(), limited.edit({0: ("add", 4.0)})):
        found = toy.trace(ids, SITE)[SITE]
    assert torch.equal(found[norm > limited.skip_above], plain[norm > limited.skip_above])


def test_half_precision_models_take_the_edits(lens: Dictionary) -> None:
    model = BY_NAME["llama"].model()
    model.module.to(torch.bfloat16)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    plain = model.trace(ids, SITE)[SITE]
    assert plain.dtype == torch.bfloat16
    with model.edit(lens.substitute()):
        found = model.trace(ids, SITE)[SITE]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), lens.reconstruct(plain).float(), rtol=2e-2, atol=2e-2)
    with model.edit(lens.edit({0: ("add", 0.0)}), lens.substitute(keep_error=True)):
        torch.testing.assert_close(model.trace(ids, SITE)[SITE], plain)


def test_strength_zero_and_no_scope_change_nothing_bit_for_bit(lens: Dictionary, toy: Model) -> None:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    plain = toy.logits(ids)
    for edit in (lens.substitute(), lens.edit({0: 5.0}), lens.edit(0, 5.0)):
        for off in (edit * 0.0, edit.at(positions=[99]), edit.at(rows=[7])):
            with toy.edit(off):
                assert torch.equal(toy.logits(ids), plain)


def test_gradients_flow_through_a_substitution(lens: Dictionary, toy: Model) -> None:
    ids = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(3))
    with toy.edit(lens.substitute(keep_error=True)):
        trace = toy.trace(ids, "blocks.0.resid_post", grad=True, stop=False)
        g = trace.gradients(trace.logits[0, -1, 5])["blocks.0.resid_post"]
    trace = toy.trace(ids, "blocks.0.resid_post", grad=True, stop=False)
    plain = trace.gradients(trace.logits[0, -1, 5])["blocks.0.resid_post"]
    torch.testing.assert_close(g, plain, rtol=1e-4, atol=1e-5)


def test_edits_survive_a_save(lens: Dictionary, toy: Model, tmp_path: Path) -> None:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    edit = lens.substitute(error="keep", without=[0]) * 0.5 + lens.edit({1: ("scale", 2.0)}).at(
        positions="last"
    )
    back = Edit.load(edit.save(tmp_path / "edit", toy), toy)
    with toy.edit(edit):
        first = toy.logits(ids)
    with toy.edit(back):
        assert torch.equal(toy.logits(ids), first)
