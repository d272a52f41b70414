"""Streams of tasks: what each changes, and that it depends on (seed, task) alone."""

import pytest
import torch
from torch import nn

from spectral_ops.continual.data import Dataset
from spectral_ops.continual.streams import STREAMS, build_stream

CLASSES = 5


def images(count: int, seed: int, channels: int = 2) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (count, channels, 4, 3), generator=generator, dtype=torch.uint8)
    return Dataset(x, torch.arange(count) % CLASSES, CLASSES)


def stream(name: str, *, seed: int = 0, tasks: int = 4, samples: int | None = 40, held_out: int | None = 20, **options):
    common = {"seed": seed, "tasks": tasks, "samples": samples, "held_out_samples": held_out}
    return build_stream(name, images(60, 0), images(30, 1), options=options, **common)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES))


def same(a, b) -> bool:
    pairs = zip(a.__dict__.values(), b.__dict__.values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", STREAMS)
def test_a_task_depends_on_seed_and_number_alone(name):
    first, model = stream(name), linear()
    tasks = [first.task(t, model) for t in range(4)]
    torch.rand(3)  # nothing of the global random state is in it
    again = stream(name)
    assert all(same(again.task(t, model), tasks[t]) for t in (2, 0, 3, 1))  # in any order
    other = stream(name, seed=1)
    assert not all(same(other.task(t, model), tasks[t]) for t in range(4))


@pytest.mark.parametrize("name", STREAMS)
def test_consecutive_tasks_differ(name):
    made = stream(name)
    for t in range(3):
        now, then = made.task(t, linear(t)), made.task(t + 1, linear(t + 1))
        assert now.x.shape != then.x.shape or not torch.equal(now.x, then.x) or not torch.equal(now.y, then.y)


@pytest.mark.parametrize("name", STREAMS)
def test_shapes_and_types(name):
    made, model = stream(name), linear()
    assert made.input_shape == (2, 4, 3) and made.classes == CLASSES
    for t in range(4):
        task = made.task(t, model)
        assert task.x.dtype == torch.float32 and task.x.shape == (len(task.y), 2, 4, 3) and len(task.y) > 0
        assert task.y.dtype == torch.int64 and 0 <= task.y.min() and task.y.max() < CLASSES
        assert (task.held_out_x is None) == (task.held_out_y is None)
        if task.held_out_x is not None:
            assert task.held_out_x.shape == (len(task.held_out_y), 2, 4, 3)


def test_inputs_have_mean_zero_and_variance_one():
    made = stream("random-labels", samples=None, held_out=None)
    assert len(made.x) == 60 and len(made.held_out_x) == 30
    assert made.x.mean(0).abs().max() <= 1e-6
    assert abs(float(made.x.std()) - 1) <= 1e-6
    # Held-out images by the same numbers: pixels keep their order.
    raw = images(30, 1).images.float()
    pairs = torch.corrcoef(torch.stack([raw[:, 0, 0, 0].sort()[0], made.held_out_x[:, 0, 0, 0].sort()[0]]))
    assert pairs[0, 1] >= 0.999999


def test_random_labels_keep_the_images_and_are_even():
    made = build_stream("random-labels", images(5000, 0), images(5, 1), options={}, seed=0, tasks=2)
    a, b = made.task(0), made.task(1)
    assert torch.equal(a.x, b.x) and a.held_out_x is None
    # 5000 draws of 5 classes: 1000 each, standard deviation 28; agreement of two tasks likewise.
    assert (torch.bincount(a.y) - 1000).abs().max() <= 150
    assert abs(int((a.y == b.y).sum()) - 1000) <= 150


def test_permuted_pixels_shuffle_all_images_and_channels_alike():
    made = stream("permuted-pixels")
    task, plain = made.task(1), made.x
    order = [int((plain.flatten(2)[:, 0] == task.x.flatten(2)[:, :1, i]).all(0).nonzero()) for i in range(12)]
    assert sorted(order) == list(range(12)) and order != list(range(12))
    assert torch.equal(task.x.flatten(2), plain.flatten(2)[:, :, order])
    assert torch.equal(task.held_out_x.flatten(2), made.held_out_x.flatten(2)[:, :, order])
    assert torch.equal(task.y, made.y) and torch.equal(task.held_out_y, made.held_out_y)


def test_label_flipping_renames_whole_classes():
    made = stream("label-flipping")
    assert torch.equal(made.task(0).y, made.y)
    for t in (1, 2, 3):
        task = made.task(t)
        names = {int(old): int(new) for old, new in zip(made.y, task.y, strict=True)}
        assert sorted(names.values()) == list(range(CLASSES))
        assert torch.equal(task.y, torch.tensor([names[int(y)] for y in made.y]))
        assert torch.equal(task.held_out_y, torch.tensor([names[int(y)] for y in made.held_out_y]))


@pytest.mark.parametrize("cumulative", [True, False])
def test_class_incremental_adds_the_classes_in_order(cumulative):
    made = stream("class-incremental", tasks=3, classes_per_task=2, cumulative=cumulative)
    sets = [set(made.task(t).y.tolist()) for t in range(3)]
    if cumulative:
        assert [len(s) for s in sets] == [2, 4, 5] and sets[0] < sets[1] < sets[2]
    else:
        assert [len(s) for s in sets] == [2, 2, 1] and not sets[0] & sets[1] and not sets[1] & sets[2]
    assert all(set(made.task(t).held_out_y.tolist()) == sets[t] for t in range(3))


def test_a_task_without_a_held_out_sample_of_its_classes_holds_nothing_out():
    made = stream("class-incremental", tasks=5, held_out=1, classes_per_task=1, cumulative=False)
    held_out = [made.task(t).held_out_y for t in range(5)]
    assert sum(y is None for y in held_out) == 4 and sum(y is not None and len(y) == 1 for y in held_out) == 1


def test_images_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="expected training images that differ, got 1 without any variance"):
        stream("random-labels", samples=1)


def test_class_incremental_refuses_what_it_cannot_give():
    with pytest.raises(ValueError, match="expected at most 3 tasks of 2 new classes among 5, got 4"):
        stream("class-incremental", classes_per_task=2)
    with pytest.raises(ValueError, match="expected classes_per_task from 1 to 5, got 6"):
        stream("class-incremental", classes_per_task=6)
    with pytest.raises(ValueError, match="expected every class among the 2 samples, got none of"):
        stream("class-incremental", tasks=2, samples=2)


def test_data_incremental_grows_to_all_samples():
    made = stream("data-incremental")
    assert [len(made.task(t).y) for t in range(4)] == [10, 20, 30, 40]
    assert torch.equal(made.task(1).x[:10], made.task(0).x)
    assert torch.equal(made.task(0).held_out_x, made.held_out_x)


def test_next_label_moves_every_label_by_one():
    made = stream("next-label")
    assert torch.equal(made.task(0).y, made.y)
    assert torch.equal(made.task(2).y, (made.y + 2) % CLASSES)
    assert torch.equal(made.task(2).held_out_y, (made.held_out_y + 2) % CLASSES)


def test_least_likely_label_is_the_models_last_choice():
    made = stream("least-likely-label")
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, CLASSES))
    with torch.no_grad():
        model(torch.randn(64, 2, 4, 3))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    task = made.task(1, model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        scores = model(made.x)
    assert torch.equal(scores[torch.arange(40), task.y], scores.min(1)[0])
    assert torch.equal(made.task(0).y, made.y)
    with pytest.raises(ValueError, match="expected a model for task 1, got None"):
        made.task(1)


def test_more_samples_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"expected samples from 1 to the 60 images there are, got 61\. Change --samples"
    ):
        stream("random-labels", samples=61)
    with pytest.raises(ValueError, match="held_out_samples from 1 to the 30 .*, got 31. Change --held-out-samples"):
        stream("random-labels", held_out=31)


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match=r"stream: expected one of random-labels, .*, got 'random'\."):
        stream("random")
    with pytest.raises(
        ValueError, match="stream class-incremental: expected options among .*classes_per_task.*, got 'x'"
    ):
        stream("class-incremental", x=1)
    with pytest.raises(ValueError, match="stream random-labels: expected no options, got 'x'"):
        stream("random-labels", x=1)
    with pytest.raises(ValueError, match=r"outside of its options, got both\. Use --held-out-samples\."):
        build_stream("random-labels", images(60, 0), images(30, 1), options={"held_out_samples": 1}, seed=0, tasks=1)
    with pytest.raises(ValueError, match=r"expected seed outside of its options, got both\. Use --seed"):
        build_stream("random-labels", images(60, 0), images(30, 1), options={"seed": 1}, seed=0, tasks=1)
