"""Names and options chosen by a user."""

from typing import Literal

import pytest

from spectral_ops.continual.choices import check_options, choose, options_of, parse_options
from spectral_ops.continual.models.mlp import MLP


class Thing:
    def __init__(
        self,
        context: object,
        *,
        strength: float = 1e-3,
        period: int = 10,
        widths: tuple[int, ...] = (1,),
        norm: Literal["none", "layer"] = "none",
        limit: float | None = None,
        on: bool = True,
    ):
        pass


def test_a_known_name_gives_its_value():
    assert choose("model", "mlp", {"mlp": 1, "vit": 2}) == 1


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"model: expected one of mlp, vit, got 'mpl'\. The nearest is 'mlp'\."):
        choose("model", "mpl", {"mlp": 1, "vit": 2})
    with pytest.raises(ValueError, match=r"got 'zzz'\. Name one of these\."):
        choose("model", "zzz", {"mlp": 1})


def test_options_are_the_arguments_with_a_default():
    assert list(options_of(Thing)) == ["strength", "period", "widths", "norm", "limit", "on"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"strength": 1}, {"strength": 1.0}),
        ({"widths": [3, 4]}, {"widths": (3, 4)}),
        ({"widths": 3}, {"widths": (3,)}),
        ({"norm": "layer"}, {"norm": "layer"}),
        ({"limit": None}, {"limit": None}),
        ({"limit": 2}, {"limit": 2.0}),
        ({"on": False}, {"on": False}),
    ],
    ids=str,
)
def test_values_are_converted_where_nothing_is_lost(given, taken):
    converted = check_options("thing", Thing, given)
    assert converted == taken and list(map(type, converted.values())) == list(map(type, taken.values()))


@pytest.mark.parametrize(
    "given",
    [{"strength": "x"}, {"strength": True}, {"period": 1.5}, {"widths": ["a"]}, {"norm": 1}, {"on": 1}],
    ids=str,
)
def test_values_of_another_type_are_refused_by_name(given):
    (name,) = given
    with pytest.raises(TypeError, match=f"thing: expected option {name} to be .*, got "):
        check_options("thing", Thing, given)


def test_a_text_that_is_none_of_those_an_option_may_be_is_refused_with_them():
    with pytest.raises(ValueError, match=r"norm to be one of none, layer, got 'layers'\. The nearest is 'layer'\."):
        check_options("thing", Thing, {"norm": "layers"})
    with pytest.raises(ValueError, match=r"option norm to be one of none, layer, got 'batch'\. Name one of these\."):
        check_options("thing", Thing, {"norm": "batch"})


def test_what_is_set_elsewhere_is_no_option():
    with pytest.raises(ValueError, match=r"expected options among strength, widths, norm, limit, on, got 'period'\."):
        check_options("thing", Thing, {"period": 1}, set_elsewhere=["period"])


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"expected options among strength, .*, got 'strenght'\. The nearest is 'strength'"
    ):
        check_options("thing", Thing, {"strenght": 1})
    with pytest.raises(ValueError, match=r"thing: expected no options, got 'a'\. It takes no options: leave it out\."):
        check_options("thing", object, {"a": 1})


def test_options_written_on_a_command_line():
    texts = ["a=1", "b=1e-3", "c=true", "d=none", "e=1,2", "f=layer", "g=3,"]
    parsed = {"a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, 2], "f": "layer", "g": [3]}
    assert parse_options(texts) == parsed and type(parse_options(["a=1"])["a"]) is int


@pytest.mark.parametrize("text", ["period", "=3", "a b=3"])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(ValueError, match="options: expected name=value, got"):
        parse_options([text])


def test_none_is_a_name_where_nothing_is_no_value():
    assert check_options("model mlp", MLP, parse_options(["norm=none"])) == {"norm": "none"}
    assert check_options("here", takes_nothing, parse_options(["size=none"])) == {"size": None}


def takes_nothing(size: int | None = 3) -> None:
    """Has an option that may be None."""
