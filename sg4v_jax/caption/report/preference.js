"use strict";
// One pair at a time; votes are kept in this browser and leave it by the download button only.
const { page, pairs } = JSON.parse(document.getElementById("pairs").textContent);
const element = (id) => document.getElementById(id);
const slot = "sg4v-preference-" + page;
const keys = {
  ArrowLeft: "left", a: "left", 1: "left",
  ArrowRight: "right", b: "right", 2: "right",
  ArrowDown: "tie", t: "tie", 3: "tie",
};
let state = { rater: "", votes: {} };
let shown = 0;

function load() {
  try {
    const saved = JSON.parse(localStorage.getItem(slot));
    if (saved && typeof saved.votes === "object" && saved.votes) state = { rater: saved.rater || "", votes: saved.votes };
  } catch (error) {
    warn();
  }
}

function save() {
  try {
    localStorage.setItem(slot, JSON.stringify(state));
  } catch (error) {
    warn();
  }
}

function warn() {
  element("warning").hidden = false;
}

function show(index) {
  shown = Math.max(0, Math.min(index, pairs.length));
  const done = shown === pairs.length;
  element("pair").hidden = done;
  element("end").hidden = !done;
  if (!done) {
    const pair = pairs[shown];
    element("image").src = pair.image;
    element("image").hidden = !pair.image;
    element("left").textContent = pair.left;
    element("right").textContent = pair.right;
  }
  const count = Object.keys(state.votes).length;
  element("progress").textContent = done ? "" : "Pair " + (shown + 1) + " of " + pairs.length;
  element("count").textContent = count + " of " + pairs.length + " judged";
  element("filled").style.width = (100 * count) / pairs.length + "%";
  for (const choice of ["left", "right", "tie"])
    element("vote-" + choice).classList.toggle("chosen", state.votes[shown] === choice);
}

function vote(choice) {
  if (shown === pairs.length) return;
  state.votes[shown] = choice;
  save();
  show(shown + 1);
}

function firstOpen() {
  const open = pairs.findIndex((pair, index) => !(index in state.votes));
  return open < 0 ? pairs.length : open;
}

function download() {
  const text = JSON.stringify({ version: 1, page, rater: state.rater, votes: state.votes }, null, 1);
  const link = document.createElement("a");
  link.href = "data:application/json;charset=utf-8," + encodeURIComponent(text + "\n");
  link.download = "votes-" + page + (state.rater ? "-" + state.rater.replace(/[^\w-]+/g, "_") : "") + ".json";
  link.click();
}

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = keys[event.key];
  if (choice) vote(choice);
  else if (event.key === "Backspace" || event.key === "u") show(shown - 1);
  else return;
  event.preventDefault();
});
for (const choice of ["left", "right", "tie"]) element("vote-" + choice).addEventListener("click", () => vote(choice));
element("back").addEventListener("click", () => show(shown - 1));
element("open").addEventListener("click", () => show(firstOpen()));
for (const button of document.querySelectorAll(".download")) button.addEventListener("click", download);
element("rater").addEventListener("input", (event) => {
  state.rater = event.target.value;
  save();
});

load();
element("rater").value = state.rater;
show(firstOpen());
