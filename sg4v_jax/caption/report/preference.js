"use strict";
// The form is all there is to know: it is kept in this browser, and leaves it by the download button only.
// One pair is shown at a time. Which keys choose what is said by the form's own `data-keys`.
const form = document.forms.ballot;
const pairs = [...form.querySelectorAll("fieldset")];
const element = (id) => document.getElementById(id);
const slot = "sg4v-preference-" + form.dataset.page;
let shown = 0;

function ballot() {
  const { rater, ...votes } = Object.fromEntries(new FormData(form));
  return { version: 1, page: form.dataset.page, rater, votes };
}

function keep(action) {
  try {
    action();
  } catch (error) {
    element("warning").hidden = false;
  }
}

const save = () => keep(() => localStorage.setItem(slot, JSON.stringify(ballot())));

function load() {
  const saved = JSON.parse(localStorage.getItem(slot));
  if (!saved) return;
  form.elements.rater.value = saved.rater;
  for (const [pair, choice] of Object.entries(saved.votes))
    form.querySelector(`[name="${pair}"][value="${choice}"]`).checked = true;
}

function show(index) {
  shown = Math.max(0, Math.min(index, pairs.length));
  pairs.forEach((pair, at) => (pair.hidden = at !== shown));
  const done = shown === pairs.length;
  const count = Object.keys(ballot().votes).length;
  element("end").hidden = !done;
  element("progress").textContent = done ? "" : `Pair ${shown + 1} of ${pairs.length}`;
  element("count").textContent = `${count} of ${pairs.length} judged`;
  element("filled").style.width = `${(100 * count) / pairs.length}%`;
}

function showOpen() {
  const open = pairs.findIndex((pair) => !pair.querySelector(":checked"));
  show(open < 0 ? pairs.length : open);
}

function download() {
  const { page, rater } = ballot();
  const link = document.createElement("a");
  link.href = "data:application/json;charset=utf-8," + encodeURIComponent(JSON.stringify(ballot(), null, 1) + "\n");
  link.download = `votes-${page}${rater && "-" + rater.replace(/[^\w-]+/g, "_")}.json`;
  link.click();
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", save);
form.addEventListener("click", (event) => {
  if (event.target.type !== "radio") return;
  save();
  show(shown + 1);
});
document.addEventListener("keydown", (event) => {
  if (event.target.name === "rater" || event.ctrlKey || event.metaKey || event.altKey) return;
  const place = document.querySelector("fieldset:not([hidden])") ?? form;
  const chosen = [...place.querySelectorAll("[data-keys]"), element("back")]
    .find((control) => control.dataset.keys.split(" ").includes(event.key));
  if (!chosen) return;
  chosen.click();
  event.preventDefault();
});
element("back").addEventListener("click", () => show(shown - 1));
element("open").addEventListener("click", showOpen);
element("download").addEventListener("click", download);

keep(load);
showOpen();
