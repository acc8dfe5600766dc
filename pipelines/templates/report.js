"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["as the system", "light", "dark"];
  let theme = 0;

  const isDark = () => (theme === 0 ? system.matches : theme === 2);

  function colours() {
    const read = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    const [fore, dim, line] = ["--fore", "--dim", "--line"].map(read);
    const axis = { labelColor: dim, titleColor: dim, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11, titleFontSize: 12 };
    const range = isDark()
      ? ["#7cc0ff", "#ffb454", "#56d27a", "#ff8f8f", "#c9a6ff", "#6fe0d6", "#f2a6d6", "#d9d36a", "#b9a28f"]
      : ["#2566b0", "#b35c00", "#1a7f37", "#c0392b", "#7a4fc0", "#0f7f78", "#b03a86", "#7a7200", "#6b5846"];
    return {
      background: "transparent", axis, view: { stroke: "transparent" }, range: { category: range },
      legend: { labelColor: dim, titleColor: dim, labelLimit: 200, labelFontSize: 12, titleFontSize: 12 }, title: { color: fore },
    };
  }

  async function draw() {
    if (!window.vegaEmbed) return;
    const plots = [...document.querySelectorAll("script[data-for]")];
    await Promise.all(plots.map((script) => {
      const target = document.getElementById(script.dataset.for);
      const options = { actions: false, renderer: "svg", ast: true, config: colours(), tooltip: { theme: isDark() ? "dark" : "light" } };
      return window.vegaEmbed(target, JSON.parse(script.textContent), options);
    }));
    root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
  }

  function filter(form) {
    const wanted = [...form.querySelectorAll("[data-by]")].map((field) => [field.dataset.by, field.value.trim()]);
    const items = [...document.querySelectorAll(`[data-item="${form.dataset.list}"]`)];
    let shown = 0;
    for (const item of items) {
      const fits = wanted.every(([by, value]) => {
        if (!value) return true;
        if (by !== "text") return item.dataset[by] === value;
        return item.textContent.toLowerCase().includes(value.toLowerCase());
      });
      item.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${items.length}`;
  }

  for (const form of document.querySelectorAll("form.filters")) {
    form.addEventListener("input", () => filter(form));
    form.addEventListener("submit", (event) => event.preventDefault());
    filter(form); // browsers keep what was typed over a reload
  }
  const button = document.getElementById("theme");
  button.addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    button.textContent = `Theme: ${themes[theme]}`;
    if (theme) root.dataset.theme = themes[theme];
    else delete root.dataset.theme;
    draw();
  });
  system.addEventListener("change", () => theme || draw());
  draw();
})();
