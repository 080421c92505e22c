// The rules of a queue: what a rule would have found, before it is saved.
import { Refusal, call } from "./calls.js";

const $ = (id) => document.getElementById(id);
const queue_id = $("rules").dataset.queue;
const form = $("new-rule");

const said = (error) => (error instanceof Refusal ? error.text : "The service cannot be reached. Try again.");

function rule() {
  const { parameter } = $("kind").selectedOptions[0].dataset;
  return {
    kind: $("kind").value,
    params: parameter ? { [parameter]: $("threshold").valueAsNumber } : {},
    sample_rate: $("share").valueAsNumber / 100,
    priority: $("priority").valueAsNumber,
  };
}

function refuse(text) {
  $("refused").hidden = !text;
  $("refused").textContent = text;
}

let asked = 0;
let timer;
let trying = Promise.resolve(); // one after the other: what is out of date by its turn is not asked at all
function dryRun() {
  clearTimeout(timer);
  const mine = (asked += 1);
  $("sentence").textContent = "…";
  if (!form.checkValidity()) return;
  timer = setTimeout(() => (trying = trying.then(() => ask(mine))), 200);
}

async function ask(mine) {
  if (mine !== asked) return;
  try {
    const { sentence } = await call("try-rule", { queue_id, rule: rule() });
    if (mine !== asked) return;
    $("sentence").textContent = sentence;
    refuse("");
  } catch (error) {
    if (mine === asked) refuse(said(error));
  }
}

function describe() {
  const { meaning, parameter, default: usual } = $("kind").selectedOptions[0].dataset;
  $("threshold-field").hidden = !parameter;
  $("threshold").required = Boolean(parameter);
  $("threshold").value = usual;
  $("threshold-label").textContent = meaning;
  dryRun();
}

/** Press, ask, and reload the page; what is refused is said. */
async function change(name, body, button) {
  button.disabled = true;
  try {
    await call(name, { queue_id, ...body });
    location.reload();
  } catch (error) {
    button.disabled = false;
    if (form) refuse(said(error));
  }
}

if (form) {
  $("kind").addEventListener("change", describe);
  form.addEventListener("input", dryRun);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change("add-rule", { rule: rule() }, event.submitter ?? form.querySelector("button"));
  });
  const dialog = $("close-dialog");
  $("close-queue").addEventListener("click", () => dialog.showModal());
  dialog.querySelector("[data-act=cancel]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.returnValue === "close" && change("close", {}, $("close-queue")));
  describe();
}

for (const button of document.querySelectorAll("[data-disable]"))
  button.addEventListener("click", () => change("stop-rule", { rule_id: button.dataset.disable }, button));

$("fill")?.addEventListener("click", async () => {
  $("fill").disabled = true;
  try {
    $("filled").textContent = (await call("fill", { queue_id })).sentence;
  } catch (error) {
    $("filled").textContent = said(error);
  }
  $("fill").disabled = false;
});
