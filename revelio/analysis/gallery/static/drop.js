"use strict";
// Only behind `revelio serve`: a picture dropped anywhere is encoded, and what fires on it shown.
(() => {
  const { data, h, number, plural, labelOf, thumb, imagesView, term } = Gallery;
  const main = document.getElementById("main");
  const most = Number(document.currentScript.dataset.most);
  let last = 0;
  const choose = h("input", { type: "file", id: "picture", accept: "image/*", hidden: true, onchange: () => choose.files[0] && send(choose.files[0]) });
  const link = h("button", { type: "button", class: "text", id: "try", title: "Or drop a picture anywhere", onclick: () => choose.click() }, "Try a picture");
  document.querySelector(".bar nav").after(link, choose);

  function note(text) {
    main.replaceChildren(h("p", { class: "empty", role: "alert" }, text));
  }
  async function send(file) {
    location.hash = "#/picture";
    const mine = ++last;
    await new Promise((done) => setTimeout(done));
    note("Encoding the picture\u2026");
    const found = await encoded(file);
    choose.value = "";
    // Another picture came since, or another page is open.
    if (mine !== last || location.hash !== "#/picture") return;
    if (found.error) note(found.error);
    else show(file, found);
  }
  async function encoded(file) {
    // A server that refuses a body stops reading it, which a browser takes for a lost connection.
    if (file.size > most) return { error: `${file.name}: a picture has at most ${most / 2 ** 20} MiB, and this has ${number(file.size / 2 ** 20)}` };
    try {
      const answer = await fetch("encode", { method: "POST", body: file, headers: { "X-Revelio": "1", "Content-Type": "application/octet-stream" } });
      const found = await answer.json();
      return found.error ? { error: `${file.name}: ${found.error}` } : found;
    } catch (error) {
      return { error: `${file.name} could not be sent: is \`revelio serve\` still running? (${error.message})` };
    }
  }
  function show(file, { grid, active, more, alike, seen }) {
    const layer = h("span", { class: "layers" });
    // What the model saw, which the cells lie over: not the file itself.
    const picture = () => h("img", { class: "thumb", src: seen, alt: file.name });
    layer.append(picture());
    const lines = imagesView.lines(active, active.map(([, , cells]) => cells), picture, layer, grid);
    document.title = `${file.name} \u00b7 ${data.title} | Revelio gallery`;
    main.replaceChildren(
      h("div", { class: "columns image" },
        h("figure", {}, layer, h("figcaption", {}, h("h1", {}, "Your picture"), h("p", { class: "id" }, file.name),
          h("p", { class: "quiet" }, `${plural(active.length, "active latent")}${more ? `, ${more} more outside this gallery` : ""}. Point at one to see where it fires.`)),
          alike.length ? [h("h2", {}, "Known images with the most similar latents"), h("div", { class: "pictures small" }, alike.map(([row, cosine]) => h("a", { class: "picture", href: `#/image/${row}` }, thumb(row), h("span", { class: "row" }, h("span", { class: "name" }, labelOf(row)), h("b", {}, number(cosine))))))] : null),
        h("section", { class: "wide" }, h("h2", {}, "Active latents, by ", term("activation")),
          h("div", { class: "actives" }, lines.length ? lines : h("p", { class: "empty" }, "None of the latents in this gallery fires on this picture.")))));
  }
  const stop = (event) => { if ([...event.dataTransfer.types].includes("Files")) event.preventDefault(); };
  addEventListener("dragover", stop);
  addEventListener("drop", (event) => {
    stop(event);
    const file = [...event.dataTransfer.files][0];
    if (file) send(file);
  });
})();
