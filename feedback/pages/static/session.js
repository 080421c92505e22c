// Signing out removes what this browser still keeps for the person; say so when something would be lost.
import { Store } from "./store.js";

const form = document.getElementById("sign-out");
form.addEventListener("submit", (event) => {
  const store = new Store(form.dataset.person);
  const { drafts, answers } = store.unsent;
  const kept = [drafts && `${drafts} draft(s)`, answers && `${answers} unsent answer(s)`].filter(Boolean).join(" and ");
  if (kept && !confirm(`This browser keeps ${kept}. Signing out removes them.`)) event.preventDefault();
  else store.clear();
});
