"""The parts of the report that are no charts of settings: how runs stand, what happened, where the time went, samples."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Sequence

from dist_trainer.plural import counted
from dist_trainer.tracking.formatting import duration, memory, quantity, short
from dist_trainer.tracking.goodput import Goodput
from dist_trainer.tracking.report.curves import numbered_marks, skipped_steps, style_of
from dist_trainer.tracking.report.markup import folded, section, table
from dist_trainer.tracking.report.svg_charts import key
from dist_trainer.tracking.run_history import RunHistory, SampleText

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
    ("standing still between lives", "standing_seconds", "t7"),
    ("all else", "other_seconds", "t8"),
)


def heading(runs: Sequence[RunHistory], labels: Sequence[str], spent: Sequence[Goodput]) -> str:
    """Who they are, how they stand, how good they got."""
    made = f"page made {time.strftime('%Y-%m-%d %H:%M', time.localtime())}"
    if len(runs) == 1:
        facts = "".join(
            f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts_of(runs[0], spent[0])
        )
        state = html.escape(state_of(runs[0]))
        return f'<h1>{html.escape(labels[0])}</h1><p class="faded">{state}; {made}</p><dl class="facts">{facts}</dl>'
    facts = [dict(facts_of(run, each)) for run, each in zip(runs, spent, strict=True)]
    names = list(dict.fromkeys(name for known in facts for name in known))
    rows = [
        [label, *(known.get(name, "–") for name in names), state_of(run)]
        for run, label, known in zip(runs, labels, facts, strict=True)
    ]
    keys = "".join(key(label, style_of(number)) for number, label in enumerate(labels))
    return (
        f'<h1>{len(runs)} runs</h1><p class="faded">{made}</p><p class="keys runs">{keys}</p>'
        f"{table('The runs', ['run', *names, 'state'], rows, numbers=True)}"
    )


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
        yield "at step", f"{validation['step'][best]:.0f}"
        yield "perplexity there", short(validation["perplexity"][best])
        if math.isfinite(bits := validation["bits_per_byte"][best]):
            yield "bits per byte there", f"{bits:.3f}"
    if len(train["loss"]):
        yield "last training loss", f"{train['loss'][-1]:.4f}"
        yield "tokens", quantity(train["tokens"][-1])
        yield "tokens a second", quantity(_median(train["tokens_per_second"]))
        mfu = _median(train["mfu"])
        yield "MFU", f"{mfu:.1%}" if math.isfinite(mfu) else "unknown"
        yield "peak memory", memory(max((b for b in train["peak_memory_bytes"] if math.isfinite(b)), default=math.nan))
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
