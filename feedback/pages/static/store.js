// What this browser keeps for a person until it is sent: drafts, and answers that wait for the connection.

const PREFIX = "datamoat.";
const DRAFT_DAYS = 14;

function read(storage, key, otherwise) {
  try {
    return JSON.parse(storage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export class Store {
  constructor(person) {
    this.drafts = `${PREFIX}draft.${person}.`;
    this.waiting = `${PREFIX}outbox.${person}`;
    this.seen = `${PREFIX}items.${person}.`;
    const oldest = Date.now() - DRAFT_DAYS * 86_400_000;
    for (const key of this.#draftKeys()) if (read(localStorage, key, { at: 0 }).at < oldest) localStorage.removeItem(key);
  }

  #draftKeys() {
    try {
      return Object.keys(localStorage).filter((key) => key.startsWith(this.drafts));
    } catch {
      return [];
    }
  }

  draft(item) {
    return read(localStorage, this.drafts + item, null)?.answers ?? null;
  }

  /** False when the browser keeps nothing. */
  keepDraft(item, answers) {
    return write(localStorage, this.drafts + item, { answers, at: Date.now() });
  }

  dropDraft(item) {
    localStorage.removeItem(this.drafts + item);
  }

  outbox() {
    return read(localStorage, this.waiting, []);
  }

  enqueue(entry) {
    const others = this.outbox().filter((one) => one.lease.item_id !== entry.lease.item_id);
    return write(localStorage, this.waiting, [...others, entry]);
  }

  dequeue(item) {
    write(localStorage, this.waiting, this.outbox().filter((one) => one.lease.item_id !== item));
  }

  /** The items of this tab, as the rail shows them. */
  items(queue) {
    return read(sessionStorage, this.seen + queue, []);
  }

  keepItems(queue, items) {
    write(sessionStorage, this.seen + queue, items);
  }

  get unsent() {
    return { drafts: this.#draftKeys().length, answers: this.outbox().length };
  }

  clear() {
    for (const key of this.#draftKeys()) localStorage.removeItem(key);
    localStorage.removeItem(this.waiting);
    for (const key of Object.keys(sessionStorage)) if (key.startsWith(PREFIX)) sessionStorage.removeItem(key);
  }
}
