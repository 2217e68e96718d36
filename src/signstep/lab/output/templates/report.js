// Adds to a page that is complete without it: values under the pointer, and methods that can be picked out or put away.
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
    const focus = (on) => {
      svg.classList.toggle("focus", on);
      parts().forEach((part) => part.classList.toggle("on", on));
    };
    const toggle = () => {
      const shown = item.getAttribute("aria-pressed") === "true";
      parts().forEach((part) => part.classList.toggle("off", shown));
      document.querySelectorAll(`.key li[data-method="${CSS.escape(item.dataset.method)}"]`)
        .forEach((other) => other.setAttribute("aria-pressed", String(!shown)));
    };
    item.setAttribute("role", "button");
    item.setAttribute("aria-pressed", "true");
    item.tabIndex = 0;
    item.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && focus(true));
    item.addEventListener("pointerleave", () => focus(false));
    item.addEventListener("focus", () => item.matches(":focus-visible") && focus(true));
    item.addEventListener("blur", () => focus(false));
    item.addEventListener("click", toggle);
    item.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
    });
  });
});
