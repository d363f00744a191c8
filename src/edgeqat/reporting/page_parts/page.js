"use strict";
// Tables with data-sortable: a click on a head sorts by it, numbers as numbers, empty cells last.
function key(cell) {
  const text = cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value;
  const number = /^[+-]?\d+(\.\d+)?(e[+-]?\d+)?(?=[\s%x]|$)/.exec(text);
  return number === null ? text.toLowerCase() : Number(number[0]);
}
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -direction : direction;
  return (a < b ? -1 : a > b ? 1 : 0) * direction;
}
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button === null) return;
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(key(a.cells[column]), key(b.cells[column]), direction));
      table.tBodies[0].append(...rows);
    });
  });
}
// A search field with data-filters: rows without its text are hidden, and the rest counted.
for (const field of document.querySelectorAll("input[data-filters]")) {
  const table = document.getElementById(field.dataset.filters);
  const told = document.getElementById(field.dataset.count);
  const filter = () => {
    const wanted = field.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    told.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
  };
  field.addEventListener("input", filter);
  filter();
}
// A selection with data-shows: of the elements that its options name, only the chosen one is seen.
for (const select of document.querySelectorAll("select[data-shows]")) {
  const show = () => {
    for (const option of select.options) document.getElementById(option.value).hidden = !option.selected;
  };
  select.addEventListener("change", show);
  show();
}
// What a link points at may be hidden by a filter, or folded; on paper nothing is.
addEventListener("hashchange", () => {
  const row = document.getElementById(location.hash.slice(1));
  if (row !== null) { row.hidden = false; row.scrollIntoView({ block: "center" }); }
});
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
