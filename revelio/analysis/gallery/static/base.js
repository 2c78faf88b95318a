"use strict";
// The gallery's data, and how text, pictures and terms get on the page. Text is only ever set as text.
const Gallery = (() => {
  const data = window.REVELIO;
  const { meta } = data;

  const TERMS = {
    latent: "One unit of the k-sparse autoencoder: a direction in the layer's activations that it has learned to switch on for some images.",
    activation: "How strongly a latent responds to an image: its code, after only the k largest of that image were kept.",
    density: "The share of all images that switch the latent on. Low: specific; high: common.",
    strength: "The mean activation over the images that switch the latent on. Latents with 10 such images or fewer count as 0.",
    purity: `The share of the latent's ${meta.judged} top images that are of its most common class. 100 %: one class only.`,
    entropy: "How mixed the classes of the top images are: 0 when all are of one class, 1 when all differ.",
    pairs: "The share of pairs of top images that are of the same class.",
    similar: "Latents whose decoder directions point the same way; the number is the cosine between them.",
    together: "Latents that fire on the same images; the number is the cosine between their activations over all images.",
    misses: "Images on which the latent came closest to firing; the number is what its activation lacked.",
    sigma: "\u03c3 label: the standard deviation of the class ids of a latent's top images, the paper's measure; lower is purer. Ids are names: it changes when the classes are put into another order, and grows with their number.",
    chance: "The share of the class among all images: what a latent that knows nothing of classes would show.",
    repeats: "A latent whose direction has a cosine above 0.9 with a stronger one's, or that shares more than half of either's top images (of latents of cells: at the same cells): shown with that one.",
    locality: "How the firings of a latent lie in an image: entropy over its cells is 0 at one cell and 1 when spread evenly.",
    rare: "Switched on by 10 images or fewer: too few to say what it stands for.",
  };
  // Of a k-SAE of cells: codes are of places in an image, and heat maps show them at once.
  const ofCells = meta.cells === "max" || meta.cells === "mean";
  if (ofCells) {
    TERMS.activation = `How strongly a latent responds to an image: the ${{ max: "maximum", mean: "mean" }[meta.cells]} of its codes over the cells of the image's grid, after only the k largest of each cell were kept.`;
  }
  if (meta.codes === "dense") {
    TERMS.activation = "How strongly a latent responds to an image: its pre-activation, before the k largest are kept (as released).";
  }

  function h(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  // Numbers of all latents come as a list a property; what a page shows besides is loaded when needed.
  const columns = Object.entries(data.latents);
  const latents = data.latents.id.map((id, place) => {
    const latent = { place };
    for (const [name, values] of columns) latent[name] = values[place];
    latent.density = latent.count / meta.images;
    latent.rare = latent.count <= 10;
    latent.strength = latent.rare ? 0 : latent.mean;
    return latent;
  });
  // Latents that nearly repeat a stronger one are shown with it.
  const folded = new Map();
  for (const latent of latents) {
    const first = latent.repeats ?? null;
    if (first === null) continue;
    if (!folded.has(first)) folded.set(first, []);
    folded.get(first).push(latent);
  }
  const placeOf = new Map(latents.map((latent) => [latent.id, latent.place]));

  const number = (value, digits = 3) => {
    if (value === null || value === undefined) return "\u2013";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
  };
  const whole = (value) => value.toLocaleString("en");
  const percent = (value) => {
    if (value === null || value === undefined) return "\u2013";
    const points = value * 100;
    return `${points > 0 && points < 0.1 ? "<\u202f0.1" : Number(points.toFixed(points < 10 ? 1 : 0))}\u202f%`;
  };
  const plural = (count, one, many) => `${whole(count)} ${count === 1 ? one : many || `${one}s`}`;

  // A latent has no class when no two of its top images share one.
  const className = (id) => (id === null || id === undefined ? "mixed" : data.classes[id] ?? `class ${id}`).replaceAll("_", " ");
  // What a latent is called: by its own name where it has one.
  const titleOf = (latent) => latent.name ?? (data.labelled ? className(latent.class) : `Latent ${latent.id}`);
  const labelOf = (row) => (data.images.labels ? className(data.images.labels[row]) : "");
  // Neighbouring ids get far hues (golden angle), and three lightnesses tell near hues apart.
  const colour = (id) => (id === null ? "var(--faint)" : `hsl(${((id * 137.508 + 205) % 360).toFixed(1)} ${[58, 46, 64][id % 3]}% var(--class-light-${id % 3}))`);

  function thumb(row, extra = {}) {
    const name = labelOf(row) || data.images.ids[row];
    const reason = data.images.missing[row];
    if (reason !== undefined) {
      return h("span", { class: "thumb missing", title: reason, role: "img", "aria-label": reason }, "no picture");
    }
    const path = `thumbs/${String(Math.floor(row / 1000)).padStart(3, "0")}/${String(row).padStart(6, "0")}.jpg`;
    return h("img", { class: "thumb", src: path, alt: name, loading: "lazy", decoding: "async", ...extra });
  }

  // A word with its explanation, shown on hover and on keyboard focus.
  function term(key, text) {
    return h("span", { class: "term", tabindex: "0", "data-tip": TERMS[key], "aria-label": `${text || key}: ${TERMS[key]}` }, text || key);
  }

  function stripe(latent, rows) {
    if (!data.labelled) return null;
    const cells = rows.slice(0, meta.judged).map((row) => {
      const label = data.images.labels[row];
      return h("i", { style: { background: label === latent.class ? colour(label) : "var(--other)" } });
    });
    return h("span", { class: "stripe", title: "The top images in order: colored where they are of the most common class" }, cells);
  }

  const dot = (id) => h("span", { class: "dot", style: { background: colour(id) } });

  const loaded = new Map();
  data.add = (kind, index, part) => loaded.get(`${kind}-${index}`).done(part);
  function chunk(kind, index) {
    const key = `${kind}-${index}`;
    if (!loaded.has(key)) {
      const entry = {};
      entry.part = new Promise((resolve, reject) => {
        entry.done = resolve;
        const src = `data/${kind}-${String(index).padStart(4, "0")}.js`;
        document.head.append(h("script", { src, onload: (event) => event.target.remove(), onerror: () => { loaded.delete(key); reject(new Error(`${src} is missing`)); } }));
      });
      loaded.set(key, entry);
    }
    return loaded.get(key).part;
  }
  const item = (kind, at) => chunk(kind, Math.floor(at / data.chunks[kind])).then((part) => part[at % data.chunks[kind]]);
  const cardOf = (latent) => item("cards", latent.place);
  const detailsOf = (latent) => item("latents", latent.place);
  const activeLatents = (row) => item("images", row);

  // The first images of a latent, which come a moment later.
  function tiles(latent, count, { first = false, extra = () => {} } = {}) {
    const box = h("span", { class: "tiles" }, Array.from({ length: Math.min(count, latent.count) }, (_, i) => h("span", { class: first && !i ? "thumb first" : "thumb" })));
    cardOf(latent).then((rows) => {
      box.replaceChildren(...rows.slice(0, count).map((row, i) => thumb(row, first && !i ? { class: "thumb first" } : {})));
      extra(rows);
    }, () => {});
    return box;
  }

  // The cells of a grid that a latent fires on, as a layer over a picture of the same square.
  function heat(cells, grid = meta.grid) {
    const [height, width] = grid;
    const canvas = h("canvas", { class: "heat", width, height, role: "img", "aria-label": `fires in ${plural(cells.length / 2, "cell")} of ${width * height}` });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < cells.length; i += 2) {
      const level = cells[i + 1] / 255;
      image.data.set([255, Math.round(220 * level), 40, Math.round(70 + 170 * level)], cells[i] * 4);
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  const csv = (rows) => rows.map((row) => row.map((value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replaceAll('"', '""')}"` : value ?? "")).join(",")).join("\n");
  // Gives the reader a file of what the page shows: [name, text], made when it is asked for.
  function download(make) {
    const save = () => Promise.resolve(make()).then(([name, text]) => {
      const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    return h("button", { type: "button", class: "text", id: "download", title: "Download what is shown (d)", onclick: save }, "Download");
  }

  return { data, meta, ofCells, latents, placeOf, folded, titleOf, h, number, whole, percent, plural, className, labelOf, colour, thumb, tiles, heat, term, stripe, dot, cardOf, detailsOf, activeLatents, csv, download };
})();
