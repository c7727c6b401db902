"""The sections of the report other than charts: state, results, stops, time spent, samples, config, environment.

Text is escaped where it becomes HTML: in `section`, `folded`, `table`, and where a function writes elements itself.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Iterator, Sequence

from dist_trainer.config.keys import flatten
from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.config.values import as_yaml
from dist_trainer.errors import counted
from dist_trainer.html_report.charts import legend_key, skipped_steps, style_of
from dist_trainer.html_report.timeline import numbered_marks
from dist_trainer.tracking.formatting import duration, memory, quantity, significant
from dist_trainer.tracking.goodput import Goodput
from dist_trainer.tracking.run_reader import RunHistory, SampleText, number

SAMPLES_SHOWN, SAMPLES_OPEN = 12, 3
"""Number of samples of a run on the page, evenly spread; and how many of them are visible at once."""
SAMPLE_CHARACTERS = 3000
MARKS_OPEN = 12
_LATEST_TIME = 1 << 40
"""Unix seconds that localtime can take."""

PARTS_OF_TIME = (
    ("steps", "step_seconds", "t0"),
    ("waiting for data", "data_seconds", "t1"),
    ("validation", "validation_seconds", "t2"),
    ("samples", "sample_seconds", "t3"),
    ("saving", "saving_seconds", "t4"),
    ("start-up", "starting_seconds", "t5"),
    ("steps lost to a restart (estimated)", "redone_seconds", "t6"),
    ("downtime between restarts", "downtime_seconds", "t7"),
    ("other", "other_seconds", "t8"),
)
UNCOMPARED_KEYS = ("run_name", "output_dir")
"""Keys that always differ between runs."""
COMPARED_ENVIRONMENT = ("device", "world_size", "torch", "dist_trainer", "git_commit", "dist_trainer_git_commit", "hostname")


def heading(runs: Sequence[RunHistory], labels: Sequence[str], spent: Sequence[Goodput]) -> str:
    """Names, state and results."""
    written = f"page written {time.strftime('%Y-%m-%d %H:%M', time.localtime())}"
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in results(runs[0], spent[0])
        )
        state = html.escape(format_state(runs[0]))
        about = describe_training(runs[0])
        verified = html.escape(format_certificate(runs[0]))
        states = f'<p class="faded">{state}; {written}</p>' + (f'<p class="faded">{verified}</p>' if verified else "")
        return f'<h1>{html.escape(labels[0])}</h1>{about}{states}<dl class="tiles">{tiles}</dl>'
    all_results = [dict(results(run, each)) for run, each in zip(runs, spent, strict=True)]
    names = list(dict.fromkeys(name for known in all_results for name in known))
    rows = [
        [label, *(known.get(name, "–") for name in names), format_state(run)]
        for run, label, known in zip(runs, labels, all_results, strict=True)
    ]
    keys = "".join(legend_key(label, style_of(number)) for number, label in enumerate(labels))
    abouts = {describe_training(run, command=False) for run in runs}
    about = abouts.pop() if len(abouts) == 1 else ""
    return (
        f'<h1>{len(runs)} runs</h1>{about}<p class="faded">{written}</p><p class="keys runs">{keys}</p>'
        f'<div class="overview">{table("The runs", ["run", *names, "state"], rows, numbers=True)}</div>'
    )


def describe_training(run: RunHistory, *, command: bool = True) -> str:
    """Model, data, device and, with `command`, the command; unknown fields are left out."""
    config, environment = flatten(run.config), run.environment
    layers, width = config.get("model.num_hidden_layers"), config.get("model.hidden_size")
    batch_size, length = config.get("batch.global_batch_size"), config.get("data.sequence_length")
    ranks, dtype = environment.get("world_size"), config.get("precision.dtype")
    parts = {
        "model": [
            config.get("model.name"),
            math.isfinite(run.parameters) and f"{quantity(run.parameters)} parameters",
            config.get("model.name") == "decoder_lm" and isinstance(layers, int) and f"{counted(layers, 'layer')} of {width}",
            config.get("model.init_from") and f"starting from {config['model.init_from']}",
        ],
        "data": [config.get("data.dataset"), batch_size and length and f"{batch_size} x {length} tokens per step"],
        "device": [
            environment.get("device"),
            isinstance(ranks, int) and counted(ranks, "rank"),
            dtype != "auto" and dtype,
        ],
    }
    known = {name: ", ".join(str(value) for value in values if value) for name, values in parts.items()}
    words = "".join(f"<span><small>{name}</small> {html.escape(text)}</span>" for name, text in known.items() if text)
    typed = environment.get("command") if command else None
    lines = [words, f"<code>{html.escape(str(typed))}</code>" if typed else ""]
    return "".join(f'<p class="about">{line}</p>' for line in lines if line)


def format_state(run: RunHistory) -> str:
    """`preempted (SIGTERM), step 40 of 100`."""
    status = run.status
    if not status:
        return "no status.json found"
    reason = f" ({status['reason']})" if status.get("reason") else ""
    return f"{status.get('state', 'unknown')}{reason}, step {status.get('step', '?')} of {status.get('max_steps', '?')}"


def format_certificate(run: RunHistory) -> str:
    """`verified: steps 5-8 on 1, 2, 4 ranks: equal (2026-12-01 04:00)`; empty if nothing was verified."""
    known = run.certificate
    ranks, steps = known.get("ranks"), [known.get("first_step"), known.get("last_step")]
    if known.get("result") not in ("equal", "differs") or not isinstance(ranks, list) or not ranks:
        return ""
    *others, last = [rank if type(rank) is int else 0 for rank in ranks]
    found = known["result"]
    if found == "differs" and isinstance(known.get("differences"), list) and known["differences"]:
        found = f"differs: {known['differences'][0]}"
    made = number(known.get("time"))
    when = f" ({time.strftime('%Y-%m-%d %H:%M', time.localtime(made))})" if 0 <= made < _LATEST_TIME else ""
    return f"verified: steps {steps[0]}-{steps[1]} on {', '.join([*map(str, others), counted(last, 'rank')])}: {found}{when}"


def results(run: RunHistory, spent: Goodput) -> Iterator[tuple[str, str]]:
    """Names and values of those that are known."""
    train, validation = run.train, run.validation
    finite = [i for i, loss in enumerate(validation["loss"]) if math.isfinite(loss)]
    if finite:
        best = min(finite, key=validation["loss"].__getitem__)
        yield "best validation loss", f"{validation['loss'][best]:.4f}"
        yield "best step", f"{validation['step'][best]:.0f}"
        if math.isfinite(perplexity := validation["perplexity"][best]):
            yield "perplexity at best", significant(perplexity)
        if math.isfinite(bits := validation["bits_per_byte"][best]):
            yield "bits per byte at best", f"{bits:.3f}"
    if len(train["loss"]):
        if math.isfinite(last := train["loss"][-1]):
            yield "last training loss", f"{last:.4f}"
        known: dict[str, tuple[float, Callable[[float], str]]] = {
            "tokens": (train["tokens"][-1], quantity),
            "tokens per second": (_median(train["tokens_per_second"]), quantity),
            "MFU": (_median(train["mfu"]), "{:.1%}".format),
            "peak memory": (max((b for b in train["peak_memory_bytes"] if math.isfinite(b)), default=math.nan), memory),
        }
        yield from ((name, form(value)) for name, (value, form) in known.items() if math.isfinite(value))
        if spent.wall_seconds > 0:
            yield "time", duration(spent.wall_seconds)
    if skipped := skipped_steps(run):
        yield "logged steps with NaN/Inf", str(len(skipped))


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


def stops_and_restarts(runs: Sequence[RunHistory], labels: Sequence[str]) -> str:
    """The list of the marks in the charts, by number."""
    items = []
    for mark in numbered_marks(runs):
        name = f"<b>{html.escape(labels[mark.run])}</b>, " if len(labels) > 1 else ""
        items.append(f'<li value="{mark.number}">{name}step {mark.x:.0f}: {html.escape(mark.text)}</li>')
    if not items:
        return ""
    visible, rest = items[:MARKS_OPEN], items[MARKS_OPEN:]
    more = folded(f"{len(rest)} more", f'<ol class="timeline">{"".join(rest)}</ol>') if rest else ""
    return f'<ol class="timeline">{"".join(visible)}</ol>{more}'


def time_spent(spent: Sequence[Goodput], labels: Sequence[str]) -> str:
    """The time since each run first started: a bar, and a table of its parts."""
    if not any(each.wall_seconds > 0 for each in spent):
        return ""
    several = len(labels) > 1
    bars = "".join(_bar(each, label if several else "") for each, label in zip(spent, labels, strict=True))
    rows = []
    for name, attribute, colour in PARTS_OF_TIME:
        if any(getattr(each, attribute) > 0 for each in spent):
            cells = "".join(f"<td>{_format_part(getattr(each, attribute), each)}</td>" for each in spent)
            rows.append(f'<tr><th scope="row"><i class="block {colour}"></i>{name}</th>{cells}</tr>')
    rows.append(f'<tr><th scope="row">total</th>{"".join(f"<td>{duration(each.wall_seconds)}</td>" for each in spent)}</tr>')
    rows.append(f'<tr><th scope="row">restarts</th>{"".join(f"<td>{_format_restarts(each)}</td>" for each in spent)}</tr>')
    titles = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in ["part", *labels]) if several else ""
    head = f"<thead><tr>{titles}</tr></thead>" if several else ""
    body = f'<table class="numbers">{head}<tbody>{"".join(rows)}</tbody></table>'
    return section("Time spent", bars + _scrolling("Time spent", body))


def _format_restarts(spent: Goodput) -> str:
    repeated = f" <small>{counted(spent.lost_steps, 'step')} repeated</small>" if spent.lost_steps else ""
    return f"{spent.restarts}{repeated}" if spent.restarts else "none"


def _bar(spent: Goodput, label: str) -> str:
    pieces = "".join(
        f'<i class="{colour}" style="flex:{getattr(spent, attribute):.6f}"></i>'
        for _, attribute, colour in PARTS_OF_TIME
        if getattr(spent, attribute) > 0
    )
    name = f'<div class="barname">{html.escape(label)}</div>' if label else ""
    return f'{name}<div class="bar" aria-hidden="true">{pieces}</div>'


def _format_part(seconds: float, spent: Goodput) -> str:
    share = seconds / spent.wall_seconds if spent.wall_seconds > 0 else 0.0
    return f"{duration(seconds)} <small>{share:.1%}</small>" if seconds > 0 else "–"


def samples(run: RunHistory, title: str) -> str:
    """Some of the samples, newest first."""
    figures = [_sample(sample) for sample in spread(run.samples, SAMPLES_SHOWN)[::-1]]
    rest = figures[SAMPLES_OPEN:]
    more = folded(f"{len(rest)} more, {len(run.samples)} in total", "".join(rest)) if rest else ""
    return section(title, "".join(figures[:SAMPLES_OPEN]) + more)


def spread(samples: Sequence[SampleText], limit: int) -> list[SampleText]:
    """At most `limit` of them, evenly spread, including the first and the last."""
    if len(samples) <= limit:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (limit - 1))] for place in range(limit)]


def _sample(sample: SampleText) -> str:
    text = sample.text.rstrip() if len(sample.text) <= SAMPLE_CHARACTERS else f"{sample.text[:SAMPLE_CHARACTERS]} …"
    return (
        f'<figure class="sample"><figcaption>step {sample.step}</figcaption><p><b>{html.escape(sample.prompt)}</b>'
        f"{html.escape(text)}</p></figure>"
    )


# -------------------------------------------------------------------------------------- config, environment


def differences(runs: Sequence[RunHistory], labels: Sequence[str]) -> str:
    """Config keys and parts of the environment that differ between several runs, side by side."""
    if len(runs) < 2:
        return ""
    configs = [flatten(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in UNCOMPARED_KEYS]
    rows = [[key, *(as_yaml(config.get(key, "")) for config in configs)] for key in keys]
    rows += [[name, *(as_yaml(run.environment.get(name, "")) for run in runs)] for name in COMPARED_ENVIRONMENT]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return section("Differences", "<p>None: these runs have the same config and environment.</p>")
    return section("Differences", table("Keys that differ between the runs", ["key", *labels], differing))


def config(run: RunHistory, title: str) -> str:
    """The config: settings other than the defaults, then the rest on demand."""
    if not run.config:
        return ""
    defaults = flatten(as_dict(TrainingConfig()))
    changed, unchanged = [], []
    for key, value in flatten(run.config).items():
        if key in defaults and defaults[key] == value:
            unchanged.append([key, as_yaml(value)])
        else:
            changed.append([key, as_yaml(value), as_yaml(defaults.get(key, ""))])
    parts = [table("Non-default settings", ["non-default setting", "value", "default"], changed)] if changed else []
    if unchanged:
        at_default = f"{counted(len(unchanged), 'key')} at {'its default' if len(unchanged) == 1 else 'their defaults'}"
        parts.append(folded(at_default, table("Keys at their defaults", ["key", "value"], unchanged)))
    return section(title, "".join(parts))


def environment(run: RunHistory, title: str) -> str:
    """Versions and machine of the latest start."""
    if not run.environment:
        return ""
    rows = [[name, as_yaml(value)] for name, value in run.environment.items()]
    return section(title, folded("versions, machine, command", table("Environment", [], rows)))


# ------------------------------------------------------------------------------------------ pieces of HTML


def section(title: str, body: str) -> str:
    """A section of the page with its heading; empty without a body."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def folded(summary: str, body: str) -> str:
    """A body that is shown on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table whose first column names the rows."""
    titles = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    above = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    kind = ' class="numbers"' if numbers else ""
    return _scrolling(name, f"<table{kind}>{above}<tbody>{lines}</tbody></table>")


def _scrolling(name: str, table: str) -> str:
    """A table that scrolls sideways if it is wider than the page."""
    return f'<div class="table" role="region" aria-label="{html.escape(name)}" tabindex="0">{table}</div>'
