"use strict";
// Everything can be read without this: it sorts the headline table and lets arrow keys move in the maps.
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? JSON.parse(cell.dataset.value.replace("NaN", "null")) : cell.textContent;
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      const known = rows.filter(([value]) => value !== null).sort((a, b) => (descending ? -1 : 1) * compare(a[0], b[0]));
      table.tBodies[0].append(...known.map(([, row]) => row), ...rows.filter(([value]) => value === null).map(([, row]) => row));
    });
  });
}
for (const map of document.querySelectorAll(".map")) {
  const cells = [...map.querySelectorAll("td[tabindex]")];
  cells.forEach((cell, index) => (cell.tabIndex = index ? -1 : 0));
  const column = (cell) => [...cell.parentNode.cells].indexOf(cell);
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  map.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    const from = event.target.closest("td[tabindex]");
    if (!step || !from) return;
    event.preventDefault();
    let row = from.parentNode.sectionRowIndex + step[0];
    let place = column(from) + step[1];
    for (let rows = map.tBodies[0].rows; rows[row] && place > 0; row += step[0], place += step[1]) {
      const next = rows[row].cells[step[0] ? Math.min(place, rows[row].cells.length - 1) : place];
      if (!next) return;
      if (next.tabIndex >= 0 || next.hasAttribute("tabindex")) return next.focus();
    }
  });
  map.addEventListener("focusin", (event) => {
    if (!event.target.matches("td[tabindex]")) return;
    for (const cell of cells) cell.tabIndex = cell === event.target ? 0 : -1;
    const tip = event.target.querySelector(".tip");
    tip.classList.remove("docked");
    const both = tip.getBoundingClientRect().bottom - event.target.getBoundingClientRect().top;
    tip.classList.toggle("docked", both >= innerHeight); // below a map taller than the window it would not be seen
    if (both < innerHeight) tip.scrollIntoView({ block: "nearest" });
  });
}
