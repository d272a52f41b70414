"""bench/train_vit.py in one process: its options, data, network, checkpoints and accounts."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_fixtures import _one_thread  # noqa: F401
from train_vit_runs import SMALLEST, STEPS, losses, train

if not dist.is_available():
    pytest.skip("needs torch.distributed, which this build lacks", allow_module_level=True)

from bench.models import ViT  # noqa: E402
from bench.train_vit import main  # noqa: E402
from bench.transformer import VisionTransformer  # noqa: E402
from bench.vit_training import checkpoint, memory, network  # noqa: E402
from bench.vit_training.data import Batches, load, synthetic  # noqa: E402
from bench.vit_training.loop import WARMUP_SHARE, learning_rate  # noqa: E402
from bench.vit_training.options import PENALTIES, Options  # noqa: E402
from bench.vit_training.processes import Processes  # noqa: E402
from spectral_ops import SpectralRegularizer  # noqa: E402

ALONE = Processes("cpu", 0, 1, 1)
TINY = Options(model="vit-nano", image=32, classes=4, samples=20, batch=6, device="cpu", implementation="reference")


def run(tmp_path: Path, *options: object) -> dict[str, Any]:
    return train(1, tmp_path / "out.json", *options)


# ---- options ----


@pytest.mark.parametrize(
    "options, said",
    [
        (["--steps", "0"], "train_vit: expected --steps >= 1, got 0. Change it."),
        (["--stop-at", "0"], "train_vit: expected --stop-at >= 1, got 0."),
        (["--strength", "nan"], "train_vit: expected --strength finite and not negative, got nan."),
        (["--learning-rate", "-1"], "train_vit: expected --learning-rate finite and not negative, got -1.0."),
        (["--penalty", "l2", "l2"], "train_vit: expected every --penalty once, got l2 l2. Leave the second one out."),
        (["--resume"], "train_vit: expected --checkpoint with --resume, got none. Name the folder of the checkpoints."),
        (["--checkpoint-every", "2"], "train_vit: expected --checkpoint with --checkpoint-every, got none."),
        (["--replicas", "2"], "train_vit: expected --shard hsdp with --replicas, got None. Add it, or leave --replic"),
        (["--shard", "fsdp"], "train_vit: expected torchrun for --shard fsdp, got one process without it. Start it w"),
        (["--batch", "25"], "train_vit: expected --batch <= the 24 images, got 25. Change --samples."),
        (["--patch", "5"], "train_vit: expected --patch to divide the image, 32, got 5. Set --patch."),
        (["--implementation", "timm"], "train_vit: expected timm for --implementation timm, got No module named"),
        (["--data", "tiny-imagenet", "--data-root", "/nowhere"], "find_data_root: expected root to be an existing"),
    ],
)
def test_refusals(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main([*SMALLEST, *options]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_refusals_of_a_device_and_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected --batch to be a multiple of the 4 processes, got 6. Change it."):
        Batches(load(TINY), TINY, Processes("cpu", 0, 4, 4))
    with pytest.raises(ValueError, match="expected one process for --shard none, got 2. Use fsdp, hsdp or ddp."):
        network.shard_of(Options(shard="none"), Processes("cpu", 0, 2, 2))
    with pytest.raises(ValueError, match="expected --replicas to divide the 3 processes, got 2. Change it."):
        Processes("cpu", 0, 3, 3).mesh(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*SMALLEST, "--device", "cuda"]) == 2


def test_learning_rate_rises_and_falls() -> None:
    options = Options(steps=100, learning_rate=1.0)
    rates = [learning_rate(options, step) for step in range(100)]
    top = round(WARMUP_SHARE * 100)
    assert rates[0] == pytest.approx(0.1) and rates[top - 1] == rates[top] == 1.0
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :], strict=False)) and 0 < rates[-1] < 1e-3


# ---- data and network ----


def test_rows_follow_from_seed_and_step_alone() -> None:
    data = load(TINY)
    alone = Batches(data, TINY, ALONE)
    seen: list[int] = []
    for step in (4, 0, 1, 2):  # whatever was asked before
        rows, mirrored = alone.rows(step)
        seen += rows.tolist() if step < 3 else []
        for world in (2, 3):
            shares = [Batches(data, TINY, Processes("cpu", rank, world, world)).rows(step) for rank in range(world)]
            assert torch.equal(torch.cat([share[0] for share in shares]), rows)
            assert torch.equal(torch.cat([share[1] for share in shares]), mirrored)
    assert len(set(seen)) == 18  # an epoch of 20 images in batches of 6 has none twice
    assert not torch.equal(alone.rows(0)[0], alone.rows(3)[0])  # the next epoch has another order
    another = Batches(data, Options(**vars(TINY) | {"seed": 1}), ALONE)
    assert not torch.equal(alone.rows(0)[0], another.rows(0)[0])


def test_images_are_scaled_and_mirrored() -> None:
    batches = Batches(load(TINY), TINY, ALONE)
    images, labels = batches(3)
    rows, mirrored = batches.rows(3)
    assert 0 < mirrored.sum() < 6
    data = synthetic(TINY)
    assert torch.equal(labels, data.labels[rows])
    for image, row, flipped in zip(images, rows.tolist(), mirrored.tolist(), strict=True):
        raw = data.images[row].flip(-1) if flipped else data.images[row]
        scaled = (raw.double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        assert torch.allclose(image.double(), scaled, atol=1e-5)


def test_timm_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with timm's names: it needs torchvision, of which there is no build for this torch."""

    def vision_transformer(img_size: int, patch_size: int, num_classes: int, **sizes: int) -> VisionTransformer:
        shape = ViT(sizes["embed_dim"], sizes["depth"], 4 * sizes["embed_dim"], "")
        return VisionTransformer(shape, img_size, patch_size, num_classes)

    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
    module.VisionTransformer = vision_transformer  # type: ignore[attr-defined]
    options = Options(**vars(TINY) | {"implementation": "auto"})
    found = network.build(options, 4, ALONE)
    assert found.origin == "timm" and len(found.blocks) == 2
    reg = SpectralRegularizer(found.module, strength=1.0, rules=found.rules)
    assert reg.sigmas()["blocks.0.qkv.weight"].shape == (3,)


# ---- checkpoints ----


@pytest.mark.slow
@pytest.mark.parametrize("penalty", PENALTIES)
def test_resumed_it_has_the_same_bits(tmp_path: Path, penalty: str) -> None:
    whole = losses(run(tmp_path, "--penalty", penalty))[penalty]
    options = ("--penalty", penalty, "--checkpoint", tmp_path / "saved")
    first = losses(run(tmp_path, *options, "--stop-at", 7))[penalty]  # within a turn
    second = losses(run(tmp_path, *options, "--resume"))[penalty]
    assert len(first) == 7 and first + second == whole


def test_a_checkpoint_is_asked_for_and_of_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "saved"
    few = ("--checkpoint", str(folder), "--stop-at", "2")
    run(tmp_path, *few, "--resume")  # none there: from the beginning
    for options, said in (
        ([], f"train_vit: expected no checkpoint in {folder}, got step-00000002. Add --resume, or delete it."),
        (["--resume", "--seed", "1"], f"train_vit: expected seed as in {folder}/step-00000002, 0, got 1. Give the sa"),
        (["--resume", "--penalty", "l2"], f"train_vit: expected penalty as in {folder}/step-00000002, ['none'], got "),
        (["--resume", "--precision", "fp32"], f"train_vit: expected precision as in {folder}/step-00000002, bf16, go"),
    ):
        assert main([*SMALLEST, *few, *options]) == 2
        assert capsys.readouterr().err.startswith(said)
    run(tmp_path, *few, "--resume", "--turn", "3")  # how it is run may change
    (folder / "step-00000002" / "__0_0.distcp").write_bytes(b"")
    assert main([*SMALLEST, *few, "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"train_vit: expected {folder}/step-00000002 to be a complete checkpoint, got EOFError" in said
    assert said.rstrip().endswith("Delete it: the one before is taken.")


def test_what_a_killed_run_left_unfinished_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"x": torch.ones(3)}
    checkpoint.save(tmp_path, 1, state, {}, ALONE)

    rename = os.rename

    def killed(old: Path, new: Path) -> None:
        if Path(old).is_dir():
            raise KeyboardInterrupt
        rename(old, new)  # torch's own, of a file

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)  # all is written, and has not its name yet
        checkpoint.save(tmp_path, 2, state, {}, ALONE)
    assert (tmp_path / "step-00000002.part").is_dir()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000001"]
    for step in (3, 10, 4):
        checkpoint.save(tmp_path, step, {"x": torch.full((3,), float(step))}, {}, ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    checkpoint.load(tmp_path / "step-00000010", state)
    assert state["x"].tolist() == [10.0] * 3


# ---- accounts ----


def test_memory_of_a_model_is_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, most = 1000, 0

    def use(bytes: int, kept: int) -> None:
        nonlocal allocated, most
        most = max(most, allocated + bytes)
        allocated += kept

    def reset() -> None:
        nonlocal most
        most = allocated

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    first, second = memory.CudaMemory(), memory.CudaMemory()
    for account, kept in ((first, 100), (second, 40)):
        with account.building():
            use(kept, kept)
    for counted, moments in ((False, 200), (True, 0)):
        for account in (first, second):
            with account.turn(counted):
                use(moments + 50, moments)
            assert (account.peak is None) is not counted
    assert (first.held, first.peak) == (300, 350) and (second.held, second.peak) == (240, 290)


@pytest.mark.slow
def test_compiled_it_is_the_same_and_one_graph_serves_all_blocks(tmp_path: Path) -> None:
    plain = losses(run(tmp_path, "--precision", "fp32", "--stop-at", 4))["none"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses(run(tmp_path, "--precision", "fp32", "--stop-at", 4, "--penalty", "none", "l2", "--compile"))
    assert compiled["none"] == pytest.approx(plain, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(plain) == 4 < STEPS
