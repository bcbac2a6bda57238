"use strict";
(function () {
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var modes = ["auto", "light", "dark"];
  var mode = "auto";
  try { mode = localStorage.getItem("actlas-theme") || "auto"; } catch (e) { /* storage is off */ }
  if (modes.indexOf(mode) < 0) mode = "auto";
  function apply() {
    if (mode === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", mode);
    button.textContent = "Theme: " + mode;
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    mode = modes[(modes.indexOf(mode) + 1) % modes.length];
    try { localStorage.setItem("actlas-theme", mode); } catch (e) { /* storage is off */ }
    apply();
  });
  apply();

  var toc = document.querySelector(".toc");
  if (toc && window.matchMedia("(max-width: 940px)").matches) toc.open = false;
  var links = {};
  document.querySelectorAll(".toc a").forEach(function (a) { links[a.getAttribute("href").slice(1)] = a; });
  if ("IntersectionObserver" in window) {
    var seen = new Set();
    var watch = new IntersectionObserver(function (entries) {
      entries.forEach(function (e) { if (e.isIntersecting) seen.add(e.target.id); else seen.delete(e.target.id); });
      var first = Object.keys(links).find(function (id) { return seen.has(id); });
      Object.keys(links).forEach(function (id) { links[id].classList.toggle("here", id === first); });
    }, { rootMargin: "-10% 0px -60% 0px" });
    document.querySelectorAll("main > section").forEach(function (s) { watch.observe(s); });
  }

  var data = JSON.parse(document.getElementById("charts").textContent);
  if (!window.vegaEmbed) return;
  var narrow = window.matchMedia("(max-width: 620px)").matches;
  var config = data.config;
  if (narrow) config.axis = Object.assign({}, config.axis, { labelLimit: 112 });
  document.querySelectorAll("[data-chart]").forEach(function (place) {
    var spec = data.specs[Number(place.getAttribute("data-chart"))];
    if (narrow) shorten(spec);
    window.vegaEmbed(place, spec, { actions: false, renderer: "svg", config: config, tooltip: { theme: "custom" } })
      .catch(function (error) { place.textContent = "This plot could not be drawn (" + error.message + "); its numbers are below."; });
  });

  /* Long row labels leave no room for the plot on a phone: they go on two lines. */
  function shorten(node) {
    if (!node || typeof node !== "object") return;
    if (node.labelLimit) Object.assign(node, { labelLimit: 124, labelExpr: "split(datum.label, ': ')", labelLineHeight: 11, labelFontSize: 10, labelOffset: -5 });
    if (node.legend && node.legend.orient) node.legend.columns = 1;
    Object.keys(node).forEach(function (key) { if (key !== "data" && key !== "datasets") shorten(node[key]); });
  }
})();
