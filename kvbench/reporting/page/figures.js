"use strict";
// The figures of the page, each a function from chosen rows to Plotly's traces and layout. Texts are escaped, since Plotly reads some tags in them.
const kvbench = data => {
  const rows = data.rows.map((row, place) => ({...Object.fromEntries(data.columns.map((name, i) => [name, row[i]])), place}));
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const unique = values => [...new Set(values)];
  const by = (values, key) => { const found = new Map(); values.forEach(v => found.set(key(v), [...(found.get(key(v)) ?? []), v])); return found; };

  const number = (value, metric, signed = false) => {
    if (value === null) return "–";
    const {digits, scale} = data.metrics[metric], scaled = value * scale;
    const text = Math.abs(scaled) >= 1e5 ? scaled.toExponential(2) : scaled.toFixed(digits);
    return signed && scaled > 0 ? `+${text}` : text;
  };
  const interval = (low, high, metric, signed) => low === null ? "" : ` [${number(low, metric, signed)}, ${number(high, metric, signed)}]`;
  const bytes = value => { if (value === null) return "–"; let unit = 0; while (value >= 1024 && unit < 4) { value /= 1024; unit++; } return `${value.toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`; };
  const named = row => data.methods[row.method].name + (row.asked === null ? "" : ` ${row.asked}`);
  const cell = row => [row.setting, row.method, row.asked, row.bin, row.length, row.batch, row.run].join("|");
  const memory = new Map(), full = new Map();
  for (const row of rows) {
    if (row.metric === "kv_bytes_physical") memory.set(cell(row), row.value);
    if (row.metric === "kv_bytes_full") full.set(cell(row), row.value);
  }
  const held = row => memory.get(cell(row)) ?? null;
  const differs = row => row.p !== null && row.p < 0.05;
  const lines = row => {
    const found = [named(row), `${data.metrics[row.metric].heading}: ${number(row.value, row.metric)}${interval(row.low, row.high, row.metric)}`];
    if (row.delta !== null) found.push(`to full: ${number(row.delta, row.metric, true)}${interval(row.delta_low, row.delta_high, row.metric, true)}${row.p === null ? "" : `, p = ${row.p.toPrecision(2)}`}`);
    if (row.realised !== null) found.push(`removed: asked ${row.asked ?? "–"}, realised ${row.realised.toFixed(3)}${row.mean === null ? "" : `, mean ${row.mean.toFixed(3)}`}`);
    if (row.entries !== null) found.push(`entries at most: ${row.entries}`);
    if (held(row) !== null) found.push(`KV held: ${bytes(held(row))}${full.get(cell(row)) ? ` (${(100 * held(row) / full.get(cell(row))).toFixed(0)} %)` : ""}`);
    return [...found, `${row.n} in ${row.groups} groups`];
  };
  const hover = row => lines(row).map(plain).join("<br>");

  const shade = colour => !isDark() ? colour : "#" + [1, 3, 5].map(i => Math.round(parseInt(colour.slice(i, i + 2), 16) * 0.6 + 255 * 0.4).toString(16).padStart(2, "0")).join("");
  const axis = more => ({gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true, ...more, ...(more.title ? {title: {text: plain(more.title), standoff: 8}} : {})});
  const scaleOf = isLog => isLog ? {type: "log", dtick: "D2"} : {type: "linear"};
  const layout = more => ({
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: {color: style("--text"), size: 12, family: "system-ui, sans-serif"},
    margin: {l: 56, r: 12, t: 12, b: 48}, hovermode: "closest", showlegend: false, hoverlabel: {align: "left", bgcolor: style("--panel"), bordercolor: style("--mark"), font: {color: style("--text")}}, ...more,
  });
  const faint = (method, lit) => lit !== null && method !== lit;

  const X = {
    asked: ["share removed, asked", row => row.asked], realised: ["share removed, realised", row => row.realised],
    mean: ["share removed, mean over queries", row => row.mean], bytes: ["bytes held", held],
    length: ["tokens of the prompt", row => row.length], batch: ["batch", row => row.batch],
  };

  // A line for each method over x; methods without a ratio are drawn across.
  const curves = (chosen, {x, metric, logX, logY, front, lit}) => {
    const [title, of] = X[x], {scale, axis: label, better} = data.metrics[metric];
    const isSpeed = x === "length" || x === "batch", points = chosen.filter(row => row.value !== null);
    const known = points.map(of).filter(v => v !== null);
    const ends = x === "bytes" || isSpeed || !known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
    const groups = [...by(points, row => isSpeed ? named(row) : row.method)], apart = isSpeed || x === "bytes" ? 0 : Math.min(0.004, 0.05 / groups.length);
    const traces = groups.map(([key, mine], place) => {
      const method = data.methods[mine[0].method], dim = faint(mine[0].method, lit), colour = shade(method.colour);
      const across = !isSpeed && x !== "bytes" && mine.every(row => row.asked === null);
      const shown = across ? [mine[0], mine[0]] : mine.filter(row => of(row) !== null).sort((a, b) => of(a) - of(b));
      const values = shown.map(row => scale * row.value);
      return {
        type: "scatter", mode: across ? "lines" : "lines+markers", name: plain(isSpeed ? key : method.name), x: across ? ends : shown.map(row => of(row) + apart * (place - groups.length / 2)), y: values,
        text: shown.map(hover), hovertemplate: "%{text}<extra></extra>", customdata: shown.map(row => row.place), opacity: dim ? 0.15 : 1,
        line: {color: colour, dash: method.dash, width: dim ? 1 : lit === null ? 1.8 : 3}, marker: {color: colour, symbol: method.symbol, size: 8, line: {color: colour, width: 1.5}},
        error_y: across || !shown.some(row => row.low !== null) ? undefined : {
          type: "data", symmetric: false, thickness: 1, width: 3, color: colour,
          array: shown.map((row, i) => row.high === null ? 0 : scale * row.high - values[i]), arrayminus: shown.map((row, i) => row.low === null ? 0 : values[i] - scale * row.low),
        },
      };
    });
    if (front && better) traces.unshift(frontOf(points.filter(row => of(row) !== null), of, scale, x === "bytes", better));
    return {traces, layout: layout({xaxis: axis({title, ...scaleOf(logX), ...(x === "bytes" ? {tickformat: "~s", ticksuffix: "B"} : {})}), yaxis: axis({title: label, ...scaleOf(logY)}), height: 460})};
  };

  // What nothing beats that is as small: a step through the points that are best among those with as few bytes, or as much removed.
  const frontOf = (points, of, scale, small, better) => {
    const ordered = [...points].sort((a, b) => (small ? 1 : -1) * (of(a) - of(b))), kept = [];
    for (const row of ordered) {
      const last = kept.at(-1);
      if (!last || (better === "low" ? row.value < last.value : row.value > last.value)) kept.push(row);
    }
    return {type: "scatter", mode: "lines", name: "Pareto front", x: kept.map(of), y: kept.map(row => scale * row.value), hoverinfo: "skip", line: {color: style("--dim"), width: 5, shape: "hv"}, opacity: 0.3};
  };

  // Small maps side by side, one for each method.
  const maps = (list, {xTitle, yTitle, lit, reversed, colours = "Viridis", categories = true}) => {
    const across = Math.max(1, Math.floor(document.querySelector("main").clientWidth / 210)), down = Math.ceil(list.length / across);
    const places = {}, annotations = [], traces = list.map((map, i) => {
      const column = i % across, line = Math.floor(i / across), n = i ? i + 1 : "", gap = {x: 0.25 / across, y: Math.min(0.4, 40 / 170) / down};
      const domain = [column / across + (column ? gap.x / 2 : 0), (column + 1) / across - gap.x / 2], height = [1 - (line + 1) / down + gap.y, 1 - line / down - gap.y / 2];
      places[`xaxis${n}`] = axis({domain, anchor: `y${n}`, ...(categories ? {type: "category"} : {visible: false}), tickfont: {size: 10}});
      places[`yaxis${n}`] = axis({domain: height, anchor: `x${n}`, ...(categories ? {type: "category"} : {visible: false}), showticklabels: categories && column === 0, autorange: reversed ? "reversed" : true, tickfont: {size: 10}});
      annotations.push({text: plain(map.title), showarrow: false, xref: "paper", yref: "paper", x: (domain[0] + domain[1]) / 2, y: height[1], xanchor: "center", yanchor: "bottom", font: {size: 11}});
      return {type: "heatmap", z: map.z, x: map.x, y: map.y, text: map.text, hovertemplate: "%{text}<extra></extra>", xaxis: `x${n}`, yaxis: `y${n}`, zmin: 0, zmax: map.most ?? 1, colorscale: map.scale ?? colours,
        opacity: faint(map.method, lit) ? 0.25 : 1, showscale: i === 0 && !map.scale, colorbar: {thickness: 10, len: Math.min(1, 220 / (170 * down)), y: 1, yanchor: "top"}};
    });
    annotations.push({text: plain(`${xTitle} →, ${yTitle} ↓`), showarrow: false, xref: "paper", yref: "paper", x: 0, y: 0, xanchor: "left", yanchor: "top", yshift: -28, font: {size: 11, color: style("--dim")}});
    return {traces, layout: layout({...places, annotations, height: 90 + 170 * down, margin: {l: 44, r: 12, t: 24, b: 54}})};
  };

  // Points of measured against predicted speed-up, with the line where both are equal.
  const predicted = (chosen, lit) => {
    const found = by(chosen, cell), pairs = [...found.values()].map(mine => [mine.find(r => r.metric === "decode_speedup_predicted"), mine.find(r => r.metric === "decode_speedup")]).filter(([a, b]) => a && b && a.value !== null && b.value !== null);
    const most = Math.max(1, ...pairs.flat().map(row => row.value)) * 1.05;
    const traces = [{type: "scatter", mode: "lines", x: [0.9, most], y: [0.9, most], line: {color: style("--dim"), dash: "dot"}, hoverinfo: "skip", name: "equal"}, ...pairs.map(([a, b]) => {
      const method = data.methods[b.method];
      return {type: "scatter", mode: "markers", name: plain(named(b)), x: [a.value], y: [b.value], text: [hover(b) + `<br>length ${b.length}, batch ${b.batch}`], hovertemplate: "%{text}<extra></extra>", customdata: [b.place], error_y: b.low === null ? undefined : {type: "data", symmetric: false, thickness: 1, width: 3, color: shade(method.colour), array: [b.high - b.value], arrayminus: [b.value - b.low]}, opacity: faint(b.method, lit) ? 0.15 : 1, marker: {symbol: method.symbol, color: shade(method.colour), size: 9, line: {color: shade(method.colour), width: 1.5}}};
    })];
    return {traces, layout: layout({xaxis: axis({title: "speed-up that bytes predict"}), yaxis: axis({title: "speed-up measured"}), height: 420})};
  };

  // The prefix of a text; what a method kept of it is marked, the more layers and heads, the stronger.
  const prefix = (one, method, asked) => {
    const digits = one.kept.find(([name, ratio]) => name === method && (ratio === null || ratio === asked))?.[2];
    if (!digits || !one.ends.length) return document.createTextNode(one.prefix);
    const made = document.createElement("span");
    one.ends.forEach((end, i) => {
      const token = document.createElement("span");
      token.textContent = one.prefix.slice(i ? one.ends[i - 1] : 0, end);
      token.title = `${Math.round(100 * digits[i] / 9)} %`;
      token.style.background = `color-mix(in srgb, var(--kept) ${Math.round(70 * digits[i] / 9)}%, transparent)`;
      made.append(token);
    });
    return made;
  };

  return {data, rows, prefix, unique, by, number, interval, bytes, named, cell, held, differs, lines, plain, curves, maps, predicted, X, style};
};
