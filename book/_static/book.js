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
