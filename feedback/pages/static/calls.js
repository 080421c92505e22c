// Asking the service: JSON there and back, and three ways to fail that each need another reaction.

/** The service said no; `field` names the question or setting it is about, if any. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error.message);
    Object.assign(this, { status, code: error.code, field: error.field, remedy: error.remedy });
  }

  get text() {
    const text = [this.message, this.remedy].filter(Boolean).map((part) => part.replace(/\.$/, "")).join(". ");
    return `${text[0].toUpperCase()}${text.slice(1)}.`;
  }
}

/** Nothing is known of what became of the request; asking again is safe. */
export class Offline extends Error {}

/** The session has ended; the person must sign in again. */
export class SignedOut extends Error {}

/** A UUIDv7, ending in `node` if given. crypto.randomUUID makes none, and nothing at all on a plain http address. */
export function newId(node) {
  const [a, b, ...rest] = crypto.getRandomValues(new Uint16Array(5));
  const hex = (value, length) => value.toString(16).padStart(length, "0");
  const time = hex(Date.now(), 12);
  const end = node ?? rest.map((part) => hex(part, 4)).join("");
  return `${time.slice(0, 8)}-${time.slice(8)}-7${hex(a & 0xfff, 3)}-${hex(0x8000 | (b & 0x3fff), 4)}-${end}`;
}

const PATIENCE = 20_000;

/** What the review page asks for. */
export const call = (name, body) => post(`/review/api/${name}`, body);

/** Send JSON and get JSON, in the name of who is signed in or of a token. Raises Refusal, Offline or SignedOut. */
export async function post(path, body, { patience = PATIENCE, token } = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(patience),
    });
  } catch (error) {
    throw new Offline(error.message);
  }
  if (answer.status >= 500 || answer.status === 429) throw new Offline(`answered with ${answer.status}`);
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401) throw new SignedOut();
  if (!answer.ok) throw new Refusal(answer.status, content.error ?? { message: `Answered with ${answer.status}` });
  return content;
}
