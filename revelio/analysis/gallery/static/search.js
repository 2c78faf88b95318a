"use strict";
// One search for all: a latent's name, a latent's or an image's number, a class, a file.
Gallery.search = (() => {
  const { data, meta, latents, placeOf, h, className, dot, plural } = Gallery;
  const MOST = 6;
  const box = document.getElementById("search");
  const list = document.getElementById("found");
  let at = -1;

  function find(words) {
    const found = [];
    const digits = /^#?(\d+)$/.exec(words);
    if (digits) {
      const wanted = Number(digits[1]);
      if (placeOf.has(wanted)) found.push([`#/latent/${wanted}`, "latent", `#${wanted}`]);
      if (wanted >= 1 && wanted <= meta.images) found.push([`#/image/${wanted - 1}`, "image", `${wanted}: ${data.images.ids[wanted - 1]}`]);
      const more = latents.filter(({ id }) => id !== wanted && String(id).startsWith(digits[1])).slice(0, MOST);
      found.push(...more.map(({ id }) => [`#/latent/${id}`, "latent", `#${id}`]));
    }
    const named = data.latents.name ? latents.filter(({ name }) => name?.toLowerCase().includes(words)).slice(0, MOST) : [];
    found.push(...named.map(({ id, name }) => [`#/latent/${id}`, "latent", name]));
    const classes = data.classes.map((_, id) => id).filter((id) => className(id).toLowerCase().includes(words));
    found.push(...classes.slice(0, MOST).map((id) => [`#/latents?class=${id}`, "class", h("span", {}, dot(id), className(id))]));
    const rows = [];
    for (let row = 0; row < meta.images && rows.length < MOST; row += 1) {
      if (data.images.ids[row].toLowerCase().includes(words)) rows.push(row);
    }
    found.push(...rows.map((row) => [`#/image/${row}`, "image", data.images.ids[row]]));
    return found;
  }
  function fill() {
    const words = box.value.trim().toLowerCase();
    at = -1;
    list.hidden = !words;
    const found = words ? find(words) : [];
    list.replaceChildren(...found.map(([href, kind, what]) => h("a", { href, role: "option", onclick: close }, h("span", { class: "name" }, what), h("span", { class: "quiet" }, kind))));
    if (words && !found.length) list.append(h("p", { class: "quiet" }, `Nothing of that name or number among ${plural(latents.length, "latent")} and ${plural(meta.images, "image")}.`));
  }
  function close() { list.hidden = true; box.value = ""; box.blur(); }
  function mark(step) {
    const links = [...list.querySelectorAll("a")];
    if (!links.length) return;
    at = (at + step + links.length) % links.length;
    links.forEach((link, i) => link.setAttribute("aria-selected", String(i === at)));
    links[at].scrollIntoView({ block: "nearest" });
  }
  box.addEventListener("input", fill);
  box.addEventListener("focus", fill);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); mark(event.key === "ArrowDown" ? 1 : -1); }
    if (event.key === "Enter") list.querySelectorAll("a")[Math.max(0, at)]?.click();
    if (event.key === "Escape") close();
  });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest?.(".find")) list.hidden = true; });
  return { focus: () => box.focus() };
})();
