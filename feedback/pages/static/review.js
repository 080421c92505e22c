// The review page: one item at a time, by keyboard, with nothing lost when a lease or the connection is.
import { Offline, Refusal, SignedOut, call, newId } from "./calls.js";
import { showDifference } from "./diff.js";
import { Store } from "./store.js";

const $ = (id) => document.getElementById(id);
const page = $("review");
const queue = page.dataset.queue;
const lease = Number(page.dataset.leaseSeconds) * 1000;
const store = new Store(page.dataset.person);

const DIFFERENCE_DELAY = 80;
const DRAFT_DELAY = 250;
const PREVIEW_DELAY = 400;
const RETRY_DELAY = 5_000;
const SOON = 60_000;

// phase: loading (between items), working, sending, or why there is nothing to work on: empty, lost, offline, signed-out.
let phase = "loading";
let item = null; // what the service said of the item in hand: lease, title, output
let ends = 0; // when its lease ends, by this clock
let kept = 0; // when it was last extended
let active = 0; // the question the keys act on
let view = "inline"; // how the difference is shown: inline, beside, or off
let counts = { done: 0, total: 0 };
let moved = false; // whether the person did anything since the lease was extended
let past = null; // the item of the rail that is looked at instead of the one in hand
const items = store.items(queue);
// What this tab does not remember, the service does: the last ones that this person answered.
items.unshift(...JSON.parse(page.dataset.answered).filter(({ id }) => !items.some((one) => one.id === id)));

const later = (delay, act) => {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, delay);
  };
};

// --- what is shown ---------------------------------------------------------------------------------------------

function setPhase(next) {
  phase = next;
  page.dataset.phase = next;
  for (const act of ["submit", "skip", "flag"])
    page.querySelector(`.side [data-act=${act}]`).disabled = next !== "working" || past !== null;
}

function toast(text) {
  $("toast").textContent = text;
  forgetToast();
}
const forgetToast = later(4_000, () => ($("toast").textContent = ""));

/** Say something above the item; `buttons` are [label, act] pairs. */
function notify(kind, text, ...buttons) {
  const box = document.createElement("div");
  box.className = `notice ${kind}`;
  box.append(text);
  for (const [label, act] of buttons) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", act);
    box.append(" ", button);
  }
  $("notice").replaceChildren(box);
}

function mark(id, state, title) {
  let one = items.find((known) => known.id === id);
  if (!one) items.push((one = { id, title }));
  one.state = state;
  store.keepItems(queue, items);
  drawRail();
}

const STATES = {
  current: "in hand", done: "answered", skipped: "skipped", waiting: "waits for the connection", lost: "lease lost, draft kept",
};

function drawRail() {
  $("items").replaceChildren(
    ...items.map((one) => {
      const row = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.state = one.state;
      button.title = `${one.title} (${STATES[one.state]})`;
      if (one.id === (past ?? item?.lease.item_id)) button.setAttribute("aria-current", "true");
      const dot = document.createElement("span");
      dot.className = "dot";
      const title = document.createElement("span");
      title.className = "title";
      title.textContent = one.title;
      const said = document.createElement("span");
      said.className = "only-read";
      said.textContent = STATES[one.state];
      button.append(dot, title, said);
      button.addEventListener("click", () => look(one.id));
      row.append(button);
      return row;
    }),
  );
  $("items").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  $("count").textContent = `${counts.done} / ${counts.total}`;
  $("progress").max = Math.max(1, counts.total);
  $("progress").value = counts.done;
  const waiting = store.outbox().length;
  $("outbox").hidden = waiting === 0;
  $("outbox").textContent = `${waiting} ${waiting === 1 ? "answer waits" : "answers wait"} in this browser for the connection.`;
}

async function refreshCounts() {
  try {
    counts = await call("progress", { queue_id: queue });
    const link = $("adjudicate");
    link.hidden = !counts.to_adjudicate;
    link.textContent = `Adjudicate ${counts.to_adjudicate}`;
    drawRail();
  } catch (error) {
    if (error instanceof SignedOut) signedOut();
  }
}

// --- taking an item up -----------------------------------------------------------------------------------------

/** Claim once more if the item vanished while it was handed out: it was erased. */
async function claim() {
  const ask = async () => (await call("claim", { queue_id: queue })).item;
  try {
    return await ask();
  } catch (error) {
    if (error instanceof Refusal && error.code === "lost_lease") return ask();
    throw error;
  }
}

async function next() {
  const before = phase === "lost" ? item : null;
  setPhase("loading");
  leavePast();
  let found;
  try {
    found = await claim();
  } catch (error) {
    item = null;
    clear();
    return failed(error, () => {
      setPhase("offline");
      notify("warn", "The service cannot be reached. What you answered is kept in this browser and sent as soon as it can be.", ["Try again", next]);
      comeBack();
    });
  }
  $("notice").replaceChildren();
  item = found;
  if (!item) {
    clear();
    setPhase("empty");
    notify("good", "Nothing waits for you in this queue.", ["Look again", next]);
    drawRail();
    return;
  }
  const restored = show();
  if (before && before.lease.item_id !== item.lease.item_id)
    notify("warn", `Somebody else has “${before.title}” now. Your draft of it is kept: choose it on the left.`);
  else if (before) toast("You have it again");
  else if (restored) toast("Your draft is back");
}

function clear() {
  $("item").replaceChildren();
  $("answers").replaceChildren();
  $("preview-box").hidden = true;
  $("lease").textContent = "";
}

/** Put the item in hand on the page, with its draft. Returns whether there was one. */
function show() {
  holdFor(item.seconds_left);
  // Both come from the service's templates, which escape whatever others wrote.
  $("item").innerHTML = item.centre;
  $("answers").innerHTML = item.questions;
  $("centre").scrollTop = 0;
  $("toast").textContent = "";
  $("preview").replaceChildren();
  const draft = store.draft(item.lease.item_id);
  if (draft) fill(draft);
  for (const one of items) if (one.state === "current") one.state = store.draft(one.id) ? "lost" : "skipped";
  mark(item.lease.item_id, "current", item.title);
  setPhase("working");
  setActive(0);
  answered();
  drawDifference();
  refreshPreview();
  $("centre").focus({ preventScroll: true });
  return draft !== null;
}

function holdFor(seconds) {
  kept = Date.now();
  ends = kept + seconds * 1000;
  moved = false;
  drawLease();
}

function fill(draft) {
  for (const question of questions()) {
    const answer = draft[question.dataset.name];
    if (answer === undefined) continue;
    if (question.dataset.kind === "correction") openCorrection(answer);
    else if (question.dataset.kind === "golden") question.querySelector("input").checked = answer === true;
    else if (radios(question).length) radios(question).forEach((one) => (one.checked = one.value === answer));
    else question.querySelector("input, textarea").value = answer;
  }
}

// --- answering -------------------------------------------------------------------------------------------------

const questions = () => [...$("answers").querySelectorAll(".question")];
const radios = (question) => [...question.querySelectorAll("input[type=radio]")];

function answerTo(question) {
  switch (question.dataset.kind) {
    case "correction":
      return $("correction").hidden ? undefined : $("correction-text").value;
    case "golden":
      return question.querySelector("input").checked || undefined;
    default: {
      if (radios(question).length) return radios(question).find((one) => one.checked)?.value;
      const field = question.querySelector("input, textarea");
      if (field.type === "number") return field.value === "" ? undefined : field.valueAsNumber;
      return field.value.trim() ? field.value : undefined;
    }
  }
}

function answers() {
  const given = {};
  for (const question of questions()) {
    const answer = answerTo(question);
    if (answer !== undefined && !Number.isNaN(answer)) given[question.dataset.name] = answer;
  }
  return given;
}

/** Fill the dots of what has an answer. */
function answered() {
  for (const question of questions()) {
    const answer = answerTo(question);
    question.toggleAttribute("data-answered", answer !== undefined && !Number.isNaN(answer) && answer !== item.output);
  }
}

function changed() {
  if (phase !== "working" && phase !== "lost") return;
  answered();
  redrawDifference();
  keepDraft();
  refreshPreview();
}

function saveDraft() {
  if (!item || (phase !== "working" && phase !== "lost")) return true;
  const given = answers();
  if (Object.keys(given).length) return store.keepDraft(item.lease.item_id, given);
  store.dropDraft(item.lease.item_id);
  return true;
}
const keepDraft = later(DRAFT_DELAY, () => {
  if (!saveDraft()) notify("warn", "This browser keeps nothing: a draft is lost when the page is closed.");
});

function setActive(index) {
  const all = questions();
  if (!all.length) return;
  active = Math.max(0, Math.min(index, all.length - 1));
  all.forEach((question, at) => question.toggleAttribute("data-active", at === active));
  all[active].scrollIntoView({ block: "nearest" });
}

function choose(number) {
  const question = questions()[active];
  const option = question && radios(question)[number - 1];
  if (!option) return;
  const first = answerTo(question) === undefined;
  option.checked = true;
  refuse(question, "");
  changed();
  // Going on after the first choice saves a key; after a change of mind it would be in the way.
  if (first) setActive(active + 1);
}

function edit() {
  const question = questions()[active];
  if (!question) return;
  const field = question.querySelector("textarea, input[type=number]");
  if (question.dataset.kind === "correction") openCorrection();
  else if (question.dataset.kind === "golden") question.querySelector("input").click();
  else (field ?? question.querySelector("input")).focus();
}

function activate(kind) {
  const at = questions().findIndex((question) => question.dataset.kind === kind);
  if (at < 0) return toast(`This queue asks for no ${{ text: "note", correction: "correction" }[kind]}`);
  setActive(at);
  edit();
}

function openCorrection(text) {
  const box = $("correction");
  if (box.hidden) {
    box.hidden = false;
    $("correction-text").value = text ?? item.output;
  }
  if (text === undefined) {
    $("correction-text").focus();
    box.scrollIntoView({ block: "nearest" });
    changed();
  }
}

function dropCorrection() {
  $("correction").hidden = true;
  refuse(questionNamed($("correction").dataset.question), "");
  changed();
  $("centre").focus({ preventScroll: true });
}

function drawDifference() {
  const box = $("difference");
  if (!box) return;
  const text = $("correction-text").value;
  const state = $("answers").querySelector("[data-kind=correction] [data-state]");
  const open = !$("correction").hidden;
  state.textContent = open && text === item.output ? "unchanged so far" : "";
  box.hidden = !open || view === "off" || text === item.output;
  if (!open || text === item.output) return;
  const size = showDifference($("difference-body"), item.output, text, view === "beside");
  $("difference-size").textContent = size;
  state.textContent = size;
  for (const button of box.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === view));
}

const redrawDifference = later(DIFFERENCE_DELAY, drawDifference);

function turnDifference() {
  if (!$("correction") || $("correction").hidden) return toast("There is no correction to compare yet");
  view = { inline: "beside", beside: "off", off: "inline" }[view];
  drawDifference();
}

const questionNamed = (name) => questions().find((question) => question.dataset.name === name);

function refuse(question, text) {
  const line = question?.querySelector(".refused");
  if (!line) return;
  line.hidden = !text;
  line.textContent = text;
}

// --- what it would create --------------------------------------------------------------------------------------

let asked = 0;
const refreshPreview = later(PREVIEW_DELAY, async () => {
  if (phase !== "working") return;
  const mine = (asked += 1);
  const { item_id } = item.lease;
  // An answer may come when it is out of date: something else was typed, or the next item is in hand.
  const current = () => mine === asked && phase === "working" && item.lease.item_id === item_id;
  try {
    const { html } = await call("preview", { lease: item.lease, answers: answers() });
    if (!current()) return;
    $("preview-box").hidden = !html.trim();
    $("preview").innerHTML = html;
  } catch (error) {
    if (!current()) return;
    if (error instanceof Refusal && error.code === "lost_lease") lost();
    else $("preview-box").hidden = true;
  }
});

// --- handing in ------------------------------------------------------------------------------------------------

/** The first answer that cannot be sent, as [question, why]; the service checks all of it again. */
function unfit() {
  for (const question of questions()) {
    const answer = answerTo(question);
    const number = question.querySelector("input[type=number]");
    if (number && !number.validity.valid) return [question, "Give a number from 0 to 1."];
    if (answer === undefined && question.hasAttribute("data-required")) return [question, "This question needs an answer."];
    if (question.dataset.kind === "correction" && answer === item.output)
      return [question, "This is the answer unchanged. Change it, or discard the correction."];
  }
  return null;
}

async function submit() {
  if (phase !== "working" || past !== null) return;
  questions().forEach((question) => refuse(question, ""));
  const wrong = unfit();
  if (wrong) return refused(...wrong);
  const work = { queue, lease: item.lease, title: item.title, answers: answers() };
  saveDraft();
  setPhase("sending");
  try {
    await call("submit", { lease: work.lease, answers: work.answers });
    finished(work);
  } catch (error) {
    if (error instanceof Refusal && error.code === "refused") {
      setPhase("working");
      return refused(questionNamed(error.field), error.text);
    }
    if (!(error instanceof Offline)) return failed(error);
    if (!store.enqueue(work)) {
      setPhase("working");
      return notify("bad", "The service cannot be reached and this browser keeps nothing: stay on this page and submit again.");
    }
    mark(work.lease.item_id, "waiting", work.title);
    comeBack();
  }
  await next();
}

function refused(question, text) {
  if (!question) return notify("bad", text);
  setActive(questions().indexOf(question));
  refuse(question, text);
}

function finished({ lease: { item_id }, title }) {
  store.dropDraft(item_id);
  counts.done += 1;
  mark(item_id, "done", title);
}

/** What every request may run into. `offline` says what to do when nothing is known of its outcome. */
function failed(error, offline = () => setPhase("working")) {
  if (error instanceof SignedOut) return signedOut();
  if (error instanceof Refusal && error.code === "lost_lease") return lost();
  if (error instanceof Offline) return offline();
  if (item) setPhase("working");
  notify("bad", error instanceof Refusal ? error.text : String(error));
}

function lost() {
  saveDraft();
  if (!item) {
    setPhase("empty");
    return notify("warn", "The item was gone before you had it.", ["Look again", next]);
  }
  setPhase("lost");
  mark(item.lease.item_id, "lost", item.title);
  $("lease").textContent = "no lease";
  notify("warn", "Your time for this item has ended, and others may take it. Your draft is kept.", ["Take it up again", next]);
}

function signedOut() {
  saveDraft();
  setPhase("signed-out");
  notify("bad", "You are signed out. Your drafts and unsent answers stay in this browser.", [
    "Sign in again",
    () => location.assign(`/login?next=${encodeURIComponent(location.pathname)}`),
  ]);
}

// --- coming back after the connection was gone -------------------------------------------------------------------

let sending = false;
async function sendOutbox() {
  if (sending) return;
  sending = true;
  let refusal = "";
  try {
    for (const work of store.outbox()) {
      const { item_id } = work.lease;
      try {
        await call("submit", { lease: work.lease, answers: work.answers });
        store.dequeue(item_id);
        if (work.queue === queue) finished(work);
        else store.dropDraft(item_id);
      } catch (error) {
        if (error instanceof SignedOut) return signedOut();
        if (!(error instanceof Refusal)) return comeBack();
        store.keepDraft(item_id, work.answers);
        store.dequeue(item_id);
        if (work.queue === queue) mark(item_id, "lost", work.title);
        refusal = `“${work.title}” was not taken: ${error.text} Your draft of it is kept.`;
      }
    }
  } finally {
    sending = false;
    drawRail();
  }
  if (phase === "offline") await next();
  if (refusal) notify("warn", refusal);
}
const comeBack = later(RETRY_DELAY, sendOutbox);

// --- the lease -------------------------------------------------------------------------------------------------

function drawLease() {
  const left = Math.max(0, ends - Date.now());
  const seconds = Math.ceil(left / 1000);
  $("lease").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} left`;
  $("lease").classList.toggle("soon", left < Math.min(SOON, lease / 3));
}

let asking = 0; // when a longer lease was asked for; while there is no connection, not every second
async function tick() {
  if (phase !== "working") return;
  drawLease();
  const over = Date.now() >= ends;
  const due = moved && Date.now() - kept > Math.min(SOON, lease / 3);
  if (Date.now() - asking < RETRY_DELAY || !(over || due)) return;
  asking = Date.now();
  const held = item.lease;
  try {
    const longer = await call("extend", { lease: held });
    if (item?.lease === held) {
      item.lease = longer.lease;
      holdFor(longer.seconds_left);
    }
  } catch (error) {
    // Without a connection the answers go to the outbox, and the service decides when it is back.
    if (item?.lease === held && phase === "working" && !(error instanceof Offline)) failed(error);
  }
}

// --- looking at other items ------------------------------------------------------------------------------------

async function look(id) {
  if (phase === "loading" || phase === "sending") return;
  if (!items.some((one) => one.id === id)) return;
  if (id === item?.lease.item_id) return leavePast();
  const one = items.find((known) => known.id === id);
  let html;
  if (one.state === "lost" || one.state === "waiting") {
    const given = store.draft(id) ?? store.outbox().find((work) => work.lease.item_id === id)?.answers ?? {};
    html = document.createElement("div");
    const text = document.createElement("pre");
    text.textContent = Object.entries(given).map(([name, answer]) => `${name}: ${answer}`).join("\n\n") || "No draft is kept.";
    const heading = document.createElement("h2");
    heading.textContent = `${one.title}: ${STATES[one.state]}`;
    html.append(heading, text);
  } else {
    try {
      html = (await call("reviewed", { item_id: id })).html;
    } catch (error) {
      if (error instanceof SignedOut) return signedOut();
      return toast(one.state === "skipped" ? "You skipped this item" : error.text ?? "It cannot be shown now");
    }
  }
  past = id;
  if (typeof html === "string") $("past").innerHTML = html;
  else $("past").replaceChildren(html);
  $("past").hidden = false;
  $("item").hidden = true;
  page.dataset.past = "";
  setPhase(phase);
  $("centre").scrollTop = 0;
  drawRail();
}

function leavePast() {
  if (past === null) return;
  past = null;
  $("past").hidden = true;
  $("past").replaceChildren();
  $("item").hidden = false;
  delete page.dataset.past;
  setPhase(phase);
  drawRail();
}

function step(by) {
  const at = items.findIndex((one) => one.id === (past ?? item?.lease.item_id));
  const target = items[(at < 0 ? items.length : at) + by];
  if (target) look(target.id);
}

// --- dialogs ---------------------------------------------------------------------------------------------------

function open(name) {
  const dialog = $(`${name}-dialog`);
  dialog.querySelector("form").reset();
  const refusal = dialog.querySelector(".refused");
  if (refusal) refusal.hidden = true;
  dialog.showModal();
}

/** What a dialog's form does: `act` gets its fields, and the dialog stays open when it is refused. */
function onSend(name, act) {
  const dialog = $(`${name}-dialog`);
  const form = dialog.querySelector("form");
  let busy = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = true;
    try {
      await act(Object.fromEntries(new FormData(form)));
      dialog.close();
    } catch (error) {
      const refusal = dialog.querySelector(".refused");
      if (error instanceof SignedOut || (error instanceof Refusal && error.code === "lost_lease")) {
        dialog.close();
        failed(error);
      } else {
        refusal.hidden = false;
        refusal.textContent = error instanceof Refusal ? error.text : "The service cannot be reached. Try again.";
      }
    } finally {
      busy = false;
    }
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

onSend("skip", async ({ reason, mode }) => {
  await call("skip", { lease: item.lease, reason, mode });
  store.dropDraft(item.lease.item_id);
  mark(item.lease.item_id, "skipped", item.title);
  if (mode === "cannot_judge") counts.done += 1;
  setPhase("loading");
  queueMicrotask(next);
});

let flagId; // one per opening of the dialog: a flag whose reply got lost is pressed again and counts once
onSend("flag", async ({ label, note }) => {
  await call("flag", { lease: item.lease, event_id: flagId, label, note });
  toast("Flagged");
});

// --- keys and clicks -------------------------------------------------------------------------------------------

const ACTS = {
  submit,
  skip: () => phase === "working" && past === null && open("skip"),
  flag: () => {
    if (phase !== "working" || past !== null) return;
    flagId = newId();
    open("flag");
  },
  help: () => open("help"),
  correct: () => activate("correction"),
  reset: () => {
    $("correction-text").value = item.output;
    changed();
  },
  drop: dropCorrection,
  close: (button) => button.closest("dialog").close(),
};

const KEYS = {
  ArrowRight: ACTS.skip,
  ArrowLeft: () => step(-1),
  k: () => step(-1),
  j: () => step(1),
  ArrowUp: () => setActive(active - 1),
  ArrowDown: () => setActive(active + 1),
  Enter: edit,
  e: () => activate("correction"),
  n: () => activate("text"),
  d: turnDifference,
  f: ACTS.flag,
};

const typing = (target) => target.matches("textarea, select, input:not([type=checkbox]):not([type=radio])");
// Here a key already means something: Enter presses a button, arrows move between a question's options.
const claimed = (target, key) =>
  (key === "Enter" && target.matches("button, a, summary, input")) || (key.startsWith("Arrow") && target.matches("input"));

document.addEventListener("keydown", (event) => {
  moved = true;
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  let act = null;
  if (command && event.key === "Enter") act = submit;
  else if (command && event.key.toLowerCase() === "s")
    act = () => toast(saveDraft() ? "Draft kept in this browser" : "This browser keeps no drafts");
  else if (command || event.altKey) return;
  else if (event.key === "Escape")
    act = () => {
      document.activeElement.blur();
      leavePast();
      $("centre").focus({ preventScroll: true });
    };
  else if (typing(event.target) || claimed(event.target, event.key)) return;
  else if (event.key === "?") act = ACTS.help;
  else if (phase === "loading" || phase === "sending") return;
  else if (event.key.length === 1 && event.key >= "1" && event.key <= "9") act = () => past === null && choose(Number(event.key));
  else if (past !== null && !["ArrowLeft", "j", "k"].includes(event.key)) return;
  else act = KEYS[event.key] ?? null;
  if (!act) return;
  event.preventDefault();
  act();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) return ACTS[button.dataset.act](button);
  const wanted = event.target.closest("[data-view]");
  if (wanted) {
    view = wanted.dataset.view;
    drawDifference();
  }
});

$("answers").addEventListener("submit", (event) => event.preventDefault());
$("answers").addEventListener("focusin", (event) => setActive(questions().indexOf(event.target.closest(".question"))));
// A mouse leaves the keys to the page; the keyboard's own way through the options stays as it is.
$("answers").addEventListener("click", (event) => event.detail > 0 && event.target.matches("input[type=radio]") && event.target.blur());
$("answers").addEventListener("input", (event) => {
  refuse(event.target.closest(".question"), "");
  changed();
});
$("centre").addEventListener("input", () => {
  refuse(questionNamed($("correction").dataset.question), "");
  changed();
});
for (const kind of ["pointerdown", "wheel", "input"]) document.addEventListener(kind, () => (moved = true), { passive: true });

addEventListener("online", sendOutbox);
addEventListener("pagehide", saveDraft);
setInterval(tick, 1_000);
setInterval(refreshCounts, 60_000);

drawRail();
if (store.outbox().length) await sendOutbox();
await Promise.all([refreshCounts(), next()]);
