"""Groups of seeds: as many runs at once as the cache holds, one group after the other, the same after a crash."""

import pytest
import torch
from ensemble_samples import (
    SMALL,
    TOLERANCE,
    folders,
    same_bits,
    stop_at,
    weights,
    with_seeds,
    without_times,
)

from spectral_ops.continual import ensemble, steps
from spectral_ops.continual.ensemble import groups, run_together
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.journal import Journal
from spectral_ops.continual.models import build_model
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.trainer import Stopped

FIVE = (3, 0, 7, 1, 4)


def shared(paths):
    """How many runs shared the steps of each."""
    return [read_run(path).header["together"] for path in paths]


@pytest.mark.parametrize(
    ("cache", "parameters", "threads", "runs"),
    [
        (32 << 20, 1_077_288, 2, 4),  # MLP 784-256-256-10: 5.2 fit
        (32 << 20, 1_077_288, 1, 5),
        (32 << 20, 1_077_288, 8, 5),  # less than one for each thread
        (32 << 20, 50_000_000, 2, 2),  # not even one fits
        (32 << 20, 10_000, 4, 556),  # 559.2
    ],
)
def test_as_many_as_the_cache_holds(monkeypatch, cache, parameters, threads, runs):
    monkeypatch.setattr(groups, "cache_bytes", lambda: cache)
    assert groups.runs_at_once(parameters, threads) == runs


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"index0": "48K\n", "index2": "1024K\n", "index3": "32768K\n"}, 32 << 20),
        ({"index0": "32K\n"}, 32 << 10),
        ({"index0": "unknown\n", "index1": "\n"}, 16 << 20),
        ({}, 16 << 20),
    ],
)
def test_the_cache_is_the_largest_that_the_system_names(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(text)
    assert groups.cache_bytes(tmp_path) == found
    assert groups.cache_bytes(tmp_path / "none") == 16 << 20


def test_the_cache_decides_and_at_once_overrules_it(tmp_path, monkeypatch):
    configs = with_seeds(SMALL, FIVE)
    asked = []
    monkeypatch.setattr(ensemble, "runs_at_once", lambda *given: asked.append(given) or 3)
    run_together(configs, folders(tmp_path / "cache", configs))
    assert shared(folders(tmp_path / "cache", configs)) == [3, 3, 3, 2, 2]
    model = build_model("mlp", (1, 8, 8), 10, **SMALL.model_options)
    assert asked == [(4 * sum(p.numel() for p in model.parameters()), SMALL.threads)]
    run_together(configs, folders(tmp_path / "told", configs), at_once=4)
    assert shared(folders(tmp_path / "told", configs)) == [4, 4, 4, 4, 1] and len(asked) == 1
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"expected at_once to be an integer >= 1, got {wrong}. Leave it out"):
            run_together(configs, at_once=wrong)


def test_finished_runs_do_not_decide_the_groups_of_others(tmp_path):
    configs = with_seeds(SMALL, FIVE)
    paths = folders(tmp_path, configs)
    run_together(configs[:2], paths[:2], at_once=1)
    run_together(configs, paths, at_once=None)
    assert shared(paths) == [1, 1, 3, 3, 3]  # what is left of a group of all: the cache holds these small ones


def test_groups_end_where_all_together_do():
    configs = with_seeds(SMALL, FIVE)
    for own, other in zip(run_together(configs, at_once=2), run_together(configs, at_once=5), strict=True):
        assert [record["accuracy"] for record in own] == [record["accuracy"] for record in other]
        for a, b in zip(own, other, strict=True):
            assert a["weight_norm"] == pytest.approx(b["weight_norm"], rel=TOLERANCE)


def stop_in_group(number, point):
    """Arguments of a call that is stopped after this step of this group, the first one being 0."""
    given, begun = stop_at((-1, -1)), []

    def progress(task, step):
        if (task, step) == (0, 1):
            begun.append(1)
        if len(begun) == number + 1 and (task, step) == point:
            given["stop"].set()

    return given | {"progress": progress}


@pytest.mark.parametrize("at", [(0, (0, 4)), (0, (2, 0)), (1, (1, 3)), (2, (0, 6))], ids=str)
def test_groups_go_on_with_the_same_bits(tmp_path, monkeypatch, at):
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)
    configs = with_seeds(SMALL, FIVE)
    whole, parts = folders(tmp_path / "whole", configs), folders(tmp_path / "parts", configs)
    records = run_together(configs, whole, at_once=2)
    with pytest.raises(Stopped):
        run_together(configs, parts, at_once=2, **stop_in_group(*at))
    begun = [path.exists() for path in parts]
    # A stop between two groups begins none.
    assert begun == [i // 2 <= at[0] for i in range(5)]
    resumed = run_together(configs, parts, at_once=2, resume=True)
    assert shared(parts) == [2, 2, 2, 2, 1]
    for a, b, one, other in zip(records, resumed, whole, parts, strict=True):
        assert without_times(a) == without_times(b) and same_bits(weights(one), weights(other))


def test_a_crash_while_a_group_ends_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    configs = with_seeds(SMALL, FIVE)
    whole, parts = folders(tmp_path / "whole", configs), folders(tmp_path / "parts", configs)
    run_together(configs, whole, at_once=3)
    original = Journal.end

    def end(journal, records):
        if journal.folder == parts[1]:
            raise KeyboardInterrupt
        original(journal, records)

    monkeypatch.setattr(Journal, "end", end)
    with pytest.raises(KeyboardInterrupt):
        run_together(configs, parts, at_once=3)
    monkeypatch.setattr(Journal, "end", original)
    assert [path.exists() and read_run(path).finished for path in parts] == [True, False, False, False, False]
    run_together(configs, parts, at_once=3, resume=True)
    assert shared(parts) == [3, 3, 3, 2, 2]  # not a new group of seeds 0, 7 and 1
    assert all(same_bits(weights(one), weights(other)) for one, other in zip(whole, parts, strict=True))


def test_groups_stay_as_they_began_whatever_the_cache_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)
    configs = with_seeds(SMALL, FIVE)
    whole, parts = folders(tmp_path / "whole", configs), folders(tmp_path / "parts", configs)
    monkeypatch.setattr(ensemble, "runs_at_once", lambda *given: 2)
    run_together(configs, whole)
    with pytest.raises(Stopped):
        run_together(configs, parts, **stop_in_group(1, (0, 5)))
    monkeypatch.setattr(ensemble, "runs_at_once", lambda *given: 5)
    with pytest.raises(ValueError, match="of one point, got .*Leave at_once out, give --together as it was, or go on"):
        run_together(configs, parts, at_once=5, resume=True)
    run_together(configs, parts, resume=True)
    assert all(same_bits(weights(one), weights(other)) for one, other in zip(whole, parts, strict=True))
    assert [read_run(path).header["at_once"] for path in parts] == [2] * 5


def test_a_parameter_that_is_not_trained_gets_no_gradient():
    networks = [build_model("mlp", (1, 4, 4), 3, hidden=(5,), norm="layer") for _ in range(2)]
    for network in networks:
        for name in ("layers.0.incoming.weight", "layers.0.norm.bias"):
            network.get_parameter(name).requires_grad_(False)
    stack = Stack(networks)
    stack.backward(torch.randn(2, 6, 1, 4, 4), torch.randint(3, (2, 6)))
    without = [name for name, p in stack.model.named_parameters() if p.grad is None]
    assert without == ["layers.0.incoming.weight", "layers.0.norm.bias"]
