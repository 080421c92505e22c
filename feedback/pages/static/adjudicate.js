// Adjudication: take one reviewer's answers, or put together an answer per question.
import { Refusal, call } from "./calls.js";

const root = document.getElementById("adjudicate");
const refused = document.getElementById("refused");
const merged = document.getElementById("merged-text");
let busy = false;

async function decide(decision) {
  if (busy) return;
  busy = true;
  refused.hidden = true;
  try {
    await call("adjudicate", { item_id: root.dataset.item, ...decision });
    location.reload();
  } catch (error) {
    busy = false;
    refused.hidden = false;
    refused.textContent = error instanceof Refusal ? error.text : "The service cannot be reached. Try again.";
  }
}

const chosen = (row) => {
  const radio = row.querySelector("input:checked");
  return radio && JSON.parse(radio.dataset.answer);
};

function merge() {
  const answers = {};
  for (const row of root.querySelectorAll("tr[data-question]")) {
    const answer = row.dataset.kind === "correction" ? merged.value : chosen(row);
    if (answer !== null && String(answer).trim()) answers[row.dataset.question] = answer;
  }
  decide({ answers });
}

if (root) {
  for (const button of root.querySelectorAll("[data-pick]")) button.addEventListener("click", () => decide({ pick: Number(button.dataset.pick) }));
  document.getElementById("merge").addEventListener("click", merge);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) merge();
  });
  const row = root.querySelector("tr[data-kind=correction]");
  // Start from the first reviewer who wrote one.
  const first = row?.querySelector('input:not([data-answer="null"])');
  if (first) {
    const follow = () => (merged.value = chosen(row) ?? "");
    row.addEventListener("change", follow);
    first.checked = true;
    follow();
  }
}
