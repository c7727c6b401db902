"""report.html: one or several runs as one page that opens from disk, on a phone, in the dark, by keyboard."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.tracking.formatting import duration, quantity
from dist_trainer.tracking.goodput import goodput
from dist_trainer.tracking.run_history import RunHistory
from dist_trainer.tracking.svg_charts import Chart, Line, figure, short

SAMPLES_SHOWN = 8
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss."""
MARKED_EVENTS = ("resume", "preempted", "failed")

STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--faint:#657083;--paper:#fbfbfa;--card:#fff;--edge:#e3e5ea;--c0:#2563b8;--c1:#c2571a;
--c2:#2c8a57;--c3:#8a3fb0;--c4:#b3294e;--c5:#7a6a1d;--same:#657083}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ec;--faint:#98a2b3;--paper:#14171c;--card:#1b1f26;--edge:#2c323c;--c0:#6ea8ff;
--c1:#ff9a5c;--c2:#5fce93;--c3:#c98aef;--c4:#ff7d9c;--c5:#d9c25a}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1360px;margin:0 auto;padding:20px 16px 60px}h1{font-size:1.5rem;margin:0 0 4px}h2{font-size:1.1rem;margin:36px 0 12px}
.state{color:var(--faint);margin:0 0 16px}.facts{display:flex;flex-wrap:wrap;gap:10px}
.facts div{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:8px 14px;min-width:108px}
.facts b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}.facts span,small{color:var(--faint);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px;margin-top:18px}
.chart{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:12px 12px 4px}
.chart:focus-visible,summary:focus-visible{outline:3px solid var(--c0);outline-offset:2px}figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{fill:var(--faint);font-size:13px;font-family:inherit}.grid{stroke:var(--edge)}
svg path{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}circle{fill:currentColor}.faint path{opacity:.35;stroke-width:1.2}
.cursor{stroke:var(--faint);stroke-dasharray:3 3}.mark line{stroke:var(--c4);stroke-width:1.5;stroke-dasharray:5 4}
output{display:block;min-height:1.5em;font-size:.85rem;color:var(--faint);font-variant-numeric:tabular-nums}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.key{margin-left:12px;font-weight:400;font-size:.85rem;white-space:nowrap}.key:before{content:"";display:inline-block;width:14px;height:3px;
background:currentColor;vertical-align:middle;margin-right:5px;border-radius:2px}.key.faint{opacity:.6}
.sample{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:12px 16px;margin:0 0 10px;white-space:pre-wrap;
overflow-wrap:anywhere}.sample b{font-weight:600}.sample small{display:block}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;padding:4px 12px 4px 0;
border-bottom:1px solid var(--edge);vertical-align:top;overflow-wrap:anywhere}tr.same td{color:var(--same)}td:first-child{white-space:nowrap}
summary{cursor:pointer;font-weight:600;padding:6px 0}.bar{display:flex;height:26px;border-radius:8px;overflow:hidden;margin:4px 0}
.bar span{background:currentColor;min-width:2px}
"""

SCRIPT = """
for(const f of document.querySelectorAll('.chart')){const d=JSON.parse(f.querySelector('script').textContent),s=f.querySelector('svg'),
c=f.querySelector('.cursor'),o=f.querySelector('output'),xs=[...new Set(d.series.flatMap(l=>l.x))].sort((a,b)=>a-b);let at=xs.length-1;
const show=i=>{at=Math.max(0,Math.min(xs.length-1,i));const v=xs[at],p=d.left+(v-d.low)/(d.high-d.low)*(d.right-d.left);
c.setAttribute('x1',p);c.setAttribute('x2',p);o.textContent='step '+v+'   '+d.series.map(l=>{const j=l.x.indexOf(v);
return j<0?'':l.label+' '+l.y[j]}).filter(Boolean).join('   ')};
s.addEventListener('pointermove',e=>{const r=s.getBoundingClientRect(),w=d.low+((e.clientX-r.left)/r.width*d.width-d.left)/(d.right-d.left)
*(d.high-d.low);let b=0;xs.forEach((x,i)=>{if(Math.abs(x-w)<Math.abs(xs[b]-w))b=i});show(b)});
f.addEventListener('keydown',e=>{const k={ArrowLeft:at-1,ArrowRight:at+1,Home:0,End:xs.length-1}[e.key];
if(k!==undefined){e.preventDefault();show(k)}});f.addEventListener('focus',()=>show(at))}
"""


def html_report(runs: Sequence[RunHistory]) -> str:
    """The page; several runs lie over one another in its charts."""
    title = html.escape(", ".join(run.name for run in runs))
    body = "".join(
        [
            *(_heading(run, f"c{number % 6}" if len(runs) > 1 else "") for number, run in enumerate(runs)),
            f'<div class="charts">{"".join(map(figure, _charts(runs)))}</div>',
            *(_samples(run) for run in runs),
            *(_time_spent(run) for run in runs),
            *(_config(run) for run in runs),
            *(_environment(run) for run in runs),
        ]
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _heading(run: RunHistory, colour: str) -> str:
    status = run.status
    state = str(status.get("state", "unknown"))
    step, of = status.get("step"), status.get("max_steps")
    reason = f" ({status['reason']})" if status.get("reason") else ""
    facts = "".join(f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for name, value in _facts(run))
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return (
        f'<h1 class="{colour}">{html.escape(run.name)}</h1><p class="state">{html.escape(f"{state}{reason}")}, '
        f'step {html.escape(str(step))} of {html.escape(str(of))}; page made {when}</p><div class="facts">{facts}</div>'
    )


def _facts(run: RunHistory) -> Iterator[tuple[str, str]]:
    train, validation = run.train, run.validation
    if len(validation["loss"]):
        best = min(range(len(validation["loss"])), key=lambda i: _or_infinity(validation["loss"][i]))
        yield "best validation loss", f"{validation['loss'][best]:.4f}"
        yield "at step", f"{validation['step'][best]:.0f}"
        yield "perplexity there", short(validation["perplexity"][best])
    if len(train["loss"]):
        yield "last training loss", f"{train['loss'][-1]:.4f}"
        yield "tokens", quantity(train["tokens"][-1])
        yield "tokens a second", short(_median(train["tokens_per_second"]))
        mfu = _median(train["mfu"])
        yield "MFU", f"{mfu:.1%}" if math.isfinite(mfu) else "unknown"
    if run.skipped:
        yield "logged steps skipped", str(len(run.skipped))


def _charts(runs: Sequence[RunHistory]) -> Iterator[Chart]:
    marks = [
        (float(event["step"]), f"{run.name}: {event['event']} at step {event['step']}")
        for run in runs
        for event in run.events
        if event["event"] in MARKED_EVENTS
    ]
    yield Chart(
        "Loss", "nats per token", [line for n, run in enumerate(runs) for line in _loss_lines(run, n, len(runs))], marks
    )
    yield from (
        Chart(title, unit, _lines(runs, column, factor), marks, from_zero=zero)
        for title, unit, column, factor, zero in (
            ("Learning rate", "", "lr", 1.0, True),
            ("Gradient norm", "before clipping", "grad_norm", 1.0, True),
            ("Throughput", "tokens a second", "tokens_per_second", 1.0, True),
            ("MFU", "% of the devices' peak", "mfu", 100.0, True),
            ("Peak memory", "GiB, rank 0", "peak_memory_bytes", 2.0**-30, True),
            ("Time of a step", "ms", "step_seconds", 1000.0, True),
        )
    )


def _loss_lines(run: RunHistory, number: int, num_runs: int) -> Iterator[Line]:
    colour = f"c{number % 6}"
    prefix = f"{run.name} " if num_runs > 1 else ""
    steps, losses = run.train["step"], run.train["loss"]
    yield Line(f"{prefix}training", steps, losses, f"{colour} faint")
    if num_runs == 1:
        yield Line("smoothed", steps, smoothed(losses), colour)
    style = "c1 dots" if num_runs == 1 else f"{colour} dots"
    yield Line(f"{prefix}validation", run.validation["step"], run.validation["loss"], style)


def _lines(runs: Sequence[RunHistory], column: str, factor: float) -> list[Line]:
    return [
        Line(run.name, run.train["step"], [value * factor for value in run.train[column]], f"c{number % 6}")
        for number, run in enumerate(runs)
    ]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its beginning; what is not finite is passed over."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight if weight else math.nan)
    return out


def _samples(run: RunHistory) -> str:
    if not run.samples:
        return ""
    shown = "".join(
        f'<p class="sample"><small>step {s.step}</small><b>{html.escape(s.prompt)}</b>{html.escape(s.text)}</p>'
        for s in reversed(run.samples[-SAMPLES_SHOWN:])
    )
    return f"<h2>Samples of {html.escape(run.name)}, newest first</h2>{shown}"


def _time_spent(run: RunHistory) -> str:
    """Of the time since the run first began: steps, waiting for data, validation, and all else."""
    spent = goodput(run)
    if not spent.wall_seconds or not len(run.train["step"]):
        return ""
    rest = max(0.0, spent.wall_seconds - spent.useful_seconds)
    parts = [("steps", spent.step_seconds, "c0"), ("waiting for data", spent.data_seconds, "c1"),
             ("validation", spent.validation_seconds, "c2"), ("start, saving, samples, standing still", rest, "c3")]  # fmt: skip
    bar = "".join(f'<span class="{colour}" style="flex:{max(seconds, 1e-6):.6f}"></span>' for _, seconds, colour in parts)
    keys = "".join(f'<span class="key {colour}">{name} {duration(seconds)}</span>' for name, seconds, colour in parts)
    lost = f"<p>{spent.restarts} restarts, {spent.lost_steps} steps done again</p>" if spent.restarts else ""
    title = f"Where {html.escape(run.name)}'s {duration(spent.wall_seconds)} went"
    return f'<h2>{title}</h2><div class="bar">{bar}</div><p>{keys}</p>{lost}'


def _config(run: RunHistory) -> str:
    if not run.config:
        return ""
    defaults = dict(_flat(as_dict(TrainingConfig())))
    rows = []
    for key, value in _flat(run.config):
        same = key in defaults and defaults[key] == value
        was = "" if same else html.escape(str(defaults.get(key, "")))
        rows.append((same, key, html.escape(str(value)), was))
    rows.sort(key=lambda row: row[0])
    lines = "".join(
        f"<tr{' class=same' if same else ''}><td>{html.escape(key)}</td><td>{value}</td><td>{was}</td></tr>"
        for same, key, value, was in rows
    )
    return (
        f"<h2>Config of {html.escape(run.name)}</h2><details><summary>{sum(not row[0] for row in rows)} keys differ from the "
        f'default</summary><div class="table"><table><tr><th>key</th><th>value</th><th>default</th></tr>{lines}</table></div>'
        "</details>"
    )


def _environment(run: RunHistory) -> str:
    if not run.environment:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>" for key, value in run.environment.items()
    )
    name = html.escape(run.name)
    return f'<h2>What {name} ran on</h2><details><summary>versions and machine</summary><div class="table"><table>{lines}</table></div></details>'


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _median(values: Sequence[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf
