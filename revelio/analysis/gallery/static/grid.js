"use strict";
// A grid of any number of items: its height is that of all, on the page are only those near the window.
Gallery.grid = (box, items, make) => {
  const { h } = Gallery;
  const inner = h("div", { class: box.dataset.items });
  box.replaceChildren(inner);
  if (!items.length) return { draw: () => {}, stop: () => {} };
  let from = 0, to = 0, columns = 1, step = 1;

  function measure() {
    if (!inner.firstChild) { inner.append(make(items[0])); [from, to] = [0, 1]; }
    inner.style.gridAutoRows = "";
    const style = getComputedStyle(inner);
    columns = style.gridTemplateColumns.split(" ").length;
    const height = Math.ceil(inner.firstChild.getBoundingClientRect().height) || 1;
    inner.style.gridAutoRows = `${height}px`;
    step = height + (parseFloat(style.rowGap) || 0);
    box.style.height = `${Math.ceil(items.length / columns) * step}px`;
  }
  function draw() {
    const above = -box.getBoundingClientRect().top;
    const spare = Math.ceil(innerHeight / step / 2) + 1;
    const rows = Math.ceil(items.length / columns);
    const first = Math.min(rows - 1, Math.max(0, Math.floor(above / step) - spare));
    const last = Math.min(rows, Math.max(1, Math.ceil((above + innerHeight) / step) + spare));
    const [low, high] = [first * columns, Math.min(items.length, Math.max(first + 1, last) * columns)];
    // Items that stay are not touched: one of them may have the focus.
    if (high <= from || low >= to) { inner.replaceChildren(); from = to = low; }
    for (; from < low; from += 1) inner.firstChild.remove();
    for (; to > high; to -= 1) inner.lastChild.remove();
    for (; from > low; from -= 1) inner.prepend(make(items[from - 1]));
    for (; to < high; to += 1) inner.append(make(items[to]));
    inner.style.transform = `translateY(${first * step}px)`;
  }
  const fit = () => { measure(); draw(); };
  const watch = new ResizeObserver(fit);
  const scrolled = () => requestAnimationFrame(draw);
  watch.observe(box.parentElement);
  addEventListener("scroll", scrolled, { passive: true });
  fit();
  return {
    stop: () => { watch.disconnect(); removeEventListener("scroll", scrolled); },
    // Arrow keys walk the items, by the grid's columns.
    walk: (event) => {
      const at = [...inner.children].indexOf(document.activeElement);
      const way = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      const next = way && at >= 0 ? inner.children[at + way] : null;
      if (!next) return;
      event.preventDefault();
      next.focus();
    },
  };
};
