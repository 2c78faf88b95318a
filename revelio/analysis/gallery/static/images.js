"use strict";
// All images, and one image with its active latents.
Gallery.imagesView = (() => {
  const { data, meta, latents, h, number, plural, whole, labelOf, titleOf, thumb, heat, tiles, term, dot, activeLatents, csv, download } = Gallery;
  let grid = null;

  const picture = (row) => h("a", { class: "picture", href: `#/image/${row}`, title: data.images.ids[row] }, thumb(row), h("span", { class: "name" }, labelOf(row) || data.images.ids[row]));

  function fill(list, status, words) {
    const found = [];
    for (let row = 0; row < meta.images; row += 1) {
      if (!words || String(row + 1) === words || data.images.ids[row].toLowerCase().includes(words) || labelOf(row).toLowerCase().includes(words)) found.push(row);
    }
    grid?.stop();
    status.replaceChildren(h("strong", {}, plural(found.length, "image")), found.length < meta.images ? ` of ${whole(meta.images)}` : "",
      download(() => ["images.csv", csv([["number", "id", "class"], ...found.map((row) => [row + 1, data.images.ids[row], labelOf(row)])])]));
    list.style.height = "";
    grid = Gallery.grid(list, found, picture);
  }

  function show(main, query) {
    const list = h("div", { class: "grid", "data-items": "pictures small", onkeydown: (event) => grid?.walk(event) });
    const status = h("p", { class: "status", role: "status" });
    const box = h("input", { type: "search", id: "image-search", value: query.get("q") || "", placeholder: data.labelled ? "A class, a file or a number" : "A file or a number", "aria-label": "Search images", oninput: () => {
      history.replaceState(history.state, "", box.value.trim() ? `#/images?${new URLSearchParams({ q: box.value.trim() })}` : "#/images");
      fill(list, status, box.value.trim().toLowerCase());
    } });
    main.replaceChildren(h("div", { class: "row headline" }, h("h1", {}, "Images"), h("div", { class: "search" }, box)), status, list);
    fill(list, status, box.value.trim().toLowerCase());
  }

  // The active latents of a picture; where one fires is drawn over the picture while it is pointed at.
  function lines(active, maps, small, layer, grid = meta.grid) {
    const most = active.length ? active[0][1] : 1;
    const over = (cells) => {
      layer.querySelector(".on")?.remove();
      if (cells) layer.append(h("span", { class: "on" }, heat(cells, grid)));
    };
    return active.map((pair, i) => {
      const cells = maps?.[i];
      const node = line(pair, most, cells ? h("span", { class: "layers on" }, small(), heat(cells, grid)) : null);
      for (const kind of ["mouseenter", "focus"]) node.addEventListener(kind, () => over(cells));
      for (const kind of ["mouseleave", "blur"]) node.addEventListener(kind, () => over(null));
      return node;
    });
  }

  function line([place, value], most, where) {
    const latent = latents[place];
    return h("a", { class: where ? "active where" : "active", href: `#/latent/${latent.id}` }, where,
      h("span", { class: "what" }, h("span", { class: "name" }, data.labelled ? dot(latent.class) : null, titleOf(latent)), h("span", { class: "id" }, `#${latent.id}`)),
      h("span", { class: "level" }, h("i", { style: { width: `${(value / most) * 100}%` } })), h("b", {}, number(value)),
      tiles(latent, 6));
  }

  function showOne(main, row) {
    if (!(row >= 0 && row < meta.images)) {
      main.replaceChildren(h("p", { class: "empty" }, `There is no image ${row}: this gallery has ${whole(meta.images)}.`));
      return "Images";
    }
    const list = h("div", { class: "actives", "aria-busy": "true" }, h("p", { class: "quiet" }, "Loading\u2026"));
    const count = h("p", { class: "quiet" });
    const layer = h("span", { class: "layers" }, thumb(row));
    const to = (other, key, name, id) => other >= 0 && other < meta.images
      ? h("a", { class: "button", id, href: `#/image/${other}`, "aria-label": `${name} image`, title: `${name} image (${key})` }, key) : h("span", { class: "button off", "aria-hidden": "true" }, key);
    main.replaceChildren(
      h("div", { class: "crumbs" }, h("a", { href: "#/images" }, "\u2039 All images"), h("span", { class: "pager" }, to(row - 1, "\u2190", "Previous", "previous"), h("span", {}, `${whole(row + 1)} of ${whole(meta.images)}`), to(row + 1, "\u2192", "Next", "next"))),
      h("div", { class: "columns image" },
        h("figure", {}, layer, h("figcaption", {}, h("h1", {}, data.labelled ? [dot(data.images.labels[row]), labelOf(row)] : "Image"), h("p", { class: "id" }, data.images.ids[row]), count,
          Gallery.compareView.others.length ? h("p", {}, h("a", { href: `#/compare/${row}` }, "Compare with another gallery")) : null,
          data.labelled ? h("p", {}, h("a", { href: `#/latents?class=${data.images.labels[row]}` }, `Latents of ${labelOf(row)}`)) : null)),
        h("section", { class: "wide" }, h("h2", {}, "Active latents, by ", term("activation")), list)));
    activeLatents(row).then(({ active, more, maps }) => {
      list.replaceChildren(...lines(active, maps, () => thumb(row), layer));
      list.removeAttribute("aria-busy");
      count.replaceChildren(`${plural(active.length, "active latent")} shown` + (more ? `, ${whole(more)} more not listed. ` : ". ") + (maps ? "Point at one to see where it fires, on a scale of its own. " : ""),
        download(() => [`image-${row + 1}.json`, JSON.stringify({ image: data.images.ids[row], active: active.map(([place, value]) => ({ latent: latents[place].id, activation: value })) }, null, 1)]));
      if (!active.length) list.append(h("p", { class: "empty" }, "None of the latents in this gallery responds to this image."));
    }, (error) => list.replaceChildren(h("p", { class: "empty" }, `${error.message}: write the gallery again.`)));
    return `${labelOf(row) || "Image"} ${row + 1}`;
  }
  return { show, showOne, lines, stop: () => grid?.stop() };
})();
