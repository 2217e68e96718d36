// Adds to a page that is complete without it: a press on a column's head sorts by it, the next one the other way round.
document.querySelectorAll("thead th:not(.unsorted)").forEach((head) => {
  const body = head.closest("table").tBodies[0];
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      return "value" in cell.dataset ? parseFloat(cell.dataset.value) : cell.textContent;
    };
    const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    const rows = [...body.rows].map((row) => [key(row), row]);
    const absent = ([value]) => Number.isNaN(value);
    const known = rows.filter((each) => !absent(each));
    known.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
    // What has no number is last either way.
    body.append(...[...known, ...rows.filter(absent)].map(([, row]) => row));
    head.closest("tr").querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
});
