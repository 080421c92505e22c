// A new queue: the rows of its questions, and what the service says about them.
import { Refusal, call } from "./calls.js";

const form = document.getElementById("new-queue");
const rows = document.getElementById("questions");
const refused = document.getElementById("refused");

// What most teams ask first; everything can be changed.
const USUAL = [
  { title: "Is the answer right?", name: "verdict", kind: "choice", options: "right, partly right, wrong", required: true },
  { title: "The right answer", name: "right_answer", kind: "correction" },
  { title: "Use as a golden case?", name: "golden", kind: "golden" },
  { title: "Note", name: "note", kind: "text" },
];

const part = (row, name) => row.querySelector(`[data-part=${name}]`);

function add(question = { title: "", name: "", kind: "choice", options: "" }) {
  const row = document.getElementById("question").content.firstElementChild.cloneNode(true);
  for (const name of ["title", "name", "kind", "options"]) part(row, name).value = question[name] ?? "";
  part(row, "required").checked = question.required ?? false;
  const kind = part(row, "kind");
  const show = () => {
    row.querySelector("[data-options]").hidden = !["choice", "score"].includes(kind.value);
    row.querySelector("[data-meaning]").textContent = kind.selectedOptions[0].title;
  };
  kind.addEventListener("change", show);
  row.querySelector("[data-act=remove]").addEventListener("click", () => row.remove());
  show();
  rows.append(row);
  return row;
}

function rubric() {
  return [...rows.children].map((row) => {
    const kind = part(row, "kind").value;
    const options = ["choice", "score"].includes(kind) ? part(row, "options").value.split(",") : [];
    return {
      name: part(row, "name").value.trim(),
      kind,
      title: part(row, "title").value.trim(),
      options: options.map((option) => option.trim()).filter(Boolean),
      required: part(row, "required").checked,
    };
  });
}

/** `field` is a path such as rubric[1].options. */
function mark(field) {
  for (const wrong of form.querySelectorAll(".wrong")) wrong.classList.remove("wrong");
  const [, index, name] = /^rubric\[(\d+)\](?:\.(\w+))?/.exec(field) ?? [];
  const place = index === undefined ? form.querySelector(`[data-field="${field}"]`) : part(rows.children[index], name ?? "title")?.closest(".field");
  place?.classList.add("wrong");
  place?.querySelector("input, textarea")?.focus();
}

document.getElementById("add").addEventListener("click", () => part(add(), "title").focus());
let busy = false;
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return;
  busy = true;
  refused.hidden = true;
  const field = (name) => form.elements[name];
  try {
    const { queue_id } = await call("create", {
      name: field("name").value.trim(),
      description: field("description").value.trim(),
      overlap: field("overlap").valueAsNumber,
      blind: field("blind").checked,
      lease_minutes: field("lease_minutes").valueAsNumber,
      control_percent: field("control_percent").valueAsNumber,
      window_days: field("window_days").valueAsNumber,
      rubric: rubric(),
    });
    location.assign(`/review/${queue_id}/rules`);
  } catch (error) {
    refused.hidden = false;
    refused.textContent = error instanceof Refusal ? error.text : "The service cannot be reached. Try again.";
    if (error.field) mark(error.field);
    busy = false;
  }
});

USUAL.forEach(add);
document.getElementById("name").focus();
