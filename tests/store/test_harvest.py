"""What a harvest stores: the rows of a trace, the tokens they belong to, and nothing that is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from actlas.core.edits import Add
from actlas.core.errors import FingerprintError, InputError, ModelError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.data import Corpus, Document
from actlas.store import Store, harvest
from actlas.store.layout import quantize_rows
from actlas.store.planning import plan_shards
from tests.core.families import BY_NAME
from tests.core.tiny import TEXTS, tiny, tokenizer

from .made import CONTEXT, CORPUS, OTHER, SITE, expected, files_of, small


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 2e-6), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 254)]
)
def test_rows_are_those_of_a_trace(tmp_path: Path, dtype: str, error: float) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model, dtype=dtype)
    assert len(store.shards) > 3 and store.complete and store.dtype == dtype
    for site in (SITE, OTHER):
        wanted = expected(model, CORPUS, site)
        assert store.rows == len(wanted) and store.channels(site) == wanted.shape[1]
        found = store.read(site, slice(None))
        assert found.dtype == torch.float32
        most = wanted.abs().amax(1, keepdim=True)
        assert bool(((found - wanted).abs() <= error * most + 2e-6).all())
        assert not torch.equal(found, wanted) or dtype == "float32"


def test_int8_is_half_of_float16_and_keeps_its_bound(tmp_path: Path) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    x[7] = 0
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.int8 and scale.shape == (50, 1)
    bound = x.abs().amax(1, keepdim=True) / 254
    assert bool(((codes * scale - x).abs() <= bound * (1 + 1e-5)).all()) and bool((codes[7] == 0).all())
    sizes = {}
    for dtype in ("float16", "int8"):
        store = small(tmp_path / dtype, dtype=dtype)
        sizes[dtype] = sum(p.stat().st_size for p in store.path.rglob("*.safetensors"))
    assert sizes["int8"] < 0.75 * sizes["float16"]  # headers and scales weigh much at 32 channels


def test_other_libraries_read_the_files(tmp_path: Path) -> None:
    store = small(tmp_path / "acts")
    parts = [load_file(p)[SITE] for p in sorted(store.path.rglob("*.safetensors"))]
    assert torch.equal(torch.cat(parts).float(), store.read(SITE, range(store.rows)))


def test_several_sites_in_one_pass_are_those_of_a_pass_each(tmp_path: Path) -> None:
    both = small(tmp_path / "both")
    for site in (SITE, OTHER):
        alone = small(tmp_path / site, sites=site)
        assert torch.equal(alone.read(site, range(alone.rows)), both.read(site, range(both.rows)))


def test_the_token_table_says_what_each_row_is(tmp_path: Path) -> None:
    documents = [
        Document(f"d{i}", t, {"split": "fit" if i else "eval", "kind": "x"}) for i, t in enumerate(TEXTS)
    ]
    model = tiny()
    store = small(tmp_path / "acts", model, Corpus("c", documents))
    rows = store.query("SELECT * FROM tokens ORDER BY row")
    assert [r["row"] for r in rows] == list(range(store.rows))
    assert store.documents == [d.id for d in documents]
    for document in documents:
        ids = model.tokenizer(document.text)["input_ids"]
        mine = [r for r in rows if r["document"] == document.id]
        assert [r["token"] for r in mine] == ids
        assert [r["position"] for r in mine] == list(range(len(ids)))
        assert [r["place"] for r in mine] == [i % CONTEXT for i in range(len(ids))]
        assert {r["split"] for r in mine} == {document.group["split"]}
        assert dict(mine[0]["labels"]) == document.group
        assert store.text(document.id) == document.text
    for name, record in zip(store.shards, store._records, strict=True):
        inside = [r["row"] for r in rows if r["shard"] == int(name)]
        assert inside == list(range(record.first, record.first + record.rows))
    count = store.query("SELECT count(*) AS n FROM tokens WHERE labels['kind'] = 'x'")
    assert count == [{"n": store.rows}]


def test_text_survives_whatever_it_is(tmp_path: Path) -> None:
    strange = ["a  b\n\nc", "ünïcode and 漢字", "\ud800 half a pair"]
    model = tiny()
    store = small(tmp_path / "acts", model, strange)
    assert store.text("0") == strange[0] and store.text("1") == strange[1]


def test_rows_stops_within_a_document(tmp_path: Path) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model, rows=130)
    assert store.rows == 130
    # The last window is cut, and a causal model does not look at what is not there.
    torch.testing.assert_close(
        store.read(SITE, range(130)), expected(model, CORPUS, SITE)[:130], atol=2e-3, rtol=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    context=st.integers(1, 16),
    shard_rows=st.integers(1, 40),
    rows=st.none() | st.integers(1, 60),
)
def test_a_plan_holds_every_token_once(
    lengths: list[int], context: int, shard_rows: int, rows: int | None
) -> None:
    model = tiny()
    texts = ["".join(chr(97 + (i + k) % 26) for k in range(n)) for i, n in enumerate(lengths)]
    plans = list(plan_shards(model, texts, context=context, rows=rows, shard_rows=shard_rows))
    planned = [(c.text.id, p) for plan in plans for c in plan.cuts for p in range(c.start, c.stop)]
    everything = [(str(i), p) for i, n in enumerate(lengths) for p in range(n)]
    assert planned == everything[:rows]
    assert all(0 < len(c) <= context for plan in plans for c in plan.cuts)
    assert all(plan.rows <= shard_rows or len(plan.cuts) == 1 for plan in plans)
    assert [plan.first for plan in plans] == [sum(p.rows for p in plans[:i]) for i in range(len(plans))]


def test_gradients_are_those_of_the_summed_loss_of_each_window(tmp_path: Path) -> None:
    model = Model(BY_NAME["llama"].model().module.double(), tokenizer(), name="double")
    texts = [TEXTS[0], TEXTS[4], "a"]
    store = small(tmp_path / "acts", model, texts, gradient=True, dtype="float32")
    assert store.gradient and all(p.requires_grad for p in model.module.parameters())
    wanted: dict[str, list[torch.Tensor]] = {SITE: [], OTHER: []}
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        for window in ids.split(CONTEXT, 1):
            trace = model.trace(window, [SITE, OTHER], grad=True, stop=False)
            loss = torch.zeros((), dtype=torch.float64)
            for t in range(window.shape[1] - 1):
                loss = loss - trace.logits[0, t].log_softmax(-1)[window[0, t + 1]]
            found = trace.gradients(loss + 0 * trace.logits.sum())
            for site, held in wanted.items():
                held.append(found[site][0].flatten(1))
    for site, held in wanted.items():
        gradient = store.read(site, range(store.rows), gradient=True)
        torch.testing.assert_close(gradient.double(), torch.cat(held), atol=1e-6, rtol=1e-5)
        assert float(gradient.abs().max()) > 1e-3
    batch = next(iter(store.batches(20, sites=SITE, gradient=True)))
    assert torch.equal(batch[f"{SITE}.gradient"], store.read(SITE, batch["row"], gradient=True))
    with pytest.raises(InputError, match="holds no gradients"):
        small(tmp_path / "plain").read(SITE, 0, gradient=True)


def test_massive_rows_are_stored_marked_and_passed_over(tmp_path: Path) -> None:
    model = tiny()
    with model.edit(Add(SITE, torch.eye(32)[3] * 20_000.0).at(positions=[0])):
        store = small(tmp_path / "acts", model)
        kept = small(tmp_path / "kept", model, keep_massive=True)
    first = [r["row"] for r in store.query("SELECT row FROM tokens WHERE place = 0")]
    marked = [r["row"] for r in store.query("SELECT row FROM tokens WHERE massive")]
    assert first == marked and store.massive == len(first) and store.under
    assert bool((store.read(SITE, first)[:, 3] > 1e4).all())
    given_out = torch.cat([b["row"] for b in store.batches(64)])
    assert sorted(given_out.tolist()) == sorted(set(range(store.rows)) - set(first))
    assert sum(len(b["row"]) for b in store.batches(64, keep_massive=True)) == store.rows
    assert sum(len(b["row"]) for b in kept.batches(64)) == kept.rows


def test_conversations_keep_roles_and_special_tokens(tmp_path: Path) -> None:
    model = tiny()
    model.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    )
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, user."}]
    store = small(tmp_path / "acts", model, [chat, "plain text"])
    rows = store.query("SELECT * FROM tokens WHERE document = '0' ORDER BY row")
    assert store.text("0") == "<s>user\nWho?</s><s>assistant\nMe, user.</s>"
    by_role = {
        role: "".join(r["text"] for r in rows if r["role"] == role) for role in ("user", "assistant", None)
    }
    assert by_role == {"user": "Who?", "assistant": "Me, user.", None: "<s>user\n</s><s>assistant\n</s>"}
    assert "".join(r["text"] for r in rows if r["special"]) == "<s></s><s></s>"
    assert store.query("SELECT DISTINCT role FROM tokens WHERE document = '1'") == [{"role": None}]
    with pytest.raises(ModelError, match="'0' is a conversation, and tiny-llama has no chat template"):
        small(tmp_path / "none", tiny(), [chat])


def test_a_module_site_and_an_encoder_can_be_harvested(tmp_path: Path) -> None:
    model = tiny("bert")
    site = "module:bert.encoder.layer.0.output"
    store = small(tmp_path / "acts", model, sites=[site, "blocks.1.resid_post"])
    torch.testing.assert_close(
        store.read(site, range(store.rows)), expected(model, CORPUS, site), atol=2e-3, rtol=1e-3
    )


# -- bad input ------------------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_is_named_by_document_and_position(tmp_path: Path) -> None:
    model = tiny()
    token = model.tokenizer("Z")["input_ids"][0]
    with torch.no_grad():
        model.module.get_input_embeddings().weight[token] = torch.nan
    documents = Corpus("c", [Document("good", "all is well"), Document("bad", "well, almost Z")])
    with pytest.raises(NonFiniteError, match=r"^embed: .* in document 'bad' at position 13;"):
        small(tmp_path / "acts", model, documents, sites="embed")


def test_float16_says_where_its_range_ends(tmp_path: Path) -> None:
    model = tiny()
    with model.edit(Add(SITE, torch.eye(32)[3] * 1e5).at(positions=[2])):
        with pytest.raises(
            ShapeError, match=r"holds 100,\d+ in document '0' at position 2, and float16 ends"
        ):
            small(tmp_path / "acts", model)
        store = small(tmp_path / "int8", model, dtype="int8")
    assert float(store.read(SITE, 2)[0, 3]) == pytest.approx(1e5, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'; it must be float16"),
        ({"context": 0}, "context is 0"),
        ({"context": 10_000}, "context is 10000; tiny-llama takes 1 to"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, not 0"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, not 0"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"corpus": []}, "the corpus has no text"),
        ({"corpus": ["", ""]}, "the corpus has no text"),
        ({"sites": "blocks.0.attn.pattern"}, "one weight for each query and key"),
        ({"sites": "logits"}, "logits"),
        ({"sites": "blocks.9.resid_post"}, "blocks.9"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as failed:
        small(tmp_path / "acts", **options)  # type: ignore[arg-type]
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "acts" / "manifest.json").exists()


def test_models_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        harvest(BY_NAME["llama"].model(), ["a"], SITE, tmp_path / "acts")
    with pytest.raises(ModelError, match="gradients need a causal-lm"):
        small(tmp_path / "acts", tiny("bert"), sites="blocks.1.resid_post", gradient=True)


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a store"):
        small(tmp_path)
    with pytest.raises(InputError, match="exists and is not a store"):
        small(tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_store_is_not_continued_as_another(tmp_path: Path) -> None:
    model = tiny()
    store = small(tmp_path / "acts", model)
    before = files_of(store.path)
    for options, said in (
        ({"dtype": "int8"}, "dtype=float16, and int8 was asked for"),
        ({"context": 16}, "context=32, and 16"),
        ({"rows": 7}, "rows=None, and 7"),
        ({"shard_rows": 99}, "shard_rows=100, and 99"),
        ({"sites": SITE}, f"sites={SITE}, {OTHER}, and {SITE}"),
        ({"corpus": CORPUS[1:]}, "shard 00000 of .* was made from another text"),
        ({"corpus": CORPUS + ["more"]}, "shard 0000. of .* was made from another text"),
    ):
        with pytest.raises(InputError, match=said):
            small(store.path, model, **options)  # type: ignore[arg-type]
    with pytest.raises(FingerprintError, match="another model"):
        small(store.path, tiny("gpt2"))
    changed = tiny()
    with torch.no_grad():
        next(changed.module.parameters()).mul_(1.5)
    with pytest.raises(FingerprintError, match="other weights"):
        small(store.path, changed)
    with model.edit(Add(SITE, torch.ones(32))):
        model.trace("a", SITE)  # otherwise the edit complains that it had no effect
        with pytest.raises(InputError, match="under=none, and"):
            small(store.path, model)
    assert files_of(store.path) == before
    with pytest.raises(FingerprintError, match="another model"):
        Store(store.path, tiny("gpt2"))


def test_the_same_harvest_again_changes_nothing(tmp_path: Path) -> None:
    first = small(tmp_path / "acts")
    before = files_of(first.path)
    small(tmp_path / "acts")
    assert files_of(first.path) == before
    assert json.loads(before["manifest.json"])["complete"] is True
