"""bench/tune.py: variants read, processes that take turns, and one that fails."""

from __future__ import annotations

import pytest
from bench_fixtures import needs_native  # noqa: F401  and bench/'s place

from bench import __main__ as command  # noqa: E402
from bench import tune  # noqa: E402
from spectral_ops.ops import spectral_norm  # noqa: E402


def test_a_variant_is_read_and_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_norm, "MAX_ITER", spectral_norm.MAX_ITER)  # set back afterwards
    variant = tune.parse("few=ops.spectral_norm.MAX_ITER=7")
    assert variant == tune.Variant("few", (("ops.spectral_norm", "MAX_ITER", 7),))
    variant.apply()
    assert spectral_norm.MAX_ITER == 7


@pytest.mark.parametrize(
    "text", ["few", "few=", "=ops.spectral_norm.MAX_ITER=7", "few=MAX_ITER=7", "few=ops.spectral_norm.NONE=7",
             "few=ops.spectral_norm.MAX_ITER=seven", "few=no.such.module=1"]
)  # fmt: skip
def test_what_is_no_variant_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="tune: expected"):
        tune.parse(text)
    with pytest.raises(SystemExit):
        command.main(["tune", text])
    assert "tune: expected" in capsys.readouterr().err


@pytest.mark.slow
@needs_native
def test_variants_take_turns_and_one_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["tight=ops.spectral_norm.MAX_ITER=7", "wrong=backends.choose=None"]
    code = command.main(["tune", *variants, "--device", "cpu", "--quick", "--models", "mlp", "--dtypes", "float32"])
    out = capsys.readouterr().out
    assert code == 0
    head, base, tight, *rest = [line for line in out.splitlines() if line and not line.startswith("mlp")]
    assert head.split()[0] == "value" and base.split()[0] == "base" and tight.split()[0] == "tight"
    assert "1.000" in base
    assert len(rest) == 1 and rest[0].startswith("FAILED wrong")


def test_ratios_are_taken_within_a_round() -> None:
    def times(seconds: float) -> tune.Times:
        floors = {f"{what}, {tune.FLOOR}": 1.0 for what in (tune.VALUE, tune.GRADIENT)}
        return {tune.VALUE: seconds, tune.GRADIENT: 2 * seconds} | floors

    rounds = [{"base": times(x), "other": times(1.5 * x)} for x in (1.0, 10.0, 2.0)]  # a machine that drifts
    *_, other = tune.as_table(["base", "other"], rounds).splitlines()
    assert other.split()[-1] == "1.500"
