"use strict";
// The grid of latents: a card each, added as the page is scrolled.
Gallery.latentsView = (() => {
  const { data, meta, latents, h, number, percent, plural, whole, className, folded, titleOf, tiles, term, stripe, dot, filters, csv, download } = Gallery;
  let grid = null;

  function card(latent) {
    const of = latent.name || data.labelled ? titleOf(latent) : plural(latent.count, "image");
    const like = folded.get(latent.place);
    const line = h("span", { class: "stripe" });
    return h("a", { class: "card", href: `#/latent/${latent.id}`, "aria-label": `Latent ${latent.id}, ${of}` },
      h("div", { class: "head" },
        data.labelled ? dot(latent.class) : null, h("span", { class: "name" }, of),
        data.labelled ? h("span", { class: "pure" }, percent(latent.majority)) : null),
      tiles(latent, 7, { first: true, extra: (rows) => line.replaceWith(stripe(latent, rows) ?? "") }),
      data.labelled ? line : null,
      h("div", { class: "foot" }, h("span", { class: "id" }, `#${latent.id}`),
        h("span", { title: "strength" }, h("b", {}, number(latent.mean)), " strength"),
        h("span", { title: "density" }, h("b", {}, percent(latent.density)), " density"),
        like ? h("span", { class: "like", title: `${plural(like.length, "latent")} nearly the same` }, `+${whole(like.length)}`) : null,
        latent.rare ? h("span", { class: "rare" }, "rare") : null));
  }

  function summary() {
    const { purity } = data;
    const facts = [
      ["Latents shown", whole(meta.shown), `of ${whole(meta.n)}; ${whole(meta.alive)} respond to some image`, "latent"],
      ["Images", whole(meta.images), data.labelled ? `in ${plural(data.classes.length, "class", "classes")}` : "without labels", null],
    ];
    if (data.labelled) {
      const mean = latents.reduce((sum, latent) => sum + latent.majority, 0) / latents.length;
      // Measured on other latents than are shown: on so many of the strongest, or on all that fire on enough images.
      const measured = purity?.latents ? `of the ${whole(purity.latents)} strongest latents` : "of the latents shown";
      const chance = purity?.chance_levels?.majority_share;
      facts.push(["Mean purity", percent(purity?.majority_share ?? mean), chance === undefined ? measured : `${measured}; chance is ${percent(chance)}`, "purity"]);
    }
    if (purity?.sigma_label) {
      facts.push(["\u03c3 label", number(purity.sigma_label), `of the same; chance is ${number(purity.chance)}; depends on the order of the class ids`, "sigma"]);
    } else {
      const density = latents.reduce((sum, latent) => sum + latent.density, 0) / latents.length;
      facts.push(["Mean density", percent(density), "of the latents shown", "density"]);
    }
    return h("dl", { class: "facts" }, facts.map(([name, value, note, key]) =>
      h("div", {}, h("dt", {}, key ? term(key, name) : name), h("dd", {}, h("strong", {}, value), h("span", {}, note)))));
  }

  const FIELDS = ["id", "name", "mean", "count", "class", "majority", "entropy", "pairs", "sigma", "spread"].filter((name) => data.latents[name]);
  const table = (found) => csv([FIELDS, ...found.map((latent) => FIELDS.map((name) => (name === "class" ? className(latent.class) : latent[name])))]);

  function fill(list, status) {
    const found = filters.shown();
    const { class: chosen } = filters.state();
    grid?.stop();
    status.replaceChildren(h("strong", {}, plural(found.length, "latent")),
      found.length < latents.length ? ` of ${whole(latents.length)}` : "",
      chosen === null ? "" : h("span", { class: "chip" }, dot(chosen), className(chosen)),
      download(() => ["latents.csv", table(found)]));
    list.style.height = "";
    if (!found.length) {
      list.replaceChildren(h("p", { class: "empty" }, "No latent is left. Widen the filters, or reset them."));
      return;
    }
    grid = Gallery.grid(list, found, card);
  }

  function show(main) {
    const list = h("div", { class: "grid", "data-items": "cards", onkeydown: (event) => grid?.walk(event) });
    const status = h("p", { class: "status", role: "status" });
    main.replaceChildren(summary(), status, list);
    fill(list, status);
    return () => fill(list, status);
  }
  return { show, card, stop: () => grid?.stop() };
})();
