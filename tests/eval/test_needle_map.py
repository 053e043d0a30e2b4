import math

import pytest

from eval.needle_map import as_array, draw, longest_retrieved, print_map


def scores(**rows):
    """rows: the scores of a length, l100=(...), at depths 0, 50 and 100."""
    depths = (0, 50, 100)
    return {(int(key[1:]), d): x for key, row in rows.items() for d, x in zip(depths, row)}


def test_the_longest_length_is_one_up_to_which_all_are_retrieved():
    good, fair, bad = (1, 1, 0.9), (1, 0.7, 1), (0, 1, 1)  # means 0.967, exactly 0.9, 0.667
    assert longest_retrieved(scores(l300=good, l100=good, l200=good)) == 300
    assert longest_retrieved(scores(l300=good, l100=good, l200=bad)) == 100
    assert longest_retrieved(scores(l100=good, l200=(0.9, 0.9, 0.9))) == 100
    assert longest_retrieved(scores(l100=bad, l200=good)) == 0
    assert sum(fair) / 3 == 0.9 and longest_retrieved(scores(l100=fair)) == 0


def test_lengths_and_depths_ascend_and_what_is_not_there_is_nan():
    lengths, depths, values = as_array({(20, 0): 0.5, (10, 100): 1.0, (10, 0): 0.0})
    assert (lengths, depths, values.shape) == ([10, 20], [0, 100], (2, 2))
    assert values[0].tolist() == [0.0, 0.5] and values[1, 0] == 1 and math.isnan(values[1, 1])


def test_the_map_as_text(capsys):
    print_map(scores(l1000=(1, 0.99, 0.95), l2000=(0, 0.55, 1)))
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["length", "depth", "0", "to", "100", "%", "mean"]
    assert first.split() == ["1,000", "#99", "0.98"]
    assert second.split() == ["2,000", "05#", "0.52"]
    assert "over 0.9 at every length up to 1,000 tokens; mean of the map 0.748" in last
    print_map(scores(l1000=(0, 0, 0)))
    assert "no retrieval over 0.9; mean of the map 0.000" in capsys.readouterr().out


def test_the_picture_shows_cells_where_they_are_and_the_trained_length(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    found = scores(l1000=(1, 0.5, 0), l2000=(0, 0.25, 1), l4000=(1, 1, 1))
    draw(found, 2500, "a title", tmp_path / "map.png")
    draw(scores(l1000=(1, 1, 1)), 64, "one length", tmp_path / "one.png")
    for name in ("map.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    (mesh,) = axes.collections
    across = mesh.get_coordinates()[0, :, 0].tolist()
    assert across == [500, 1500, 3000, 5000]  # half-way between neighbours
    assert mesh.get_coordinates()[:, 0, 1].tolist() == [-25, 25, 75, 125]
    assert mesh.get_array().tolist() == as_array(found)[2].tolist()
    red, _, _, _ = mesh.cmap(0.0)
    green = mesh.cmap(1.0)[1]
    assert red > 0.7 > mesh.cmap(1.0)[0] and green > mesh.cmap(0.0)[1]
    (line,) = axes.lines
    assert set(line.get_xdata()) == {2500} and line.get_linestyle() == "--"
    assert axes.yaxis_inverted() and axes.get_title(loc="left") == "a title"
