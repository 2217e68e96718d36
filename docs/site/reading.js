// What scrolls can be reached with the keyboard, and the search has a name for those who hear the page.
window.addEventListener("load", async () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  await window.MathJax?.startup?.promise;
  const mark = () => {
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset__table, div.arithmatex"))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  };
  mark();
  window.addEventListener("resize", mark);
});
