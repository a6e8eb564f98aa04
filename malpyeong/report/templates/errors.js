"use strict";
// One choice in each group of buttons; a record is shown if it fits all of them and holds every word searched for.
const list = document.getElementById("list");
const records = [...list.children];
const buttons = [...document.querySelectorAll("button[data-group]")];
const everything = document.querySelector("button[data-all]");
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const count = document.getElementById("count");
const texts = new Map();

function textOf(record) {
  if (!texts.has(record)) texts.set(record, record.textContent.toLowerCase());
  return texts.get(record);
}

function show() {
  const chosen = buttons.filter((button) => button.getAttribute("aria-pressed") === "true");
  const words = search.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const record of records) {
    const fits =
      chosen.every((button) => record.dataset[button.dataset.group] === button.dataset.value) &&
      words.every((word) => textOf(record).includes(word));
    record.hidden = !fits;
    shown += fits;
  }
  everything.setAttribute("aria-pressed", String(!chosen.length && !words.length));
  count.textContent = `${shown.toLocaleString("ko")} / ${records.length.toLocaleString("ko")}문항`;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") === "true";
    for (const other of buttons) {
      if (other.dataset.group === button.dataset.group) other.setAttribute("aria-pressed", "false");
    }
    button.setAttribute("aria-pressed", String(!pressed));
    show();
  });
}

everything.addEventListener("click", () => {
  for (const button of buttons) button.setAttribute("aria-pressed", "false");
  search.value = "";
  show();
});

let waiting;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(show, 120);
});

// Records without a reason score come last, whichever way round.
sort.addEventListener("change", () => {
  const sign = { low: 1, high: -1 }[sort.value];
  const key = (record) => (record.dataset.score === "" ? Infinity : sign * Number(record.dataset.score));
  const place = (record) => Number(record.dataset.place);
  records.sort((a, b) => {
    const [first, second] = sign ? [key(a), key(b)] : [0, 0];
    return first === second ? place(a) - place(b) : first - second;
  });
  list.append(...records);
});

show(); // a reloaded page keeps what was typed
