"use strict";
// The map: every latent a dot, alike ones together; drawn on a canvas, since there may be thousands.
Gallery.mapView = (() => {
  const { data, meta, latents, h, number, percent, plural, className, colour, tiles, filters } = Gallery;
  const HOW = { tsne: "t-SNE", pca: "PCA" }[meta.map_method];
  const BY = { decoder: "decoder directions", labels: "the classes of the top images" }[meta.map_by];
  const RAMP = { purity: "majority", density: "density", strength: "strength" };
  let by = data.labelled ? "class" : "density";
  const MOST = 40;
  let view = { x: 0.5, y: 0.5, zoom: 1 };
  let chosen = null;

  function ramp(key) {
    const values = latents.map((latent) => Math.log(Math.max(latent[key], 1e-4)));
    const raw = latents.map((latent) => latent[key]);
    const use = key === "density" ? values : raw;
    const low = use.reduce((a, b) => Math.min(a, b)), high = use.reduce((a, b) => Math.max(a, b));
    return use.map((value) => (value - low) / (high - low || 1));
  }
  // From muted violet to bright amber: lightness grows with the value in both themes.
  const heat = (share) => `hsl(${(265 - 220 * share + 360) % 360} ${45 + 35 * share}% ${38 + 24 * share}%)`;

  function show(main, query) {
    const asked = /^(-?[\d.]+),(-?[\d.]+),([\d.]+)$/.exec(query.get("at") || "");
    if (asked) view = { x: +asked[1], y: +asked[2], zoom: Math.min(MOST, Math.max(1, +asked[3])) };
    const canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": `Map of ${plural(latents.length, "latent")}; arrow keys move, Enter opens` });
    const hover = h("div", { class: "hover", hidden: true });
    const choices = [...(data.labelled ? [["class", "most common class"], ["purity", "purity"]] : []), ["density", "density"], ["strength", "strength"]];
    if (choices.some(([key]) => key === query.get("by"))) by = query.get("by");
    const select = h("select", { "aria-label": "Color by", onchange: (event) => { by = event.target.value; draw(); written(); } }, choices.map(([key, name]) => h("option", { value: key, selected: key === by }, name)));
    const legend = h("div", { class: "legend" });
    const zooms = h("div", { class: "zooms" }, [["+", "Zoom in", 1.6], ["\u2212", "Zoom out", 1 / 1.6]].map(([sign, name, factor]) =>
      h("button", { type: "button", class: "button", "aria-label": name, title: name, onclick: () => zoom(factor, size[0] / 2, size[1] / 2) }, sign)));
    const box = h("div", { class: "map" }, canvas, zooms, hover);
    main.replaceChildren(
      h("div", { class: "row headline" }, h("h1", {}, "Map of latents"), h("label", { class: "inline" }, "Color by", select)),
      h("p", { class: "quiet" }, `Each dot is a latent, laid out by ${BY} (${HOW}): near dots are alike. Scroll or pinch to zoom, drag to move, click to open; the filters fade the rest.`),
      box, legend);

    let size = [0, 0], colours = [], matching = [];
    const x = (latent) => ((latent.at[0] - view.x) * view.zoom + 0.5) * (size[0] - 48) + 24;
    const y = (latent) => ((0.5 - latent.at[1] - (0.5 - view.y)) * view.zoom + 0.5) * (size[1] - 48) + 24;
    const radius = (latent) => (2.6 + 3.4 * Math.sqrt(latent.strength / (strongest || 1))) * Math.min(2, Math.sqrt(view.zoom));
    const strongest = latents.reduce((most, latent) => Math.max(most, latent.strength), 0);

    function paint() {
      const css = getComputedStyle(document.documentElement);
      const values = by === "class" ? null : ramp(RAMP[by]);
      // A canvas knows no CSS variables: the class lightness of the theme is put in by hand.
      const resolve = (text) => text.replace(/var\((--[\w-]+)\)/, (_, name) => css.getPropertyValue(name).trim());
      colours = latents.map((latent, i) => (values ? heat(values[i]) : resolve(colour(latent.class))));
      matching = latents.map(filters.matches);
      if (by === "class") {
        const counts = new Map();
        for (const latent of latents) if (latent.class !== null) counts.set(latent.class, (counts.get(latent.class) || 0) + 1);
        const common = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 14);
        legend.replaceChildren(...common.map(([id, count]) => h("a", { href: `#/map?class=${id}` }, Gallery.dot(id), className(id), h("b", {}, count))), counts.size > 14 ? h("span", { class: "quiet" }, `and ${counts.size - 14} more classes`) : "");
      } else {
        legend.replaceChildren(h("span", {}, "low"), h("span", { class: "scale", style: { background: `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(heat).join(",")})` } }), h("span", {}, "high"));
      }
    }
    // Of very many latents each is a square of a few pixels: as circles they take seconds.
    function pixels(context, ratio) {
      const [width, height] = [canvas.width, canvas.height];
      const image = context.createImageData(width, height);
      const cells = new Uint32Array(image.data.buffer);
      const known = new Map();
      const packed = (text) => {
        if (!known.has(text)) { context.fillStyle = text; known.set(text, parseInt(context.fillStyle.slice(1), 16)); }
        const rgb = known.get(text);
        return ((rgb & 255) << 16) | (rgb & 65280) | (rgb >> 16);
      };
      for (const wanted of [false, true]) {
        const alpha = (wanted ? 235 : 40) << 24;
        latents.forEach((latent, i) => {
          if (matching[i] !== wanted) return;
          const half = Math.max(1, Math.round((radius(latent) * ratio) / 2));
          const [left, top] = [Math.round(x(latent) * ratio) - half, Math.round(y(latent) * ratio) - half];
          const value = (alpha | packed(colours[i])) >>> 0;
          for (let py = Math.max(0, top); py < Math.min(height, top + 2 * half); py += 1) {
            for (let px = Math.max(0, left); px < Math.min(width, left + 2 * half); px += 1) cells[py * width + px] = value;
          }
        });
      }
      context.putImageData(image, 0, 0);
    }
    function render() {
      const context = canvas.getContext("2d");
      const ratio = window.devicePixelRatio || 1;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, ...size);
      const css = getComputedStyle(document.documentElement);
      if (latents.length > 5000) pixels(context, ratio);
      for (const wanted of latents.length > 5000 ? [] : [false, true]) {
        context.globalAlpha = wanted ? 0.88 : 0.12;
        latents.forEach((latent, i) => {
          if (matching[i] !== wanted) return;
          context.fillStyle = colours[i];
          context.beginPath();
          context.arc(x(latent), y(latent), radius(latent), 0, 7);
          context.fill();
        });
      }
      context.globalAlpha = 1;
      if (chosen) {
        context.lineWidth = 2;
        context.strokeStyle = css.getPropertyValue("--ink");
        context.beginPath();
        context.arc(x(chosen), y(chosen), radius(chosen) + 3.5, 0, 7);
        context.stroke();
      }
    }
    function draw() { paint(); render(); }
    function fit() {
      const rect = box.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      size = [rect.width, rect.height];
      canvas.width = rect.width * ratio;
      canvas.height = rect.height * ratio;
      draw();
    }
    function choose(latent) {
      chosen = latent;
      hover.hidden = !latent;
      canvas.classList.toggle("over", Boolean(latent));
      if (latent) {
        hover.replaceChildren(tiles(latent, 6),
          h("div", { class: "row" }, h("strong", {}, data.labelled ? className(latent.class) : `Latent ${latent.id}`), h("span", { class: "id" }, `#${latent.id}`)),
          h("div", { class: "quiet" }, [data.labelled ? `purity ${percent(latent.majority)}` : null, `density ${percent(latent.density)}`, `strength ${number(latent.mean)}`].filter(Boolean).join(" \u00b7 ")));
        const left = x(latent) + 16 + 216 > size[0] ? x(latent) - 232 : x(latent) + 16;
        hover.style.left = `${Math.max(4, left)}px`;
        hover.style.top = `${Math.max(4, Math.min(size[1] - 220, y(latent) - 60))}px`;
      }
      render();
    }
    function nearest(px, py) {
      let best = null, distance = 14 * 14;
      latents.forEach((latent, i) => {
        const d = (x(latent) - px) ** 2 + (y(latent) - py) ** 2;
        if (matching[i] && d < distance) { best = latent; distance = d; }
      });
      return best;
    }
    function zoom(factor, px, py) {
      const before = view.zoom;
      view.zoom = Math.min(MOST, Math.max(1, view.zoom * factor));
      const [sx, sy] = [(px - 24) / (size[0] - 48) - 0.5, 0.5 - (py - 24) / (size[1] - 48)];
      view.x += sx * (1 / before - 1 / view.zoom);
      view.y += sy * (1 / before - 1 / view.zoom);
      if (view.zoom === 1) view = { x: 0.5, y: 0.5, zoom: 1 };
      render();
      written();
    }
    // The address holds what is seen, so that it can be passed on.
    function written() {
      const place = new URLSearchParams(filters.written().slice(1));
      place.set("by", by);
      if (view.zoom > 1) place.set("at", [view.x, view.y, view.zoom].map((value) => value.toFixed(3)).join(","));
      history.replaceState(history.state, "", `#/map?${place.toString().replaceAll("%2C", ",")}`);
    }
    // One finger or the mouse drags, two fingers zoom.
    const held = new Map();
    let moved = false;
    const spread = () => { const [a, b] = held.values(); return Math.hypot(a.x - b.x, a.y - b.y); };
    canvas.addEventListener("pointerdown", (event) => {
      if (!held.size) moved = false;
      held.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = held.get(event.pointerId);
      if (!last) { choose(nearest(event.offsetX, event.offsetY)); return; }
      const [dx, dy] = [event.offsetX - last.x, event.offsetY - last.y];
      if (!moved && Math.hypot(dx, dy) < 4) return;
      moved = true;
      const before = held.size === 2 ? spread() : 0;
      held.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
      choose(null);
      if (held.size === 2) {
        const [a, b] = held.values();
        zoom(spread() / (before || 1), (a.x + b.x) / 2, (a.y + b.y) / 2);
      } else if (held.size === 1) {
        view.x -= dx / ((size[0] - 48) * view.zoom);
        view.y += dy / ((size[1] - 48) * view.zoom);
        render();
      }
    });
    const release = (event) => {
      const click = held.size === 1 && !moved && event.type === "pointerup";
      held.delete(event.pointerId);
      const hit = click && nearest(event.offsetX, event.offsetY);
      if (hit) location.hash = `#/latent/${hit.id}`;
      else if (moved && !held.size) written();
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { if (!held.size) choose(null); });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter" && chosen) location.hash = `#/latent/${chosen.id}`;
      if (!way) return;
      event.preventDefault();
      if (!chosen) { choose(latents.find((_, i) => matching[i]) || null); return; }
      let best = null, least = Infinity;
      latents.forEach((latent, i) => {
        const [dx, dy] = [x(latent) - x(chosen), y(latent) - y(chosen)];
        const along = dx * way[0] + dy * way[1], across = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
        if (matching[i] && along > 0.5 && along >= across && along + 2 * across < least) { best = latent; least = along + 2 * across; }
      });
      if (best) choose(best);
    });
    chosen = null;
    new ResizeObserver(fit).observe(box);
    fit();
    return () => { draw(); written(); };
  }
  return { show };
})();
