'use strict';
{
  const LEFT = 56, RIGHT = 14, TOP = 22, BOTTOM = 36, BADGE = 16, READ_AT_REST = 4;
  const axes = JSON.parse(document.getElementById('axes').textContent);
  const form = document.querySelector('.controls');
  const charts = [...document.querySelectorAll('.chart')].map(figure => ({
    figure,
    plot: figure.querySelector('.plot'),
    svg: figure.querySelector('svg[viewBox]:not(.swatch)'),
    output: figure.querySelector('output'),
    note: figure.querySelector('.clipnote'),
    data: JSON.parse(figure.querySelector('script').textContent),
    at: -1,
  }));
  let over = 'step', whole = false;

  // Step of a run → tokens or hours, between the points that the page knows.
  const along = (run, step) => {
    const known = axes[run], steps = known.step;
    if (over === 'step' || !steps.length) return step;
    const values = known[over];
    let low = 0, high = steps.length - 1;
    if (step <= steps[0]) return values[0] * (steps[0] ? step / steps[0] : 1);
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return values[low] + (values[high] - values[low]) * (step - steps[low]) / (steps[high] - steps[low]);
  };

  // 0.003, but 1.25e-5: there is room for seven characters next to an axis.
  const digits = (value, most) => {
    const rounded = +value.toPrecision(most);
    return rounded && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
  };

  const short = value => {
    for (const [size, letter] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
      if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + letter;
    }
    return digits(value, 4);
  };

  const ticks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find(factor => power * factor >= raw);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) found.push(n * step);
    return found;
  };

  // Time in the unit that fits how long all of them took.
  const longest = Math.max(0, ...axes.flatMap(run => run.hours.slice(-1)));
  const [factor, unit] = longest > 3 ? [1, 'h'] : longest > 0.05 ? [60, 'min'] : [3600, 's'];
  const named = value => over === 'step' ? `step ${Math.round(value)}` : over === 'tokens' ? `${short(value)} tokens`
    : `${short(+(value * factor).toPrecision(3))} ${unit}`;

  const draw = chart => {
    const { data, svg } = chart;
    const width = svg.clientWidth || 640, height = svg.clientHeight || 300;
    const right = width - RIGHT, bottom = height - BOTTOM;
    chart.lines = data.lines.map(line => ({ ...line, at: line.x.map(step => along(line.run, step)) }));
    const all = chart.lines.flatMap(line => line.at);
    let low = Math.min(...all), high = Math.max(...all);
    if (low === high) { const room = over === 'step' ? 1 : Math.abs(low) * 0.05 || 1; low -= room; high += room; }
    const top = whole ? data.top : data.high;
    const x = value => LEFT + (value - low) / (high - low) * (right - LEFT);
    const y = value => Math.max(bottom - (value - data.low) / (top - data.low) * (bottom - TOP), -height);
    const inside = chart.figure.id + '-inside', parts = [];
    parts.push(`<clipPath id="${inside}"><rect x="0" y="${TOP - 4}" width="${width}" height="${bottom - TOP + 8}"/></clipPath>`);
    for (const value of ticks(data.low, top, 6)) {
      parts.push(`<line class="grid" x1="${LEFT}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`,
        `<text x="${LEFT - 8}" y="${y(value) + 4}" text-anchor="end">${short(value)}</text>`);
    }
    const times = over === 'hours' ? factor : 1;
    for (const value of ticks(low * times, high * times, width < 500 ? 4 : 8)) {
      if (over !== 'hours' && !Number.isInteger(value)) continue;
      parts.push(`<text x="${x(value / times)}" y="${height - 20}" text-anchor="middle">${short(value)}</text>`);
    }
    parts.push(`<text x="${right}" y="${height - 5}" text-anchor="end">${over === 'hours' ? unit : over}</text>`);
    let badge = -Infinity;
    for (const [step, run, number] of data.marks) {
      const place = x(along(run, step));
      if (!(place >= LEFT - 1 && place <= right + 1)) continue;
      parts.push(`<g class="mark"><line x1="${place}" x2="${place}" y1="${TOP}" y2="${bottom}"/>`);
      if (Math.abs(place - badge) >= BADGE) {
        parts.push(`<text x="${badge = place}" y="${TOP - 7}" text-anchor="middle">${number}</text>`);
      }
      parts.push('</g>');
    }
    parts.push(`<g clip-path="url(#${inside})">`);
    for (const line of chart.lines) {
      const places = line.at.map((value, i) => [x(value).toFixed(1), y(line.y[i]).toFixed(1)]);
      const dots = line.style.includes('dots') || places.length === 1
        ? places.map(([a, b]) => `<circle cx="${a}" cy="${b}" r="3"/>`).join('') : '';
      parts.push(`<g class="${line.style}"><path d="M${places.map(place => place.join(' ')).join('L')}"/>${dots}</g>`);
    }
    parts.push('</g>');
    for (const [step, run] of data.skips) {
      parts.push(`<text class="skip" x="${x(along(run, step))}" y="${bottom - 3}" text-anchor="middle">×</text>`);
    }
    parts.push(`<line class="cursor" y1="${TOP}" y2="${bottom}" x1="-9" x2="-9"/>`);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.innerHTML = parts.join('');
    chart.x = x;
    chart.invert = pixel => low + (pixel - LEFT) / (right - LEFT) * (high - low);
    chart.near = (high - low) / 50;
    chart.stops = [...new Set(all)].sort((a, b) => a - b);
    if (chart.note) chart.note.hidden = whole;
    chart.plot.setAttribute('aria-valuemin', low);
    chart.plot.setAttribute('aria-valuemax', high);
    if (chart.at >= 0) show(chart, chart.at);
    else chart.output.textContent = chart.lines.length <= READ_AT_REST ? reading(chart, chart.stops[chart.stops.length - 1]) : '';
  };

  // The point of a line nearest to `value`; -1 where none is near.
  const nearest = (line, value, near) => {
    let best = -1;
    line.at.forEach((place, i) => {
      if (Math.abs(place - value) <= near && (best < 0 || Math.abs(place - value) < Math.abs(line.at[best] - value))) best = i;
    });
    return best;
  };

  // What stands at `value`: the lines' values, and what happened there.
  const reading = (chart, value) => {
    const words = [named(value)];
    for (const line of chart.lines) {
      const i = nearest(line, value, chart.near);
      if (i >= 0) words.push(`${line.label} ${digits(line.y[i], 5)}`);
    }
    for (const [step, run, number, what] of chart.data.marks) {
      if (Math.abs(along(run, step) - value) <= chart.near / 4) words.push(`[${number}] ${what}`);
    }
    return words.join(' · ');
  };

  const show = (chart, index) => {
    const { stops } = chart;
    chart.at = Math.max(0, Math.min(stops.length - 1, index));
    const value = stops[chart.at];
    const cursor = chart.svg.querySelector('.cursor');
    cursor.setAttribute('x1', chart.x(value));
    cursor.setAttribute('x2', chart.x(value));
    chart.output.textContent = reading(chart, value);
    chart.plot.setAttribute('aria-valuenow', value);
    chart.plot.setAttribute('aria-valuetext', chart.output.textContent);
  };

  for (const chart of charts) {
    const point = event => {
      const value = chart.invert(event.clientX - chart.svg.getBoundingClientRect().left);
      let best = 0;
      chart.stops.forEach((stop, i) => { if (Math.abs(stop - value) < Math.abs(chart.stops[best] - value)) best = i; });
      show(chart, best);
    };
    chart.plot.addEventListener('pointermove', point);
    chart.plot.addEventListener('pointerdown', point);
    chart.plot.addEventListener('focus', () => show(chart, chart.at < 0 ? chart.stops.length - 1 : chart.at));
    chart.plot.addEventListener('keydown', event => {
      const last = chart.stops.length - 1, far = Math.max(1, Math.round(last / 10));
      const to = {
        ArrowLeft: chart.at - 1, ArrowDown: chart.at - 1, ArrowRight: chart.at + 1, ArrowUp: chart.at + 1,
        PageDown: chart.at - far, PageUp: chart.at + far, Home: 0, End: last,
      }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      show(chart, to);
    });
  }

  const drawAll = () => charts.forEach(draw);
  if (form) {
    form.hidden = false;
    form.querySelector('.whole').hidden = charts.every(chart => !chart.note);
    form.addEventListener('submit', event => event.preventDefault());
    form.addEventListener('change', () => {
      over = form.elements.over.value;
      whole = form.elements.whole.checked;
      charts.forEach(chart => { chart.at = -1; });
      drawAll();
    });
    over = form.elements.over.value;
    whole = form.elements.whole.checked;
  }
  let drawn = 0;
  const resized = () => { if (drawn !== innerWidth) { drawn = innerWidth; drawAll(); } };
  addEventListener('resize', resized);
  resized();

  const folded = [...document.querySelectorAll('details')];
  addEventListener('beforeprint', () => folded.forEach(part => { part.dataset.was = part.open ? 'open' : ''; part.open = true; }));
  addEventListener('afterprint', () => folded.forEach(part => { part.open = part.dataset.was === 'open'; }));
}
