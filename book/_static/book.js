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

// Stored figures gave their legend a fixed share of the height: it moves below the plot, and the figure grows with it.
function moveLegend(figure) {
  const entries = figure.querySelectorAll(".legend .traces").length, height = 430 + 20 * entries;
  figure.style.height = figure.parentElement.style.height = height + "px";
  window.Plotly.relayout(figure, {
    height, autosize: true, "yaxis.domain": [0, 1], "yaxis.automargin": true, "xaxis.automargin": true, "legend.maxheight": 0.6,
    "legend.y": 0, "legend.yref": "container", "legend.yanchor": "bottom",
  });
}

// Interactive figures are drawn while the page is still being laid out; they follow the width of their column.
window.addEventListener("load", function () {
  if (!window.Plotly) { return; }
  const observer = new ResizeObserver(entries => entries.forEach(entry => {
    const figure = entry.target.querySelector(".plotly-graph-div");
    if (figure && figure.querySelector(".main-svg")) { window.Plotly.Plots.resize(figure); }
  }));
  document.querySelectorAll(".grass-interactive").forEach(box => {
    const figure = box.querySelector(".plotly-graph-div");
    if (figure && figure.layout && figure.layout.yaxis.domain) { moveLegend(figure); }
    observer.observe(box);
  });
});

// A reason of the ledger that is opened has a row of its own, as wide as the table. Sorting and paging bring the rows
// anew without it, so the body of the table is watched from the first click on.
(function () {
  const watched = new WeakSet();
  function show(body) {
    body.querySelectorAll("tr.ledger-reason").forEach(row => {
      const above = row.previousElementSibling;
      if (!above || !above.querySelector("details[open]")) { row.remove(); }
    });
    body.querySelectorAll("details[open]").forEach(details => {
      const row = details.closest("tr"), next = row.nextElementSibling;
      if (next && next.className === "ledger-reason") { return; }
      const below = document.createElement("tr"), cell = below.insertCell();
      below.className = "ledger-reason";
      cell.colSpan = row.cells.length;
      cell.append(details.lastElementChild.cloneNode(true));
      row.after(below);
    });
  }
  document.addEventListener("toggle", function (event) {
    const body = event.target.closest("#dt-ledger tbody, #dt-ledger-seconds tbody");
    if (!body) { return; }
    show(body);
    if (watched.has(body)) { return; }
    watched.add(body);
    new MutationObserver(() => show(body)).observe(body, { childList: true });
  }, true);
})();
