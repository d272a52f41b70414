"""The ladder as text: what was measured with its prediction, and what is predicted alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.cost_model import GRADIENT, H200_BYTES, H200_NETWORK, OPS, OURS, TORCH, VALUE
from bench.ladder import NOTED_SOURCE, Point
from bench.record import Results
from bench.table import aligned, byte_count, digits, duration, heading

Table = tuple[list[str], list[list[str]]]  # head, rows
POINT_HEAD = ["model", "", "what", "time", "GB/s", "x floor", "held", "peak beyond", "predicted", "error", "own rate"]
MODEL = (
    "Predicted: launches + bytes / rate + all-reduce (bench/cost_model.py), the rates those of plain passes over the "
    "same memory (the floor), not of ours. Error: of the prediction, in per cent of the time measured; own rate: the "
    "same where the rate is that of the floor in the same rounds."
)


def per_cent(share: float) -> str:
    """Two digits below ten per cent."""
    x = 100 * share
    return "0 %" if x == 0 else f"{x:.3f} %" if abs(x) < 0.1 else f"{x:.2f} %" if abs(x) < 10 else f"{x:.1f} %"


def signed(error: float) -> str:
    return f"{100 * error:+.1f} %"


def optional(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def point_cells(point: Point) -> list[str]:
    return [
        point["model"],
        point["dtype"],
        point["op"],
        duration(point["seconds"]),
        digits(point["gb_per_s"]),
        optional(point["to_floor"], digits),
        byte_count(point["held_bytes"]),
        optional(point["peak_bytes"], byte_count),
        optional(point["predicted_s"], duration),
        optional(point["predicted_error"], signed),
        optional(point["own_predicted_error"], signed),
    ]


def here_table(ladder: dict[str, Any]) -> Table:
    return POINT_HEAD, [point_cells(point) for point in ladder["here"]]


def stored_table(ladder: dict[str, Any]) -> Table:
    keep = [i for i, name in enumerate(POINT_HEAD) if name != "peak beyond"]
    rows = [[*(point_cells(p)[i] for i in keep), f"{p['source']}, {p['date']}"] for p in ladder["stored"]]
    return [*(POINT_HEAD[i] for i in keep), "from"], rows


def device_table(ladder: dict[str, Any]) -> Table:
    """One device: every op, with the time of those that were measured on it beside the prediction."""
    measured = {(p["model"], p["dtype"], p["op"]): p for p in ladder["stored"]}
    head = ["model", "", "held, moments included", *OPS, "step without, assumed", "gradient, share", "folded, share"]
    rows = []
    for p in (p for p in ladder["predictions"] if p["ranks"] == 1):
        cells = []
        for op in OPS:
            known = measured.get((p["model"], p["dtype"], op))
            cells.append(duration(p["seconds"][op]) + (f" ({duration(known['seconds'])})" if known else ""))
        shares = [duration(p["step_s"]), per_cent(p["share"]), per_cent(p["share_folded"])]
        held = byte_count(p["held_bytes"]) + (" *" if p["held_bytes"] > H200_BYTES else "")
        rows.append([p["model"], p["dtype"], held, *cells, *shares])
    return head, rows


def ranks_table(ladder: dict[str, Any], text: Callable[[Point], str]) -> Table:
    """Models down, ranks across."""
    cells = {(p["model"], p["dtype"], p["ranks"]): text(p) for p in ladder["predictions"]}
    rows = [
        [model, dtype, *(cells[model, dtype, count] for count in ladder["ranks"])]
        for dtype in ladder["dtypes"]
        for model in ladder["models"]
    ]
    return ["model", "", *(f"{count:,}" for count in ladder["ranks"])], rows


def gradient_of_rank(point: Point) -> str:
    seconds, reduced = point["seconds"][GRADIENT], point["all_reduce_s"]
    return duration(seconds) + (f" ({100 * reduced / seconds:.0f} %)" if reduced else "")


def folded_of_rank(point: Point) -> str:
    return f"{duration(point['seconds'][OURS])} / {duration(point['seconds'][TORCH])}"


def value_of_rank(point: Point) -> str:
    return duration(point["seconds"][VALUE])


def sections(results: Results) -> list[tuple[str, list[str], Table]]:
    """Heading, lines under it, table."""
    ladder = results["ladder"]
    images, network = ladder["images"], H200_NETWORK
    assumed = (
        f"The step without the penalty is assumed: forward and backward of {images} images of 224 x 224 a rank at "
        f"{100 * ladder['utilisation']:.0f} % of {ladder['flops'] * 1e-12:.0f} TFLOP/s, then AdamW; everything that "
        "FSDP exchanges hidden behind it."
    )
    out = []
    if ladder["here"]:
        told = "no model with all three floors"
        if ladder["memory"] is not None:
            told = f"{ladder['memory_from']}; {rates(ladder['memory'])}"
        lines = [MODEL, f"Rates here: {told}."]
        out.append((f"Measured here: {results['device']['name']}", lines, here_table(ladder)))
    lines = ["Replayed from a CUDA graph; the newest figure of each.", f"x floor is not known from {NOTED_SOURCE}."]
    if ladder["stored"]:
        out.append(("Measured on an H200 before, and what the model says of it", [MODEL, *lines], stored_table(ladder)))
    lines = [
        "PREDICTED; in brackets what was measured (above), measuring included. Nobody has measured the others. "
        f"*: more than the {H200_BYTES * 1e-9:.0f} GB of one; the value and the gradient of bfloat16 weights fit.",
        assumed,
        "Folded: what SpectralAdamW takes beyond AdamW, whose moments are bfloat16 where the weights are: there the "
        "difference is ours being float32, not the penalty.",
    ]
    out.append(("One H200", lines, device_table(ladder)))
    lines = [
        "PREDICTED, none of it measured: rows of every weight shared out over H200s, in brackets the share of the one "
        f"all-reduce. {network.per_node} a node.",
    ]
    out.append(("Penalty with gradient, by ranks", lines, ranks_table(ladder, gradient_of_rank)))
    share = ranks_table(ladder, lambda p: f"{per_cent(p['share'])} / {per_cent(p['share_folded'])}")
    lines = ["PREDICTED, as above: with gradient / folded into SpectralAdamW.", assumed]
    out.append(("Share of a training step that the penalty adds, by ranks", lines, share))
    lines = ["PREDICTED, as above: SpectralAdamW / torch's fused AdamW without a penalty."]
    out.append(("Optimizer step, by ranks", lines, ranks_table(ladder, folded_of_rank)))
    lines = ["PREDICTED, as above."]
    out.append(("Penalty alone, by ranks", lines, ranks_table(ladder, value_of_rank)))
    return out


def rates(memory: dict[str, Any]) -> str:
    return ", ".join(f"{op} {digits(rate * 1e-9)} GB/s" for op, rate in memory["rates"].items())


def as_markdown(results: Results) -> str:
    lines = [f"# The ladder: {results['device']['name']}", ""]
    for line in heading(results):
        lines += [line, ""]
    for title, texts, table in sections(results):
        lines += [f"## {title}", ""]
        for text in texts:
            lines += [text, ""]
        lines += [*markdown(*table), ""]
    lines += [f"NOT MEASURED {name}: {reason}\n" for name, reason in results["left_out"].items()]
    return "\n".join(lines)


def as_text(results: Results) -> str:
    lines = heading(results)
    for title, texts, table in sections(results):
        lines += ["", title, *(f"  {text}" for text in texts)]
        head, rows = table
        lines += [f"  {line}" for line in aligned([head, *rows])]
    lines += ["", *(f"NOT MEASURED {name}: {reason}" for name, reason in results["left_out"].items())]
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    numbers = [" --- " if name in ("model", "", "what", "from") else " ---: " for name in head]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(numbers) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
