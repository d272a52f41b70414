"""Two results files side by side: for every row of both, times, ratios to the floor, and how these changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.record import Results
from bench.table import aligned, byte_count, count, digits, duration

# Times of two runs differ by this much on a quiet machine; ratios to a floor measured in the same run by less.
NOISE = 0.05

Key = tuple[str, str]

# What only some devices tell: key of a row -> head and text. Shown where one of the two files knows it.
EXTRA: dict[str, tuple[str, Callable[[Any], str]]] = {
    "launches": ("launches", count),
    "host_seconds": ("host", lambda x: "-" if x is None else duration(x)),
    "peak_bytes": ("peak", lambda x: "-" if x is None else byte_count(x)),
}


def rows_of(results: Results) -> dict[Key, dict[str, Any]]:
    return {(case["name"], row["name"]): row for case in results["cases"] for row in case["rows"]}


def beyond_noise(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two summaries differ: medians by more than NOISE, and no overlap between their quartiles."""
    apart = a["q75"] < b["q25"] or b["q75"] < a["q25"]
    return apart and abs(b["median"] / a["median"] - 1) > NOISE


def differences(a: Results, b: Results) -> list[dict[str, Any]]:
    """One entry per row that both files hold: name, times, ratios to the floor, change of each, and a verdict.

    The verdict rests on the ratio to the floor, which a faster or busier machine changes less than the time.
    """
    rows_a, rows_b = rows_of(a), rows_of(b)
    out = []
    for key in rows_a:
        if key not in rows_b:
            continue
        x, y = rows_a[key], rows_b[key]
        verdict = "same"
        if beyond_noise(x["to_floor"], y["to_floor"]):
            verdict = "faster" if y["to_floor"]["median"] < x["to_floor"]["median"] else "slower"
        out.append(
            {
                "case": key[0],
                "name": key[1],
                "seconds": (x["seconds"]["median"], y["seconds"]["median"]),
                "to_floor": (x["to_floor"]["median"], y["to_floor"]["median"]),
                "verdict": verdict,
                **{key: (x[key], y[key]) for key in EXTRA},
            }
        )
    return out


def warnings_of(a: Results, b: Results) -> list[str]:
    """Why the two may not be comparable."""
    found = []
    for key in ("name", "cores", "threads"):
        if a["device"][key] != b["device"][key]:
            found.append(f"device {key} differs: {a['device'][key]} and {b['device'][key]}")
    if a["quick"] or b["quick"]:
        found.append("a quick run: its times mean nothing")
    if a["versions"]["torch"] != b["versions"]["torch"]:
        found.append(f"torch differs: {a['versions']['torch']} and {b['versions']['torch']}")
    only = [set(rows_of(x)) - set(rows_of(y)) for x, y in ((a, b), (b, a))]
    for which, keys in zip(("first", "second"), only, strict=True):
        if keys:
            found.append(f"only in the {which}: {', '.join(sorted(' '.join(key) for key in keys))}")
    return found


def as_text(a: Results, b: Results) -> str:
    def described(results: Results) -> str:
        return f"{results['device']['name']}, {(results['commit'] or 'no commit')[:10]}, {results['date']}"

    lines = [f"A  {described(a)}", f"B  {described(b)}"]
    lines += [f"note: {line}" for line in warnings_of(a, b)]
    entries = differences(a, b)
    extra = [key for key in EXTRA if any(x is not None for entry in entries for x in entry[key])]
    heads = [f"{which} {EXTRA[key][0]}" for key in extra for which in "AB"]
    table = [["", "A", "B", "B / A", "A x floor", "B x floor", "by the floor", *heads]]
    for entry in entries:
        before, after = entry["seconds"]
        floors = [digits(x) for x in entry["to_floor"]]
        label = f"{entry['case']}  {entry['name']}"
        more = [EXTRA[key][1](x) for key in extra for x in entry[key]]
        table.append(
            [label, duration(before), duration(after), digits(after / before), *floors, entry["verdict"], *more]
        )
    return "\n".join([*lines, *aligned(table)])
