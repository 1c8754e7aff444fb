"use strict";
// The controls of the page. One state (`lit`, the highlighted method) is shared by all sections; each section draws itself when it comes into view.
(async () => {
  // The numbers are packed, since they are most of the page: seven times smaller.
  if (!("DecompressionStream" in window)) document.querySelector("#curves .notes").textContent = "Figures and tables need a browser of 2023 or later.";
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), letter => letter.charCodeAt(0));
  const figures = kvbench(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json());
  const {data, rows, unique, by, number, interval, bytes, named, held, differs, lines, curves, maps, predicted, X, style} = figures;
  const $ = id => document.getElementById(id);
  const element = (tag, properties = {}, ...children) => { const made = Object.assign(document.createElement(tag), properties); made.append(...children); return made; };
  const whole = rows.filter(row => row.bin === null);
  const sections = [];
  let lit = null;

  // A choice among [value, label] pairs; the section is drawn again when it changes.
  const choice = (section, name, label, options) => {
    const select = element("select", {name}), box = element("label", {}, label, select);
    section.form.append(box);
    const fill = found => { const old = select.value; select.replaceChildren(...found.map(([value, text]) => element("option", {value, textContent: text}))); if (found.some(([value]) => String(value) === old)) select.value = old; box.hidden = found.length < 2; };
    fill(options);
    select.addEventListener("change", () => section.draw());
    return Object.assign(select, {fill});
  };
  const tick = (section, name, label, checked = false) => {
    const box = element("input", {type: "checkbox", name, checked});
    section.form.append(element("label", {}, box, label));
    box.addEventListener("change", () => section.draw());
    return box;
  };
  const section = (id, isThere, setUp) => {
    const place = $(id);
    if (!isThere) { place.hidden = true; return; }
    place.hidden = false;
    const made = {place, form: place.querySelector("form"), figure: place.querySelector(".figure"), notes: place.querySelector(".notes"), isTable: Boolean(place.querySelector(".table")), seen: false, draw: () => {}};
    made.form?.addEventListener("submit", event => event.preventDefault());
    made.draw = setUp(made);
    sections.push(made);
  };
  const plot = (section, {traces, layout}) => {
    Plotly.react(section.figure, traces, layout, {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"]});
    if (!section.bound) {
      section.bound = true;
      section.figure.on("plotly_click", event => { const point = event.points[0], place = [].concat(point.customdata ?? [])[0]; if (place !== undefined) { pick(rows[place]); light(rows[place].method, true); } });
    }
  };

  // Highlighting: the same method in every figure and table.
  const light = (method, stay = false) => {
    lit = lit === method && !stay ? null : method;
    document.querySelectorAll("#methods button").forEach(button => button.setAttribute("aria-pressed", String(Number(button.value) === lit)));
    document.querySelectorAll("[data-method]").forEach(mark);
    sections.filter(section => section.seen && !section.isTable).forEach(section => section.draw());
  };
  const glyph = method => { const made = element("span", {className: "glyph", textContent: `${method.glyph} `}); made.style.setProperty("--own", method.colour); return made; };
  const mark = place => place.classList.toggle("lit", lit !== null && place.dataset.method === data.methods[lit].name);
  data.methods.forEach((method, i) => {
    const button = element("button", {type: "button", value: i}, glyph(method), method.name);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => light(i));
    $("methods").append(button);
  });

  // The recipe of one number.
  const pick = row => {
    const [title, text, recipe] = $("picked").querySelectorAll("h3, p, pre"), setting = data.settings[row.setting];
    title.textContent = `${named(row)} on ${setting.label}`;
    text.replaceChildren(...lines(row).slice(1).flatMap(line => [line, element("br")]));
    recipe.textContent = `${data.commands[row.run]}\n\n${data.signatures[row.signature]}${row.bin ? `\nbin: ${row.bin}` : ""}\n\n${JSON.stringify(data.recipes[row.recipe], null, 1)}`;
    $("picked").hidden = false;
  };
  $("picked").querySelector("button").addEventListener("click", () => { $("picked").hidden = true; });
  document.addEventListener("keydown", event => { if (event.key === "Escape") { $("picked").hidden = true; if (lit !== null) light(lit); } });

  const brief = setting => [setting.task, ...(setting.length ? [setting.length] : []), ...(setting.question ? [setting.question] : []), setting.protocol === "answer" ? "" : setting.protocol].filter(Boolean).join(" · ");
  const ascending = values => unique(values).sort((a, b) => a - b);
  const several = unique(data.settings.map(setting => setting.seed)).length > 1;
  const label = (setting, withModel) => [setting.label, setting.protocol, ...(withModel ? [setting.model] : []), ...(several ? [`seed ${setting.seed}`] : [])].join(" · ");
  const settingsOf = (model, keep) => data.settings.map((setting, i) => [i, setting]).filter(([, setting]) => setting.model === model && keep(setting)).map(([i, setting]) => [i, label(setting)]);
  const models = keep => unique(data.settings.filter(keep).map(setting => setting.model)).map(model => [model, model]);
  const isQuality = setting => setting.protocol !== "profile", isSpeed = setting => setting.protocol === "profile";
  const ratiosOf = chosen => ascending(chosen.map(row => row.asked).filter(asked => asked !== null)).map(asked => [asked, String(asked)]);

  const curveSection = (id, keep, xs, defaultMetric) => section(id, whole.some(row => keep(data.settings[row.setting])), self => {
    const model = choice(self, "model", "model", models(keep)), task = choice(self, "task", "task", settingsOf(model.value, keep)), metric = choice(self, "metric", "metric", []), x = choice(self, "x", "against", []), other = choice(self, "other", "at", []);
    const logX = tick(self, "logx", "log x"), logY = tick(self, "logy", "log y"), front = keep(data.settings[0]) && keep === isQuality ? tick(self, "front", "Pareto front") : {checked: false};
    return () => {
      task.fill(settingsOf(model.value, keep));
      const setting = data.settings[task.value], mine = whole.filter(row => row.setting === Number(task.value) && row.value !== null);
      const old = metric.dataset.of === task.value, present = unique(mine.map(row => row.metric));
      metric.fill(present.map(name => [name, data.metrics[name].axis]));
      if (!old) { metric.value = present.includes(defaultMetric) ? defaultMetric : setting.main; metric.dataset.of = task.value; }
      const chosen = mine.filter(row => row.metric === metric.value);
      const isPositive = chosen.length && chosen.every(row => row.value > 0), isWide = Math.max(...chosen.map(row => row.value)) > 4 * Math.min(...chosen.map(row => row.value));
      if (logY.dataset.of !== `${task.value} ${metric.value}`) { logY.checked = Boolean(isPositive && isWide && data.metrics[metric.value].better !== "high"); logY.dataset.of = `${task.value} ${metric.value}`; }
      x.fill(xs.filter(name => unique(chosen.map(X[name][1])).filter(v => v !== null).length > (keep === isSpeed ? 1 : 0)).map(name => [name, X[name][0]]));
      if (!x.value) x.fill([[xs[0], X[xs[0]][0]]]);
      const held = {length: "batch", batch: "length"}[x.value];
      other.fill(held ? ascending(chosen.map(row => row[held]).filter(v => v !== null)).map(v => [v, `${held} ${v}`]) : []);
      self.notes.textContent = setting.unranked || `${label(setting, true)}. Bars: 95 % intervals; points that would hide each other are drawn beside each other. Click one for its recipe.`;
      plot(self, curves(held ? chosen.filter(row => String(row[held]) === other.value) : chosen, {x: x.value, metric: metric.value, logX: logX.checked, logY: logY.checked, front: front.checked, lit}));
    };
  });
  curveSection("curves", isQuality, ["realised", "asked", "mean", "bytes"], null);

  // Methods by tasks at one ratio; the bar of a cell is the share of the full cache's value that is kept.
  section("leaderboard", whole.some(row => isQuality(data.settings[row.setting]) && !data.methods[row.method].control), self => {
    const keep = isQuality, model = choice(self, "model", "model", models(keep)), ratio = choice(self, "ratio", "removed", []), found = {};
    const kept = (row, setting, at) => {
      const base = at.get(`${row.setting}|full|${setting.main}`), recovery = at.get(`${row.setting}|${row.method}|recovery`);
      if (setting.unranked || !base || base.value === null || row.value === null) return null;
      if (recovery && recovery.value !== null) return recovery.value;
      return setting.main.includes("accuracy") && base.value ? row.value / base.value : null;
    };
    return () => {
      const mine = whole.filter(row => data.settings[row.setting].model === model.value && keep(data.settings[row.setting]) && row.value !== null);
      const chosenBefore = ratio.value;
      ratio.fill(ratiosOf(mine));
      if (!chosenBefore && [...ratio.options].some(option => option.value === "0.7")) ratio.value = "0.7";
      const wanted = mine.filter(row => row.asked === null || String(row.asked) === ratio.value), at = new Map();
      for (const row of wanted) { at.set(`${row.setting}|${row.method}|${row.metric}`, row); if (data.methods[row.method].name === "full") at.set(`${row.setting}|full|${row.metric}`, row); }
      const settings = unique(wanted.map(row => row.setting)).filter(i => wanted.some(row => row.setting === i && row.metric === data.settings[i].main && !data.methods[row.method].control));
      const table = unique(wanted.map(row => row.method)).map(method => {
        const line = {method: data.methods[method].name, glyph: data.methods[method].glyph, colour: data.methods[method].colour, shares: {}, rows: {}}, shares = [];
        for (const i of settings) {
          const row = at.get(`${i}|${method}|${data.settings[i].main}`);
          if (!row) continue;
          line[`s${i}`] = row.value; line.rows[`s${i}`] = row;
          const share = kept(row, data.settings[i], at);
          if (share !== null) { line.shares[`s${i}`] = share; shares.push(share); }
        }
        line.kept = shares.length ? shares.reduce((a, b) => a + b) / shares.length : null;
        line.tasks = shares.length;
        return line;
      });
      const titled = text => () => element("span", {textContent: text});
      const cellOf = field => cell => {
        const line = cell.getData(), row = line.rows[field], share = line.shares[field];
        if (!row) return "–";
        const width = share === undefined ? 0 : 100 * Math.max(0, Math.min(1, share));
        cell.getElement().style.background = `linear-gradient(90deg, var(--bar) ${width}%, transparent ${width}%)`;
        return element("span", {textContent: number(row.value, row.metric) + (differs(row) ? "*" : "") + (data.settings[row.setting].unranked ? "†" : ""), title: lines(row).join("\n")});
      };
      const last = {sorter: "number", sorterParams: {alignEmptyValues: "bottom"}};
      const columns = [
        {title: "method", field: "method", frozen: true, width: 150, titleFormatter: titled("method"), formatter: cell => element("span", {}, glyph(cell.getData()), cell.getValue())},
        {title: "kept", field: "kept", width: 100, hozAlign: "right", ...last, headerSortStartingDir: "desc", titleFormatter: titled("kept"), formatter: cell => cell.getValue() === null ? "–" : `${(100 * cell.getValue()).toFixed(0)} % of ${cell.getData().tasks}`},
        ...settings.map(i => ({title: brief(data.settings[i]), field: `s${i}`, hozAlign: "right", ...last, width: 104, headerSortStartingDir: data.metrics[data.settings[i].main].better === "low" ? "asc" : "desc", titleFormatter: titled(`${brief(data.settings[i])}: ${data.metrics[data.settings[i].main].heading}`), formatter: cellOf(`s${i}`), cellClick: (event, cell) => { const row = cell.getData().rows[`s${i}`]; if (row) pick(row); }})),
      ];
      found.table?.destroy();
      found.table = new Tabulator(self.place.querySelector(".table"), {data: table, columns, layout: "fitData", initialSort: [table.some(line => line.kept !== null) ? {column: "kept", dir: "desc"} : {column: (columns[2] ?? columns[0]).field, dir: columns[2]?.headerSortStartingDir ?? "asc"}], rowFormatter: row => { row.getElement().dataset.method = row.getData().method; mark(row.getElement()); }});
      found.table.on("rowClick", (event, row) => light(data.methods.findIndex(method => method.name === row.getData().method), true));
    };
  });

  // Maps of accuracy by depth: over lengths where several were measured, otherwise over ratios.
  const byDepth = rows.filter(row => row.bin?.startsWith("depth=") && row.metric === "answer_accuracy" && row.value !== null);
  const family = row => { const setting = data.settings[row.setting]; return [setting.task, setting.question ? `question ${setting.question}` : "question hidden", setting.model].join(" · "); };
  const depth = row => Number(row.bin.split("=")[1]);
  section("needles", byDepth.length, self => {
    const task = choice(self, "task", "task", unique(byDepth.map(family)).map(name => [name, name])), ratio = choice(self, "ratio", "removed", []);
    return () => {
      const mine = byDepth.filter(row => family(row) === task.value), over = unique(mine.map(row => row.length)).length > 1;
      ratio.fill(over ? ratiosOf(mine) : []);
      const chosen = mine.filter(row => !over || row.asked === null || String(row.asked) === ratio.value), depths = ascending(chosen.map(depth));
      const list = [...by(chosen, row => row.method)].map(([method, some]) => {
        const xs = over ? ascending(chosen.map(row => row.length)) : ascending(some.map(row => row.asked ?? 0));
        const at = (y, x) => some.find(row => depth(row) === y && (over ? row.length === x : (row.asked ?? 0) === x)) ?? null;
        return {title: data.methods[method].name, method, x: xs.map(String), y: depths.map(d => `${d} %`), z: depths.map(y => xs.map(x => at(y, x)?.value ?? null)), text: depths.map(y => xs.map(x => { const row = at(y, x); return row ? figures.plain(lines(row).slice(0, 2).join("\n")).replace("\n", "<br>") : ""; }))};
      });
      plot(self, maps(list, {xTitle: over ? "tokens of the context" : "share removed (0: full cache)", yTitle: "depth", lit, reversed: true}));
      self.notes.textContent = "Accuracy from 0 (dark) to 1 (bright); a gap: not measured.";
    };
  });

  section("survival", data.survival.length, self => {
    const name = one => `${one.task} · ${one.model}`, task = choice(self, "task", "task", unique(data.survival.map(name)).map(text => [text, text]));
    return () => {
      const mine = data.survival.filter(one => name(one) === task.value), xs = unique(mine.map(one => one.asked)).sort();
      const list = [...by(mine, one => one.method)].map(([method, some]) => {
        const at = x => some.find(one => one.asked === x), layers = some[0].layers.map((_, layer) => layer);
        return {title: method, method: data.methods.findIndex(one => one.name === method), x: xs, y: layers.map(String), z: layers.map(layer => xs.map(x => at(x)?.layers[layer] ?? null)), text: layers.map(layer => xs.map(x => figures.plain(`${method} ${x}, layer ${layer}: ${at(x)?.layers[layer] ?? "–"}`)))};
      });
      plot(self, maps(list, {xTitle: "share removed", yTitle: "layer", lit, reversed: true}));
      self.notes.textContent = "Share of the evidence's entries that are still held, mean over heads and contexts: 0 (dark) to 1 (bright).";
    };
  });

  curveSection("speed", isSpeed, ["length", "batch"], "decode_tok_s");
  section("predicted", whole.some(row => row.metric === "decode_speedup_predicted" && row.value !== null), self => () => plot(self, predicted(whole.filter(row => row.metric.startsWith("decode_speedup") && data.methods[row.method].name !== "full"), lit)));
  section("masks", Object.keys(data.masks).length > 1, self => {
    const of = name => name.split(" ").at(-1), ratio = choice(self, "ratio", "removed", unique(Object.keys(data.masks).filter(name => name.includes(" ")).map(of)).sort().map(text => [text, text]));
    return () => {
      const list = Object.entries(data.masks).filter(([name]) => !name.includes(" ") || of(name) === ratio.value).map(([name, mask]) => ({
        title: name, method: data.methods.findIndex(one => one.name === name.split(" ")[0]), most: 3, scale: [[0, "transparent"], [0.33, "#56B4E9"], [0.66, "#D55E00"], [1, style("--text")]],
        z: mask.rows.map((line, y) => [...line].map((seen, x) => x === y ? 3 : seen !== "1" ? 0 : mask.kinds[x] === "r" ? 1 : 2)), text: mask.rows.map((line, y) => [...line].map((seen, x) => `token ${y}, entry ${x}`)),
      }));
      plot(self, maps(list, {xTitle: "entries", yTitle: "tokens", lit, reversed: true, categories: false}));
      self.notes.textContent = "Blue: a token of the text is seen; orange: an entry that stands for others; dark: the token itself.";
    };
  });

  // Texts and answers side by side.
  section("texts", data.texts.length + data.answers.length, self => {
    const all = [...data.texts, ...data.answers], name = one => `${one.task} · ${one.model}`;
    const task = choice(self, "task", "task", unique(all.map(name)).map(text => [text, text])), document_ = choice(self, "document", "document", []), ratio = choice(self, "ratio", "removed", []), kind = choice(self, "decode", "decoding", []);
    const heading = line => line[1] === null ? line[0] : `${line[0]} ${line[1]}`, place = self.place.querySelector(".texts");
    const card = (method, title, ...content) => { const made = element("article", {}, element("b", {textContent: title}), ...content); if (method) { made.dataset.method = method; mark(made); } return made; };
    return () => {
      const mine = all.filter(one => name(one) === task.value);
      document_.fill(unique(mine.map(one => one.document)).map(text => [text, text]));
      const one = mine.find(each => each.document === document_.value), written = one.texts ?? one.answers;
      ratio.fill(unique(written.map(line => line[1]).filter(asked => asked !== null)).sort().map(text => [text, text]));
      kind.fill(one.texts ? unique(written.map(line => line[2])).map(text => [text, text]) : []);
      const chosen = written.filter(line => (line[1] === null || line[1] === ratio.value) && (!one.texts || line[2] === kind.value));
      place.classList.toggle("long", Boolean(one.texts));
      place.replaceChildren(
        ...(one.prefix ? [Object.assign(card(null, one.kept.length ? "prefix: click a method above to see what it kept of it (the stronger, the more layers and heads)" : "prefix", figures.prefix(one, lit === null ? null : data.methods[lit].name, ratio.value)), {className: "source"}), card(null, "human", one.human)] : []),
        ...chosen.map(line => one.texts
          ? card(line[0], heading(line), ...(line[4] === null || line[4] >= line[3].length ? [line[3] || "(empty)"] : [element("span", {className: "same", textContent: line[3].slice(0, line[4])}), element("span", {className: "from", textContent: "|"}), line[3].slice(line[4])]))
          : card(line[0], `${heading(line)}${line[4] === null ? "" : `, evidence held ${(100 * line[4]).toFixed(0)} %`}`, ...line[2].map((text, i) => element("div", {className: line[3][i] < 1 ? "wrong" : "", textContent: `${line[3][i] < 1 ? "✗" : "✓"} ${text || "(empty)"}`})))),
      );
    };
  });

  section("all", rows.length, self => () => {
    if (self.table) return;
    const text = (title, of, width) => ({title, field: title, headerFilter: "input", width, mutator: (value, row) => of(rows[row.place])});
    const value = (title, of) => ({title, field: title, sorter: "number", sorterParams: {alignEmptyValues: "bottom"}, hozAlign: "right", mutator: (_, row) => of(rows[row.place])});
    const rounded = (title, of, shown) => ({...value(title, of), formatter: cell => cell.getValue() === null ? "–" : shown(cell.getValue())});
    const formatted = (title, of, signed, ends) => ({...value(title, of), formatter: cell => { const row = rows[cell.getData().place]; return number(of(row), row.metric, signed) + interval(...ends(row), row.metric, signed) + (signed && differs(row) ? "*" : ""); }});
    self.table = new Tabulator(self.place.querySelector(".table"), {
      height: "32rem", data: rows.map(row => ({place: row.place})), placeholder: "No such number.",
      columns: [
        text("task", row => data.settings[row.setting].label, 220), text("model", row => data.settings[row.setting].model, 120), text("protocol", row => data.settings[row.setting].protocol, 80), text("method", row => data.methods[row.method].name, 130),
        value("removed", row => row.asked), rounded("realised", row => row.realised, v => v.toFixed(3)), text("metric", row => data.metrics[row.metric].heading, 130), text("bin", row => row.bin ?? "", 90),
        formatted("value", row => row.value, false, row => [row.low, row.high]), formatted("to full", row => row.delta, true, row => [row.delta_low, row.delta_high]),
        rounded("p", row => row.p, v => v.toPrecision(2)), rounded("KV held", held, bytes), value("n", row => row.n),
      ],
      rowFormatter: row => { row.getElement().dataset.method = row.getData().method; mark(row.getElement()); },
    });
    self.table.on("rowClick", (event, row) => pick(rows[row.getData().place]));
  });

  // Light and dark; paper is always light.
  const theme = name => { document.documentElement.dataset.theme = name; sections.filter(section => section.seen && !section.isTable).forEach(section => section.draw()); };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  preferred.addEventListener("change", () => theme(preferred.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  theme(preferred.matches ? "dark" : "light");
  const show = section => { if (!section.seen) { section.seen = true; section.draw(); } };
  const watcher = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(entry => show(sections.find(section => section.place === entry.target))), {rootMargin: "300px"});
  sections.forEach(section => watcher.observe(section.place));
  requestIdleCallback(() => sections.filter(section => section.place.id === "leaderboard").forEach(show));
  let before = null;
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; document.querySelectorAll("#summary details").forEach(part => { part.open = true; }); sections.filter(section => section.place.id !== "all").forEach(show); theme("light"); });
  addEventListener("afterprint", () => { if (before) theme(before); });
})();
