"use strict";
// Tables sort by a click on a column's head; folded tables are unfolded for printing. The page reads without this.
const sortKey = (cell) => {
  const text = cell.textContent.trim();
  const number = parseFloat(text.replace(/[,<>\s]/g, ""));
  return Number.isNaN(number) || !cell.classList.contains("n") ? text.toLowerCase() : number;
};
for (const table of document.querySelectorAll("table.sortable")) {
  table.classList.add("live");
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [sortKey(row.cells[head.cellIndex]), row]);
    const order = ([a], [b]) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
    rows.sort((a, b) => (up ? order(a, b) : order(b, a)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((fold) => (fold.open = true)));
