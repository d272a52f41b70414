"""The trainer: what a run computes, what it writes down, and that it goes on after a stop with the same bits."""

import json
import threading
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spectral_ops.continual import steps, trainer
from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.data import Dataset
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.online import Online
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.streams.stream import stream_generator, task_batches
from spectral_ops.continual.trainer import Stopped, Trainer, run

SMALL = RunConfig(
    data="digits",
    model_options={"hidden": (12, 9)},
    tasks=3,
    samples=60,
    held_out_samples=40,
    steps=11,
    batch=8,
    probe_samples=20,
    checkpoint_seconds=0.0,
)
TIMES = ("step_seconds", "method_seconds")


def without_times(records):
    return [{key: value for key, value in r.items() if key not in TIMES} for r in records]


def weights(folder):
    return load_checkpoint(folder)["trainer"]["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint, and a look at `stop`, at every step."""
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)


def test_a_run_is_the_loop_one_would_write_by_hand(tmp_path):
    records = run(SMALL, tmp_path)
    made = Trainer(SMALL)
    torch.manual_seed(stream_generator(SMALL.seed, 0, "weights").initial_seed())
    model = trainer.build_model("mlp", (1, 8, 8), 10, hidden=(12, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=SMALL.lr, fused=True)
    for task in range(3):
        labels = made.stream.task(task).y
        correct = loss = 0.0
        for rows in task_batches(SMALL.seed, task, 60, 11, 8):
            scores = model(made.stream.x[rows])
            correct += int((scores.argmax(1) == labels[rows]).sum())
            value = F.cross_entropy(scores, labels[rows])
            loss += value.item()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            scores = model(made.stream.x)
        assert records[task]["accuracy"] == int((scores.argmax(1) == labels).sum()) / 60
        assert records[task]["online_accuracy"] == correct / 88
        # Means in float32 of 8, then of 11 against sums in float64: 1e-7 relative each.
        assert records[task]["online_loss"] == pytest.approx(loss / 11, rel=1e-6)
        assert records[task]["loss"] == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-6)
    assert same_weights(weights(tmp_path), model.state_dict())


def test_the_log_holds_what_was_run(tmp_path):
    records = run(SMALL, tmp_path)
    log = read_run(tmp_path)
    assert log.tasks == records and log.end["tasks"] == 3 and log.end["seconds"] > 0
    assert log.header["versions"]["torch"] == torch.__version__ and log.header["config"]["samples"] == 60
    assert [r["task"] for r in records] == [0, 1, 2]
    fields = {"accuracy", "online_accuracy", "held_out_accuracy", "loss", "sigma", "effective_rank", "stable_rank"}
    fields |= {"dormant", "duplicate", "weight_norm", "gradient_norm", "gradient_diversity", "penalty_ratio", *TIMES}
    assert fields <= set(records[0])
    assert json.loads((tmp_path / "config.json").read_text())["model_options"] == {"hidden": [12, 9]}


def test_measures_leave_the_run_as_it_is(tmp_path):
    run(SMALL, tmp_path / "a")
    run(replace(SMALL, probe_samples=60), tmp_path / "b")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_held_out_accuracy_is_that_of_other_samples():
    records = run(replace(SMALL, stream="permuted-pixels", tasks=1, steps=300, lr=3e-3))
    assert records[0]["accuracy"] > 0.9 and 0.3 < records[0]["held_out_accuracy"] < 1
    assert run(replace(SMALL, tasks=1))[0]["held_out_accuracy"] is None  # random labels


def test_the_penalty_ratio_is_measured_at_the_last_step():
    none, l2 = (run(replace(SMALL, tasks=1, method=m, strength=s))[0] for m, s in (("none", None), ("l2", 1e-2)))
    assert none["penalty_ratio"] == 0 and l2["penalty_ratio"] > 1e-3
    doubled = run(replace(SMALL, tasks=1, steps=1, method="l2", strength=2e-2))[0]
    once = run(replace(SMALL, tasks=1, steps=1, method="l2", strength=1e-2))[0]
    assert doubled["penalty_ratio"] == pytest.approx(2 * once["penalty_ratio"], rel=1e-4)  # of the very same gradients


def test_the_penalty_ratio_where_the_optimizer_takes_the_penalty_in():
    spectral = replace(SMALL, tasks=1, steps=5, method="spectral", strength=0.05, momentum=0.0)
    apart, folded = (run(replace(spectral, optimizer=o))[0]["penalty_ratio"] for o in ("adam", "spectral-adamw"))
    assert apart > 1e-2 and folded == pytest.approx(apart, rel=1e-5)  # rounding of float32 along five steps


def test_a_run_depends_on_its_seed_alone(tmp_path):
    run(SMALL, tmp_path / "a")
    torch.rand(5)
    state = torch.get_rng_state()
    run(SMALL, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own is untouched
    run(replace(SMALL, seed=1), tmp_path / "c")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same_weights(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_methods_see_the_same_stream_and_the_same_start():
    none, spectral = Trainer(SMALL), Trainer(replace(SMALL, method="spectral", strength=1e-3))
    assert torch.equal(none.stream.x, spectral.stream.x)
    assert torch.equal(none.stream.task(2).y, spectral.stream.task(2).y)
    assert same_weights(none.model.state_dict(), spectral.model.state_dict())


def test_methods_that_begin_anew_get_the_labels_of_the_network_before():
    config = replace(SMALL, stream="least-likely-label", tasks=2)
    none, reset = Trainer(config), Trainer(replace(config, method="reset"))
    for made in (none, reset):
        made.train_task()
        made.begin_task()
    assert torch.equal(none.samples[1], reset.samples[1])
    assert not same_weights(none.model.state_dict(), reset.model.state_dict())


def test_measures_are_of_evaluation_mode():
    config = replace(SMALL, model="resnet18", model_options={"width": 4}, tasks=1, steps=2, probe_samples=8)
    made = Trainer(config)
    (record,) = [made.train_task()]
    assert record["gradient_diversity"] is not None  # under BatchNorm's training mode there is none
    assert made.model.training


def test_random_labels_need_no_held_out_files(monkeypatch):
    load = trainer.load_dataset

    def training_files_alone(name, root=None, *, split="train", samples=None):
        assert split == "train"
        return load(name, root, split=split, samples=samples)

    monkeypatch.setattr(trainer, "load_dataset", training_files_alone)
    assert len(run(replace(SMALL, tasks=1))) == 1


def test_a_run_stopped_twice_after_a_damaged_checkpoint_goes_on(tmp_path, every_step):
    """The log was cut at the first resume: the checkpoints after it must know its new length."""

    early = tmp_path / "early.pt"

    def go_on(until):
        stop = threading.Event()

        def progress(*at):
            if at == (1, 5) and not early.exists():
                early.write_bytes((tmp_path / "checkpoint.pt").read_bytes())
            if at >= until:
                stop.set()

        with pytest.raises(Stopped):
            run(SMALL, tmp_path, resume=True, stop=stop, progress=progress)

    go_on((2, 0))  # task 1 is in the log
    (tmp_path / "checkpoint.pt").write_bytes(b"lost")
    early.rename(tmp_path / "checkpoint.previous.pt")
    go_on((1, 7))
    records = run(SMALL, tmp_path, resume=True)
    assert [r["task"] for r in records] == [0, 1, 2] == [r["task"] for r in read_run(tmp_path).tasks]


def stop_and_go_on(config, folder, generator):
    """The run, stopped at random steps and resumed until it is done; how often it was stopped."""
    stops = 0
    while True:
        wait = int(torch.randint(1, 14, (), generator=generator))
        stop, steps = threading.Event(), 0

        def progress(task, step, wait=wait, stop=stop):
            nonlocal steps
            steps += 1
            if steps >= wait:
                stop.set()

        try:
            return run(config, folder, resume=True, progress=progress, stop=stop), stops
        except Stopped:
            stops += 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_with_the_same_bits(tmp_path, every_step, method):
    config = replace(SMALL, tasks=2, steps=8, method=method, strength=1e-2 if METHODS[method].grid else None)
    whole = run(config, tmp_path / "whole")
    resumed, stops = stop_and_go_on(config, tmp_path / "parts", torch.Generator().manual_seed(1))
    assert stops >= 1
    assert without_times(resumed) == without_times(whole)
    assert without_times(read_run(tmp_path / "parts").tasks) == without_times(whole)
    assert same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": "least-likely-label"},  # the labels came from a model that is no more
        {"model": "resnet18", "model_options": {"width": 4}, "steps": 4, "tasks": 2},
        {"optimizer": "sgd", "momentum": 0.9, "lr": 1e-2},
        {"stream": "data-incremental"},
    ],
    ids=lambda c: next(iter(c.values())),
)
def test_every_kind_of_run_goes_on_with_the_same_bits(tmp_path, every_step, changes):
    config = replace(SMALL, **changes)
    whole = run(config, tmp_path / "whole")
    resumed, stops = stop_and_go_on(config, tmp_path / "parts", torch.Generator().manual_seed(2))
    assert stops >= 1 and without_times(resumed) == without_times(whole)
    assert same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_damaged_checkpoint_costs_only_time(tmp_path, every_step, capsys):
    whole = run(SMALL, tmp_path / "whole")
    stop = threading.Event()
    with pytest.raises(Stopped):
        run(
            SMALL,
            tmp_path / "parts",
            stop=stop,
            progress=lambda task, step: stop.set() if (task, step) == (1, 5) else None,
        )
    (tmp_path / "parts" / "checkpoint.pt").write_bytes(b"lost")
    resumed = run(SMALL, tmp_path / "parts", resume=True)
    assert "The one before is tried" in capsys.readouterr().err
    assert without_times(resumed) == without_times(whole)
    assert same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_tasks_shorter_than_a_look_at_stop_are_stopped_between(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run(SMALL, tmp_path, stop=stop)
    assert len(read_run(tmp_path).tasks) == 1 and load_checkpoint(tmp_path)["trainer"]["task"] == 1
    assert len(run(replace(SMALL, tasks=1), stop=stop)) == 1  # nothing was left to stop


@pytest.mark.parametrize(("batch", "classes"), [(4, 7), (1, 10), (37, 3), (256, 100)])
def test_online_sums_are_the_same_wherever_they_are_cut(batch, classes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, batch, classes, generator=generator)
    labels = torch.randint(classes, (50, batch), generator=generator)
    whole, parts = (Online(batch, classes) for _ in range(2))
    for i in range(50):
        whole.add(scores[i], labels[i])
        parts.add(scores[i], labels[i])
        if i % 7 == 3:
            state = parts.state_dict()
            parts = Online(batch, classes)
            parts.load_state_dict(state)
    assert whole.means() == parts.means()


def test_online_lets_scores_go_after_some_steps_so_that_they_do_not_pin_the_heap():
    online, kept = Online(4, 7), []
    correct, losses = 0, []
    for i in range(300):
        scores, labels = torch.randn(4, 7), torch.randint(7, (4,))
        correct += int((scores.argmax(1) == labels).sum())
        losses.append(float(F.cross_entropy(scores.double(), labels, reduction="sum")))
        online.add(scores, labels)
        kept.append(weakref.ref(scores))
        del scores
        assert sum(ref() is not None for ref in kept) <= 64, i
    # Sums of float64: 1e-12 is some hundred roundings.
    means = {"online_accuracy": correct / 1200, "online_loss": sum(losses) / 1200}
    assert online.means() == pytest.approx(means, rel=1e-12)


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    records = run(SMALL, tmp_path)
    monkeypatch.setattr(trainer, "Trainer", None)
    assert run(SMALL, tmp_path) == run(SMALL, tmp_path, resume=True) == records


def test_another_configuration_in_the_folder_is_refused(tmp_path):
    run(replace(SMALL, tasks=1), tmp_path)
    with pytest.raises(ValueError, match="got one of another"):
        run(replace(SMALL, tasks=1, lr=0.5), tmp_path, resume=True)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(run(replace(SMALL, tasks=2))) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["spectral", "redo"])
def test_on_cuda_as_on_the_cpu_and_resumed(tmp_path, every_step, monkeypatch, method):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (80, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = Dataset(images, torch.arange(80) % 10, 10)  # scikit-learn and its digits may be missing there
    monkeypatch.setattr(trainer, "load_dataset", lambda *arguments, **options: data)
    config = replace(SMALL, method=method, strength=1e-2, tasks=2, steps=5)
    on_cpu, on_cuda = run(config), run(replace(config, device="cuda"), tmp_path / "whole")
    # The same first steps up to rounding; later ones drift apart.
    assert on_cuda[0]["online_loss"] == pytest.approx(on_cpu[0]["online_loss"], rel=1e-3)
    resumed, _ = stop_and_go_on(replace(config, device="cuda"), tmp_path / "parts", torch.Generator().manual_seed(1))
    assert [r["online_loss"] for r in resumed] == pytest.approx([r["online_loss"] for r in on_cuda], rel=1e-3)


def test_a_network_that_diverged_is_logged_as_null():
    diverging = {"lr": 100.0, "optimizer": "sgd", "method": "l2", "strength": 1.0}  # weights times -199 at each step
    records = run(replace(SMALL, tasks=1, steps=40, **diverging))
    json.dumps(records, allow_nan=False)
    assert records[0]["loss"] is None and records[0]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 0}, r"expected tasks from 1 to inf, got 0\. Change tasks \(--tasks\)\."),
        ({"lr": -1.0}, "expected lr from 0 to 100, got -1.0"),
        ({"lr": float("nan")}, "expected lr from 0 to 100, got nan"),
        ({"held_out_samples": -1}, r"from 0 to inf, got -1\. Change held_out_samples \(--held-out-samples\)\."),
        ({"momentum": 0.5}, "expected momentum 0 with adam, got 0.5"),
        ({"strength": 1.0, "method": "l2", "options": {"strength": 2.0}}, "expected one strength"),
        ({"method": "none", "strength": 1.0}, "method none: expected no options, got 'strength'"),
        ({"method": "l3"}, "expected one of none, .*, got 'l3'"),
        ({"model": "mpl"}, "expected one of mlp, .*, got 'mpl'. The nearest is 'mlp'"),
        ({"stream": "x"}, "stream: expected one of"),
        ({"data": "mnits"}, "expected one of .*mnist.*, got 'mnits'"),
        (
            {"optimizer": "adma"},
            "optimizer: expected one of adam, sgd, spectral-adamw, got 'adma'. The nearest is 'adam'",
        ),
        ({"device": "tpu"}, "expected device to be cpu or cuda"),
        ({"batch": 0}, "expected batch from 1 to inf"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(SMALL, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _SetWhenLookedAt(threading.Event):
    """A signal that comes right after one of the looks at it."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def is_set(self):
        was = super().is_set()
        self.looks -= 1
        if self.looks == 0:
            self.set()
        return was


@pytest.mark.parametrize("looks", [3, 4])
def test_a_stop_has_a_checkpoint_of_where_it_was_whenever_it_comes(tmp_path, every_step, looks):
    rarely, steps = replace(SMALL, checkpoint_seconds=1e9), []
    with pytest.raises(Stopped):
        run(rarely, tmp_path, stop=_SetWhenLookedAt(looks), progress=lambda *at: steps.append(at))
    state = load_checkpoint(tmp_path)["trainer"]
    assert (state["task"], state["step"]) == steps[-1]
