// Ask, show what was found, and take a better answer. Thumbs are the feedback element's own business.
import { Refusal, SignedOut, newId, post } from "./calls.js";

const $ = (id) => document.getElementById(id);
const form = $("ask");
const SEARCH_PATIENCE = 70_000; // the first search of a process loads its model

function said(error) {
  if (error instanceof SignedOut) return "You are signed out: reload the page to sign in again.";
  return error instanceof Refusal ? error.text : "The service cannot be reached. Try again.";
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  if (button.disabled) return;
  button.disabled = true;
  $("status").className = "muted";
  $("status").textContent = "Searching…";
  try {
    const { html } = await post("/ask/api/ask", { question: $("question").value }, { patience: SEARCH_PATIENCE });
    // From the service's template, which escapes what documents hold.
    $("found").innerHTML = html;
    $("status").textContent = "";
    $("better").addEventListener("submit", better);
  } catch (error) {
    $("found").replaceChildren();
    $("status").className = "notice warn";
    $("status").textContent = said(error);
  } finally {
    button.disabled = false;
  }
});

/** What every id must end in that a token's bearer uses. */
const nodeOf = (token) => JSON.parse(atob(token.slice(4).split(".")[0].replaceAll("-", "+").replaceAll("_", "/"))).node;

async function better(event) {
  event.preventDefault();
  const box = event.currentTarget;
  const button = box.querySelector("button");
  const correction = $("better-text").value;
  if (button.disabled || !correction.trim()) return;
  button.disabled = true;
  const { token } = box.dataset;
  const event_id = newId(nodeOf(token));
  // Whoever thinks again revises what they said.
  box.dataset.feedback ??= event_id;
  const revision = Number(box.dataset.revision ?? 0) + 1;
  const statement = { kind: "correction", op: revision > 1 ? "revise" : "create", event_id, revision, correction };
  try {
    await post("/v1/feedback", { ...statement, feedback_id: box.dataset.feedback }, { token });
    box.dataset.revision = revision;
    button.textContent = "Change it";
    $("saved").textContent = "Saved. Thank you.";
  } catch (error) {
    $("saved").textContent = error instanceof SignedOut ? "This answer is too old: ask again." : said(error);
  } finally {
    button.disabled = false;
  }
}
