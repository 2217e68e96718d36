// Adds to a page that is complete without it: values under the pointer, and methods that can be picked out or put away.
const picksOut = (element, svgs, method) => {
  const part = `[data-method="${CSS.escape(method)}"]`;
  const focus = (on) => svgs.filter((svg) => svg.querySelector(part)).forEach((svg) => {
    svg.classList.toggle("focus", on);
    svg.querySelectorAll(part).forEach((each) => each.classList.toggle("on", on));
  });
  element.tabIndex = 0;
  element.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && focus(true));
  element.addEventListener("pointerleave", () => focus(false));
  element.addEventListener("focus", () => element.matches(":focus-visible") && focus(true));
  element.addEventListener("blur", () => focus(false));
};
const drawings = [...document.querySelectorAll("figure svg")];
document.querySelectorAll("tr[data-row]").forEach((row) => picksOut(row, drawings, row.dataset.row));
document.querySelectorAll("figure.curves").forEach((figure) => {
  const svg = figure.querySelector("svg");
  const lines = JSON.parse(figure.querySelector("script").textContent);
  const items = [...figure.querySelectorAll(".key li")];
  const key = figure.querySelector(".key");
  key.setAttribute("role", "group");
  key.setAttribute("aria-label", "methods: press one to hide or show it");
  const when = figure.querySelector(".when");
  const [left, right, top, bottom, first, last] = svg.dataset.plot.split(" ").map(Number);
  const epochs = [...new Set(lines.flatMap((line) => line.epochs))].sort((a, b) => a - b);
  const final = when.textContent;
  const finals = items.map((item) => item.lastElementChild.textContent);
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("visibility", "hidden");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  svg.append(cursor);

  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    when.textContent = final;
    items.forEach((item, i) => { item.lastElementChild.textContent = finals[i]; });
  };
  const point = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const wanted = first + ((at.x - left) / (right - left)) * (last - first);
    const epoch = epochs.reduce((best, e) => (Math.abs(e - wanted) < Math.abs(best - wanted) ? e : best));
    const x = left + ((epoch - first) / (last - first)) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    when.textContent = `epoch ${epoch}`;
    items.forEach((item) => {
      const line = lines.find((l) => l.method === item.dataset.method);
      const i = line.epochs.indexOf(epoch);
      item.lastElementChild.textContent = i < 0 ? "" : line.text[i];
    });
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);

  items.forEach((item) => {
    const parts = () => document.querySelectorAll(`figure.curves svg [data-method="${CSS.escape(item.dataset.method)}"]`);
    const toggle = () => {
      const shown = item.getAttribute("aria-pressed") === "true";
      parts().forEach((part) => part.classList.toggle("off", shown));
      document.querySelectorAll(`.key li[data-method="${CSS.escape(item.dataset.method)}"]`)
        .forEach((other) => other.setAttribute("aria-pressed", String(!shown)));
    };
    item.setAttribute("role", "button");
    item.setAttribute("aria-pressed", "true");
    picksOut(item, [svg], item.dataset.method);
    item.addEventListener("click", toggle);
    item.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
    });
  });
});
