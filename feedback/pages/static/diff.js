// The difference of two texts, word by word: Myers' greedy algorithm, with limits beyond which it says so.

export const MAX_WORDS = 12_000;
export const MAX_EDITS = 1_500;

/** Parts [kind, text] with kind "same", "gone" or "new"; null when the texts are too long or too different. */
export function diffWords(before, after) {
  const [a, b] = [words(before), words(after)];
  if (a.length > MAX_WORDS || b.length > MAX_WORDS) return null;
  let start = 0;
  while (start < a.length && start < b.length && alike(a[start], b[start])) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && alike(a.at(-1 - end), b.at(-1 - end))) end += 1;
  const middle = shortest(a.slice(start, a.length - end), b.slice(start, b.length - end));
  if (middle === null) return null;
  return joined([
    ...a.slice(0, start).map((word, at) => same(word, b[at])),
    ...middle,
    ...a.slice(a.length - end).map((word, at) => same(word, b[b.length - end + at])),
  ]);
}

/** JSON with sorted keys and even spacing, so that only its content differs; other texts as they are. */
export function canonical(before, after) {
  try {
    return [before, after].map((text) => JSON.stringify(sorted(JSON.parse(text)), null, 2));
  } catch {
    return [before, after];
  }
}

function sorted(value) {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

// A word takes the space after it along: spaces alone would match everywhere and cut a change into crumbs. Two words
// are alike whatever spaces follow; of these the wider are shown, so that no two words run together.
function words(text) {
  return text.match(/[\p{L}\p{N}_'’-]+[^\S\n]*|\s+|[^\p{L}\p{N}_'’\s-][^\S\n]*/gu) ?? [];
}

const alike = (one, other) => one === other || (one.trimEnd() === other.trimEnd() && one.trim() !== "");

const same = (one, other) => ["same", one.length > other.length ? one : other];

function shortest(a, b) {
  const most = Math.min(a.length + b.length, MAX_EDITS);
  const reach = new Int32Array(2 * most + 3);
  const at = most + 1;
  const trail = [];
  for (let edits = 0; edits <= most; edits += 1) {
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && reach[at + k - 1] < reach[at + k + 1]);
      let x = down ? reach[at + k + 1] : reach[at + k - 1] + 1;
      while (x < a.length && x - k < b.length && alike(a[x], b[x - k])) x += 1;
      reach[at + k] = x;
      if (x >= a.length && x - k >= b.length) return walk(a, b, trail, edits);
    }
    trail.push(reach.slice(at - edits, at + edits + 1));
  }
  return null;
}

function walk(a, b, trail, edits) {
  const parts = [];
  let [x, y] = [a.length, b.length];
  for (let d = edits; d > 0; d -= 1) {
    const before = trail[d - 1];
    const middle = d - 1;
    const reached = (k) => (Math.abs(k) <= middle ? before[middle + k] : -1);
    const k = x - y;
    const down = k === -d || (k !== d && reached(k - 1) < reached(k + 1));
    const fromX = down ? reached(k + 1) : reached(k - 1);
    const fromY = fromX - (down ? k + 1 : k - 1);
    while (x > fromX + (down ? 0 : 1)) {
      x -= 1;
      y -= 1;
      parts.push(same(a[x], b[y]));
    }
    parts.push(down ? ["new", b[y - 1]] : ["gone", a[x - 1]]);
    [x, y] = [fromX, fromY];
  }
  for (; x > 0; x -= 1) parts.push(same(a[x - 1], b[x - 1]));
  return parts.reverse();
}

/** Neighbours of one kind become one part; a run of changes shows what went before what came. */
function joined(parts) {
  const result = [];
  let [gone, fresh] = ["", ""];
  const flush = () => {
    if (gone) result.push(["gone", gone]);
    if (fresh) result.push(["new", fresh]);
    [gone, fresh] = ["", ""];
  };
  for (const [kind, text] of parts) {
    if (kind === "gone") gone += text;
    else if (kind === "new") fresh += text;
    else {
      flush();
      if (result.at(-1)?.[0] === "same") result.at(-1)[1] += text;
      else result.push(["same", text]);
    }
  }
  flush();
  return result;
}

/** Show the difference in `place`, inline or as two columns. Returns what it amounts to, in words. */
export function showDifference(place, before, after, beside) {
  const parts = diffWords(...canonical(before, after));
  if (parts === null) {
    const note = document.createElement("p");
    note.className = "muted";
    note.textContent = "The texts are too long or too different to compare word by word.";
    place.replaceChildren(note);
    return "";
  }
  const column = (...kinds) => {
    const block = document.createElement("div");
    block.className = "difference-text";
    for (const [kind, text] of parts.filter(([kind]) => kinds.includes(kind))) {
      const tag = { same: "span", gone: "del", new: "ins" }[kind];
      const piece = document.createElement(tag);
      piece.textContent = text;
      block.append(piece);
    }
    return block;
  };
  place.classList.toggle("beside", beside);
  place.replaceChildren(...(beside ? [column("same", "gone"), column("same", "new")] : [column("same", "gone", "new")]));
  const count = (wanted) =>
    parts.filter(([kind]) => kind === wanted).reduce((sum, [, text]) => sum + (text.match(/\S+/g) ?? []).length, 0);
  return `−${count("gone")} +${count("new")} words`;
}
