// An equation in a line that is too wide for it scrolls by itself; what scrolls can be reached with the keyboard; and the
// search has a name for those who hear the page.
window.addEventListener("load", async () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  await window.MathJax?.startup?.promise;
  const fit = () => {
    for (const equation of document.querySelectorAll("span.arithmatex"))
      equation.classList.toggle("wide", equation.firstChild.offsetWidth > equation.closest("p, li, td, div").clientWidth);
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset__table, .arithmatex"))
      if (box.scrollWidth > box.clientWidth && box.clientWidth > 0) box.tabIndex = 0;
  };
  fit();
  window.addEventListener("resize", fit);
});
