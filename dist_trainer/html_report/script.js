'use strict';
// Draws the charts as SVG, as wide as the window is, over the x-axis that the reader chose; reads values at a cursor.
{
  const LEFT = 56, RIGHT = 14, TOP = 22, BOTTOM = 36, MARK_WIDTH = 16, MAX_LINES_READ_AT_REST = 4;
  const axes = JSON.parse(document.getElementById('axes').textContent);
  const form = document.querySelector('.controls');
  const charts = [...document.querySelectorAll('.chart')].map(figure => {
    const plot = figure.querySelector('.plot');
    plot.innerHTML = '<svg aria-hidden="true"></svg>';
    const [output, note, script] = ['output', '.clipnote', 'script'].map(name => figure.querySelector(name));
    return { figure, plot, svg: plot.firstChild, output, note, data: JSON.parse(script.textContent), index: -1 };
  });
  let axis = 'step', fullRange = false;

  // Step of a run → tokens or hours, interpolated between the points in `axes`.
  const position = (run, step) => {
    const steps = axes[run].step, values = axes[run][axis];
    if (axis === 'step' || !steps.length) return step;
    let low = 0, high = steps.length - 1;
    if (step <= steps[0]) return values[0] * (steps[0] ? step / steps[0] : 1);
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return values[low] + (values[high] - values[low]) * (step - steps[low]) / (steps[high] - steps[low]);
  };

  // 0.003, but 1.25e-5: an axis has room for seven characters.
  const digits = (value, count) => {
    const rounded = +value.toPrecision(count);
    return rounded && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
  };

  const short = value => {
    for (const [size, letter] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
      if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + letter;
    }
    return digits(value, 4);
  };

  // About `count` round numbers from `low` to `high`.
  const ticks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const size = power * [1, 2, 2.5, 5, 10].find(factor => power * factor >= raw);
    const values = [];
    for (let n = Math.ceil(low / size - 1e-9); n <= Math.floor(high / size + 1e-9); n++) values.push(n * size);
    return values;
  };

  // Time in the unit that suits the longest run.
  const longest = Math.max(0, ...axes.flatMap(run => run.hours.slice(-1)));
  const [perHour, unit] = longest > 3 ? [1, 'h'] : longest > 0.05 ? [60, 'min'] : [3600, 's'];
  const named = value => axis === 'step' ? `step ${Math.round(value)}` : axis === 'tokens' ? `${short(value)} tokens`
    : `${short(+(value * perHour).toPrecision(3))} ${unit}`;

  const draw = chart => {
    const { data, svg, plot, note } = chart;
    const width = svg.clientWidth || 640, height = svg.clientHeight || 300;
    const right = width - RIGHT, bottom = height - BOTTOM;
    chart.lines = data.lines.map(line => ({ ...line, at: line.x.map(step => position(line.run, step)) }));
    chart.stops = [...new Set(chart.lines.flatMap(line => line.at))].sort((a, b) => a - b);
    let low = chart.stops[0], high = chart.stops[chart.stops.length - 1];
    if (low === high) { const room = axis === 'step' ? 1 : Math.abs(low) * 0.05 || 1; low -= room; high += room; }
    const top = fullRange ? data.top : data.high;
    const x = value => LEFT + (value - low) / (high - low) * (right - LEFT);
    // Values above the axis are drawn just outside.
    const y = value => Math.max(bottom - (value - data.low) / (top - data.low) * (bottom - TOP), -height);
    const text = (left, down, anchor, content, style = '') =>
      `<text class="${style}" x="${left}" y="${down}" text-anchor="${anchor}">${content}</text>`;
    const inside = chart.figure.id + '-inside';
    let parts = `<clipPath id="${inside}"><rect y="${TOP - 4}" width="${width}" height="${bottom - TOP + 8}"/></clipPath>`;
    for (const value of ticks(data.low, top, 6)) {
      parts += `<line class="grid" x1="${LEFT}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`
        + text(LEFT - 8, y(value) + 4, 'end', short(value));
    }
    const scale = axis === 'hours' ? perHour : 1;
    for (const value of ticks(low * scale, high * scale, width < 500 ? 4 : 8)) {
      if (axis === 'hours' || Number.isInteger(value)) parts += text(x(value / scale), height - 20, 'middle', short(value));
    }
    parts += text(right, height - 5, 'end', axis === 'hours' ? unit : axis);
    let numbered = -Infinity;
    const marks = data.marks.map(([step, run, number]) => [x(position(run, step)), number]);
    for (const [place, number] of marks.sort((a, b) => a[0] - b[0])) {
      if (!(place >= LEFT - 1 && place <= right + 1)) continue;
      parts += `<g class="mark"><line x1="${place}" x2="${place}" y1="${TOP}" y2="${bottom}"/>`;
      if (Math.abs(place - numbered) >= MARK_WIDTH) parts += text(numbered = place, TOP - 7, 'middle', number);
      parts += '</g>';
    }
    parts += `<g clip-path="url(#${inside})">`;
    for (const line of chart.lines) {
      const places = line.at.map((value, i) => [x(value).toFixed(1), y(line.y[i]).toFixed(1)]);
      const dots = line.style.includes('dots') || places.length === 1
        ? places.map(([cx, cy]) => `<circle cx="${cx}" cy="${cy}" r="3"/>`).join('') : '';
      parts += `<g class="${line.style}"><path d="M${places.map(place => place.join(' ')).join('L')}"/>${dots}</g>`;
    }
    parts += '</g>';
    for (const [step, run] of data.skips) parts += text(x(position(run, step)), bottom - 3, 'middle', '×', 'skip');
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.innerHTML = parts + `<line class="cursor" y1="${TOP}" y2="${bottom}" x1="-9" x2="-9"/>`;
    note.textContent = `The axis ends at ${short(data.high)}; higher values, up to ${short(data.top)}, are cut off.`;
    note.hidden = fullRange || data.high === data.top;
    chart.x = x;
    chart.value = pixel => low + (pixel - LEFT) / (right - LEFT) * (high - low);
    chart.near = (high - low) / 50;
    plot.setAttribute('aria-valuemin', low);
    plot.setAttribute('aria-valuemax', high);
    if (chart.index >= 0) show(chart, chart.index);
    else read(chart, chart.stops[chart.stops.length - 1], chart.lines.length <= MAX_LINES_READ_AT_REST);
  };

  // The place of the number nearest to `value`.
  const nearest = (numbers, value) => numbers.reduce(
    (best, number, i) => Math.abs(number - value) < Math.abs(numbers[best] - value) ? i : best, 0);

  // Write the lines' values at `value`, and what happened there, below the chart.
  const read = (chart, value, isVisible = true) => {
    const words = [named(value)];
    for (const line of chart.lines) {
      const i = nearest(line.at, value);
      if (Math.abs(line.at[i] - value) <= chart.near) words.push(`${line.label} ${digits(line.y[i], 5)}`);
    }
    for (const [step, run, number, what] of chart.data.marks) {
      if (Math.abs(position(run, step) - value) <= chart.near / 4) words.push(`[${number}] ${what}`);
    }
    const text = words.join(' · ');
    chart.output.textContent = isVisible ? text : '';
    chart.plot.setAttribute('aria-valuenow', value);
    chart.plot.setAttribute('aria-valuetext', text);
  };

  const show = (chart, index) => {
    chart.index = Math.max(0, Math.min(chart.stops.length - 1, index));
    const value = chart.stops[chart.index], cursor = chart.svg.querySelector('.cursor');
    for (const end of ['x1', 'x2']) cursor.setAttribute(end, chart.x(value));
    read(chart, value);
  };

  for (const chart of charts) {
    const point = event => {
      const pixel = event.clientX - chart.svg.getBoundingClientRect().left;
      show(chart, nearest(chart.stops, chart.value(pixel)));
    };
    chart.plot.addEventListener('pointermove', point);
    chart.plot.addEventListener('pointerdown', point);
    chart.plot.addEventListener('focus', () => show(chart, chart.index < 0 ? chart.stops.length - 1 : chart.index));
    chart.plot.addEventListener('keydown', event => {
      const last = chart.stops.length - 1, far = Math.max(1, Math.round(last / 10));
      const to = {
        ArrowLeft: chart.index - 1, ArrowDown: chart.index - 1, ArrowRight: chart.index + 1, ArrowUp: chart.index + 1,
        PageDown: chart.index - far, PageUp: chart.index + far, Home: 0, End: last,
      }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      show(chart, to);
    });
  }

  const drawAll = () => charts.forEach(draw);
  if (form) {
    const choose = () => { axis = form.elements.axis.value; fullRange = form.elements.range.checked; };
    form.hidden = false;
    form.querySelector('.range').hidden = charts.every(chart => chart.data.high === chart.data.top);
    form.addEventListener('submit', event => event.preventDefault());
    form.addEventListener('change', () => {
      choose();
      charts.forEach(chart => { chart.index = -1; });
      drawAll();
    });
    choose();
  }
  let drawnWidth = 0;
  const resized = () => { if (drawnWidth !== innerWidth) { drawnWidth = innerWidth; drawAll(); } };
  addEventListener('resize', resized);
  resized();

  const folded = [...document.querySelectorAll('details')];
  addEventListener('beforeprint', () => folded.forEach(part => { part.dataset.was = part.open ? 'open' : ''; part.open = true; }));
  addEventListener('afterprint', () => folded.forEach(part => { part.open = part.dataset.was === 'open'; }));
}
