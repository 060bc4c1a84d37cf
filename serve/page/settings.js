// What the user set: kept in this browser, sent with the next question. Empty: as served.

const STORE = "raytune-chat-settings";
const NUMBERS = [
  "temperature", "top_p", "max_tokens", "seed", "frequency_penalty", "presence_penalty",
];
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");

function restored() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    return kept && typeof kept === "object" ? kept : {};
  } catch {
    return {}; // no storage in a private window, or not ours
  }
}

function values() {
  return Object.fromEntries(new FormData(form));
}

function show(kept) {
  for (const field of form.elements) {
    if (field.name) field.value = typeof kept[field.name] === "string" ? kept[field.name] : "";
  }
  dress();
}

function dress() {
  const { theme } = values();
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function keep() {
  dress();
  try {
    localStorage.setItem(STORE, JSON.stringify(values()));
  } catch {
    // this session has them all the same
  }
}

export const system = () => values().system.trim();

// The fields of a request; another try at the same question takes the next seed.
export function sampling(attempt) {
  const given = values();
  const fields = {};
  for (const name of NUMBERS) {
    if (given[name] !== "") fields[name] = Number(given[name]);
  }
  if (fields.seed !== undefined) fields.seed += attempt;
  const stops = given.stop.split("\n").filter(Boolean).slice(0, 4);
  if (stops.length) fields.stop = stops;
  return fields;
}

export const isOpen = () => dialog.open;

export function open() {
  if (!dialog.open) dialog.showModal();
}

form.addEventListener("change", keep);
dialog.addEventListener("close", keep);
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
document.getElementById("reset-settings").addEventListener("click", () => { show({}); keep(); });
show(restored());
