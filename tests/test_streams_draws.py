"""What streams are drawn from: labels, batches and inputs that depend on the seed and the task alone."""

import torch

from spectral_ops.continual.data import load_digits
from spectral_ops.continual.streams.stream import stream_generator, stream_inputs, task_batches, task_labels


def test_streams_depend_on_seed_and_task_alone():
    labels, batches = task_labels(3, 5, 50), task_batches(3, 5, 50, 7, 8)
    torch.rand(9)
    task_labels(3, 4, 50)
    assert torch.equal(task_labels(3, 5, 50), labels) and torch.equal(task_batches(3, 5, 50, 7, 8), batches)
    for seed, task in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(task_labels(seed, task, 50), labels)
        assert not torch.equal(task_batches(seed, task, 50, 7, 8), batches)
    state = torch.get_rng_state()
    stream_inputs(load_digits()[0], 3, 50)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator
    assert stream_generator(3, 5, "labels").initial_seed() != stream_generator(3, 5, "batches").initial_seed()
    # The same in every version: the figures of the sweep rest on these streams.
    assert task_labels(10, 0, 12).tolist() == [1, 6, 1, 7, 5, 5, 6, 1, 8, 5, 2, 8]


def test_labels_are_uniform():
    counts = task_labels(0, 0, 100_000).bincount(minlength=10)
    assert len(counts) == 10 and (counts - 10_000).abs().max() <= 500  # five standard deviations of 95


def test_batches_pass_over_all_samples():
    batches = task_batches(0, 0, samples=20, steps=15, batch=4)  # three passes of five batches
    assert batches.shape == (15, 4)
    for one_pass in batches.view(3, 20):
        assert sorted(one_pass.tolist()) == list(range(20))
    assert task_batches(0, 0, samples=20, steps=3, batch=7).shape == (3, 7)  # 21 rows: the second pass is cut


def test_inputs_are_centred_and_scaled():
    x = stream_inputs(load_digits()[0], seed=0, samples=200)
    assert x.shape == (200, 64) and x.dtype == torch.float32
    assert x.mean(0).abs().max() <= 1e-5 and abs(float(x.std()) - 1) <= 1e-5
    assert not torch.equal(x, stream_inputs(load_digits()[0], seed=1, samples=200))
