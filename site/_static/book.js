// Formulas and code that are wider than their column scroll; what scrolls can be reached with the keyboard.
const BOXES = "span.math, div.math mjx-container, div.highlight pre, div.output, div.pst-scrollable-table-container";
function markWide() {
  // Everything is read before anything is written: the browser lays out a long page once, not once for each box.
  const found = Array.from(document.querySelectorAll(BOXES), (box) => {
    const formula = box.querySelector("mjx-math");
    const width = formula ? formula.getBoundingClientRect().width : box.scrollWidth;
    return [box, width > box.clientWidth + 1];
  });
  for (const [box, wide] of found) {
    if (wide === box.classList.contains("wide")) continue;
    box.classList.toggle("wide", wide);
    if (wide) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

// A button that opens a box says which.
function nameToggles() {
  for (const button of document.querySelectorAll("button.toggle-button")) {
    const title = button.closest(".admonition-title");
    if (title) button.setAttribute("aria-label", `Show or hide: ${title.textContent.trim()}`);
  }
}

// An excerpt in the results of a search is taken from the text of the page, and shows symbols instead of TeX.
function cleanExcerpts() {
  if (typeof Search === "undefined") return;
  const plain = (tex) => tex.replace(/\\(?:mathcal|mathbb|operatorname|text|bar|hat|tilde)\b/g, "").replace(/[\\{}]/g, "");
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    const article = page.querySelector("article.bd-article");
    if (!article) return "";
    article.querySelectorAll(".headerlink, script, style").forEach((element) => element.remove());
    article.querySelectorAll(".math").forEach((formula) => {
      formula.textContent = plain(formula.textContent.replace(/^\s*\\[(\[]|\\[)\]]\s*$/g, ""));
    });
    const part = anchor ? article.querySelector(anchor) : null;
    return (part || article).textContent;
  };
}

cleanExcerpts();
window.addEventListener("load", async () => {
  nameToggles();
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    requestAnimationFrame(markWide);
  }).observe(document.querySelector("article"));
  document.addEventListener("toggle", markWide, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest(".admonition-title")) setTimeout(markWide, 0);
  });
});
