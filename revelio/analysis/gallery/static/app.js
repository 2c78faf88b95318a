"use strict";
// The address picks the view; keys and the theme.
(() => {
  const { data, meta, ofCells, h, whole, number, plural, term, percent, filters, latentsView, latentView, imagesView, mapView, compareView, search } = Gallery;
  const main = document.getElementById("main");
  const aside = document.getElementById("filters");
  let redraw = null;
  let place = "";

  const KEYS = [["/", "search a name, a class, an image or a number"], ["arrow keys", "walk the grid or the map; in a latent or an image: previous, next"], ["Enter", "open"], ["Esc", "back to where you were"], ["m", "map"], ["i", "images"], ...(compareView.others.length ? [["c", "compare with another gallery"]] : []), ["h", "where a latent fires, on whole grids"], ["d", "download what is shown"], ["t", "light or dark"], ["?", "this page"]];

  function about() {
    const { missing } = data.images;
    const shown = { model: "Model", dataset: "Data set", split: "Split", layer: "Layer", timestep: "Timestep t", prompt_policy: "Prompt policy", mode: "Mode", codes: "Codes", n: "Latents of the k-SAE", d: "Width of the activations", k: `Latents kept per ${ofCells ? "cell" : "image"} (k)`, images: "Images", alive: "Latents that respond to some image", shown: "Latents in this gallery" };
    const rows = Object.entries(shown).filter(([key]) => meta[key] !== undefined && meta[key] !== null);
    const names = Object.entries(missing);
    main.replaceChildren(h("div", { class: "prose" },
      h("h1", {}, "About this gallery"),
      h("p", {}, "A ", term("latent"), " of a k-sparse autoencoder is a direction in a layer's activations. For every latent this gallery shows the images with the largest ", term("activation"), ", so that you can see what it stands for."),
      h("h2", {}, "The words"),
      h("dl", { class: "words" }, ["latent", "activation", "density", "strength", ...(data.labelled ? ["purity", "entropy", "sigma", "chance"] : []), "similar", "together", "repeats", ...(data.measures?.length ? ["locality"] : []), "misses"].map((key) => [h("dt", {}, { sigma: "\u03c3 label", similar: "similar by direction", together: "similar by images", misses: "near miss" }[key] || key), h("dd", {}, term(key).dataset.tip)])),
      controls(),
      measures(),
      h("h2", {}, "Made from"),
      h("table", {}, rows.map(([key, name]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, typeof meta[key] === "number" ? whole(meta[key]) : String(meta[key]))))),
      h("h2", {}, "Keys"),
      h("table", {}, KEYS.map(([key, what]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, what)))),
      names.length ? [h("h2", {}, `${plural(names.length, "image")} without a picture`), h("ul", { class: "missing-list" }, names.slice(0, 200).map(([, reason]) => h("li", {}, reason)), names.length > 200 ? h("li", {}, `and ${whole(names.length - 200)} more, in gallery.json`) : null)] : null,
      h("p", { class: "quiet" }, "The same data, for programs: ", h("a", { href: "gallery.json" }, "gallery.json"), ".")));
  }

  // What control dictionaries reach on the same images.
  function controls() {
    const found = data.purity?.controls;
    if (!data.labelled || !data.purity) return null;
    if (!found || !Object.keys(found).length) return [h("h2", {}, "Purity and its controls"), h("p", {}, "Purity was not measured beside controls here. Without them it does not show that the k-SAE has learned anything.")];
    const line = (name, value, text) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, percent(value)), h("td", { class: "quiet" }, text));
    const order = Object.entries(found).sort((a, b) => b[1].majority.value - a[1].majority.value);
    const points = (share) => `${share > 0 ? "+" : ""}${(share * 100).toFixed(1)}`;
    return [h("h2", {}, "Purity and its controls"),
      h("p", {}, "The same measure for control dictionaries: autoencoders of the k-SAE's size whose directions no training of an autoencoder found. Where one of them is as pure as the k-SAE, purity shows what the layer's activations hold, not what the k-SAE has learned."),
      h("table", { class: "controls" }, line("this k-SAE", data.purity.majority_share, `verdict: ${data.purity.verdict.majority}`), line("chance", data.purity.chance_levels.majority_share, "random images"),
        order.map(([name, { majority: { value, difference } }], i) => line(name, value, `${i ? "" : "the strongest; "}difference ${points(difference.value)} points (${points(difference.interval[0])} to ${points(difference.interval[1])})`))),
      h("p", { class: "quiet" }, data.purity.controls_method)];
  }

  // How local and stable the measured latents are together, each measure beside chance.
  function measures() {
    if (!data.measures?.length) return null;
    const said = ([value, low, high]) => (value === null ? "\u2013" : `${number(value)} (${number(low)} to ${number(high)})`);
    return [h("h2", {}, "Locality and stability"),
      h("table", { class: "controls" }, h("tr", { class: "quiet" }, ["", "mean over latents", "chance"].map((text) => h("th", { scope: "col" }, text))),
        data.measures.map(({ name, of, chance }) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, said(of)), h("td", {}, said(chance))))),
      h("p", { class: "quiet" }, "With 95 % intervals, as ", h("code", {}, "revelio locality"), " measured them.")];
  }

  function changed() {
    const view = place === "map" ? "map" : "latents";
    history.replaceState(history.state, "", `#/${view}${filters.written()}`);
    redraw?.();
  }

  // Where each entry of the history was scrolled to, and the last list, for the links that lead back to it.
  history.scrollRestoration = "manual";
  let list = null;
  let pending = 0;
  addEventListener("scroll", () => {
    clearTimeout(pending);
    pending = setTimeout(remember, 80);
  }, { passive: true });
  // Another entry is current from here on, though its view is drawn only with the hashchange that follows.
  addEventListener("popstate", () => clearTimeout(pending));
  function remember() {
    clearTimeout(pending);
    history.replaceState({ scroll: scrollY }, "");
    if (["latents", "images"].includes(place)) list = { hash: location.hash || "#/latents", scroll: scrollY, view: place };
  }
  function scrolled() {
    const single = { latent: "latents", image: "images" };
    if (history.state?.scroll !== undefined) return history.state.scroll;
    return list && list.hash === location.hash && single[before] === place ? list.scroll : 0;
  }
  document.addEventListener("click", (event) => { if (event.target.closest?.("a")) remember(); }, true);

  // Beside another gallery a page is without its bar and its lists.
  for (const link of document.querySelectorAll("[data-view=compare]")) link.hidden = !compareView.others.length;
  let before = "", opened = "";
  function route() {
    before = place;
    latentsView.stop();
    imagesView.stop();
    const [path, text] = location.hash.replace(/^#\/?/, "").split("?");
    const [view, id] = path.split("/");
    const query = new URLSearchParams(text || "");
    place = ["latent", "map", "image", "images", "about", "picture", ...(compareView.others.length ? ["compare"] : [])].includes(view) ? view : "latents";
    const filtered = place === "latents" || place === "map";
    if (filtered && (text !== undefined || place === "latents")) filters.read(query);
    document.body.dataset.view = place;
    document.body.dataset.embed = compareView.embedded ? "on" : "off";
    aside.hidden = !filtered;
    if (filtered) filters.panel(aside, changed);
    const tab = { latent: "latents", image: "images" }[place] || place;
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.view === tab) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    redraw = null;
    let title = { latents: "Latents", map: "Map", images: "Images", about: "About" }[place];
    if (place === "latents") redraw = latentsView.show(main);
    else if (place === "map") redraw = mapView.show(main, query);
    else if (place === "latent") title = latentView.show(main, Number(id), query);
    else if (place === "image") title = imagesView.showOne(main, Number(id));
    else if (place === "images") imagesView.show(main, query);
    else if (place === "compare") title = compareView.show(main, Number(id), query);
    else if (place === "about") about();
    else { title = "A picture"; main.replaceChildren(h("p", { class: "empty" }, "Drop a picture here.")); }
    document.title = `${title} \u00b7 ${data.title} | Revelio gallery`;
    tips.hide();
    window.scrollTo(0, scrolled());
    const last = before === "latent" && place === "latents" ? document.querySelector(`.card[href="#/latent/${opened}"]`) : null;
    last?.focus({ preventScroll: true });
    if (place === "latent") opened = id;
  }

  const tips = (() => {
    const tip = document.getElementById("tip");
    const hide = () => { tip.hidden = true; };
    const open = (event) => {
      const word = event.target.closest?.(".term");
      if (!word) return;
      tip.textContent = word.dataset.tip;
      tip.hidden = false;
      const at = word.getBoundingClientRect();
      tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${at.bottom + 8 + tip.offsetHeight > innerHeight ? at.top - tip.offsetHeight - 8 : at.bottom + 8}px`;
    };
    for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, open);
    for (const kind of ["mouseout", "focusout", "scroll"]) document.addEventListener(kind, hide, true);
    return { hide };
  })();

  // Pages opened from disk may be denied storage: the theme then lasts for the page.
  const stored = (write) => { try { return write === undefined ? localStorage.getItem("revelio-theme") : localStorage.setItem("revelio-theme", write); } catch { return null; } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function theme(name) {
    document.documentElement.dataset.theme = name;
    redraw?.();
  }
  const asked = new URLSearchParams(location.search).get("theme");
  theme(asked || stored() || (dark.matches ? "dark" : "light"));
  function flip() {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    stored(next);
    theme(next);
  }
  document.getElementById("theme").addEventListener("click", flip);

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input[type=search], select");
    if (event.ctrlKey || event.metaKey || event.altKey || typing || event.target.type === "range") return;
    const press = (id) => document.getElementById(id)?.click();
    const single = ["latent", "image", "compare"].includes(place);
    const back = () => { if (single) { remember(); location.hash = list?.hash ?? "#/latents"; } };
    const act = {
      "/": search.focus, t: flip, h: () => press("maps"), d: () => press("download"), m: () => { location.hash = "#/map"; }, i: () => { location.hash = "#/images"; }, c: () => { if (compareView.others.length) location.hash = `#/compare/${place === "image" ? location.hash.split("/")[2] : 0}`; }, "?": () => { location.hash = "#/about"; }, Escape: back,
      ArrowLeft: () => single && press("previous"), ArrowRight: () => single && press("next"),
    }[event.key];
    if (!act) return;
    if (event.key === "/") event.preventDefault();
    act();
  });
  addEventListener("hashchange", route);
  route();
})();
