"""Which tensors SpectralAdamW takes as parameters, as torch's AdamW does, and which it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from optim_models import LR, STRENGTH
from regularizer_truth import refuses
from torch import Tensor, nn
from torch.optim import AdamW

from spectral_ops import SpectralAdamW


def matrix() -> Tensor:
    return torch.linspace(-1, 2, 20).view(5, 4).sin()


def steps(optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for step in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, step + 1.0) if p.requires_grad else None
        optimizer.step()


# ---- tensors that are no nn.Parameter ----


def test_plain_leaf_tensors() -> None:
    """As torch takes them: the step of the parameter with the same numbers."""
    p, bias = matrix().requires_grad_(), torch.ones(5, requires_grad=True)
    q, beside = nn.Parameter(matrix()), nn.Parameter(torch.ones(5))
    ours = SpectralAdamW([("w", p), ("bias", bias)], lr=LR, strength=STRENGTH)
    other = SpectralAdamW([("w", q), ("bias", beside)], lr=LR, strength=STRENGTH)
    assert [entry.held for entry in ours.entries] == [p, bias] and set(ours.sigmas()) == {"w"}
    for optimizer in (ours, other):
        steps(optimizer)
    assert same_bits(p.detach(), q.detach()) and same_bits(bias.detach(), beside.detach())
    copied = copy.deepcopy(ours)
    for optimizer in (copied, other):
        steps(optimizer)
    assert same_bits(copied.param_groups[0]["params"][0].detach(), q.detach())
    unnamed = SpectralAdamW([matrix().requires_grad_()], strength=0.1)
    steps(unnamed)
    assert set(unnamed.sigmas()) == {"0.0"}


# ---- dtypes ----

ODD = {
    "int8": lambda: nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False),
    "complex64": lambda: nn.Parameter(torch.ones(3, 4, dtype=torch.complex64), requires_grad=False),
}


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("dtype", list(ODD))
def test_frozen_parameters_of_other_dtypes_are_kept(dtype: str, with_model: bool) -> None:
    model = nn.Linear(4, 3)
    model.odd = ODD[dtype]()
    optimizer = SpectralAdamW(model.named_parameters(), model=model if with_model else None, strength=STRENGTH)
    (entry,) = [entry for entry in optimizer.entries if entry.name == "odd"]
    assert entry.layout is None and entry.reason == f"frozen, {dtype}" and entry.reason in repr(optimizer)
    steps(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer)
    assert torch.equal(model.odd, ODD[dtype]()) and model.odd not in optimizer.state
    listed = [name for name, _ in model.named_parameters()]
    excluding = SpectralAdamW(model.named_parameters(), strength=STRENGTH, exclude="odd")
    assert [entry.name for entry in excluding.entries] == listed


def test_one_that_is_thawed_is_refused_before_anything_is_changed() -> None:
    model = nn.Linear(4, 3)
    model.odd = ODD["complex64"]()
    optimizer = SpectralAdamW(model.named_parameters(), strength=STRENGTH)
    steps(optimizer)
    before = model.weight.detach().clone()
    model.odd.requires_grad_(True)
    condition = "expected parameter 'odd' to be float16, bfloat16, float32 or float64"
    with refuses(TypeError, f"SpectralAdamW: {condition}, got torch.complex64. Leave it to another optimizer."):
        steps(optimizer)
    assert same_bits(model.weight.detach(), before)
    with pytest.raises(TypeError, match="'odd' to be"):
        SpectralAdamW(model.named_parameters(), model=model, strength=STRENGTH)


# ---- memory ----

EXPANDED: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.ones(1, 4).expand(3, 4),
    "shift": lambda: torch.ones(1).expand(4),
}


@pytest.mark.parametrize("name", list(EXPANDED))
def test_elements_in_one_place(name: str, backend: str) -> None:
    """torch refuses to write to them, too."""
    p = nn.Parameter(EXPANDED[name]())
    other = nn.Parameter(matrix())
    for cls, options in ((AdamW, {}), (SpectralAdamW, {"strength": 0.0})):
        optimizer = cls([("other", other), (name, p)], lr=0.1, **options)  # type: ignore[operator]
        before = other.detach().clone()
        with pytest.raises((RuntimeError, ValueError)) as error:
            steps(optimizer, 1)
        assert (p == 1).all()
    assert same_bits(other.detach(), before)
    assert str(error.value) == (
        f"SpectralAdamW: expected {name} to have memory for every element, got an expanded tensor with strides "
        f"{p.stride()}. Make it contiguous."
    )


def test_frozen_ones_in_one_place_are_left() -> None:
    p = nn.Parameter(torch.ones(1, 4).expand(3, 4), requires_grad=False)
    optimizer = SpectralAdamW([nn.Parameter(matrix()), p], strength=STRENGTH)
    steps(optimizer)
    assert (p == 1).all()


def test_an_optimizer_that_was_built_on_meta() -> None:
    """to_empty has put other parameters into the model."""
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    optimizer = SpectralAdamW(model.parameters(), model=model, strength=STRENGTH)
    model.to_empty(device="cpu")
    remedy = "Materialise the model (to_empty or load_state_dict(assign=True)), then build the optimizer anew"
    with refuses(RuntimeError, f"SpectralAdamW: expected parameter 'weight' to hold data, got one on meta. {remedy}."):
        optimizer.step()


# ---- what is shown ----


def test_the_table_has_the_targets_of_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    groups = [{"params": model[:2].parameters(), "target": 3.25}, {"params": model[2].parameters()}]
    optimizer = SpectralAdamW(groups, model=model, strength=0.1)

    def targets() -> dict[str, str]:
        rows = [line.split() for line in repr(optimizer).splitlines()]
        return {row[0]: row[3] for row in rows if len(row) > 3 and row[0].endswith("weight")}

    assert targets() == {"0.weight": "3.25", "1.weight": "1", "2.weight": "1"}
    optimizer.param_groups[1]["target"] = 0.5
    assert targets()["2.weight"] == "0.5"
