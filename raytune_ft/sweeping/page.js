"use strict";
// Trials light up together in pictures and table; axes are brushed by dragging along them.
(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const sweep = document.getElementById("sweep");
  const said = document.getElementById("said");
  const hint = said ? said.textContent : "";
  const brushes = new Map();
  let busy = false;

  const light = (number) => {
    sweep.classList.toggle("lighting", number !== null);
    for (const one of all(".lit")) one.classList.remove("lit");
    if (number === null) { said.textContent = hint; return; }
    for (const one of all(`[data-n="${number}"]`)) one.classList.add("lit");
    const row = document.querySelector(`tr[data-n="${number}"]`);
    if (row) said.textContent = row.dataset.said;
  };

  // a thin line is hard to meet: what is within three pixels counts
  const near = (x, y) => {
    for (const [dx, dy] of [[0, 0], [0, -3], [0, 3], [-3, 0], [3, 0]]) {
      const met = document.elementsFromPoint(x + dx, y + dy);
      const found = met.map((one) => one.closest("[data-n]")).find(Boolean);
      if (found) return found.dataset.n;
    }
    return null;
  };

  const paint = () => {
    const out = new Set();
    for (const thread of all(".thread")) {
      const places = thread.dataset.p.split(" ");
      for (const [axis, [low, high]] of brushes) {
        const place = places[axis];
        if (place === "-" || Number(place) < low || Number(place) > high) out.add(thread.dataset.n);
      }
    }
    for (const one of all("[data-n]")) one.classList.toggle("out", out.has(one.dataset.n));
    for (const one of all(".brush")) {
      const range = brushes.get(one.dataset.a);
      one.setAttribute("visibility", range ? "visible" : "hidden");
      const grasp = one.nextElementSibling;
      if (!range) continue;
      const upright = grasp.dataset.along === "y";
      const start = Number(grasp.getAttribute(upright ? "y" : "x")) + 4;
      const length = Number(grasp.getAttribute(upright ? "height" : "width")) - 8;
      const from = upright ? 1 - range[1] : range[0];
      one.setAttribute(upright ? "y" : "x", start + from * length);
      one.setAttribute(upright ? "height" : "width", Math.max(2, (range[1] - range[0]) * length));
    }
  };

  const placeOn = (grasp, event) => {
    const box = grasp.getBoundingClientRect();
    const upright = grasp.dataset.along === "y";
    const shown = upright ? box.height : box.width;
    const edge = 4 * shown / Number(grasp.getAttribute(upright ? "height" : "width"));
    const offset = upright ? box.bottom - edge - event.clientY : event.clientX - box.left - edge;
    return Math.min(1, Math.max(0, offset / (shown - 2 * edge)));
  };

  for (const grasp of all(".grasp")) {
    let began = null;
    grasp.addEventListener("pointerdown", (event) => {
      began = placeOn(grasp, event);
      grasp.setPointerCapture(event.pointerId);
      brushes.delete(grasp.dataset.a);
      busy = true;
      paint();
    });
    grasp.addEventListener("pointermove", (event) => {
      if (began === null) return;
      const now = placeOn(grasp, event);
      if (Math.abs(now - began) < 0.02) brushes.delete(grasp.dataset.a);
      else brushes.set(grasp.dataset.a, [Math.min(began, now), Math.max(began, now)]);
      paint();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      grasp.addEventListener(end, () => { began = null; busy = brushes.size > 0; });
    }
  }

  for (const picture of all("svg")) {
    picture.addEventListener("pointermove", (event) => {
      if (!event.buttons) light(near(event.clientX, event.clientY));
    });
    picture.addEventListener("pointerleave", () => light(null));
  }
  for (const row of all("tr[data-n]")) {
    row.addEventListener("pointerenter", () => light(row.dataset.n));
    row.addEventListener("pointerleave", () => light(null));
  }
  if (sweep.dataset.running) {
    setInterval(() => { if (!busy && !document.hidden) location.reload(); }, 10000);
  }
})();
