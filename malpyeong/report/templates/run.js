"use strict";
// Under the pointer the legend shows the values of that step instead of the last ones.
for (const figure of document.querySelectorAll("figure[data-lines]")) {
  const lines = JSON.parse(figure.dataset.lines);
  const plot = figure.querySelector(".plot > svg");
  const cursor = plot.querySelector(".cursor");
  const step = figure.querySelector("[data-step]");
  const values = [...figure.querySelectorAll("[data-line]")];
  const all = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const [first, last] = [all[0], all[all.length - 1]];
  const before = [step.textContent, ...values.map((value) => value.textContent)];

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width) * (last - first);
    const nearest = all.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    step.textContent = `step ${nearest.toLocaleString("ko")}`;
    lines.forEach((line, place) => {
      const at = line.steps.indexOf(nearest);
      values[place].textContent = at < 0 ? "–" : line.shown[at];
    });
    const x = last > first ? (100 * (nearest - first)) / (last - first) : 50;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
  });
  plot.addEventListener("pointerleave", () => {
    [step.textContent] = before;
    values.forEach((value, place) => (value.textContent = before[place + 1]));
    cursor.style.visibility = "hidden";
  });
}
