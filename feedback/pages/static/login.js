// A link /login#dm_… brings the key, and the person presses the button: a link that somebody else made would sign them
// in as somebody else. The fragment is never sent to a server, and leaves the address bar here.
function takeKey() {
  const key = location.hash.slice(1);
  if (!key) return false;
  history.replaceState(null, "", location.pathname + location.search);
  document.getElementById("key").value = key;
  document.getElementById("from-link").hidden = false;
  document.querySelector("#login button").focus();
  return true;
}

// Browsers keep the session from a link on another site, so somebody who is signed in may end up here: go on then.
async function goOn() {
  if (!new URLSearchParams(location.search).has("next")) return;
  const answer = await fetch(document.querySelector("[name=next]").value, { method: "HEAD", redirect: "manual" });
  if (answer.ok) location.replace(answer.url);
}

addEventListener("hashchange", takeKey);
if (!takeKey()) goOn();
