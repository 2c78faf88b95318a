"use strict";
// Which latents are shown and in which order; kept in the address, so that a view can be linked to.
Gallery.filters = (() => {
  const { data, latents, h, whole, percent, number, className, dot, term } = Gallery;
  const last = (values) => values.reduce((a, b) => Math.max(a, b), 0);
  const first = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

  function scale(key, low, high, logarithmic, show) {
    const to = logarithmic ? Math.log : (value) => value;
    const from = logarithmic ? Math.exp : (value) => value;
    const [a, b] = [to(low), to(high)];
    const span = b - a || 1;
    return {
      key,
      show,
      step: (value) => Math.round(Math.min(1, Math.max(0, (to(Math.max(value, 1e-12)) - a) / span)) * 100),
      value: (step) => from(a + (span * step) / 100),
    };
  }
  const densities = latents.map((latent) => latent.density);
  const SCALES = [
    ...(data.labelled ? [scale("majority", 0, 1, false, percent)] : []),
    scale("density", first(densities), last(densities), true, percent),
    scale("strength", 0, last(latents.map((latent) => latent.strength)), false, number),
  ];
  const NAMES = { majority: "purity", density: "density", strength: "strength" };
  // By what a few images say by chance (one is of one class, whatever it shows), rare latents come last.
  const rareLast = (order) => (a, b) => a.rare - b.rare || order(a, b);
  const SORTS = [
    ["strength", "Strength", rareLast((a, b) => b.strength - a.strength)],
    ...(data.labelled
      ? [
          ["purity", "Purity", rareLast((a, b) => b.majority - a.majority || b.pairs - a.pairs)],
          ["mixed", "Most mixed", rareLast((a, b) => b.entropy - a.entropy)],
        ]
      : []),
    ["dense", "Density, high first", (a, b) => b.count - a.count],
    ["sparse", "Density, low first", (a, b) => a.count - b.count],
    ...(data.latents.spread ? [["local", "Most local", rareLast((a, b) => (a.spread ?? 2) - (b.spread ?? 2))]] : []),
    ["id", "Latent number", (a, b) => a.id - b.id],
  ];

  const RARE_LAST = ["strength", "purity", "mixed", "local"];
  const rare = latents.filter((latent) => latent.rare).length;
  const repeated = latents.filter(({ repeats }) => (repeats ?? null) !== null).length;

  const fresh = () => ({ class: null, all: false, sort: "strength", ranges: Object.fromEntries(SCALES.map((s) => [s.key, [0, 100]])) });
  let state = fresh();

  function read(query) {
    state = fresh();
    const wanted = query.get("class");
    if (wanted !== null && data.classes[Number(wanted)] !== undefined) state.class = Number(wanted);
    if (SORTS.some(([key]) => key === query.get("sort"))) state.sort = query.get("sort");
    state.all = query.has("all");
    for (const { key } of SCALES) {
      const found = /^(\d+)-(\d+)$/.exec(query.get(NAMES[key]) || "");
      if (found) state.ranges[key] = [Math.min(100, +found[1]), Math.min(100, +found[2])];
    }
  }
  function written() {
    const query = new URLSearchParams();
    if (state.class !== null) query.set("class", state.class);
    if (state.sort !== "strength") query.set("sort", state.sort);
    for (const [key, [low, high]] of Object.entries(state.ranges)) {
      if (low > 0 || high < 100) query.set(NAMES[key], `${low}-${high}`);
    }
    if (state.all) query.set("all", "1");
    return query.size ? `?${query}` : "";
  }

  const inRanges = (latent) => SCALES.every(({ key, step }) => {
    const at = step(latent[key]);
    return at >= state.ranges[key][0] && at <= state.ranges[key][1];
  });
  const matches = (latent) => (state.all || (latent.repeats ?? null) === null) && (state.class === null || latent.class === state.class) && inRanges(latent);
  function shown() {
    const order = SORTS.find(([key]) => key === state.sort)[2];
    return latents.filter(matches).sort((a, b) => order(a, b) || a.place - b.place);
  }

  function slider(spec, change) {
    const { key, step, value, show } = spec;
    const bins = new Array(34).fill(0);
    for (const latent of latents) bins[Math.min(33, Math.floor((step(latent[key]) / 100) * 34))] += 1;
    const tallest = Math.sqrt(last(bins)) || 1;
    const bars = bins.map((count) => h("i", { style: { height: `${(Math.sqrt(count) / tallest) * 100}%` } }));
    const text = h("output", {});
    const draw = () => {
      const [low, high] = state.ranges[key];
      text.textContent = `${show(value(low))} to ${show(value(high))}`;
      bars.forEach((bar, i) => bar.classList.toggle("out", (i / 33) * 100 < low - 1 || (i / 33) * 100 > high + 1));
    };
    const end = (which) => h("input", {
      type: "range", min: 0, max: 100, value: state.ranges[key][which],
      "aria-label": `${which ? "Highest" : "Lowest"} ${NAMES[key]}`,
      oninput: (event) => {
        const range = state.ranges[key];
        range[which] = which ? Math.max(+event.target.value, range[0]) : Math.min(+event.target.value, range[1]);
        event.target.value = range[which];
        draw();
        change();
      },
    });
    const box = h("div", { class: "range" },
      h("div", { class: "row" }, term(NAMES[key], NAMES[key][0].toUpperCase() + NAMES[key].slice(1)), text),
      h("div", { class: "bars", "aria-hidden": "true" }, bars), h("div", { class: "ends" }, end(0), end(1)));
    draw();
    return box;
  }

  function classes(change) {
    const counts = new Array(data.classes.length).fill(0);
    for (const latent of latents) if (latent.class !== null) counts[latent.class] += 1;
    const most = last(counts) || 1;
    const order = counts.map((_, id) => id).sort((a, b) => counts[b] - counts[a] || a - b);
    const list = h("ul", { class: "classes", "aria-label": "Classes" });
    const box = h("input", { type: "search", id: "class-search", placeholder: "Search a class", "aria-label": "Search a class", autocomplete: "off" });
    const pick = (id) => { state.class = state.class === id ? null : id; fill(); change(); };
    function fill() {
      const words = box.value.trim().toLowerCase();
      const found = order.filter((id) => className(id).toLowerCase().includes(words) || id === state.class);
      list.replaceChildren(...found.map((id) => h("li", {},
        h("button", { type: "button", "aria-pressed": String(state.class === id), class: counts[id] ? null : "none", onclick: () => pick(id) },
          dot(id), h("span", { class: "name" }, className(id)), h("span", { class: "meter", "aria-hidden": "true" }, h("i", { style: { width: `${(counts[id] / most) * 100}%` } })), h("span", { class: "count" }, whole(counts[id]))))));
      if (!found.length) list.append(h("li", { class: "quiet" }, "No class of that name"));
    }
    box.addEventListener("input", fill);
    box.addEventListener("keydown", (event) => {
      const hit = order.find((id) => className(id).toLowerCase().includes(box.value.trim().toLowerCase()));
      if (event.key === "Enter" && box.value.trim() && hit !== undefined) pick(hit);
      if (event.key === "Escape") { box.value = ""; fill(); box.blur(); }
    });
    fill();
    return h("section", {}, h("h2", {}, "Class"), h("div", { class: "search" }, box), list);
  }

  function panel(node, change) {
    const sort = h("select", { id: "sort", onchange: (event) => { state.sort = event.target.value; say(); change(); } },
      SORTS.map(([key, name]) => h("option", { value: key, selected: key === state.sort }, name)));
    const order = h("p", { class: "order" }, term("rare", "Rare latents"), ` (${whole(rare)}) come last.`);
    const say = () => { order.hidden = !rare || !RARE_LAST.includes(state.sort); };
    say();
    const every = h("label", { class: "inline" }, h("input", { type: "checkbox", id: "all", checked: state.all, onchange: (event) => { state.all = event.target.checked; change(); } }), h("span", {}, "Show ", term("repeats", "repeated latents"), ` (${whole(repeated)})`));
    const reset = h("button", { type: "button", class: "text", onclick: () => { state = fresh(); panel(node, change); change(); } }, "Reset");
    // On a phone the filters are folded away until they are asked for.
    const open = node.querySelector("details")?.open ?? !matchMedia("(max-width: 900px)").matches;
    node.replaceChildren(h("details", { open }, h("summary", {}, "Sort and filter"),
      h("section", { class: "sort" }, h("label", { for: "sort" }, "Sort by"), sort, order),
      h("section", {}, h("div", { class: "row" }, h("h2", {}, "Filter"), reset), SCALES.map((spec) => slider(spec, change)), repeated ? every : null),
      data.labelled ? classes(change)
        : h("section", {}, h("h2", {}, "Class"), h("p", { class: "quiet" }, "These images have no labels, so there is no purity and no class to search for."))));
  }

  return { read, written, shown, matches, panel, state: () => state };
})();
