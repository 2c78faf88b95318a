"use strict";
// One latent: its numbers, its top images, the classes among them, and similar latents.
Gallery.latentView = (() => {
  const { data, meta, latents, placeOf, h, number, percent, plural, whole, className, labelOf, colour, thumb, term, dot, filters } = Gallery;

  function facts(latent) {
    const rows = [
      [term("strength", "Strength"), number(latent.mean), latent.count > 10 ? `rank ${whole(latent.place + 1)}` : term("rare", "rare latent")],
      [term("density", "Density"), percent(latent.density), `${whole(latent.count)} of ${plural(meta.images, "image")}`],
    ];
    if (data.labelled) {
      const judged = Math.min(meta.judged, latent.top.length);
      rows.push([term("purity", "Purity"), percent(latent.majority), `${Math.round(latent.majority * judged)} of ${judged} top images`]);
      rows.push([term("entropy", "Entropy"), number(latent.entropy), latent.sigma === null ? "" : `\u03c3 of class ids ${number(latent.sigma)}`]);
    }
    return h("dl", { class: "facts" }, rows.map(([name, value, note]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", {}, note)))));
  }

  function picture(latent, [row, value], rank) {
    const share = value / latent.top[0][1];
    const label = labelOf(row);
    const same = data.labelled && data.images.labels[row] === latent.class;
    return h("a", { class: "picture", href: `#/image/${row}`, title: data.images.ids[row] }, thumb(row),
      h("span", { class: "level" }, h("i", { style: { width: `${share * 100}%`, background: same ? colour(latent.class) : null } })),
      h("span", { class: "row" }, h("span", { class: same || !data.labelled ? "name" : "name other" }, label || `${rank + 1}`), h("b", {}, number(value))));
  }

  function profile(latent) {
    const counts = new Map();
    for (const [row] of latent.top) {
      const label = data.images.labels[row];
      counts.set(label, (counts.get(label) || 0) + 1);
    }
    const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    return h("section", {}, h("h2", {}, "Classes of the top images"), h("ul", { class: "profile" }, order.map(([id, count]) =>
      h("li", {}, h("a", { href: `#/latents?class=${id}`, title: `All latents of ${className(id)}` }, className(id)),
        h("span", { class: "meter" }, h("i", { style: { width: `${(count / latent.top.length) * 100}%`, background: colour(id) } })), h("b", {}, count)))));
  }

  function similar(latent) {
    if (!latent.near.length) return null;
    return h("section", {}, h("h2", {}, term("similar", "Similar latents")), h("div", { class: "near" }, latent.near.map(([place, cosine]) => {
      const other = latents[place];
      return h("a", { class: "mini", href: `#/latent/${other.id}` },
        h("span", { class: "tiles" }, other.top.slice(0, 4).map(([row]) => thumb(row))),
        h("span", { class: "row" }, h("span", { class: "name" }, data.labelled ? dot(other.class) : null, data.labelled ? className(other.class) : `#${other.id}`), h("b", {}, cosine.toFixed(2))));
    })));
  }

  // The one before and after, in the order and under the filters of the grid.
  function around(latent) {
    let order = filters.shown();
    let at = order.indexOf(latent);
    if (at < 0) { order = latents; at = latent.place; }
    return [order[at - 1], order[at + 1], at + 1, order.length];
  }
  const step = (other, id, text, key) => other
    ? h("a", { class: "button", id, href: `#/latent/${other.id}`, "aria-label": `${text} latent`, title: `${text} latent (${key})` }, key)
    : h("span", { class: "button off", "aria-hidden": "true" }, key);

  function show(main, id) {
    const latent = latents[placeOf.get(id)];
    if (!latent) {
      main.replaceChildren(h("p", { class: "empty" }, `Latent ${id} is not in this gallery, which holds the ${whole(meta.shown)} strongest.`));
      return;
    }
    const [before, after, at, total] = around(latent);
    const top = h("div", { class: "pictures" }, latent.top.map((pair, rank) => picture(latent, pair, rank)));
    main.replaceChildren(
      h("div", { class: "crumbs" }, h("a", { href: `#/latents${filters.written()}` }, "\u2039 All latents"),
        h("span", { class: "pager" }, step(before, "previous", "Previous", "\u2190"), h("span", {}, `${whole(at)} of ${whole(total)}`), step(after, "next", "Next", "\u2192"))),
      h("h1", {}, data.labelled ? [dot(latent.class), className(latent.class)] : "Latent", h("span", { class: "id" }, ` #${latent.id}`)),
      facts(latent),
      h("div", { class: "columns" },
        h("section", { class: "wide" }, h("h2", {}, `Top ${plural(latent.top.length, "image")}, by `, term("activation")), top),
        h("div", { class: "side" }, data.labelled ? profile(latent) : null, similar(latent))));
  }
  return { show };
})();
