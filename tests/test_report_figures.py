"""The pictures of a report: what is in them, and that nothing is drawn where there is nothing."""

from __future__ import annotations

import math
import struct

import matplotlib.figure
import numpy as np
import pytest
from report_logs import LAYERS, write_run

from spectral_ops.continual.report.figures import COLORS, LEARNING, NETWORK, draw_all, draw_over_tasks
from spectral_ops.continual.report.groups import group_runs
from spectral_ops.continual.report.runs import find_runs


@pytest.fixture
def figures(monkeypatch):
    """What is saved, by the file's name: figures that can be asked what they show."""
    saved = {}
    save = matplotlib.figure.Figure.savefig

    def keep(figure, path):
        saved[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def groups_of(folder):
    return group_runs(find_runs([folder])[0])[0]


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(ax):
    return [(line.get_color(), line.get_linewidth(), list(line.get_ydata())) for line in ax.lines]


def test_seeds_are_thin_and_their_mean_is_bold(tmp_path, figures):
    write_run(tmp_path / "a", [0.5, 0.3, 0.1], seed=0)
    write_run(tmp_path / "b", [0.7, 0.5], seed=1, tasks=3, finished=False)
    write_run(tmp_path / "c", [], seed=2, tasks=3, finished=False)
    write_run(tmp_path / "d", [0.9, 0.8, 0.7], seed=0, method="l2")
    draw_all(groups_of(tmp_path), tmp_path)
    figure = figures["curves.png"]
    assert titles(figure) == [panel.title for panel in LEARNING[:2]]  # no held-out accuracy, and no panel for it
    assert legend(figure) == ["none", "l2"]
    (first, second, none), (l2,) = lines(figure.axes[0])[:3], lines(figure.axes[0])[3:]
    assert first == (COLORS[0], 0.7, [0.5, 0.3, 0.1]) and second == (COLORS[0], 0.7, [0.7, 0.5])
    assert none[:2] == (COLORS[0], 2.2) and none[2] == pytest.approx([0.6, 0.4])  # as far as both are
    assert l2 == (COLORS[1], 2.2, [0.9, 0.8, 0.7])  # one seed: no thin line under the bold one
    assert figure.get_suptitle() == "random-labels, mnist, mlp, adam; single seeds thin, their mean bold"


def test_the_network_over_the_tasks(tmp_path, figures):
    sigma = {LAYERS[0]: 1.0, LAYERS[1]: 3.0}
    more = [
        {"sigma": sigma, "dormant": {"a": 0.1, "b": 0.3}, "feature_rank": {}},
        {"sigma": sigma | {LAYERS[1]: None}, "dormant": {"a": 0.5, "b": 0.5}, "feature_rank": {}},
        {"sigma": {LAYERS[0]: 200.0, LAYERS[1]: 5.0}, "dormant": {"a": None}, "feature_rank": {}},
    ]
    write_run(tmp_path / "a", [0.5, 0.4, 0.3], more=more)
    draw_all(groups_of(tmp_path), tmp_path)
    figure = figures["network.png"]
    assert titles(figure) == [NETWORK[0].title, NETWORK[1].title, NETWORK[3].title]
    largest, _, dormant = (lines(ax)[0][2] for ax in figure.axes)
    # A layer that is not finite may be the largest: a gap.
    assert np.array_equal(largest, [3.0, math.nan, 200.0], equal_nan=True)
    assert np.allclose(dormant, [0.2, 0.5, math.nan], equal_nan=True)
    assert figure.axes[0].get_yscale() == "log" and figure.axes[1].get_yscale() == "linear"
    assert "thin" not in figure.get_suptitle()


def sweep(folder, method, strengths, lrs=(1e-3,), seeds=(0, 1)):
    for strength in strengths:
        for lr in lrs:
            for seed in seeds:
                accuracy = 0.5 if strength is None else 0.5 + 10 * strength + 0.1 * seed
                name = f"{method}-{strength}-{lr}-{seed}"
                write_run(folder / name, [accuracy], method=method, strength=strength, lr=lr, seed=seed)


def test_sensitivity_to_the_strength(tmp_path, figures):
    sweep(tmp_path, "none", [None])
    sweep(tmp_path, "l2", [0.01, 0.001, 0.02])
    sweep(tmp_path, "spectral", [0.0, None, 0.01])
    sweep(tmp_path, "l2-init", [0.01, None])  # one strength is no curve
    draw_all(groups_of(tmp_path), tmp_path)
    figure = figures["sensitivity.png"]
    assert titles(figure) == ["accuracy, mean of tasks", "accuracy, last task"]
    assert legend(figure) == ["l2", "none"]
    ax = figure.axes[0]
    mean, *dots, level = ax.lines
    assert list(mean.get_xdata()) == [0.001, 0.01, 0.02] and list(mean.get_ydata()) == pytest.approx([0.56, 0.65, 0.75])
    assert [list(dot.get_ydata()) for dot in dots] == [pytest.approx([a, a + 0.1]) for a in (0.51, 0.6, 0.7)]
    assert level.get_linestyle() == "--" and list(level.get_ydata()) == [0.5, 0.5]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "strength"


def test_a_strength_of_zero_and_the_default_one_are_levels(tmp_path, figures):
    sweep(tmp_path, "spectral", [0.0, None, 0.01, 0.02], lrs=(1e-3, 1e-2), seeds=(0,))
    draw_all(groups_of(tmp_path), tmp_path)
    labels = legend(figures["sensitivity.png"])
    of_one = ["spectral lr=0.001", "spectral lr=0.001 (default strength)", "spectral lr=0.001 (strength 0)"]
    assert sorted(labels) == sorted([*of_one, *(label.replace("0.001", "0.01") for label in of_one)])
    ticks = [text.get_text() for text in figures["sensitivity.png"].axes[0].get_xticklabels()]
    assert ticks == ["0.01", "0.02"]  # within a decade: what was tried
    assert "dots" not in figures["sensitivity.png"].get_suptitle()


def test_many_groups_are_drawn_method_by_method(tmp_path, figures):
    sweep(tmp_path, "none", [None])
    sweep(tmp_path, "l2", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], lrs=(1e-3, 1e-2))
    sweep(tmp_path, "a.b:C", [1e-3], seeds=(0,))
    pictures = {path.name for path in draw_all(groups_of(tmp_path), tmp_path)}
    assert pictures == {f"{kind}-{m}.png" for kind in ("curves", "network") for m in ("none", "l2", "a.b-C")} | {
        "sensitivity.png"
    }
    colors = [color for color, width, _ in lines(figures["curves-l2.png"].axes[0]) if width == 2.2]
    assert len(set(colors)) == 10 > len(COLORS)  # more than the palette has
    assert legend(figures["curves-none.png"]) == ["none lr=0.001"]


def test_none_at_two_learning_rates_beside_seven_methods_is_one_picture(tmp_path, figures):
    sweep(tmp_path, "none", [None], lrs=(1e-3, 3e-4))
    for method in ("l2", "l2-init", "parseval", "redo", "reset", "shrink-and-perturb", "spectral"):
        sweep(tmp_path, method, [None])
    pictures = {path.name for path in draw_all(groups_of(tmp_path), tmp_path)}
    assert pictures == {"curves.png", "network.png"}
    assert legend(figures["curves.png"])[:3] == ["none lr=0.0003", "none lr=0.001", "l2 lr=0.001"]
    colors = [color for color, width, _ in lines(figures["curves.png"].axes[0]) if width == 2.2]
    assert len(set(colors)) == 9 == len(COLORS)


def test_pictures_do_not_hide_anything(tmp_path, figures):
    """Titles, labels and the legend overlap neither each other nor the data, with long names too."""
    method = "a_package_of_mine.with_a_module:AndAMethod"
    sweep(tmp_path, method, [1e-4, 1e-3, 1e-2], lrs=(1e-3, 1e-2))
    sweep(tmp_path, "none", [None])
    draw_all(groups_of(tmp_path), tmp_path)
    assert set(figures) == {"curves.png", "network.png", "sensitivity.png"}
    for figure in figures.values():
        width, height = figure.get_size_inches() * figure.dpi
        boxes = [ax.get_tightbbox() for ax in figure.axes]  # with titles and labels
        boxes += [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
            assert not any(box.overlaps(other) for other in boxes[:i])
        assert all(ax.lines for ax in figure.axes)


def test_a_single_task_makes_pictures_too(tmp_path, figures):
    write_run(tmp_path / "a", [0.5])
    for path in draw_all(groups_of(tmp_path), tmp_path):
        for ax in figures[path.name].axes:
            assert [tick for tick in ax.get_xticks() if 0.5 <= tick <= 1.5] == [1]  # no fractions of a task
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and width >= 1000 and height >= 400


def test_without_data_there_is_no_picture(tmp_path):
    write_run(tmp_path / "a", [], finished=False)
    groups = groups_of(tmp_path)
    assert draw_all(groups, tmp_path) == [] and draw_all([], tmp_path) == []
    assert draw_over_tasks(groups, NETWORK, tmp_path / "x.png") is False and not list(tmp_path.glob("*.png"))


def test_a_long_label_stays_within_the_picture(tmp_path, figures):
    """Runs that differ in much have all of it in their labels."""
    write_run(tmp_path / "a", [0.5, 0.3])
    (group,) = groups_of(tmp_path)
    group = group._replace(label=", ".join(f"setting_{i}=0.{i}" for i in range(14)))
    draw_over_tasks([group], LEARNING, tmp_path / "curves.png")
    (figure,) = figures.values()
    (text,) = figure.legends[0].get_texts()
    assert "\n" in text.get_text() and text.get_text().replace("\n", " ") == group.label
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0
