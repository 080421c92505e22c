// The page that shows the element: gives it the token from the address, and says how to get one.

const token = new URLSearchParams(location.hash.slice(1)).get("token");
const path = location.origin + location.pathname;

document.getElementById("origin").textContent = location.origin;
document.getElementById("page").textContent = path;
document.getElementById("module").textContent = new URL("feedback.js", path).href;
document.getElementById("without").hidden = document.getElementById("how").hidden = !!token;
if (token) for (const element of document.querySelectorAll("datamoat-feedback")) element.token = token;

addEventListener("hashchange", () => location.reload());
