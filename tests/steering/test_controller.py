"""Weighted steering controllers: the equation, timing, caches and padding, saving, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.edits import Add
from actlas.core.errors import FingerprintError, InputError, NonFiniteError, ShapeError
from actlas.core.methods import find_method
from actlas.core.probe import Probe
from actlas.steering.controller import ControlledSteer, Controller
from actlas.steering.controller_fit import fit_controller
from actlas.steering.controller_training import train_controller, train_on_outcome
from actlas.steering.openings import OpeningScorer, embedding_direction, pushed
from tests.steering.gate_models import LABELLED, OTHERS, QUESTIONS, generated, model, same

READ = ("blocks.0.resid_pre", "blocks.0.resid_post")
STEER = ("blocks.1.resid_mid", "blocks.2.resid_post")
D = 32


def controller(read: tuple[str, ...] = READ, steer: tuple[str, ...] = STEER, seed: int = 0) -> Controller:
    g = torch.Generator().manual_seed(seed)
    r, o = D * len(read), 1 + len(steer)
    draw = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return Controller(
        read, steer, draw(r), draw(r).abs() + 0.5, draw(7, r) / r**0.5, draw(7), draw(o, 7), draw(o)
    )


def vectors(steer: tuple[str, ...] = STEER, scale: float = 9.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {s: scale * torch.randn(D, generator=g) for s in steer}


def brute(c: Controller, x: Tensor, scalar: str = "sigmoid") -> Tensor:
    """The equation in float64, written out."""
    out = []
    for row in x.double():
        z = (row - c.centre.double()) / c.spread.double()
        hidden = torch.tensor(
            [max(0.0, float(w @ z + b)) for w, b in zip(c.w1.double(), c.b1.double(), strict=True)]
        )
        y = c.w2.double() @ hidden.double() + c.b2.double()
        s = torch.sigmoid(y[0]) if scalar == "sigmoid" else y[0]
        out.append(s * torch.sigmoid(y[1:]))
    return torch.stack(out)


@pytest.mark.parametrize("scalar", ["sigmoid", "raw"])
def test_a_pass_is_the_equation(scalar: str) -> None:
    m, c, v = model(), controller(), vectors()
    text = QUESTIONS[0]
    clean = m.trace(text, [*READ, STEER[0]])
    x = torch.cat([clean.last(n) for n in READ], -1)
    push = brute(c, x, scalar)
    with m.edit(c.steer(v, scalar=scalar, silent=0.0)):
        steered = m.trace(text, [*READ, STEER[0]])
    for name in READ:
        torch.testing.assert_close(steered[name], clean[name], rtol=0, atol=0)
    moved = steered[STEER[0]] - clean[STEER[0]]
    torch.testing.assert_close(moved[0, -1].double(), push[0, 0] * v[STEER[0]].double(), atol=1e-4, rtol=1e-4)
    assert not moved[0, :-1].any()
    assert float(moved[0, -1].norm()) > 0.1


@pytest.mark.parametrize("read", ["prompt", "previous_step"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cache_padding_and_batches_give_the_same_tokens(read: str, family: str) -> None:
    m, edit = model(family), controller().steer(vectors(), read=read, silent=0.0)
    prompts = [QUESTIONS[0], "Why", OTHERS[3]]
    together = generated(m, prompts, edit)
    assert same(together, generated(m, prompts, edit, use_cache=False))
    assert same(together, [generated(m, [p], edit)[0] for p in prompts])
    assert not same(together, generated(m, prompts, edit * 0.0))
    assert same(
        generated(m, prompts, edit * 0.0), m.generate(prompts, max_new_tokens=5, min_new_tokens=5).tokens
    )


def test_beams_hold_the_decision_of_their_prompt() -> None:
    m, edit = model(), controller().steer(vectors(), silent=0.0)
    together = generated(m, [QUESTIONS[0], "Why"], edit, num_beams=3)
    alone = [generated(m, [p], edit, num_beams=3)[0] for p in (QUESTIONS[0], "Why")]
    assert same(together, alone)
    with pytest.raises(InputError, match="beams"):
        generated(m, [QUESTIONS[0]], controller().steer(vectors(), read="previous_step"), num_beams=2)


def test_the_prompt_decides_and_the_decision_is_held() -> None:
    """Pushes at generated tokens are those of the prompt's last token; per step they change."""
    m, c, v = model(), controller(), vectors()
    ids = m.encode(QUESTIONS[0])["input_ids"]
    longer = torch.cat([ids, torch.tensor([[9, 30, 11]])], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    clean = m.trace(longer, [*READ, STEER[0]])
    x = torch.cat([clean[n] for n in READ], -1)[0]
    last = ids.shape[1] - 1
    for read, rows in (("prompt", [last] * 4), ("previous_step", [None, last, last + 1, last + 2])):
        installed = m.edit(c.steer(v, read=read, silent=0.0))  # type: ignore[arg-type]
        with installed, installed.generating(1, mask):
            moved = m.trace(longer, [STEER[0]])[STEER[0]] - clean[STEER[0]]
        for token, row in zip(range(last, last + 4), rows, strict=True):
            wanted = torch.zeros(D, dtype=torch.float64)
            if row is not None:
                wanted = brute(c, x[row : row + 1])[0, 0] * v[STEER[0]].double()
            torch.testing.assert_close(moved[0, token].double(), wanted, atol=1e-4, rtol=1e-4)
        assert not moved[0, :last].any()


def test_a_previous_step_may_read_later_than_it_steers() -> None:
    m = model()
    late = controller(("blocks.2.resid_post",), ("blocks.0.resid_post", "blocks.1.resid_post"))
    v = vectors(late.steer_sites, 20.0)
    edit = late.steer(v, read="previous_step", silent=0.0)
    prompts = [QUESTIONS[0], "Why"]
    cached = generated(m, prompts, edit)
    assert same(cached, generated(m, prompts, edit, use_cache=False))
    assert torch.equal(cached[0][:1], generated(m, prompts)[0][:1])
    assert not same(cached, generated(m, prompts))
    with pytest.raises(InputError, match=r"reads blocks.2.resid_post, which comes after blocks.0.resid_post"):
        generated(m, prompts, late.steer(v))
    installed = m.edit(edit)
    ids = m.encode(QUESTIONS[0])["input_ids"]
    with installed, installed.generating(1, torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(InputError, match="generate it"):
            m.forward(ids)


def test_silence_leaves_activations_bit_for_bit(recwarn: pytest.WarningsRecorder) -> None:
    m, c = model(), controller()
    quiet = Controller(
        c.read_sites, c.steer_sites, c.centre, c.spread, c.w1, c.b1, 0 * c.w2, torch.tensor([-9.0, 3.0, 3.0])
    )
    with m.edit(quiet.steer(vectors())):
        steered = m.logits(QUESTIONS[0])
    assert torch.equal(steered, m.logits(QUESTIONS[0]))
    assert not [w for w in recwarn if "changed nothing" in str(w.message)]
    with m.edit(quiet.steer(vectors(), silent=0.0)):
        assert not torch.equal(m.logits(QUESTIONS[0]), steered)


def test_composes_scales_scopes_gates_and_saves(tmp_path: Path) -> None:
    m, c, v = model(), controller(), vectors()
    gate = Probe(
        site="blocks.0.resid_post", weight=torch.ones(D), bias=torch.tensor(-1e6), steer=torch.ones(D)
    )
    edit = (c.steer(v, silent=0.0) * 1.5).at(rows=1)
    prompts = [QUESTIONS[0], OTHERS[0]]
    base, steered = generated(m, prompts), generated(m, prompts, edit)
    assert torch.equal(base[0], steered[0]) and not torch.equal(base[1], steered[1])
    closed = edit.when(gate, per="sequence")
    assert same(generated(m, prompts, closed), base)
    with pytest.raises(InputError, match="condition already"):
        closed.when(gate)
    both = edit + Add("blocks.1.resid_post", torch.ones(D))
    for made, name in ((edit, "a"), (closed, "b"), (both, "c")):
        made.save(tmp_path / name, m)
        loaded = Edit.load(tmp_path / name, m)
        assert same(generated(m, prompts, loaded), generated(m, prompts, made))
        assert loaded.describe() == made.describe()
    with pytest.raises(FingerprintError), model("gpt2").edit(Edit.load(tmp_path / "a")):
        pass


def test_bad_input() -> None:
    m, c, v = model(), controller(), vectors()
    with pytest.raises(InputError, match="differ in blocks.2.mlp.out"):
        c.steer({**v, "blocks.2.mlp.out": v[STEER[0]]})
    with pytest.raises(InputError, match="read is 'now'"):
        c.steer(v, read="now")
    with pytest.raises(InputError, match="scalar is 'tanh'"):
        c.steer(v, scalar="tanh")
    with pytest.raises(InputError, match="silent is 1"):
        c.steer(v, silent=1.0)
    with pytest.raises(ShapeError, match="vectors has shape"):
        ControlledSteer(c, torch.ones(3, D))
    with pytest.raises(ShapeError, match="reads 64 channels"):
        c.forward(torch.zeros(2, 32))
    with pytest.raises(NonFiniteError, match="w1"):
        Controller(READ, STEER, c.centre, c.spread, c.w1 * float("nan"), c.b1, c.w2, c.b2)
    with pytest.raises(ShapeError, match=r"b2 has shape \[2\], not \[3\]"):
        Controller(READ, STEER, c.centre, c.spread, c.w1, c.b1, c.w2, c.b2[:2])
    cache = m.module(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with m.edit(c.steer(v)), pytest.raises(InputError, match="must see the prompt"):
        m.module(torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ShapeError), m.edit(c.steer({s: torch.ones(5) for s in STEER})):
        pass


def test_fitting_by_labels_beats_shuffled_labels() -> None:
    m = model()
    edit = fit_controller(m, LABELLED, hidden=16, epochs=20, site=STEER, read_sites=READ, held_out=0.3)
    assert find_method("controller").fit is fit_controller
    area = {x.group["gate"]: x for x in edit.measurements if x.name == "gate AUC"}
    assert area["controller"].value > 0.9
    assert area["trained on shuffled labels"].value < area["controller"].value
    pushes = {
        x.group["on"]: x.value
        for x in edit.measurements
        if x.group["gate"] == "controller" and "on" in x.group
    }
    assert pushes["prompts to steer"] > pushes["prompts to leave alone"] + 0.1
    assert isinstance(edit, ControlledSteer) and edit.controller.read_sites == READ
    again = fit_controller(m, LABELLED, hidden=16, epochs=20, site=STEER, read_sites=READ, held_out=0.3)
    assert isinstance(again, ControlledSteer) and torch.equal(edit.controller.w1, again.controller.w1)
    with pytest.raises(InputError, match="label 0 too"):
        fit_controller(m, LABELLED[:12])
    with pytest.raises(InputError, match="objective is 'loss'"):
        fit_controller(m, LABELLED, objective="loss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="differ in"):
        fit_controller(m, LABELLED, site=STEER, directions={STEER[0]: torch.ones(D)}, hidden=4, epochs=1)


def test_the_regulariser_alone_leaves_layer_weights_at_a_half() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=g), torch.tensor([0.0, 1.0]).repeat(32)
    x[:, 0] += 3 * y
    c = train_controller(x, y, ("a",), ("b", "c"), hidden=32, epochs=60, lr=3e-3)
    s, w = c.forward(x)
    assert float(s[y == 1].min()) > 0 > float(s[y == 0].max())
    assert abs(float(torch.sigmoid(w[y == 1]).mean()) - 0.5) < 0.05


def test_outcome_training_makes_the_opening_likelier() -> None:
    m = model()
    g = torch.Generator().manual_seed(1)
    v = {"blocks.1.resid_post": 4 * torch.randn(D, generator=g), "blocks.2.resid_post": torch.zeros(D)}
    texts = QUESTIONS + OTHERS
    y = torch.tensor([1.0] * 12 + [0.0] * 12)
    rows = m.trace(texts, "blocks.0.resid_post").last("blocks.0.resid_post")
    start = train_controller(rows, y, ("blocks.0.resid_post",), tuple(v), hidden=16, epochs=20)

    def likelihood(c: Controller) -> float:
        scorer = OpeningScorer(m, QUESTIONS, "ok")
        likely, _ = scorer.run(lambda i: pushed(v, c.pushes(rows[:12][i])))
        return float(likely.log().mean())

    before = {n: p.detach().clone() for n, p in m.module.named_parameters()}
    after = train_on_outcome(m, start, v, rows, y, texts, opening="ok", steps=25, lr=1e-2)
    # the gradient decides the sign of what a push is worth here, so "not worse" is the claim
    assert likelihood(after) > likelihood(start)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in m.module.named_parameters())


def test_an_opening_is_scored_as_a_whole_pass_would() -> None:
    m = model("gpt2")
    v, pushes = vectors(), torch.tensor([[0.3, 0.0], [0.0, 0.2], [1.0, 0.5]])
    prompts = ["Why", QUESTIONS[0], OTHERS[1]]
    scorer = OpeningScorer(m, prompts, "Oh no", batch=2)
    likely, first = scorer.run(lambda index: pushed(v, pushes[index]))
    for i, prompt in enumerate(prompts):
        ids = m.tokenizer(prompt + "Oh no")["input_ids"]
        n = len(m.tokenizer(prompt)["input_ids"])
        edit = pushed(v, pushes[i : i + 1], positions=range(n - 1, len(ids)))
        with m.edit(edit):
            log_p = torch.log_softmax(m.logits(torch.tensor([ids])).double(), -1)[0]
        whole = sum(float(log_p[t - 1, ids[t]]) for t in range(n, len(ids)))
        assert float(likely[i].log()) == pytest.approx(whole, abs=1e-4)
        torch.testing.assert_close(first[i].double(), log_p[n - 1], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="not empty"):
        OpeningScorer(m, prompts, "")
    unit = embedding_direction(m, positive=("ab",), negative=("c",))
    e = m.module.get_input_embeddings().weight.detach()
    ids = [m.tokenizer(c)["input_ids"][0] for c in "abc"]
    wanted = (e[ids[0]] + e[ids[1]]) / 2 - e[ids[2]]
    torch.testing.assert_close(unit, wanted / wanted.norm())
