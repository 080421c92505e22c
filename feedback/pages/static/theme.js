// Light or dark: as the system has it, unless this browser was told otherwise. Loaded before anything is painted.
"use strict";
(() => {
  const KEY = "datamoat.theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };
  let theme = "system";
  try {
    const kept = localStorage.getItem(KEY);
    if (kept in NEXT) theme = kept;
  } catch { /* storage is switched off: the choice lasts for this page */ }

  const show = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (!button) return;
    button.textContent = { system: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme}. Change to ${NEXT[theme]}`);
  };

  show();
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      theme = NEXT[theme];
      try {
        localStorage.setItem(KEY, theme);
      } catch { /* as above */ }
      show();
    });
  });
})();
