"""The parts of the report that are no charts of settings: how runs stand, what happened, where the time went, samples."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Iterator, Sequence

from dist_trainer.errors import counted
from dist_trainer.html_report.curves import numbered_marks, skipped_steps, style_of
from dist_trainer.html_report.markup import folded, section, table
from dist_trainer.html_report.settings import flat
from dist_trainer.html_report.svg_charts import key
from dist_trainer.tracking.formatting import duration, memory, quantity, short
from dist_trainer.tracking.goodput import Goodput
from dist_trainer.tracking.run_reader import RunHistory, SampleText

SAMPLES_SHOWN, SAMPLES_OPEN = 12, 3
"""Samples of a run on the page, spread over all it has; and how many of them are seen at once."""
SAMPLE_CHARACTERS = 3000
MARKS_OPEN = 12

PARTS_OF_TIME = (
    ("steps", "step_seconds", "t0"),
    ("waiting for data", "data_seconds", "t1"),
    ("validation", "validation_seconds", "t2"),
    ("samples", "sample_seconds", "t3"),
    ("saving", "saving_seconds", "t4"),
    ("starting, up to the first step", "starting_seconds", "t5"),
    ("steps lost to a restart (estimated)", "redone_seconds", "t6"),
    ("standing still between lives", "downtime_seconds", "t7"),
    ("all else", "other_seconds", "t8"),
)


def heading(runs: Sequence[RunHistory], labels: Sequence[str], spent: Sequence[Goodput]) -> str:
    """Who they are, how they stand, how good they got."""
    made = f"page made {time.strftime('%Y-%m-%d %H:%M', time.localtime())}"
    if len(runs) == 1:
        metadata = "".join(
            f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts_of(runs[0], spent[0])
        )
        state = html.escape(state_of(runs[0]))
        about = what_was_trained(runs[0])
        return f'<h1>{html.escape(labels[0])}</h1>{about}<p class="faded">{state}; {made}</p><dl class="facts">{metadata}</dl>'
    metadata = [dict(facts_of(run, each)) for run, each in zip(runs, spent, strict=True)]
    names = list(dict.fromkeys(name for known in metadata for name in known))
    rows = [
        [label, *(known.get(name, "–") for name in names), state_of(run)]
        for run, label, known in zip(runs, labels, metadata, strict=True)
    ]
    keys = "".join(key(label, style_of(number)) for number, label in enumerate(labels))
    abouts = {what_was_trained(run, command=False) for run in runs}
    about = abouts.pop() if len(abouts) == 1 else ""
    return (
        f'<h1>{len(runs)} runs</h1>{about}<p class="faded">{made}</p><p class="keys runs">{keys}</p>'
        f'<div class="overview">{table("The runs", ["run", *names, "state"], rows, numbers=True)}</div>'
    )


def what_was_trained(run: RunHistory, *, command: bool = True) -> str:
    """Model, data, device and, if asked for, the command, under the title; what is not known is left out."""
    config, environment = dict(flat(run.config)), run.environment
    layers, width = config.get("model.num_hidden_layers"), config.get("model.hidden_size")
    rows, length = config.get("batch.global_batch_size"), config.get("data.sequence_length")
    ranks, dtype = environment.get("world_size"), config.get("precision.dtype")
    metadata = {
        "model": [
            config.get("model.name"),
            math.isfinite(run.parameters) and f"{quantity(run.parameters)} parameters",
            config.get("model.name") == "decoder_lm" and isinstance(layers, int) and f"{counted(layers, 'layer')} of {width}",
            config.get("model.init_from") and f"starting from {config['model.init_from']}",
        ],
        "data": [config.get("data.dataset"), rows and length and f"{rows} x {length} tokens per step"],
        "device": [
            environment.get("device"),
            isinstance(ranks, int) and counted(ranks, "rank"),
            dtype != "auto" and dtype,
        ],
    }
    known = {name: ", ".join(str(value) for value in values if value) for name, values in metadata.items()}
    words = "".join(f"<span><small>{name}</small> {html.escape(text)}</span>" for name, text in known.items() if text)
    typed = environment.get("command") if command else None
    lines = [words, f"<code>{html.escape(str(typed))}</code>" if typed else ""]
    return "".join(f'<p class="about">{line}</p>' for line in lines if line)


def state_of(run: RunHistory) -> str:
    """`preempted (SIGTERM), step 40 of 100`."""
    status = run.status
    if not status:
        return "no status.json tells how it stands"
    reason = f" ({status['reason']})" if status.get("reason") else ""
    return f"{status.get('state', 'unknown')}{reason}, step {status.get('step', '?')} of {status.get('max_steps', '?')}"


def facts_of(run: RunHistory, spent: Goodput) -> Iterator[tuple[str, str]]:
    """Names and values of what is known."""
    train, validation = run.train, run.validation
    finite = [i for i, loss in enumerate(validation["loss"]) if math.isfinite(loss)]
    if finite:
        best = min(finite, key=validation["loss"].__getitem__)
        yield "best validation loss", f"{validation['loss'][best]:.4f}"
        yield "best step", f"{validation['step'][best]:.0f}"
        if math.isfinite(perplexity := validation["perplexity"][best]):
            yield "perplexity at best", short(perplexity)
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
        yield from ((name, shown(value)) for name, (value, shown) in known.items() if math.isfinite(value))
        if spent.wall_seconds > 0:
            yield "time", duration(spent.wall_seconds)
    if skipped := skipped_steps(run):
        yield "logged steps not finite", str(len(skipped))


def happened(runs: Sequence[RunHistory], labels: Sequence[str]) -> str:
    """The list that the numbers in the charts point at."""
    items = []
    for number, mark in numbered_marks(runs):
        who = f"<b>{html.escape(labels[number])}</b>, " if len(labels) > 1 else ""
        items.append(f'<li value="{mark.number}">{who}step {mark.x:.0f}: {html.escape(mark.words)}</li>')
    if not items:
        return ""
    shown = f'<ol class="happened">{"".join(items[:MARKS_OPEN])}</ol>'
    rest = items[MARKS_OPEN:]
    return shown + (folded(f"{len(rest)} more", f'<ol class="happened">{"".join(rest)}</ol>') if rest else "")


def time_spent(spent: Sequence[Goodput], labels: Sequence[str]) -> str:
    """Of the time since each run first began: a bar, and what stands in it."""
    if not any(each.wall_seconds > 0 for each in spent):
        return ""
    bars = "".join(_bar(each, label if len(labels) > 1 else "") for each, label in zip(spent, labels, strict=True))
    rows = []
    for name, field, colour in PARTS_OF_TIME:
        if any(getattr(each, field) > 0 for each in spent):
            cells = "".join(f"<td>{_with_share(getattr(each, field), each)}</td>" for each in spent)
            rows.append(f'<tr><th scope="row"><i class="block {colour}"></i>{name}</th>{cells}</tr>')
    counts = "".join(f"<td>{_restarts_in_words(each)}</td>" for each in spent)
    total = "".join(f"<td>{duration(each.wall_seconds)}</td>" for each in spent)
    head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in labels) if len(labels) > 1 else ""
    above = f'<thead><tr><th scope="col">part</th>{head}</tr></thead>' if head else ""
    body = "".join(rows) + f'<tr><th scope="row">in all</th>{total}</tr><tr><th scope="row">restarts</th>{counts}</tr>'
    return section(
        "Where the time went",
        f'{bars}<div class="table" role="region" aria-label="Where the time went" tabindex="0">'
        f'<table class="numbers">{above}<tbody>{body}</tbody></table></div>',
    )


def _restarts_in_words(spent: Goodput) -> str:
    again = f" <small>{counted(spent.lost_steps, 'step')} done again</small>" if spent.lost_steps else ""
    return f"{spent.restarts}{again}" if spent.restarts else "none"


def _bar(spent: Goodput, label: str) -> str:
    pieces = "".join(
        f'<i class="{colour}" style="flex:{getattr(spent, field):.6f}"></i>'
        for _, field, colour in PARTS_OF_TIME
        if getattr(spent, field) > 0
    )
    name = f'<div class="barname">{html.escape(label)}</div>' if label else ""
    return f'{name}<div class="bar" aria-hidden="true">{pieces}</div>'


def _with_share(seconds: float, spent: Goodput) -> str:
    share = seconds / spent.wall_seconds if spent.wall_seconds > 0 else 0.0
    return f"{duration(seconds)} <small>{share:.1%}</small>" if seconds > 0 else "–"


def samples(run: RunHistory, title: str) -> str:
    """Some of all samples, from the newest to the oldest: how the text became what it is."""
    chosen = spread(run.samples, SAMPLES_SHOWN)[::-1]
    if not chosen:
        return ""
    shown = [_sample(sample) for sample in chosen]
    rest = shown[SAMPLES_OPEN:]
    more = folded(f"{len(rest)} more, of {len(run.samples)} in all", "".join(rest)) if rest else ""
    return section(title, "".join(shown[:SAMPLES_OPEN]) + more)


def spread(samples: Sequence[SampleText], most: int) -> list[SampleText]:
    """At most `most`, evenly spread, the first and the last among them."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (most - 1))] for place in range(most)]


def _sample(sample: SampleText) -> str:
    text = sample.text.rstrip() if len(sample.text) <= SAMPLE_CHARACTERS else f"{sample.text[:SAMPLE_CHARACTERS]} …"
    return (
        f'<figure class="sample"><figcaption>step {sample.step}</figcaption><p><b>{html.escape(sample.prompt)}</b>'
        f"{html.escape(text)}</p></figure>"
    )


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan
