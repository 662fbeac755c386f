// Formulas are typeset by the copy of MathJax 3.2.2 beside this file, on the pages that have any. Nothing is fetched.
window.MathJax = {
  tex: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    packages: { "[-]": ["autoload", "require"] },
  },
  options: { enableMenu: false, ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
{
  const source = new URL("mathjax/tex-svg.js", document.currentScript.src).href;
  document.addEventListener("DOMContentLoaded", () => {
    if (!document.querySelector(".arithmatex")) return;
    const script = document.createElement("script");
    script.src = source;
    document.head.append(script);
  });
}
