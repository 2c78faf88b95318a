"use strict";
// The grid of latents: a card each, added as the page is scrolled.
Gallery.latentsView = (() => {
  const { data, meta, latents, h, number, percent, plural, whole, className, thumb, term, stripe, dot, filters } = Gallery;
  const STEP = 60;
  let watch = null;

  function card(latent) {
    const tiles = latent.top.slice(0, 7).map(([row], i) => thumb(row, i ? {} : { class: "thumb first" }));
    const of = data.labelled ? className(latent.class) : plural(latent.count, "image");
    return h("a", { class: "card", href: `#/latent/${latent.id}`, "aria-label": `Latent ${latent.id}, ${of}` },
      h("div", { class: "head" },
        data.labelled ? dot(latent.class) : null, h("span", { class: "name" }, of),
        data.labelled ? h("span", { class: "pure" }, percent(latent.majority)) : null),
      h("div", { class: "tiles" }, tiles),
      stripe(latent),
      h("div", { class: "foot" }, h("span", { class: "id" }, `#${latent.id}`),
        h("span", { title: "strength" }, h("b", {}, number(latent.mean)), " strength"),
        h("span", { title: "density" }, h("b", {}, percent(latent.density)), " density"),
        latent.count > 10 ? null : h("span", { class: "rare" }, "rare")));
  }

  function summary() {
    const { purity } = data;
    const facts = [
      ["Latents shown", whole(meta.shown), `of ${whole(meta.n)}; ${whole(meta.alive)} respond to some image`, "latent"],
      ["Images", whole(meta.images), data.labelled ? `in ${plural(data.classes.length, "class", "classes")}` : "without labels", null],
    ];
    if (data.labelled) {
      const mean = latents.reduce((sum, latent) => sum + latent.majority, 0) / latents.length;
      const chance = purity?.chance_levels?.majority_share;
      facts.push(["Mean purity", percent(purity?.majority_share ?? mean), chance === undefined ? "over the latents shown" : `chance is ${percent(chance)}`, "purity"]);
    }
    if (purity?.sigma_label) {
      facts.push(["\u03c3 label", number(purity.sigma_label), `chance is ${number(purity.chance)}`, null]);
    } else {
      const density = latents.reduce((sum, latent) => sum + latent.density, 0) / latents.length;
      facts.push(["Mean density", percent(density), "of the latents shown", "density"]);
    }
    return h("dl", { class: "facts" }, facts.map(([name, value, note, key]) =>
      h("div", {}, h("dt", {}, key ? term(key, name) : name), h("dd", {}, h("strong", {}, value), h("span", {}, note)))));
  }

  function fill(list, status) {
    const found = filters.shown();
    const { class: chosen } = filters.state();
    watch?.disconnect();
    status.replaceChildren(h("strong", {}, plural(found.length, "latent")),
      found.length < latents.length ? ` of ${whole(latents.length)}` : "",
      chosen === null ? "" : h("span", { class: "chip" }, dot(chosen), className(chosen)));
    list.replaceChildren();
    if (!found.length) {
      list.append(h("p", { class: "empty" }, "No latent is left. Widen the filters on the left, or reset them."));
      return;
    }
    let at = 0;
    const mark = h("div", { class: "mark" });
    const more = () => {
      mark.before(...found.slice(at, at + STEP).map(card));
      at += STEP;
      if (at >= found.length) { watch?.disconnect(); mark.remove(); }
    };
    list.append(mark);
    watch = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) more(); }, { rootMargin: "1200px" });
    more();
    if (mark.isConnected) watch.observe(mark);
  }

  // Arrow keys walk the grid, by its columns.
  function walk(event, list) {
    const cards = [...list.querySelectorAll(".card")];
    const at = cards.indexOf(document.activeElement);
    if (at < 0) return;
    const columns = cards.filter((other) => other.offsetTop === cards[0].offsetTop).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step || !cards[at + step]) return;
    event.preventDefault();
    cards[at + step].focus();
  }

  function show(main) {
    const list = h("div", { class: "cards", onkeydown: (event) => walk(event, list) });
    const status = h("p", { class: "status", role: "status" });
    main.replaceChildren(summary(), status, list);
    fill(list, status);
    return () => fill(list, status);
  }
  return { show, card };
})();
