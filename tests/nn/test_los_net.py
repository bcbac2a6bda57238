"""LOSNet: its encoding, its mask, and that fixed weights compute Min-K%."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actlas.core.errors import InputError, ShapeError
from actlas.nn.los_net import LOSNet


def signature(n: int = 3, rows: int = 6, k: int = 5, vocabulary: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_p = (
        torch.randn(n, rows, vocabulary, generator=generator).log_softmax(-1).sort(-1, descending=True).values
    )
    rank = torch.randint(0, vocabulary, (n, rows), generator=generator)
    return {
        "sorted": log_p[..., :k],
        "actual": log_p.gather(-1, rank[..., None])[..., 0],
        "rank": rank,
        "mean": log_p.mean(-1),
        "std": log_p.std(-1),
        "mask": torch.ones(n, rows, dtype=torch.bool),
    }


def test_the_encoding_is_the_equation() -> None:
    torch.manual_seed(0)
    net, x = LOSNet(5, 11, rows=6, width=8, heads=2), signature()
    assert net.sorted_in is not None
    z = net.encode(*(x[n] for n in ("sorted", "actual", "rank", "mean", "std")))
    for i in range(3):
        for n in range(6):
            s = (x["sorted"][i, n] - x["mean"][i, n]) / x["std"][i, n]
            a = (x["actual"][i, n] - x["mean"][i, n]) / x["std"][i, n]
            w1, w2 = net.actual_in
            second = a * w1 + a * 2 * (0.5 - int(x["rank"][i, n]) / 11) * w2
            torch.testing.assert_close(z[i, n], torch.cat([net.sorted_in.weight @ s, second]))


@pytest.mark.parametrize("ranked_only", [False, True])
def test_rows_that_are_not_there_change_nothing(ranked_only: bool) -> None:
    torch.manual_seed(0)
    net = LOSNet(0 if ranked_only else 5, 11, rows=6, width=16, heads=2, ranked_only=ranked_only).eval()
    x = signature()
    short = {name: v[:, :4] for name, v in x.items()}
    padded = {name: v.clone() for name, v in x.items()}
    padded["mask"][:, 4:] = False
    padded["actual"][:, 4:] = 99.0
    torch.testing.assert_close(net(**padded), net(**short))
    assert not torch.allclose(net(**x), net(**short))
    if ranked_only:
        other = {**x, "sorted": x["sorted"] + 1}
        torch.testing.assert_close(net(**other), net(**x))
    again = LOSNet.from_config(net.config())
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(**x), net(**x))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    net = LOSNet(5, 11, rows=6, width=8, heads=2)
    net(**signature()).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().sum()) > 0, name


def test_fixed_weights_compute_min_k() -> None:
    """On rows sorted by log-probability, attention to the first k% of positions gives Min-K%: a constant C
    in two channels keeps the layer norms linear up to O(1/C), so the error must fall with C."""
    rows, least, m = 10, 3, 8
    generator = torch.Generator().manual_seed(1)
    actual = torch.randn(40, rows, generator=generator).sort(1).values
    x = {
        "sorted": torch.zeros(40, rows, 1),
        "actual": actual,
        "rank": torch.zeros(40, rows, dtype=torch.long),
        "mean": torch.zeros(40, rows),
        "std": torch.ones(40, rows),
        "mask": torch.ones(40, rows, dtype=torch.bool),
    }
    errors = []
    for big in (10.0, 100.0):
        net = LOSNet(1, 7, rows=rows, width=m, heads=1).double().eval()
        assert net.sorted_in is not None
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
            net.actual_in[0, 0] = 1.0  # channel 4 of z holds a_n
            net.positions[:least, 1] = 1.0  # channel 1 marks the first k% of rows
            net.cls[2], net.cls[3] = big, -big
            layer = net.encoder.layers[0]
            for norm in (layer.norm1, layer.norm2):
                norm.weight.fill_(1.0)
            query, key, value = layer.self_attn.in_proj_weight.view(3, m, m)
            query[0, 2] = 1.0  # the query of CLS is C in channel 0
            key[0, 1] = 10.0  # marked rows have a key of 10: softmax picks them, evenly
            value[0, 4] = 1.0
            layer.self_attn.out_proj.weight[5, 0] = 1.0
            # the first layer norm divides by std = C sqrt(2/m) and takes off the mean, v/m; the second
            # finds mean 0 and std 1
            net.head.weight[0, 5] = big * (2 / m) ** 0.5 / (1 - 1 / m)
            found = net(**{n: v.double() if v.is_floating_point() else v for n, v in x.items()})
        wanted = actual[:, :least].double().mean(1)
        errors.append(float((found - wanted).abs().max()))
    assert errors[1] < 0.01 and errors[1] < errors[0]


def test_bad_sizes_are_refused() -> None:
    for options, message in (
        ({"width": 9}, "width is 9"),
        ({"width": 12}, "divisible by the 8 heads"),
        ({"top_k": 12}, "top_k is 12"),
        ({"rows": 0}, "rows is 0"),
    ):
        with pytest.raises(InputError, match=message):
            LOSNet(**{"top_k": 5, "vocabulary": 11, **options})
    net = LOSNet(5, 11, rows=4, width=8, heads=2)
    with pytest.raises(ShapeError, match="reads 4 rows, not 6"):
        net(**signature())
    with pytest.raises(ShapeError, match="5 log-probabilities a row, not 3"):
        net(**signature(rows=4, k=3))
