"""Products of several pairs: the same by either library, and each taken where it should be."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.models import build_model, mlp_stacked, products
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.models.products import by_onednn, rows_for_onednn

ONEDNN = torch.backends.mkldnn.is_available()
# Of k terms in float32, in an order of their own: k roundings of the sum of absolute values, at the very most.
EPS = 2.0**-24


def pair(n, k, m, *, dtype=torch.float32, s=3):
    generator = torch.Generator().manual_seed(n + k + m)
    a, b, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((s, n, k), (s, k, m), (s, 1, m))
    )
    return a.to(dtype), b.to(dtype), bias.to(dtype)


def assert_is_product(got, a, b, bias=None):
    a, b = a.double(), b.double()
    expected, scale = a @ b, a.abs() @ b.abs()
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= (a.shape[2] + 1) * EPS * scale).all())


needs_onednn = pytest.mark.skipif(not ONEDNN, reason="without oneDNN")


@needs_onednn
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (3, 7, 5), (64, 100, 10), (33, 65, 129)])
def test_products(n, k, m):
    a, b, bias = pair(n, k, m)
    assert_is_product(by_onednn(a, b), a, b)
    assert_is_product(by_onednn(a, b, bias=bias), a, b, bias)
    out = torch.full((3, n, m), torch.nan)
    assert by_onednn(a, b, out=out) is out
    assert_is_product(out, a, b)


@needs_onednn
def test_transposed_pairs_and_places_within_another_tensor():
    a, b, bias = pair(12, 20, 9)
    a, b = a.mT.contiguous().mT, b.mT.contiguous().mT  # as a chain rule has them
    assert_is_product(by_onednn(a, b, bias=bias), a, b, bias)
    memory = torch.full((400,), 7.0)
    by_onednn(a, b, out=memory[16 : 16 + 3 * 12 * 9].view(3, 12, 9))
    assert_is_product(memory[16 : 16 + 3 * 12 * 9].view(3, 12, 9), a, b)
    assert bool((memory[:16] == 7).all() and (memory[16 + 3 * 12 * 9 :] == 7).all())


def test_the_least_rows(monkeypatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    assert rows_for_onednn(torch.empty(3, 256, 256)) == 128
    assert 41 < rows_for_onednn(torch.empty(3, 256, 784)) < 42
    assert rows_for_onednn(torch.empty(3, 10, 256)) > 3000
    for dtype in (torch.float64, torch.bfloat16):
        assert rows_for_onednn(torch.empty(3, 256, 256, dtype=dtype)) == math.inf
    assert rows_for_onednn(torch.empty(3, 256, 256, device="meta")) == math.inf


def test_without_avx512_never(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert rows_for_onednn(torch.empty(3, 256, 256)) == math.inf


@needs_onednn
def test_torch_has_the_operator_still():
    """Not a public one: where a version of torch takes it away, large batches of several seeds are 1.5 times slower."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert (rows_for_onednn(torch.empty(3, 256, 256)) == 128) == wide
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    assert schema.startswith("mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars")


@needs_onednn
@pytest.mark.parametrize("large", [1, math.inf], ids=["onednn", "mkl"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_networks_of_a_large_batch_have_their_own_gradients(norm, large, monkeypatch):
    monkeypatch.setattr(mlp_stacked, "rows_for_onednn", lambda w: large)
    taken = []
    monkeypatch.setattr(mlp_stacked, "by_onednn", lambda *args, **kwargs: taken.append(1) or by_onednn(*args, **kwargs))
    networks = [build_model("mlp", (1, 28, 28), 10, hidden=(256, 128), norm=norm) for _ in range(2)]
    alone = copy.deepcopy(networks)
    stack = Stack(networks)
    x, y = torch.randn(2, 256, 1, 28, 28), torch.randint(10, (2, 256))
    scores = stack.backward(x, y)
    for i, network in enumerate(alone):
        own = network.double()(x[i].double())
        F.cross_entropy(own, y[i]).backward()
        # float32 through three layers; 1e-6 measured.
        assert float((scores[i] - own).detach().abs().max()) <= 1e-5
        for key, p in network.named_parameters():
            gradient = stack.split(stack.model.get_parameter(key).grad)[i]
            assert float((gradient - p.grad).abs().max()) <= 1e-5 * float(p.grad.abs().max()), key
    assert len(taken) == (8 if large == 1 else 0)  # three layers' products, and the gradients of all but the images


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_more_samples_than_units(activation, norm):
    """What a layer gives is then the transpose of what lies there."""
    networks = [build_model("mlp", (1, 4, 4), 3, hidden=(5, 4), activation=activation, norm=norm) for _ in range(3)]
    networks = [network.double() for network in networks]
    alone, stack = copy.deepcopy(networks), Stack(networks)
    x, y = torch.randn(3, 20, 1, 4, 4, dtype=torch.float64), torch.randint(3, (3, 20))
    scores = stack.backward(x, y)
    for i, network in enumerate(alone):
        own = network(x[i])
        F.cross_entropy(own, y[i]).backward()
        assert float((scores[i] - own).detach().abs().max()) <= 1e-12
        for key, p in network.named_parameters():
            gradient = stack.split(stack.model.get_parameter(key).grad)[i]
            assert float((gradient - p.grad).abs().max()) <= 1e-12, key
