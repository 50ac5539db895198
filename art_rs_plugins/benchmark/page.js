"use strict";
document.addEventListener("click", (event) => {
  const button = event.target.closest(".legend button");
  if (!button) return;
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", shown);
  const plot = button.closest("figure").querySelector(".js-plotly-plot");
  Plotly.restyle(plot, { visible: shown }, JSON.parse(button.dataset.traces));
});
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.data").forEach((table) => { table.open = true; });
});
