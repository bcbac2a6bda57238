"""The graph of edges: runs with any set of edges, edge attribution, and circuits as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.circuits import attribute, head
from actlas.circuits.batch import PromptPairs
from actlas.circuits.circuit import Circuit, ablate_all_but
from actlas.circuits.circuit_search import circuit_of, split_by_answer
from actlas.circuits.draw import layout, lines_of, svg
from actlas.circuits.edge_attribution import Edge, attribute_edges
from actlas.circuits.faithfulness import EdgeRuns, circuit_scores, minimality, minimality_share
from actlas.circuits.graph import Graph
from actlas.circuits.metrics import logit_difference
from actlas.circuits.position_means import PositionMeanAblate, position_means
from actlas.cli.main import main
from actlas.cli.shared import load_model
from actlas.core.edit import Edit
from actlas.core.errors import ArtifactError, FingerprintError, InputError, ModelError, ShapeError
from actlas.core.model import Model
from tests.circuits.pairs import model_of, pairs_of
from tests.cli.conftest import make_model


@pytest.fixture(scope="module")
def llama() -> tuple[Model, PromptPairs]:
    model = model_of("llama", torch.float64)
    return model, pairs_of(model)


def naive(model: Model, pairs: PromptPairs, edges: Tensor) -> Tensor:
    """Run a llama edge by edge, from its modules: every receiver adds up its own input, edges weighted."""
    graph, module = Graph.of(model), model.module.model
    n, width = pairs.clean["input_ids"].shape
    rotary = module.rotary_emb(torch.zeros(n, width, 1, dtype=torch.float64), pairs.clean["position_ids"])
    mask = pairs.clean["attention_mask"].bool()
    causal = torch.ones(width, width).tril().bool() & mask[:, None, None, :]
    causal = causal | torch.eye(width).bool()

    def turned(x: Tensor) -> Tensor:  # [n, pos, head_dim]
        half = x.shape[-1] // 2
        return x * rotary[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotary[1]

    def run(inputs: Tensor, base: list[Tensor] | None, edges: Tensor) -> list[Tensor]:
        writers = [module.embed_tokens(inputs)]

        def entering(receiver: int) -> Tensor:
            if base is None:
                return sum(writers[1:], writers[0])
            mine = [base[w] + edges[receiver, w] * (now - base[w]) for w, now in enumerate(writers)]
            return sum(mine[1:], mine[0])

        for b, block in enumerate(module.layers):
            attn, norm = block.self_attn, block.input_layernorm
            size = attn.head_dim
            parts = {}
            for kind, count in (("q", graph.heads), ("k", graph.groups), ("v", graph.groups)):
                weight = getattr(attn, f"{kind}_proj").weight
                parts[kind] = [
                    norm(entering(graph.span(b, kind)[i])) @ weight[i * size : (i + 1) * size].T
                    for i in range(count)
                ]
            made = []
            for h in range(graph.heads):
                g = h // (graph.heads // graph.groups)
                scores = turned(parts["q"][h]) @ turned(parts["k"][g]).transpose(1, 2) / size**0.5
                pattern = scores.masked_fill(~causal[:, 0], -torch.inf).softmax(-1)
                made.append(pattern @ parts["v"][g] @ attn.o_proj.weight[:, h * size : (h + 1) * size].T)
            writers += made
            writers.append(block.mlp(block.post_attention_layernorm(entering(graph.span(b, "mlp")[0]))))
        return [*writers, entering(len(graph.receivers) - 1)]

    with torch.no_grad():
        base = run(pairs.corrupt["input_ids"], None, edges)
    last = run(pairs.clean["input_ids"], base, edges)[-1]
    return logit_difference(model.module.lm_head(module.norm(last))[:, -1], pairs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_of_some_edges_is_what_a_loop_over_modules_makes_of_them(
    llama: tuple[Model, PromptPairs], seed: int
) -> None:
    model, pairs = llama
    runs = EdgeRuns(model, pairs, batch=3)
    edges = runs.graph.allowed & (torch.rand(runs.graph.allowed.shape, generator=_g(seed)) < 0.6)
    expected = naive(model, pairs, edges.double()).detach()
    torch.testing.assert_close(runs.difference(edges), expected, atol=1e-5, rtol=1e-5)
    assert float((expected - runs.clean).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "opt", "qwen3", "phi3"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(family: str) -> None:
    model = model_of(family)
    runs = EdgeRuns(model, pairs_of(model))
    for edges, expected in (
        (runs.graph.allowed, runs.clean),
        (torch.zeros_like(runs.graph.allowed), runs.corrupt),
    ):
        torch.testing.assert_close(runs.difference(edges), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("steps", [0, 3])
def test_edge_scores_add_up_to_attribution_patching(family: str, steps: int) -> None:
    model = model_of(family)
    pairs = pairs_of(model)
    edges = attribute_edges(model, pairs, steps=steps, batch=3)
    parts = attribute(model, pairs, "components", mode="noise", steps=steps)
    mine = torch.stack([edges.changes[:, :, edges.graph.writers.index(p)].sum(1) for p in parts.labels])
    torch.testing.assert_close(mine.double(), parts.changes, atol=1e-5, rtol=1e-4)
    assert not bool(edges.changes[:, ~edges.graph.allowed].any())


def test_an_edge_s_score_is_the_derivative_along_the_edge(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    scores = attribute_edges(model, pairs, steps=0)
    edges = scores.graph.allowed.double().requires_grad_()
    (expected,) = torch.autograd.grad(naive(model, pairs, edges).sum(), edges)
    found = scores.changes.sum(0).double()
    torch.testing.assert_close(found, expected * scores.graph.allowed, atol=1e-5, rtol=1e-4)
    assert int((found.abs() > 1e-3).sum()) > 50


def test_the_graph_knows_who_reads_whom() -> None:
    graph = Graph(2, 4, 2)
    assert graph.writers[:6] == ("input", "L0H0", "L0H1", "L0H2", "L0H3", "MLP 0")
    assert graph.receivers[:9] == (
        "L0H0.q", "L0H1.q", "L0H2.q", "L0H3.q", "L0K0", "L0K1", "L0V0", "L0V1", "MLP 0",
    )  # fmt: skip
    reads = {
        r: {graph.writers[w] for w in graph.allowed[i].nonzero()[:, 0]} for i, r in enumerate(graph.receivers)
    }
    assert reads["L0V1"] == {"input"} and reads["MLP 0"] == set(graph.writers[:5])
    assert reads["L1H0.q"] == set(graph.writers[:6]) and reads["logits"] == set(graph.writers)
    assert Graph(2, 4, 2, parallel=True).allowed[8].sum() == 1
    assert [graph.receivers[i] for i in graph.inputs_of(graph.writers.index("L1H3"))] == [
        "L1H3.q",
        "L1K1",
        "L1V1",
    ]
    assert graph.node("L1H3") == head(1, 3) and graph.node("MLP 1").site == "blocks.1.mlp.out"
    with pytest.raises(InputError, match="there is no part 'L9H0'"):
        graph.node("L9H0")


def test_pruning_keeps_paths_from_the_input_to_the_logits() -> None:
    graph = Graph(2, 4, 2)
    edges = _edges(
        graph,
        ("input", "L0V0"),
        ("L0H1", "MLP 1"),
        ("MLP 1", "logits"),
        ("L0H3", "logits"),
        ("input", "L1K0"),
    )
    kept = {(s, t) for _, _, s, t in graph.names(graph.pruned(edges))}
    assert kept == {("input", "L0V0"), ("L0H1", "MLP 1"), ("MLP 1", "logits")}
    assert not bool(graph.without(edges, graph.writers.index("MLP 1")).any())
    random = graph.random(20, seed=1)
    assert 20 <= int(random.sum()) < 28 and torch.equal(graph.pruned(random), random)
    assert torch.equal(random, graph.random(20, seed=1)) and not torch.equal(random, graph.random(20, seed=2))


def test_models_whose_parts_do_not_add_up_are_refused() -> None:
    with pytest.raises(ModelError, match="norms between its parts"):
        Graph.of(model_of("gemma2"))
    with pytest.raises(ModelError, match="no causal language model"):
        Graph.of(model_of("bert"))


@pytest.fixture(scope="module")
def found() -> tuple[Model, PromptPairs, Circuit]:
    model = model_of()
    pairs = pairs_of(model)
    return model, pairs, circuit_of(model, pairs, pairs, sizes=(10, 40, 120), controls=2)


def test_a_search_takes_the_smallest_circuit_that_is_faithful_enough(
    found: tuple[Model, PromptPairs, Circuit],
) -> None:
    model, pairs, circuit = found
    runs = EdgeRuns(model, pairs)
    score = circuit.score("circuit faithfulness")
    assert score.value == pytest.approx(runs.share(circuit.mask), abs=1e-6) and score.value >= 0.85
    assert score.low is not None and score.high is not None and score.low <= score.value <= score.high
    assert torch.equal(runs.graph.pruned(circuit.mask), circuit.mask)
    assert [r["edges"] for r in circuit.curve] == sorted(r["edges"] for r in circuit.curve)
    assert {m.group["part"] for m in circuit.losses} == set(circuit.nodes)
    names = {m.name for m in circuit.scores}
    assert {"random circuit faithfulness", "remainder without the circuit", "circuit incompleteness"} <= names
    assert {"part faithfulness, mean ablation", "random parts, mean ablation", "circuit minimality"} <= names
    with pytest.raises(InputError, match="'speed' was not measured"):
        circuit.score("speed")


def test_scores_are_about_the_edges_they_name(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    runs = EdgeRuns(model, pairs)
    everything = {m.name: m for m in circuit_scores(runs, runs.graph.allowed, controls=0, halves=2)}
    assert everything["circuit faithfulness"].value == pytest.approx(1, abs=1e-5)
    assert everything["remainder without the circuit"].value == pytest.approx(0, abs=1e-5)
    assert everything["circuit incompleteness"].value == pytest.approx(0, abs=1e-6)
    edges = attribute_edges(model, pairs).strongest(60)
    losses = minimality(runs, edges)
    first = losses[0]
    cut = runs.graph.without(edges, runs.graph.writers.index(first.group["part"]))
    assert first.value == pytest.approx(runs.share(edges) - runs.share(cut), abs=1e-5)
    assert minimality_share(losses).n == len(losses)
    with pytest.raises(InputError, match="no edges"):
        circuit_scores(runs, torch.zeros_like(edges))
    with pytest.raises(InputError, match="this model's graph"):
        runs.difference(edges[:-1])


def test_a_circuit_saves_loads_and_draws(found: tuple[Model, PromptPairs, Circuit], tmp_path: Path) -> None:
    model, _, circuit = found
    circuit.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c", model)
    assert again.to_json() == circuit.to_json() and torch.equal(again.mask, circuit.mask)
    assert circuit.save_png(tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert circuit.save_svg(tmp_path / "c.svg").read_text().startswith("<svg xmlns=")
    text = circuit.to_html(tmp_path / "c.html").read_text()
    assert "Circuit of tiny-llama" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    for edge in circuit.edges[:20]:
        assert f"{edge.source} to {edge.target}" in svg(circuit)
    places, _, _ = layout(lines_of(circuit))
    assert len(set(places.values())) == len(places)
    with pytest.raises(FingerprintError):
        Circuit.load(tmp_path / "c", model_of("gpt2"))
    (tmp_path / "c" / "tensors.safetensors").write_bytes(b"0")
    with pytest.raises(ArtifactError, match="checksum"):
        Circuit.load(tmp_path / "c")


def test_ablating_the_rest_puts_means_by_position_everywhere_else(
    found: tuple[Model, PromptPairs, Circuit], tmp_path: Path
) -> None:
    model, pairs, circuit = found
    kept = {"L0H1", "L1H2", "MLP 2"}
    edit = ablate_all_but(circuit, sorted(kept))
    sites = [f"blocks.{b}.{k}" for b in range(3) for k in ("attn.z", "mlp.out")]
    with model.edit(edit):
        after = model.trace(dict(pairs.clean), sites)
        logits = pairs.last_logits(model)
    mask = pairs.clean["attention_mask"].bool()
    for row in range(len(pairs)):
        columns = mask[row].nonzero()[:, 0].tolist()
        for b in range(3):
            z, means = after[f"blocks.{b}.attn.z"][row], circuit.means[f"blocks.{b}.attn.z"]
            out, whole = after[f"blocks.{b}.mlp.out"][row], circuit.means[f"blocks.{b}.mlp.out"]
            for c in columns[1:]:
                i = pairs.width - 1 - c
                for h in range(4):
                    same = torch.allclose(z[c, h], means[i, h], atol=1e-6)
                    assert same == (f"L{b}H{h}" not in kept)
                assert torch.allclose(out[c], whole[i], atol=1e-6) == (f"MLP {b}" not in kept)
    edit.save(tmp_path / "e")
    with model.edit(Edit.load(tmp_path / "e", model)):
        assert torch.equal(pairs.last_logits(model), logits)
    with model.edit(ablate_all_but(circuit, circuit.graph.writers[1:-1])):
        assert not torch.equal(pairs.last_logits(model), logits)


def test_means_are_over_both_sides_by_distance_from_the_end(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    means = position_means(model, pairs, batch=3)["blocks.1.mlp.out"]
    both = [
        model.trace(dict(side), "blocks.1.mlp.out")["blocks.1.mlp.out"]
        for side in (pairs.clean, pairs.corrupt)
    ]
    real = pairs.clean["attention_mask"].bool()
    real = real & (real.cumsum(1) > 1)
    x = torch.cat([b[real[:, -3], -3] for b in both]).mean(0)
    torch.testing.assert_close(means[2].double(), x, atol=1e-6, rtol=1e-5)
    overall = torch.cat([b[real] for b in both]).mean(0)
    torch.testing.assert_close(means[-1].double(), overall, atol=1e-6, rtol=1e-5)
    with (
        pytest.raises(ShapeError, match=r"PositionMeanAblate.means"),
        model.edit(PositionMeanAblate("blocks.0.mlp.out", torch.zeros(3, 5))),
    ):
        pairs.last_logits(model)
    with (
        pytest.raises(InputError, match="names head 7"),
        model.edit(PositionMeanAblate("blocks.0.attn.z", torch.zeros(3, 4, 8), (7,))),
    ):
        pairs.last_logits(model)


def test_no_answer_of_the_test_is_one_of_the_search(llama: tuple[Model, PromptPairs]) -> None:
    _, pairs = llama
    search, test = split_by_answer(pairs, 0.5, seed=0)
    assert not set(search.answer_ids.tolist()) & set(test.answer_ids.tolist())
    assert len(search) + len(test) == len(pairs) and len(test) == 2


def test_settings_that_make_no_sense_are_refused(llama: tuple[Model, PromptPairs]) -> None:
    model, pairs = llama
    for options in ({"target": 0.0}, {"sizes": ()}, {"edges": 0}):
        with pytest.raises(InputError):
            circuit_of(model, pairs, pairs, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps=-1"):
        attribute_edges(model, pairs, steps=-1)
    with pytest.raises(InputError, match="at least 1"):
        attribute_edges(model, pairs, steps=0).strongest(0)
    with pytest.raises(InputError, match="no edge 'L0H0' -> 'nowhere'"):
        Circuit("m", "t", Graph(1, 1, 1), (Edge("L0H0", "nowhere", 1.0),), "EAP")


def _edges(graph: Graph, *named: tuple[str, str]) -> Tensor:
    found = torch.zeros_like(graph.allowed)
    for source, target in named:
        found[graph.receivers.index(target), graph.writers.index(source)] = True
    return found


def _g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny", 32))


def test_the_command_finds_saves_and_draws_a_circuit(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (("cat", " and"), ("dog", " the"), ("bird", " of"), ("fish", " a"))
    pairs = [
        {"clean": f"the {a} sat on the mat", "corrupt": f"the {b} sat on the mat", "answer": x, "wrong": y}
        for a, x in words
        for b, y in words
        if a != b
    ]
    model = load_model(tiny)
    one = [p for p in pairs if _fits(model, p)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(p) for p in one))
    options = ["--prompts", 4, "--held-out", 4, "--edges", 60, "--steps", 0, "--controls", 1, "--force"]
    made = ["-o", tmp_path / "c", "--html", tmp_path / "c.html", "--png", tmp_path / "c.png"]
    status = main([str(a) for a in ("circuit", tiny, "--task", file, *options, *made, "--json")])
    said = capsys.readouterr()
    assert status == 0, said.err
    document = json.loads(said.out)
    assert document["edges"] and document["scores"][0]["name"] == "circuit faithfulness"
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    edit = ["--edit", tmp_path / "rest", "--svg", tmp_path / "c.svg"]
    assert main([str(a) for a in ("circuit", tiny, "--load", tmp_path / "c", *edit)]) == 0
    assert "circuit faithfulness" in capsys.readouterr().out
    assert Edit.load(tmp_path / "rest", model).parts() and (tmp_path / "c.svg").stat().st_size > 1000
    for arguments, expected in (
        (("circuit", tiny), "give a task with --task"),
        (("circuit", tiny, "--task", file, "--html", tmp_path), "is a folder"),
        (("circuit", tiny, "--load", tmp_path / "none"), "does not exist"),
    ):
        assert main([str(a) for a in arguments]) == 2
        assert expected in capsys.readouterr().err


def _fits(model: Model, pair: dict[str, str]) -> bool:
    count = lambda text: len(model.tokenizer(text)["input_ids"])  # noqa: E731
    same = count(pair["clean"]) == count(pair["corrupt"])
    return same and all(
        count(pair["clean"] + pair[k]) == count(pair["clean"]) + 1 for k in ("answer", "wrong")
    )
