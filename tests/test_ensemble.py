"""Many seeds at once: each network ends where it would alone, and its folder is a single run's."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ensemble_samples import ADAM, FOLDED, MODELS, SMALL, TIMES, TOLERANCE, distance, folders, weights, with_seeds

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.ensemble import passes, run_together
from spectral_ops.continual.ensemble.ensemble import Ensemble
from spectral_ops.continual.ensemble.methods import MAKERS
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.methods import METHODS, Method
from spectral_ops.continual.models import build_model
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.trainer import Trainer, run

NAMES = [name for name, kind in METHODS.items() if kind in MAKERS]
STRENGTHS = {
    "weight-clipping": 0.8,
    "spectral": 0.05,
    "parseval": 0.01,
    "l2": 1e-2,
    "l2-init": 1e-2,
    "l2-decoupled": 0.1,
}


def numbers(record):
    """{"sigma/layers.0": 1.2, ...}"""
    items = [(f"{k}/{n}", v) for k, d in record.items() if isinstance(d, dict) for n, v in d.items()]
    return dict(items) | {k: v for k, v in record.items() if not isinstance(v, dict) and k not in (*TIMES, "kind")}


def assert_as_alone(config, path):
    """All seeds together end where each ends alone, and say the same of it; the weights of those alone."""
    configs = with_seeds(config)
    alone = [run(c, f) for c, f in zip(configs, folders(path / "alone", configs), strict=True)]
    together = run_together(configs, folders(path / "together", configs))
    for a, b in zip(alone, together, strict=True):
        for one, other in zip(a, b, strict=True):
            one, other = numbers(one), numbers(other)
            assert one.keys() == other.keys()
            for key, value in one.items():
                if value is None:
                    assert other[key] is None, key
                else:
                    assert abs(other[key] - value) <= 1e-5 * (1 + abs(value)), (
                        key
                    )  # 1e-6 measured, of a gradient's norm
    ends = [weights(folder) for folder in folders(path / "alone", configs)]
    for end, folder in zip(ends, folders(path / "together", configs), strict=True):
        assert distance(end, weights(folder)) <= TOLERANCE
    return ends


# ---- the same as alone ----


KINDS = [*MODELS.items(), ("resnet18", {"width": 4, "norm": "group"})]
KINDS += [
    ("mlp", {"hidden": (9, 7), "activation": activation, "norm": norm})
    for activation in ("relu", "gelu", "tanh")
    for norm in ("none", "layer-plain")
]
KINDS += [("mlp", {"hidden": ()}), ("vit-tiny", {**MODELS["vit-tiny"], "norm": "layer-plain"})]


@pytest.mark.parametrize(
    ("name", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_gradients_are_each_network_s_own(name, options):
    networks = [build_model(name, (1, 8, 8), 10, **options).double() for _ in range(3)]
    alone = copy.deepcopy(networks)
    stack = Stack(networks)
    x, y = torch.randn(3, 8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (3, 8))
    scores = stack.backward(x, y)
    for i, network in enumerate(alone):
        own = network(x[i])
        F.cross_entropy(own, y[i]).backward()
        assert float((scores[i] - own).detach().abs().max()) <= 1e-10
        for key, p in network.named_parameters():
            gradient = stack.split(stack.model.get_parameter(key).grad)[i]
            # 4e-11 measured of resnet18, whose norms divide by nearly nothing at 1 x 1; 2e-15 of the others.
            assert float((gradient - p.grad).abs().max()) <= 1e-8 * (1 + float(p.grad.abs().max())), key


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Where the networks end without a method."""
    configs, path = with_seeds(SMALL), tmp_path_factory.mktemp("none")
    run_together(configs, folders(path, configs))
    return [weights(folder) for folder in folders(path, configs)]


@pytest.mark.parametrize("method", NAMES)
def test_every_method_does_as_it_does_alone(tmp_path, bare, method):
    ends = assert_as_alone(replace(SMALL, method=method, strength=STRENGTHS.get(method)), tmp_path)
    assert method == "none" or min(map(distance, ends, bare)) > 200 * TOLERANCE


@pytest.mark.parametrize(
    ("model", "method"),
    [
        *((model, "spectral") for model in MODELS),
        ("conv", "weight-clipping"),
        ("conv", "fire"),
        ("vit-tiny", "parseval"),
    ],
)
def test_every_model_does_as_it_does_alone(tmp_path, model, method):
    changes = {"model": model, "model_options": MODELS[model], "method": method, "strength": STRENGTHS.get(method)}
    assert_as_alone(replace(SMALL, **changes), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        ADAM,
        FOLDED,
        FOLDED | {"options": {"output": False, "target": 0.5, "exponent": 1.0}},
        # Its own order of classes for each seed, and so another number of samples.
        {"stream": "class-incremental", "stream_options": {"classes_per_task": 3}},
        {"stream": "least-likely-label"},  # reads the networks
        {"method": "spectral", "strength": 0.05, "options": {"output": False, "target": 0.5, "exponent": 1.0}},
        {"method": "spectral", "strength": 0.05, "options": {"weights": False}},
        {"method": "shrink-and-perturb", "options": {"source": "normal"}},  # noise of each seed's own
        {"method": "parseval", "options": {"output": True, "scale": 0.7}},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_kind_of_run_does_as_it_does_alone(tmp_path, changes):
    assert_as_alone(replace(SMALL, **changes), tmp_path)


def test_a_method_with_a_penalty_of_its_own(monkeypatch, tmp_path):
    class Decay(Method):
        grid = (1.0,)

        def __init__(self, context, *, strength: float = 1e-2):
            super().__init__(context)
            self.strength = strength

        def penalty(self):
            return self.strength * sum(p.square().sum() for p in self.context.model.parameters())

    monkeypatch.setitem(METHODS, "decay", Decay)
    monkeypatch.setitem(MAKERS, Decay, MAKERS[METHODS["l2"]])
    ends = assert_as_alone(replace(SMALL, method="decay"), tmp_path / "decay")
    l2 = assert_as_alone(replace(SMALL, method="l2", strength=1e-2), tmp_path / "l2")
    assert max(map(distance, ends, l2)) <= TOLERANCE


def test_a_step_is_one_step_of_all(monkeypatch):
    calls = {"backward": 0, "penalty": 0, "optimizer": 0}

    def counted(kind, name, key):
        original = getattr(kind, name)

        def call(*args, **kwargs):
            calls[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, name, call)

    counted(Stack, "backward", "backward")
    counted(SpectralRegularizer, "accumulate_grad_", "penalty")
    counted(torch.optim.SGD, "step", "optimizer")
    run_together(with_seeds(replace(SMALL, method="spectral")))
    assert calls == {"backward": 18, "penalty": 18, "optimizer": 18}


def test_layers_take_the_fast_forms(monkeypatch):
    calls = []
    for name in ("_linear", "_attention"):
        original = getattr(passes, name)
        monkeypatch.setattr(
            passes, name, lambda *args, name=name, original=original: calls.append(name) or original(*args)
        )
    stack = Stack([build_model("vit-tiny", (1, 8, 8), 10, **MODELS["vit-tiny"]) for _ in range(2)])
    stack.backward(torch.randn(2, 3, 1, 8, 8), torch.randint(10, (2, 3)))
    assert calls.count("_linear") == 2 * 4 + 1 and calls.count("_attention") == 2


# ---- folders ----


def test_every_folder_is_that_of_a_run(tmp_path):
    configs = with_seeds(SMALL)
    paths = folders(tmp_path / "together", configs)
    records = run_together(configs, paths)
    run(configs[0], tmp_path / "alone")
    alone = read_run(tmp_path / "alone")
    for config, path, own in zip(configs, paths, records, strict=True):
        log = read_run(path)
        assert log.tasks == own and log.end["tasks"] == 2 and log.end["seconds"] > 0
        assert log.header.keys() == alone.header.keys() | {"together", "at_once"} and log.header["together"] == 2
        assert log.header["config"]["seed"] == config.seed
        assert [t.keys() for t in log.tasks] == [t.keys() for t in alone.tasks]
        assert all(0 < t["method_seconds"] < t["step_seconds"] for t in log.tasks)
        # A view saved with all that it looks at would make it twice as large.
        sizes = [(folder / "checkpoint.pt").stat().st_size for folder in (path, tmp_path / "alone")]
        assert sizes[0] <= 1.1 * sizes[1]
        assert run(config, path) == own  # finished: read
    states = [load_checkpoint(folder)["trainer"] for folder in (paths[0], tmp_path / "alone")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("random", "generator"))
    shared = sum(records[0][0]["step_seconds"] for _ in configs)
    assert shared == pytest.approx(sum(own[0]["step_seconds"] for own in records))


def test_seconds_are_shared():
    made = Ensemble([Trainer(config) for config in with_seeds(SMALL)])
    made.seconds = [6.0, 3.0]
    assert [state["seconds"] for state in made.state_dicts()] == [[3.0, 1.5]] * 2


def test_the_caller_s_state_is_untouched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    assert [len(records) for records in run_together(with_seeds(SMALL))] == [2, 2]
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 2
    assert not list(tmp_path.iterdir())
