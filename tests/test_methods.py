"""All methods: found by name, at work on every model and optimizer, resumed with the same bits, bad options refused."""

import inspect
from pathlib import Path

import pytest
import torch
from method_samples import MODELS, OPTIMIZERS, changed, equal, make

from spectral_ops.continual.choices import check_options, options_of
from spectral_ops.continual.methods import METHODS, Method, find_method

# So that every method acts within a few steps.
OPTIONS = {
    "redo": {"strength": 0.5, "period": 2},
    "continual-backprop": {"strength": 0.2, "maturity": 1},
    "shrink-and-perturb": {"source": "normal"},
    "weight-clipping": {"strength": 0.5},
}
ONLY_AT_BOUNDARIES = {name for name, kind in METHODS.items() if kind.task_boundaries}
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


class OfMyOwn(Method):
    """Found by module and class."""


# ---- names ----


def test_a_method_is_found_by_name_and_by_module_and_class():
    assert all(find_method(name) is kind for name, kind in METHODS.items())
    assert find_method(f"{__name__}:OfMyOwn") is OfMyOwn


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "l2-inti",
            ValueError,
            r"^method: expected one of none, l2, .*, reset, got 'l2-inti'. The nearest is 'l2-init'",
        ),
        (
            "no.such.module:A",
            ValueError,
            "^method: expected .* that can be imported, got 'no.such.module:A': No module",
        ),
        (":A", ValueError, "^method: expected .* that can be imported, got ':A': Empty module name. Install it"),
        (f"{__name__}:Nothing", ValueError, "^method: expected .* with a class of that module, got .*Nothing'. Name a"),
        (f"{__name__}:Path", TypeError, "^method: expected Path to be a subclass of Method, got .* Derive it from"),
        (f"{__name__}:DOCS", TypeError, "^method: expected DOCS to be a subclass of Method, got "),
    ],
)
def test_a_wrong_name_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        find_method(name)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("x = 1\nDecay = wrong", NameError, r"NameError: .*'wrong'.* \(broken.py, line 2\). Mend broken"),
        ("def (", SyntaxError, r"SyntaxError: .*\(broken.py, line 1\). Mend broken"),
        ("import no_such", ModuleNotFoundError, r"No module named 'no_such' \(broken.py, line 1\)"),
        ("import importlib\nimportlib.import_module('a', 3, 4)", TypeError, r"TypeError: .* \(broken.py, line 2\)"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_is_named_with_the_cause(tmp_path, monkeypatch, text, kind, message):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^method: expected .* got 'broken:Decay': .*{message}") as raised:
        find_method("broken:Decay")
    assert isinstance(raised.value.__cause__, kind) and "\n" not in str(raised.value)


def test_docs_have_every_method_and_option():
    text = DOCS.read_text()
    for name, kind in METHODS.items():
        assert f"| `{name}` |" in text, name
        assert all(f"`{option}`" in text for option in options_of(kind)), name


# ---- the contract ----


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_model(name, model):
    sample = make(name, model, **OPTIONS.get(name, {}))
    before = sample.copy()
    sample.train(range(3), boundary=1)
    after = sample.copy()
    assert all(value.isfinite().all() for value in after.values())
    assert {n for n, _ in sample.model.named_parameters()} <= changed(before, after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_acts_under_every_optimizer(name, optimizer):
    plain, sample = make("none", optimizer=optimizer), make(name, optimizer=optimizer, **OPTIONS.get(name, {}))
    for one in (plain, sample):
        one.train(range(6), boundary=3)
    same = equal(plain.copy(), sample.copy())
    # Nothing to forget without momentum.
    assert same == (name == "none" or (name == "optimizer-reset" and optimizer == "sgd"))


@pytest.mark.parametrize("name", sorted(ONLY_AT_BOUNDARIES))
def test_those_that_need_task_boundaries_do_nothing_between_them(name):
    plain, sample = make("none"), make(name)
    for one in (plain, sample):
        one.train(range(3))
    assert equal(plain.copy(), sample.copy())


@pytest.mark.parametrize(
    ("name", "options"), [*((name, OPTIONS.get(name, {})) for name in METHODS), ("spectral-norm", {"output": True})]
)
def test_the_global_random_state_is_left_alone(name, options):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    make(name, **options).train(range(4), boundary=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [(name, "mlp", {}) for name in METHODS]
    + [
        ("redo", "resnet18", {}),
        ("continual-backprop", "vit-tiny", {}),
        ("continual-backprop", "conv-crelu", {}),
        ("spectral", "conv", {"conv": "operator", "input_size": (1, 8, 8)}),
        ("spectral-norm", "vit-tiny", {"output": True}),
        ("shrink-and-perturb", "mlp", {"every": "step", "strength": 0.01, "noise": 0.01}),
        ("shrink-and-perturb", "mlp", {"source": "fresh"}),
    ],
)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_goes_on_with_the_same_bits(name, model, options, stop):
    whole, first, second = (make(name, model, **(OPTIONS.get(name, {}) | options)) for _ in range(3))
    whole.train(range(7), boundary=3)
    first.train(range(stop), boundary=3)
    second.load(first.saved())
    assert equal(first.copy(), second.copy())
    second.train(range(stop, 7), boundary=3)
    assert equal(whole.copy(), second.copy())
    pairs = zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True)
    assert all(equal(a, b) for a, b in pairs)


# ---- options ----


@pytest.mark.parametrize("name", METHODS)
def test_what_has_a_strength_has_a_grid_of_it(name):
    kind = METHODS[name]
    assert ("strength" in options_of(kind)) == bool(kind.grid)
    assert list(kind.grid) == sorted(set(kind.grid))
    for strength in kind.grid:
        make(name, strength=strength)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in options_of(kind).values())
    defaults = {option: p.default for option, p in options_of(kind).items() if p.default is not None}
    assert check_options(name, kind, defaults) == defaults


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l2", {"strength": -1.0}, "^l2: expected strength from 0 to inf, got -1.0. Set strength."),
        ("l2-decoupled", {"strength": float("nan")}, "^l2-decoupled: expected strength from 0 to inf, got nan."),
        ("l2-init", {"strength": -1.0}, "^l2-init: expected strength from 0 to inf"),
        ("wasserstein", {"strength": -1.0}, "^wasserstein: expected strength from 0 to inf"),
        ("parseval", {"strength": -1.0}, "^parseval: expected strength from 0 to inf"),
        ("parseval", {"scale": -2.0}, "^parseval: expected scale from 0 to inf, got -2.0. Set scale."),
        ("spectral", {"strength": -1.0}, "^SpectralRegularizer: expected strength to be finite and not negative"),
        ("weight-clipping", {"strength": -1.0}, "^weight-clipping: expected strength from 0 to inf"),
        ("shrink-and-perturb", {"strength": 1.5}, "^shrink-and-perturb: expected strength from 0 to 1, got 1.5."),
        ("shrink-and-perturb", {"noise": -0.1}, "^shrink-and-perturb: expected noise from 0 to inf"),
        ("shrink-and-perturb", {"every": "step"}, "^shrink-and-perturb: expected source normal .* set source=normal"),
        ("redo", {"strength": 2.0}, "^redo: expected strength from 0 to 1, got 2.0."),
        ("redo", {"period": 0}, "^redo: expected period from 1 to inf, got 0."),
        ("continual-backprop", {"strength": 2.0}, "^continual-backprop: expected strength from 0 to 1"),
        ("continual-backprop", {"decay": 1.1}, "^continual-backprop: expected decay from 0 to 1, got 1.1."),
        ("continual-backprop", {"maturity": -1}, "^continual-backprop: expected maturity from 0 to inf, got -1."),
        ("fire", {"iterations": 0}, "^fire: expected iterations from 1 to 1000, got 0."),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)
