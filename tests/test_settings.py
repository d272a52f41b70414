"""How a run is configured: preset, TOML file, command line."""

from pathlib import Path

import pytest
import tyro

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.data import DATASETS
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.models import MODELS
from spectral_ops.continual.run_folder import from_json, to_json
from spectral_ops.continual.settings import PRESETS, Settings, checked, preset_names, read_toml, resolve
from spectral_ops.continual.streams import STREAMS


def settings(*arguments: str):
    return tyro.cli(tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Settings), args=list(arguments))


def test_nothing_given_is_the_default():
    assert resolve(settings()) == RunConfig()


def test_options_count_before_the_file_and_the_file_before_the_preset(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("lr = 0.5\nsteps = 7\n[options]\nperiod = 3\ntau = 0.5\n[model_options]\nhidden = [3]\n")
    given = [
        "--preset",
        "random-label-digits",
        "--config",
        str(file),
        "--steps",
        "9",
        "--options",
        "tau=0.1",
        "on=true",
    ]
    config = resolve(settings(*given))
    assert (config.data, config.tasks) == ("digits", 25)  # preset
    assert (config.lr, config.model_options) == (0.5, {"hidden": [3]})  # file
    assert config.steps == 9 and config.options == {"period": 3, "tau": 0.1, "on": True}  # command line
    assert resolve(settings("--strength", "0.1"), seed=12).seed == 12


def test_options_of_another_stream_network_or_method_are_dropped(tmp_path):
    given = ["--preset", "class-incremental-tiny-imagenet", "--stream", "random-labels"]
    config = resolve(settings(*given))
    assert config.stream_options == {} and config.model_options == {"depth": 4, "width": 96, "heads": 3}
    config = resolve(settings(*given, "--model", "mlp", "--model-options", "hidden=64"))
    assert config.model_options == {"hidden": 64}
    same = resolve(settings("--preset", "class-incremental-tiny-imagenet", "--stream", "class-incremental"))
    assert same.stream_options == {"classes_per_task": 20}
    file = tmp_path / "a.toml"
    file.write_text('method = "redo"\noptions = { period = 3 }\n')
    assert resolve(settings("--config", str(file), "--method", "l2")).options == {}
    assert resolve(settings("--config", str(file), "--method", "redo")).options == {"period": 3}
    file.write_text('method = "spectral"\nstrength = 0.001\n[options]\ntarget = 2.0\n')
    given = ["--config", str(file), "--method"]
    assert resolve(settings(*given, "redo")) == RunConfig(method="redo")  # its own strength, 0.025
    assert resolve(settings(*given, "l2", "--strength", "0.1")).strength == 0.1
    assert resolve(settings(*given, "spectral")).strength == 0.001
    file.write_text("strength = 0.001\n[options]\ntarget = 2.0\n")  # of whatever method is named
    assert resolve(settings(*given, "spectral")) == RunConfig(method="spectral", strength=1e-3, options={"target": 2.0})


def test_every_preset_is_a_configuration():
    assert "random-label-mnist" in preset_names()
    for name in preset_names():
        config = resolve(settings("--preset", name))
        assert config != RunConfig() or name == "random-label-mnist"
        assert from_json(to_json(config)) == config


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"preset: expected one of .*, got 'random-label-mnits'\. The nearest is 'random-label-mnist'"
    ):
        resolve(settings("--preset", "random-label-mnits"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lr = ", ValueError, "to be TOML, got"),
        ("learning_rate = 1", ValueError, "expected options among .*, got 'learning_rate'"),
        ('lr = "high"', TypeError, "expected option lr to be float, got 'high'"),
        ("data_root = 3", TypeError, r'expected data_root to be text, got 3\. Write data_root = "/path"\.'),
        ("[option]\na = 1", ValueError, r"expected tables options, model_options, stream_options, got 'option'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, error, message):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(error, match=message) as raised:
        read_toml(file)
    assert str(file) in str(raised.value)


def test_a_file_of_bytes_is_refused_by_name(tmp_path):
    file = tmp_path / "image.toml"
    file.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="config: expected .*image.toml to be TOML, got"):
        read_toml(file)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: expected .*a.toml to be a file .* got No such .*\. Change"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(IsADirectoryError, match=r"a file that can be read, got Is a directory\. Change --config\."):
        read_toml(tmp_path)


def test_a_data_root_in_a_file_is_a_path():
    assert checked({"data_root": "/x"}, "config") == {"data_root": Path("/x")}


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    text = text.replace("│ │ ", "")
    assert "Learning rate. (default: 0.001)" in text and "--model-options" in text
    assert all(name in text for name in (*preset_names(), *STREAMS, *DATASETS, *MODELS, *METHODS))
    assert "--lr FLOAT" in text and "--model-options [NAME=VALUE ...]" in text
    assert "None}" not in text and "(default: None)" not in text


def test_presets_are_installed_with_the_package():
    assert PRESETS.is_dir() and len(preset_names()) >= 6
