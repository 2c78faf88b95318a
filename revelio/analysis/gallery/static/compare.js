"use strict";
// One image in this gallery and in another, side by side: what each layer, timestep or k-SAE sees in it.
Gallery.compareView = (() => {
  const { data, meta, h, whole, labelOf } = Gallery;
  const embedded = new URLSearchParams(location.search).has("embed");
  const others = embedded ? [] : data.beside ?? [];
  let open = null;

  // Each side is a whole gallery without its bar; links inside it stay on its side.
  const address = (folder, row) => `${folder}index.html?embed=1&theme=${document.documentElement.dataset.theme}#/image/${row}`;
  const frame = (title) => h("iframe", { title, loading: "eager" });

  function show(main, row, query) {
    if (!(row >= 0 && row < meta.images)) row = 0;
    const at = Math.min(Math.max(0, Number(query.get("with")) || 0), others.length - 1);
    const other = others[at];
    const there = other.rows ? other.rows[row] : row;
    const href = (to, beside = at) => `#/compare/${to}${beside ? `?with=${beside}` : ""}`;
    const to = (next, key, name, id) => next >= 0 && next < meta.images
      ? h("a", { class: "button", id, href: href(next), "aria-label": `${name} image`, title: `${name} image (${key})` }, key) : h("span", { class: "button off", "aria-hidden": "true" }, key);
    const choose = h("select", { id: "with", "aria-label": "Compare with", onchange: () => { location.hash = href(row, Number(choose.value)); } },
      others.map(({ title }, i) => h("option", { value: i, selected: i === at }, title)));
    const crumbs = h("div", { class: "crumbs" },
      h("a", { href: `#/image/${row}` }, `\u2039 ${data.images.ids[row]}${labelOf(row) ? ` \u00b7 ${labelOf(row)}` : ""}`),
      h("span", { class: "pager" }, to(row - 1, "\u2190", "Previous", "previous"), h("span", {}, `${whole(row + 1)} of ${whole(meta.images)}`), to(row + 1, "\u2192", "Next", "next")));
    // Frames that are there show the next image without loading the galleries again.
    if (!open || open.at !== at || !main.contains(open.box)) {
      open = { at, frames: [frame("This gallery"), frame(other.title)] };
      open.head = h("div", {});
      open.missing = h("p", { class: "empty" }, "That gallery does not have this image.");
      open.box = h("div", { class: "sides" },
        h("section", {}, h("h2", {}, `${data.title} (this gallery, k = ${meta.k}, n = ${whole(meta.n)})`), open.frames[0]), h("section", {}, h("div", { class: "row" }, choose), open.missing, open.frames[1]));
      main.replaceChildren(open.head, open.box);
    }
    open.head.replaceChildren(crumbs);
    open.missing.hidden = there >= 0;
    open.frames[1].hidden = there < 0;
    // Replaced, so that going back leads out of the frames.
    open.frames[0].contentWindow.location.replace(new URL(address("", row), location.href));
    if (there >= 0) open.frames[1].contentWindow.location.replace(new URL(address(`beside/${at}/`, there), location.href));
    return `Compare ${row + 1}`;
  }
  return { show, others, embedded };
})();
