"""What probe is given by mistake: the error names the argument, and torch's own is its cause."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measured import batch, small
from torch import nn

from spectral_ops.continual.measures import probe

X, Y = batch()


def error_of(*arguments, kind=ValueError, **options):
    with pytest.raises(kind) as caught:
        probe(*arguments, **options)
    return str(caught.value), caught.value.__cause__


@pytest.mark.parametrize("model", [[small("mlp")], None, torch.relu, nn.Linear], ids=["list", "None", "relu", "class"])
def test_what_is_no_model_is_refused(model):
    text, _ = error_of(model, (X, Y), kind=TypeError)
    assert text.startswith(f"probe: expected model to be a torch.nn.Module, got {type(model).__name__}. Write probe(")


@pytest.mark.parametrize(
    ("x", "shown", "cause"),
    [
        (X[:, :, :5], "(7, 1, 5, 8) and float32", RuntimeError),
        (X.double(), "(7, 1, 8, 8) and float64", RuntimeError),
        (torch.zeros(7, dtype=torch.int64), "(7,) and int64", IndexError),
    ],
    ids=["shape", "dtype", "dimensions"],
)
def test_inputs_that_the_model_cannot_take_are_refused(x, shown, cause):
    text, original = error_of(small("mlp"), (x, Y))
    expected = f"probe: expected batch to hold inputs x that the model takes, of shape {shown} on cpu, got "
    assert text.startswith(expected + cause.__name__) and text.endswith(". Correct x, or the model.")
    assert type(original) is cause and str(original).splitlines()[0] in text


@pytest.mark.parametrize(
    ("y", "shown"), [(Y.float(), "(7,) and float32"), (Y[:, None], "(7, 1) and int64")], ids=["float", "column"]
)
def test_targets_that_cross_entropy_cannot_take_are_refused(y, shown):
    text, original = error_of(small("mlp"), (X, y))
    shapes = f"{shown} on cpu for scores of shape (7, 3) and float32 on cpu, got RuntimeError: "
    assert text.startswith(f"probe: expected batch to hold targets y that the loss takes, of shape {shapes}")
    assert text.endswith(". Give the number of a class for each sample, int64 (N,); loss=... is for other targets.")
    assert isinstance(original, RuntimeError)


@pytest.mark.parametrize("label", [24, -1, 3])
def test_a_label_without_a_score_is_refused(label):
    y = Y.clone()
    y[3] = label
    text, _ = error_of(small("mlp"), (X, y))
    expected = f"probe: expected batch to hold targets y from 0 to 2, the model's 3 scores, got {label}. "
    assert text == expected + "Number the classes from 0, or give the model more scores."
    text, original = error_of(small("mlp"), (X, y), loss=partial(F.cross_entropy, label_smoothing=0.1))
    assert "got IndexError: Target " in text and text.endswith(". Correct y, or pass the loss that takes it.")
    assert isinstance(original, IndexError)


def test_what_cross_entropy_takes_is_taken():
    model, ignored = small("mlp"), Y.clone()
    ignored[0] = -100
    assert probe(model, (X, ignored))["loss"] == F.cross_entropy(model(X), ignored).item()
    shares = F.one_hot(Y, 3).float()
    assert probe(model, (X, shares))["loss"] == pytest.approx(F.cross_entropy(model(X), Y).item())


def test_a_fault_of_the_model_s_own_comes_as_it_is():
    class Broken(nn.Linear):
        def forward(self, x):
            return self.nothing

    with pytest.raises(AttributeError, match="nothing"):
        probe(Broken(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)))

    class Full(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="^full"):
        probe(Full(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)))
