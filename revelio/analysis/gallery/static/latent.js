"use strict";
// One latent: its numbers, images along its whole range and where it fires in them, classes, similar latents.
Gallery.latentView = (() => {
  const { data, meta, ofCells, latents, placeOf, folded, titleOf, h, number, percent, plural, whole, className, labelOf, colour, thumb, tiles, heat, term, dot, detailsOf, filters, download } = Gallery;

  function facts(latent) {
    const rows = [
      [term("strength", "Strength"), number(latent.mean), latent.rare ? term("rare", "rare latent") : `rank ${whole(latent.place + 1)}`],
      [term("density", "Density"), percent(latent.density), `${whole(latent.count)} of ${plural(meta.images, "image")}`],
    ];
    if (data.labelled) {
      const judged = Math.min(meta.judged, latent.count);
      rows.push([term("purity", "Purity"), percent(latent.majority), `${Math.round(latent.majority * judged)} of ${judged} top images`]);
      rows.push([term("entropy", "Entropy"), number(latent.entropy), latent.sigma === null ? "" : term("sigma", `\u03c3 label ${number(latent.sigma)}`)]);
    }
    return h("dl", { class: "facts" }, rows.map(([name, value, note]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", {}, note)))));
  }

  function picture(latent, [row, value], share, cells) {
    const label = labelOf(row);
    const same = data.labelled && data.images.labels[row] === latent.class;
    return h("a", { class: "picture", href: `#/image/${row}`, title: data.images.ids[row] },
      h("span", { class: "layers" }, thumb(row), cells ? heat(cells) : null),
      share === null ? null : h("span", { class: "level" }, h("i", { style: { width: `${share * 100}%`, background: same ? colour(latent.class) : null } })),
      h("span", { class: "row" }, h("span", { class: same || !data.labelled ? "name" : "name other" }, label || data.images.ids[row]), h("b", {}, number(value))));
  }

  function range(latent, found, name, title, most) {
    if (!found[name].length) return null;
    return h("section", { class: "range-part" }, h("h2", {}, title),
      h("div", { class: name === "top" ? "pictures" : "pictures small" }, found[name].map((pair) => picture(latent, pair, most ? pair[1] / most : null, found.maps?.[pair[0]]))));
  }

  function histogram(found) {
    const most = Math.max(...found.bins);
    if (!most) return null;
    const bins = found.bins.map((count, i) => h("i", { title: `${plural(count, "image")} from ${number((found.most * i) / found.bins.length)} to ${number((found.most * (i + 1)) / found.bins.length)}`, style: { height: `${Math.sqrt(count / most) * 100}%` } }));
    return h("section", {}, h("h2", {}, "Activations of all images it fires on"), h("div", { class: "bars tall", role: "img", "aria-label": `Histogram of activations up to ${number(found.most)}` }, bins),
      h("div", { class: "row quiet axis" }, h("span", {}, "0"), h("span", {}, "square-root scale"), h("span", {}, number(found.most))));
  }

  // Every image that it fires on counts, and a tick says what share chance gives each class.
  function profile(latent, found) {
    if (!found.classes.length) return null;
    const all = latent.count;
    const listed = found.classes.reduce((sum, [, count]) => sum + count, 0);
    const line = ([id, count]) => {
      const chance = data.class_sizes[id] / meta.images;
      return h("li", {}, h("a", { href: `#/latents?class=${id}`, title: `All latents of ${className(id)}` }, className(id)),
        h("span", { class: "meter", title: `chance is ${percent(chance)}` }, h("i", { style: { width: `${(count / all) * 100}%`, background: colour(id) } }), h("span", { class: "chance", style: { left: `${chance * 100}%` } })),
        h("b", {}, percent(count / all)));
    };
    return h("section", {}, h("h2", {}, `Classes of all ${plural(all, "image")} it fires on; the tick is `, term("chance")),
      h("ul", { class: "profile" }, found.classes.map(line)), listed < all ? h("p", { class: "quiet" }, `${percent((all - listed) / all)} of other classes`) : null);
  }

  function similar(pairs, key, title) {
    if (!pairs.length) return null;
    return h("section", {}, h("h2", {}, term(key, title)), h("div", { class: "near" }, pairs.map(([place, cosine]) => {
      const other = latents[place];
      return h("a", { class: "mini", href: `#/latent/${other.id}` }, tiles(other, 4),
        h("span", { class: "row" }, h("span", { class: "name" }, data.labelled ? dot(other.class) : null, other.name || data.labelled ? titleOf(other) : `#${other.id}`), h("b", {}, cosine.toFixed(2))));
    })));
  }

  // The latents that repeat this one, or the one that it repeats.
  function repeated(latent) {
    const first = latent.repeats ?? null;
    const others = first === null ? folded.get(latent.place) ?? [] : [latents[first]];
    if (!others.length) return null;
    return h("section", { class: "repeats" }, h("h2", {}, term("repeats", first === null ? "Nearly the same" : "Nearly repeats")),
      h("p", {}, others.slice(0, 40).map(({ id }) => h("a", { class: "chip", href: `#/latent/${id}` }, `#${id}`)), others.length > 40 ? ` and ${whole(others.length - 40)} more` : null));
  }

  // At which timesteps it fires: the share of cells, with its interval.
  function timesteps(found) {
    if (!found.timesteps) return null;
    const most = Math.max(...found.timesteps.map(([, , , high]) => high)) || 1;
    const at = (share) => `${(share / most) * 100}%`;
    return h("section", { class: "timesteps" }, h("h2", {}, "Share of cells that it fires on, by timestep"),
      h("ul", { class: "profile" }, found.timesteps.map(([t, share, low, high]) => h("li", {}, h("span", {}, `t = ${t}`),
        h("span", { class: "meter", title: `95 % from ${percent(low)} to ${percent(high)}` }, h("i", { style: { width: at(share) } }), h("span", { class: "spread", style: { left: at(low), width: at(high - low) } })),
        h("b", {}, percent(share))))));
  }

  // Its own value of each measure, beside all measured latents' and chance.
  function measured(found) {
    if (!found.measured) return null;
    return h("section", { class: "measured" }, h("h2", {}, "How ", term("locality", "local"), " and stable it is"),
      h("table", {}, h("tr", { class: "quiet" }, ["", "this", "all", "chance"].map((text) => h("th", { scope: "col" }, text))),
        data.measures.map(({ name, of, chance }, i) => h("tr", {}, h("th", { scope: "row" }, name), [found.measured[i], of[0], chance[0]].map((value) => h("td", {}, number(value)))))));
  }

  // The line that draws with more of the latent: its strongest activation, times each strength, is added to every
  // cell. Guidance multiplies the change: at 7.5 these strengths leave stripes where a picture was.
  function steer(latent, found) {
    // A model without timesteps draws nothing.
    if (!meta.model || !meta.layer || !Number.isInteger(meta.timestep) || !found.top.length) return null;
    // The strongest code of a cell, added to every cell, is far more than a picture has.
    const strengths = ofCells ? "0 0.25 0.5 1" : "0 1 2 4";
    const line = `revelio steer --backbone.name ${meta.model} --layer ${meta.layer} --ksae KSAE --latent-values ${latent.id}:${found.top[0][1]} --operation add --strength ${strengths} --guidance 3 --texts "a photo" --images-per-prompt 4 --out steered-${latent.id}`;
    return h("section", {}, h("h2", {}, "Draw with more of it"), h("p", { class: "command" }, h("code", {}, line)));
  }

  // The one before and after, in the order and under the filters of the grid.
  function around(latent) {
    let order = filters.shown();
    let at = order.indexOf(latent);
    if (at < 0) { order = latents; at = latent.place; }
    return [order[at - 1], order[at + 1], at + 1, order.length];
  }
  const step = (other, id, text, key) => other
    ? h("a", { class: "button", id, href: addressOf(other), "data-latent": other.id, "aria-label": `${text} latent`, title: `${text} latent (${key})` }, key)
    : h("span", { class: "button off", "aria-hidden": "true" }, key);

  const maps = () => document.body.dataset.maps === "on";
  // The address says so where heat maps are shown, or hidden, against what is usual for this k-SAE.
  const addressOf = (latent) => `#/latent/${latent.id}${maps() === ofCells ? "" : `?maps=${Number(maps())}`}`;
  function toggle(latent) {
    const set = () => {
      document.body.dataset.maps = maps() ? "off" : "on";
      button.setAttribute("aria-pressed", String(maps()));
      history.replaceState(history.state, "", addressOf(latent));
      for (const link of document.querySelectorAll(".pager a")) link.href = addressOf({ id: link.dataset.latent });
    };
    const button = h("button", { type: "button", class: "toggle", id: "maps", "aria-pressed": String(maps()), title: "Show where it fires (h)", onclick: set }, "Where it fires");
    return button;
  }

  function body(latent, found) {
    const most = found.top.length ? found.top[0][1] : 1;
    return [
      h("div", { class: "wide" },
        h("div", { class: "row tools" }, found.maps ? h("span", {}, toggle(latent), h("span", { class: "scale", title: "One scale for all images of this latent" }, "weak", h("i"), "strong")) : h("span"), download(() => [`latent-${latent.id}.json`, JSON.stringify({ ...latent, ...found }, null, 1)])),
        range(latent, found, "top", [`Top ${plural(found.top.length, "image")}, by `, term("activation")], most),
        range(latent, found, "middle", "Around the median of its activations", most),
        range(latent, found, "random", "Drawn from all images it fires on", most),
        range(latent, found, "misses", [term("misses", "Near misses")], null)),
      h("div", { class: "side" }, repeated(latent), histogram(found), timesteps(found), measured(found), profile(latent, found), similar(found.near, "similar", "Similar by direction"), similar(found.alike, "together", "Similar by images"), steer(latent, found)),
    ];
  }

  function show(main, id, query) {
    const latent = latents[placeOf.get(id)];
    if (!latent) {
      main.replaceChildren(h("p", { class: "empty" }, `Latent ${id} is not in this gallery, which holds the ${whole(meta.shown)} strongest.`));
      return "Latents";
    }
    document.body.dataset.maps = (query.get("maps") ?? String(Number(ofCells))) === "0" ? "off" : "on";
    const [before, after, at, total] = around(latent);
    const columns = h("div", { class: "columns", "aria-busy": "true" }, h("p", { class: "quiet" }, "Loading\u2026"));
    const name = latent.name || data.labelled ? titleOf(latent) : "Latent";
    const doubt = latent.name && latent.checked === false ? h("p", { class: "quiet" }, "A judge that was given this name could not tell the images that it fires on from others.") : null;
    main.replaceChildren(
      h("div", { class: "crumbs" }, h("a", { href: `#/latents${filters.written()}` }, "\u2039 All latents"),
        h("span", { class: "pager" }, step(before, "previous", "Previous", "\u2190"), h("span", {}, `${whole(at)} of ${whole(total)}`), step(after, "next", "Next", "\u2192"))),
      h("h1", {}, data.labelled ? dot(latent.class) : null, name, h("span", { class: "id" }, ` #${latent.id}`)),
      doubt ?? "", facts(latent), columns);
    detailsOf(latent).then((found) => {
      columns.removeAttribute("aria-busy");
      columns.replaceChildren(...body(latent, found));
    }, (error) => columns.replaceChildren(h("p", { class: "empty" }, `${error.message}: write the gallery again.`)));
    return `${name} #${latent.id}`;
  }
  return { show };
})();
