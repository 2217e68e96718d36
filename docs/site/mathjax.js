// Equations are $...$ and ```math in Markdown, which pymdownx.arithmatex leaves as \(...\) and \[...\] in elements of this class.
window.MathJax = {
  loader: { load: ["core", "input/tex", "output/chtml", "a11y/assistive-mml"] },
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
