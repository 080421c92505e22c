// <datamoat-feedback token="dmt_…" for="answer-1"></datamoat-feedback>: what readers say about one answer.
// Belongs here: what they see, and that it reaches the service exactly once. Does not: API keys, any other host.

const MESSAGES = {
  en: {
    rate: "Rate this answer", up: "Good answer", down: "Bad answer", correct: "Show the right answer",
    flag: "Flag this answer", why: "What was wrong?", note: "Anything to add?", answer: "The right answer",
    unchanged: "Nothing changed yet, so no answer is sent",
    sent: "This is the answer you sent", corrected: "Corrected",
    changes: "Your changes", send: "Send", close: "Not now",
    required: "Choose a reason or add a note", thanks: "Thank you", removed: "Taken back", flagged: "Flagged",
    unsent: "Not sent yet", refused: "This could not be saved", not_factual: "Not factual",
    instructions_not_followed: "Didn’t follow instructions", too_long: "Too long", unsafe: "Unsafe",
    outdated_source: "Outdated source", other: "Other",
  },
  de: {
    rate: "Antwort bewerten", up: "Gute Antwort", down: "Schlechte Antwort", correct: "Richtige Antwort zeigen",
    flag: "Antwort melden", why: "Was war falsch?", note: "Noch etwas?", answer: "Richtige Antwort",
    unchanged: "Nichts geändert, also nichts zu senden",
    sent: "Das ist Ihre gesendete Antwort", corrected: "Korrigiert",
    changes: "Änderungen", send: "Senden", close: "Nicht jetzt",
    required: "Bitte Grund oder Notiz angeben", thanks: "Danke", removed: "Zurückgenommen", flagged: "Gemeldet",
    unsent: "Noch nicht gesendet", refused: "Nicht gespeichert", not_factual: "Sachlich falsch",
    instructions_not_followed: "Anweisung nicht befolgt", too_long: "Zu lang", unsafe: "Bedenklich",
    outdated_source: "Veraltete Quelle", other: "Anderes",
  },
};
const REASONS = "not_factual,instructions_not_followed,too_long,unsafe,outdated_source,other";
const NOTE_LENGTH = 1000;
const BATCH_ITEMS = 50;
const BATCH_CHARACTERS = 20_000; // at most 60 kB: browsers send no more for a page that is gone
const KEEP_MS = 30 * 86_400_000;
const PATIENCE_MS = 1500;
const DIFF_CELLS = 1_000_000;

// ---- ids: UUIDv7s that end in the token's node, the only ones that its bearer may use ----

function uuid(ms, a, b, node) {
  const hex = (value, length) => value.toString(16).padStart(length, "0");
  return hex(ms, 12).replace(/.{8}/, "$&-") + `-7${hex(a & 0xfff, 3)}-${hex(0x8000 | (b & 0x3fff), 4)}-${node}`;
}

const newId = (node) => uuid(Date.now(), ...crypto.getRandomValues(new Uint16Array(2)), node);

// An author has one vote on one thing, whatever tabs and devices: its id follows from what is judged, its time is 0.
function itemId(node, what) {
  let hash = 2166136261;
  for (const character of JSON.stringify(what)) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return uuid(0, hash >>> 20, hash, node);
}

function claimsOf(token) {
  try {
    const body = atob(token.match(/^dmt_([^.]+)/)[1].replaceAll("-", "+").replaceAll("_", "/"));
    const claims = JSON.parse(new TextDecoder().decode(Uint8Array.from(body, (c) => c.charCodeAt(0))));
    return claims.v === 1 ? claims : undefined;
  } catch {
    return undefined;
  }
}

// ---- the spool: what is not acknowledged yet, kept across reloads in the best place there is ----

const PREFIX = "datamoat-feedback";
let opening;
async function table(mode, act) {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(PREFIX, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("unsent", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = reject;
  });
  const transaction = (await opening).transaction("unsent", mode);
  const request = act(transaction.objectStore("unsent"));
  await new Promise((resolve, reject) => Object.assign(transaction, { oncomplete: resolve, onabort: reject }));
  return request.result;
}
const SPOOLS = [
  {
    put: (entry) => table("readwrite", (store) => store.put(entry)),
    remove: (id) => table("readwrite", (store) => store.delete(id)),
    all: () => table("readonly", (store) => store.getAll()),
  },
  {
    put: async (entry) => localStorage.setItem(PREFIX + entry.id, JSON.stringify(entry)),
    remove: async (id) => localStorage.removeItem(PREFIX + id),
    all: async () =>
      Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => JSON.parse(localStorage[key])),
  },
];
const everywhere = (act, given) => Promise.all(SPOOLS.map((spool) => spool[act](given).catch(() => [])));

// ---- the outbox: in order, again until acknowledged ----

const elements = new Set();
const known = new Map(); // feedback_id -> its newest event, sent or not
const outbox = {
  waiting: new Map(), // event_id -> entry
  tokens: new Map(), // node -> its newest token
  held: new Map(), // nodes whose token was refused -> why
  failures: 0,

  async add(entry) {
    this.waiting.set(entry.id, entry);
    const kept = SPOOLS[0].put(entry).catch(() => SPOOLS[1].put(entry)).catch(() => {}); // at worst in this page
    this.flush();
    if (this.held.has(entry.node)) tell(entry.node, "datamoat-token-expired", this.held.get(entry.node));
    await kept;
  },

  async restore() {
    for (const entry of (await everywhere("all")).flat().sort((a, b) => (a.id < b.id ? -1 : 1))) {
      if (Date.now() - Date.parse(entry.event.occurred_at) > KEEP_MS) this.drop(entry, { code: "too_old" });
      else {
        if (!this.waiting.has(entry.id)) this.waiting.set(entry.id, entry);
        learn(entry.event);
      }
    }
    this.flush();
  },

  renew(node, token) {
    if (this.tokens.get(node) === token) return;
    this.tokens.set(node, token);
    this.held.delete(node);
    this.flush();
  },

  unsent(node) {
    const late = this.failures || !navigator.onLine || this.held.has(node);
    return late && [...this.waiting.values()].some((entry) => entry.node === node);
  },

  // Up to its first await this runs within its caller: what pagehide sends is under way when the page is gone.
  async flush() {
    if (this.busy) return;
    this.busy = true;
    clearTimeout(this.timer);
    const away = new Set(); // endpoints that did not answer keep nobody else waiting
    let wait = Math.min(60_000, 1000 * 2 ** this.failures) * (0.5 + Math.random() / 2);
    for (let batch; (batch = this.next(away)).length; )
      try {
        await this.send(batch);
      } catch (error) {
        away.add(batch[0].endpoint);
        wait = Math.max(wait, error.retryAfter || 0);
      }
    this.failures = away.size && this.failures + 1;
    if (away.size) this.timer = setTimeout(() => this.flush(), wait);
    this.busy = false;
    for (const element of elements) element.update();
  },

  next(away) {
    const batch = [];
    let size = 0;
    for (const entry of this.waiting.values()) {
      const { node, endpoint } = batch[0] || entry;
      if (this.held.has(entry.node) || away.has(entry.endpoint)) continue;
      if (entry.node !== node || entry.endpoint !== endpoint) continue;
      size += JSON.stringify(entry.event).length;
      if (batch.length && (size > BATCH_CHARACTERS || batch.length === BATCH_ITEMS)) break;
      batch.push(entry);
    }
    return batch;
  },

  async send(batch) {
    const { node, endpoint, token } = batch[0];
    const body = JSON.stringify(batch.map((entry) => entry.event));
    const answer = await call(endpoint, this.tokens.get(node) || token, {
      method: "POST", body, keepalive: body.length <= BATCH_CHARACTERS,
    });
    const said = await answer.json().catch(() => ({}));
    if (answer.ok && said.results) batch.forEach((entry, index) => this.drop(entry, said.results[index].error));
    else if (answer.status === 401) {
      this.held.set(node, said.error);
      tell(node, "datamoat-token-expired", said.error);
    } else if ([400, 403, 409, 413, 415, 422].includes(answer.status))
      for (const entry of batch) this.drop(entry, said.error || {});
    else throw { retryAfter: answer.headers.get("Retry-After") * 1000 };
  },

  drop(entry, error) {
    this.waiting.delete(entry.id);
    everywhere("remove", entry.id);
    if (!error) return;
    known.delete(entry.event.feedback_id);
    tell(entry.node, "datamoat-error", { ...error, event: entry.event });
  },
};

function call(url, token, options) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  return fetch(url, { ...options, headers, credentials: "omit", signal: AbortSignal.timeout(20_000) });
}

function learn(event) {
  const { revision = 0, event_id } = known.get(event.feedback_id) || {};
  if (event.revision > revision || (event.revision === revision && event.event_id > event_id))
    known.set(event.feedback_id, event);
}

function tell(node, type, detail) {
  const concerned = [...elements].filter((element) => element.node === node);
  for (const target of concerned.length ? concerned : [document]) {
    say(target, type, detail);
    if (detail?.event?.feedback_id) target.reload?.("refused");
  }
}

function say(target, type, detail) {
  target.dispatchEvent(new CustomEvent(type, { bubbles: true, composed: true, detail }));
}

addEventListener("online", () => {
  outbox.restore();
  for (const element of elements) element.reload();
});
addEventListener("pagehide", () => outbox.flush());
document.addEventListener("visibilitychange", () => (document.hidden ? outbox.flush() : outbox.restore()));

// ---- differences ----

const WORD =
  /[\p{sc=Han}\p{sc=Hira}\p{sc=Kana}\p{sc=Thai}]|[^\s\p{sc=Han}\p{sc=Hira}\p{sc=Kana}\p{sc=Thai}]+\s*|\s+/gu;

// The way from one text to another, as [-1, left out], [0, kept], [1, put in]: by words (by characters in scripts that
// do not part words), by lines where that is too much work, at last as a whole.
function diff(before, after) {
  for (const unit of [WORD, /.*\n|.+/g, /[^]+/g]) {
    const a = before.match(unit) || [];
    const b = after.match(unit) || [];
    let start = 0;
    while (start < a.length && a[start] === b[start]) start++;
    let end = 0;
    while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
    const rows = a.length - end - start;
    const columns = b.length - end - start;
    if (rows * columns > DIFF_CELLS) continue;
    // common[i][j]: how many units a and b share from their i-th and j-th changed one on.
    const common = Array.from({ length: rows + 1 }, () => new Uint16Array(columns + 1));
    for (let i = rows; i--; )
      for (let j = columns; j--; )
        common[i][j] =
          a[start + i] === b[start + j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    const pieces = [];
    const add = (sign, text) => {
      if (pieces.at(-1)?.[0] === sign) pieces.at(-1)[1] += text;
      else if (text) pieces.push([sign, text]);
    };
    add(0, a.slice(0, start).join(""));
    for (let i = 0, j = 0; i < rows || j < columns; ) {
      if (i < rows && a[start + i] === b[start + j] && j < columns) add(0, a[start + i++]), j++;
      else if (j === columns || (i < rows && common[i + 1][j] >= common[i][j + 1])) add(-1, a[start + i++]);
      else add(1, b[start + j++]);
    }
    add(0, a.slice(start + rows).join(""));
    return pieces;
  }
}

const plain = (text) => text.replace(/\s+/g, " ").trim();

// ---- what is seen ----

const THUMB = "M4 11h3v9H4zM7 11l4-7.5c1.7 0 2.7 1.4 2.3 3L12.6 10H18a2 2 0 0 1 2 2.4l-1.2 6A2 2 0 0 1 16.8 20H7";
const ICONS = {
  up: THUMB,
  down: THUMB,
  correct: "M4 20l1-4.5L16.5 4l3.5 3.5L8.5 19zM14 6.5l3.5 3.5",
  flag: "M5 21V4c4-2.5 8 2.5 13 0v9c-5 2.5-9-2.5-13 0",
};

const STYLE = new CSSStyleSheet();
STYLE.replaceSync(`
:host { display: block; font-family: var(--datamoat-font, inherit); font-size: 14px; line-height: 1.45;
  --accent: var(--datamoat-accent, light-dark(#2f5fd0, #8fb2ff));
  --surface: var(--datamoat-surface, light-dark(#fff, #1c1d21));
  --ink: var(--datamoat-ink, light-dark(#1d1e22, #ececf0));
  --muted: color-mix(in srgb, var(--ink) 64%, var(--surface));
  --line: var(--datamoat-line, color-mix(in srgb, var(--ink) 16%, transparent));
  --radius: var(--datamoat-radius, 10px); color: var(--ink) }
[hidden], :host([hidden]), .unsent:empty { display: none !important }
* { box-sizing: border-box }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 2px; margin-inline-start: -7px }
button, textarea { font: inherit; color: inherit; border: 1px solid transparent; border-radius: var(--radius) }
button { cursor: pointer; background: none; padding: 5px 12px }
button:hover { background: color-mix(in srgb, var(--ink) 7%, transparent) }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
.row button { width: 32px; height: 32px; padding: 0; display: grid; place-items: center; color: var(--muted) }
.row button:hover { color: var(--ink) }
.row button[aria-pressed=true] { color: var(--accent) }
[aria-pressed=true] path { fill: color-mix(in srgb, var(--accent) 26%, transparent) }
svg { width: 18px; fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round }
.down svg { transform: rotate(180deg) }
.said, .unsent, label, .small { color: var(--muted) }
.unsent, label, .small { font-size: 13px }
.said, .unsent { margin-inline-start: 8px }
.unsent { padding: 0 8px; border: 1px dashed var(--line); border-radius: 99px }
.said.bad, del { color: light-dark(#b3261e, #ff9d94) }
.panel { margin-top: 8px; padding: 16px; max-width: 40rem; background: var(--surface); border: 1px solid var(--line);
  border-radius: calc(var(--radius) + 2px); box-shadow: 0 8px 24px -14px rgb(0 0 0 / .3) }
h2 { margin: 0 0 10px; font-size: 14px; font-weight: 600 }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 14px }
.chips button { padding: 4px 12px; border-color: var(--line); border-radius: 99px }
.chips [aria-pressed=true] { border-color: var(--accent); color: var(--accent);
  background: color-mix(in srgb, var(--accent) 10%, transparent) }
textarea { display: block; width: 100%; margin-top: 4px; padding: 8px 10px; min-height: 4em; max-height: 24em;
  resize: vertical; field-sizing: content; background: none; border-color: var(--line) }
textarea:focus-visible { outline-offset: -1px }
.small { margin: 4px 2px 12px; text-align: end; font-variant-numeric: tabular-nums }
.more { margin: 0 0 8px -12px; color: var(--accent) }
.diff { margin-bottom: 14px; padding: 2px 12px; max-height: 14em; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; border-inline-start: 3px solid var(--line); color: var(--muted) }
ins { color: light-dark(#1a6b37, #7ddb9a); background: color-mix(in srgb, currentColor 13%, transparent);
  text-decoration: none; border-radius: 3px }
.foot { display: flex; justify-content: flex-end; gap: 8px }
.send, .send:hover { background: var(--accent); color: var(--surface); font-weight: 600 }
.send[aria-disabled=true] { opacity: .5 }
@media (pointer: coarse) { .row button { width: 44px; height: 44px } .chips button { padding: 9px 14px } }
@media (forced-colors: active) { [aria-pressed=true] { outline: 3px double } }
`);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {}))
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const button = (attributes, ...children) => make("button", { type: "button", ...attributes }, ...children);

function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

const shown = new Set(); // nodes whose answer was seen during this page view
const reading = new Map(); // token -> when what the service holds is known

class DatamoatFeedback extends HTMLElement {
  static observedAttributes = ["token", "interaction", "name", "identifier", "reasons", "for", "lang", "messages"];
  #row = make("div", { class: "row", role: "group" });
  #said = make("span", { class: "said", role: "status" });
  #badge = make("span", { class: "unsent", role: "status" });
  #wordings = {};
  #output;
  #claims;
  #panel;
  #opener;
  #life;
  #quiet;

  constructor() {
    super();
    this.attachShadow({ mode: "open" }).append(this.#row);
    this.shadowRoot.adoptedStyleSheets = [STYLE];
  }

  connectedCallback() {
    // What was set before this module had loaded hides the accessors.
    for (const [name, value] of Object.entries(this)) if (delete this[name]) this[name] = value;
    elements.add(this);
    this.#life = new AbortController();
    const { signal } = this.#life;
    document.addEventListener("copy", () => {
      const target = this.#target();
      if (target && getSelection().containsNode(target, true)) this.signal("copied");
    }, { signal });
    document.addEventListener("click", ({ target }) => {
      const { datamoatCopy, datamoatRegenerate } = target.closest("button")?.dataset || {};
      const id = this.getAttribute("for");
      if (id && datamoatCopy === id) this.signal("copied");
      if (id && datamoatRegenerate === id) this.regenerated();
    }, { signal });
    this.#start();
  }

  disconnectedCallback() {
    elements.delete(this);
    this.#life.abort();
  }

  attributeChangedCallback(name, before, after) {
    if (name === "messages") this.#wordings = JSON.parse(after || "{}");
    if (!this.#life || before === after) return;
    if (name === "token" && this.node && claimsOf(after)?.node === this.node) {
      outbox.renew(this.node, after); // what is being written stays
      this.#read();
    } else this.#start();
  }

  /** The 12 digits in which each id of this author on this answer ends; undefined without a usable token. */
  get node() {
    return this.#claims?.node;
  }

  get token() {
    return this.getAttribute("token");
  }

  set token(token) {
    this.setAttribute("token", token);
  }

  /** The text that is judged; by default that of the element that `for` names. */
  get output() {
    return this.#output ?? this.#target()?.innerText ?? "";
  }

  set output(text) {
    this.#output = text;
    if (this.#life) this.#start();
  }

  /** Wordings that replace the built-in ones, by their names. */
  set messages(wordings) {
    this.#wordings = wordings;
    if (this.#life) this.#start();
  }

  /** What the reader did with the answer: copied, accepted, rejected, deleted, rephrased, abandoned, … */
  async signal(label, value) {
    if (this.#may("implicit")) await this.#record({ kind: "implicit", op: "create", label, value });
  }

  regenerated() {
    return this.signal("regenerated");
  }

  /** The reader made `text` of the answer. Only the share of the answer that stayed is recorded. */
  edited(text) {
    const before = this.output;
    const stayed = diff(before, text).reduce((sum, [sign, part]) => sum + (sign ? 0 : part.length), 0);
    return this.signal("edited", { retained: Math.round((1000 * stayed) / (before.length || 1)) / 1000 });
  }

  /** Show what is known now. */
  update() {
    for (const one of this.#row.querySelectorAll("[data-kind]")) {
      const state = this.#state(one.dataset.kind);
      one.setAttribute("aria-pressed", !!state && String(state.score ?? "") === (one.dataset.score ?? ""));
      if (one.className === "correct") one.title = this.#text(state ? "corrected" : "correct");
    }
    this.#badge.textContent = outbox.unsent(this.node) ? this.#text("unsent") : "";
  }

  /** Ask the service again what it holds, after saying `what` went wrong. */
  reload(what) {
    if (what) this.#say(what, true);
    reading.delete(this.token);
    if (this.#claims) this.#read();
  }

  #target() {
    const id = this.getAttribute("for");
    return id && (this.getRootNode().getElementById(id) || document.getElementById(id));
  }

  #text(name) {
    const language = this.closest("[lang]")?.lang || document.documentElement.lang || navigator.language;
    return this.#wordings[name] ?? (MESSAGES[language.slice(0, 2).toLowerCase()] || MESSAGES.en)[name];
  }

  #may(kind) {
    return this.#claims?.kinds.includes(kind);
  }

  get #endpoint() {
    const base = this.getAttribute("endpoint")?.replace(/\/?$/, "/");
    return new URL("v1/feedback", base ? new URL(base, document.baseURI) : new URL("..", import.meta.url)).href;
  }

  #start() {
    const wanted = this.getAttribute("interaction");
    this.#claims = claimsOf(this.token);
    if (this.#claims && wanted && wanted !== this.#claims.interaction_id) {
      this.#claims = undefined;
      say(this, "datamoat-error", { code: "foreign_token", message: `The token is not for interaction ${wanted}` });
    }
    this.#discard();
    this.#row.setAttribute("aria-label", this.#text("rate"));
    this.#row.replaceChildren(...this.#buttons(), make("slot"), this.#said, this.#badge);
    if (!this.#claims) return;
    outbox.renew(this.node, this.token);
    this.#watch();
    this.update();
  }

  #buttons() {
    return [
      ["up", "thumb", () => this.#vote(1), 1],
      ["down", "thumb", () => this.#vote(0), 0],
      ["correct", "correction", ({ currentTarget }) => this.#open(currentTarget, true)],
      ["flag", "flag", () => this.#flag()],
    ]
      .filter(([name, kind]) => this.#may(kind) && (name !== "correct" || this.#output != null || this.#target()))
      .map(([name, kind, click, score]) => {
        const label = this.#text(name);
        const judged = { "data-kind": kind, "data-score": score };
        return button({ class: name, "aria-label": label, title: label, click, ...judged }, icon(name));
      });
  }

  #watch() {
    const { node } = this;
    const observer = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      if (node !== this.node) return;
      this.#read();
      if (!shown.has(node)) this.signal("shown");
      shown.add(node);
    });
    observer.observe(this.#target() || this);
    this.#life.signal.addEventListener("abort", () => observer.disconnect());
  }

  // Once per page view and token, when the answer comes into sight.
  #read() {
    const { token, node } = this;
    const read = async () => {
      try {
        const about = encodeURIComponent(this.#claims.interaction_id);
        const query = `?kind=thumb&kind=correction&kind=flag&interaction_id=${about}`;
        const answer = await call(this.#endpoint + query, token);
        const said = await answer.json();
        if (answer.status === 401) tell(node, "datamoat-token-expired", said.error);
        else
          for (const item of said.feedback) {
            const ours = known.get(item.feedback_id);
            learn(item);
            // Said later than this, but before this was known: said again, so that it stands.
            if (ours?.event_id > item.event_id && ours.revision <= item.revision) {
              const { event_id, occurred_at, ...fields } = ours;
              this.#record({ ...fields, op: ours.op === "create" ? "revise" : ours.op, revision: item.revision + 1 });
            }
          }
      } catch {
        reading.delete(token); // the service is away; what is in the spool is known all the same
      }
      for (const element of elements) element.update();
    };
    // What was said before must be known before it is revised; but nobody waits long to say something.
    if (!reading.has(token))
      reading.set(token, Promise.race([read(), new Promise((resolve) => setTimeout(resolve, PATIENCE_MS))]));
    return reading.get(token);
  }

  get #what() {
    return ["name", "identifier"].map((name) => this.getAttribute(name) || undefined);
  }

  #newest(kind) {
    const feedback_id = itemId(this.node, [kind, ...this.#what]);
    return { feedback_id, ...known.get(feedback_id) };
  }

  #state(kind) {
    const newest = this.#newest(kind);
    return newest.op && newest.op !== "retract" ? newest : undefined;
  }

  // Say something anew or, without `fields`, take it back.
  #revise(kind, fields) {
    const { feedback_id, revision = 0 } = this.#newest(kind);
    const [name, identifier] = this.#what;
    const op = fields ? (revision ? "revise" : "create") : "retract";
    return this.#record({ kind, op, feedback_id, revision: revision + 1, name, identifier, ...fields });
  }

  // Kept by the browser when this resolves, and on its way to the service.
  async #record(fields) {
    const { node, token } = this;
    const id = newId(node);
    const about = { interaction_id: this.#claims.interaction_id, occurred_at: new Date().toISOString() };
    const event = { event_id: id, ...about, ...fields };
    if (event.feedback_id) learn(event);
    this.update();
    say(this, "datamoat-feedback", event);
    await outbox.add({ id, node, token, endpoint: this.#endpoint, event });
  }

  async #vote(score) {
    await this.#read();
    const again = this.#state("thumb")?.score === score;
    this.#discard();
    await this.#revise("thumb", again ? undefined : { score });
    this.#say(again ? "removed" : "thanks");
    if (!again && !score) this.#open(this.#row.querySelector(".down"));
  }

  async #flag() {
    await this.#read();
    const again = this.#state("flag");
    await this.#revise("flag", again ? undefined : { label: "flagged" });
    this.#say(again ? "removed" : "flagged");
  }

  #say(name, bad) {
    clearTimeout(this.#quiet);
    this.#said.textContent = this.#text(name);
    this.#said.classList.toggle("bad", !!bad);
    if (!bad) this.#quiet = setTimeout(() => (this.#said.textContent = ""), 5000);
  }

  async #open(opener, correcting) {
    await this.#read();
    this.#opener = opener;
    if (!this.#panel) this.shadowRoot.append((this.#panel = this.#build()));
    this.#panel.hidden = false;
    if (correcting) this.#panel.edit();
    else this.#panel.querySelector("button").focus();
  }

  #close() {
    if (!this.#panel || this.#panel.hidden) return;
    this.#panel.hidden = true;
    this.#opener.focus();
  }

  #discard() {
    this.#panel?.remove();
    this.#panel = undefined;
  }

  #build() {
    const text = (name) => this.#text(name);
    const vote = this.#state("thumb");
    const asked = vote?.score === 0;
    const original = this.output;
    const sent = this.#state("correction")?.correction;
    const before = sent ?? original;
    const chosen = new Set(vote?.reasons);

    const chips = (this.getAttribute("reasons") || REASONS).split(",").map((reason) => {
      const [code, label] = reason.trim().split("=");
      const click = ({ currentTarget }) => {
        if (!chosen.delete(code)) chosen.add(code);
        currentTarget.setAttribute("aria-pressed", chosen.has(code));
        check();
      };
      return button({ "aria-pressed": chosen.has(code), click }, label ?? text(code) ?? code.replaceAll("_", " "));
    });
    const note = make("textarea", { id: "note", maxlength: NOTE_LENGTH, input: () => check() });
    note.value = vote?.explanation || "";
    const count = make("div", { class: "small", "aria-hidden": "true" });
    const answer = make("textarea", { id: "answer", "aria-describedby": "hint", input: () => requestAnimationFrame(show) });
    answer.value = before;
    const hint = make("div", { class: "small", id: "hint" });
    const changes = make("div", { class: "diff", role: "region", "aria-label": text("changes"), tabindex: 0 });
    const editor = make("div", { hidden: "" }, make("label", { for: "answer" }, text("answer")), answer, hint, changes);
    const more = button({ class: "more", click: () => panel.edit() }, text("correct"));
    const send = button({ class: "send", click: () => submit() }, text("send"));
    const panel = make("div",
      { class: "panel", role: "dialog", "aria-labelledby": "why", keydown: (event) => this.#keys(event, send) },
      make("h2", { id: "why" }, text(asked ? "why" : "correct")),
      ...(asked
        ? [make("div", { class: "chips", role: "group", "aria-labelledby": "why" }, ...chips),
          make("label", { for: "note" }, text("note")), note, count]
        : []),
      ...(asked && this.#row.querySelector(".correct") ? [more] : []),
      editor,
      make("div", { class: "foot" }, button({ click: () => this.#close() }, text("close")), send));

    const same = (one, other) => plain(one) === plain(other);
    const corrected = () => !editor.hidden && plain(answer.value) && !same(answer.value, before);
    const missing = () => asked && this.hasAttribute("require-reason") && !chosen.size && !note.value.trim();
    const check = () => {
      count.textContent = `${note.value.length} / ${NOTE_LENGTH}`;
      send.setAttribute("aria-disabled", missing());
    };
    const show = () => {
      hint.textContent = corrected() ? "" : text(sent && same(answer.value, sent) ? "sent" : "unchanged");
      changes.hidden = !original || same(answer.value, original);
      if (!changes.hidden)
        changes.replaceChildren(...diff(original, answer.value).flatMap(([sign, part]) => {
          const words = part.trimEnd();
          if (sign) return [make(sign < 0 ? "del" : "ins", null, words), part.slice(words.length)];
          return part.length > 300 ? `${part.slice(0, 120)} … ${part.slice(-120)}` : part;
        }));
    };
    const submit = async () => {
      if (missing()) return this.#say("required", true);
      const reasons = [...chosen];
      const explanation = note.value.trim();
      const correction = corrected() && answer.value;
      const told = asked && (explanation !== (vote.explanation ?? "") || String(reasons) !== String(vote.reasons ?? ""));
      this.#close();
      this.#discard();
      if (told) await this.#revise("thumb", { score: 0, reasons, explanation: explanation || undefined });
      if (correction) await this.#revise("correction", same(correction, original) ? undefined : { correction });
      if (told || correction) this.#say("thanks");
    };
    panel.edit = () => {
      editor.hidden = false;
      more.hidden = true;
      show();
      answer.focus();
    };
    check();
    return panel;
  }

  #keys(event, send) {
    if (event.key === "Escape") {
      event.stopPropagation();
      this.#close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send.click();
    else if (event.key === "Tab") {
      const stops = [...this.#panel.querySelectorAll("button, textarea, [tabindex]")].filter((one) => one.checkVisibility());
      if (this.shadowRoot.activeElement !== stops.at(event.shiftKey ? 0 : -1)) return;
      event.preventDefault();
      stops.at(event.shiftKey ? -1 : 0).focus();
    }
  }
}

customElements.define("datamoat-feedback", DatamoatFeedback);
outbox.restore();
