// Tables follow the theme of the page: DataTables looks for the class "dark" on <html>.
(function () {
  const root = document.documentElement;
  function follow() {
    const dark = root.dataset.theme === "dark";
    if (root.classList.contains("dark") !== dark) { root.classList.toggle("dark", dark); }
  }
  new MutationObserver(follow).observe(root, { attributes: true, attributeFilter: ["data-theme", "class"] });
  follow();
})();

// Interactive figures are drawn while the page is still being laid out; they follow the width of their column.
window.addEventListener("load", function () {
  if (!window.Plotly) { return; }
  const observer = new ResizeObserver(entries => entries.forEach(entry => {
    const figure = entry.target.querySelector(".plotly-graph-div");
    if (figure && figure.querySelector(".main-svg")) { window.Plotly.Plots.resize(figure); }
  }));
  document.querySelectorAll(".grass-interactive").forEach(box => observer.observe(box));
});
