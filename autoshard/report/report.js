"use strict";

// Tables: a click on, or Enter in, the head of a column sorts by it; again, the other way round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const isNumber = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const way = before ? (before === "ascending" ? "descending" : "ascending") : isNumber ? "descending" : "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    const key = (row) => (isNumber ? Number(row.cells[head.cellIndex].dataset.v) : row.cells[head.cellIndex].textContent);
    const compare = (a, b) => (isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort((a, b) => (way === "ascending" ? compare(a[0], b[0]) : compare(b[0], a[0])));
    body.append(...rows.map((pair) => pair[1]));
  });
}

// Pictures: zoom by buttons, keys and Ctrl with the wheel; move by dragging and arrow keys; search in names, labels and tooltips.
for (const picture of document.querySelectorAll(".picture")) {
  const stage = picture.querySelector(".stage"), svg = stage.querySelector("svg");
  const points = svg.viewBox.baseVal.width, full = (points * 96) / 72; // dot measures in points
  const height = svg.viewBox.baseVal.height / points;
  let scale = 1;

  function zoom(to, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const old = scale, left = stage.scrollLeft, top = stage.scrollTop;
    scale = Math.min(Math.max(to, 0.05), 8);
    svg.setAttribute("width", full * scale);
    svg.setAttribute("height", full * scale * height);
    stage.scrollLeft = ((left + x) * scale) / old - x;
    stage.scrollTop = ((top + y) * scale) / old - y;
  }
  const fit = () => Math.min(1, (stage.clientWidth - 4) / full);
  const act = { in: () => zoom(scale * 1.25), out: () => zoom(scale / 1.25), fit: () => zoom(fit()), full: () => zoom(1) };
  for (const button of picture.querySelectorAll("[data-zoom]")) button.addEventListener("click", act[button.dataset.zoom]);
  stage.addEventListener("keydown", (event) => {
    const name = { "+": "in", "=": "in", "-": "out", 0: "fit", 1: "full" }[event.key];
    if (name && !event.ctrlKey && !event.metaKey) act[name]();
  });
  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    zoom(scale * Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  stage.addEventListener("pointerdown", (start) => {
    if (start.button !== 0 || start.pointerType !== "mouse") return; // touch scrolls by itself
    const left = stage.scrollLeft + start.clientX, top = stage.scrollTop + start.clientY;
    const move = (event) => { stage.scrollLeft = left - event.clientX; stage.scrollTop = top - event.clientY; };
    const end = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", end); stage.classList.remove("dragged"); };
    stage.classList.add("dragged");
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
  });

  const input = picture.querySelector("input"), told = picture.querySelector("output");
  const nodes = [...svg.querySelectorAll(".node")].map((node) => [node, node.textContent.toLowerCase()]);
  let hits = [], at = -1;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = [];
    at = -1;
    for (const [node, text] of nodes) {
      const isHit = words.length > 0 && words.every((word) => text.includes(word));
      node.classList.toggle("found", isHit);
      node.classList.remove("current");
      if (isHit) hits.push(node);
    }
    stage.classList.toggle("searched", words.length > 0);
    told.value = words.length ? `${hits.length} found` : "";
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !hits.length) return;
    if (at >= 0) hits[at].classList.remove("current");
    at = (at + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
    if (at < 0) at = 0;
    hits[at].classList.add("current");
    const node = hits[at].getBoundingClientRect(), box = stage.getBoundingClientRect();
    stage.scrollBy(node.x + node.width / 2 - box.x - box.width / 2, node.y + node.height / 2 - box.y - box.height / 2);
    told.value = `${at + 1} of ${hits.length}`;
  });
  zoom(fit());
  stage.scrollTop = 0;
}
