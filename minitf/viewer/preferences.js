/* Preferences: the language, remembered for the next visit, and the light or dark theme. */

import { LANGUAGES } from "./texts.js";

export function preferredLanguage() {
  try {
    const stored = localStorage.getItem("minitf-language");
    if (stored in LANGUAGES) return stored;
  } catch { /* a page opened from a file may have no storage */ }
  return navigator.language.startsWith("zh") ? "zh" : "en";
}

export function remember(language) {
  try { localStorage.setItem("minitf-language", language); } catch { /* not remembered, then */ }
}

/** The system's theme, until the button changes it. */
export function systemTheme() {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null;
  const now = () => chosen ?? (scheme.matches ? "dark" : "light");
  const tell = () => { document.documentElement.dataset.theme = now(); listeners.forEach((listener) => listener()); };
  scheme.addEventListener("change", tell);
  document.documentElement.dataset.theme = now();
  return { now, onChange: (listener) => listeners.push(listener), toggle: () => { chosen = now() === "dark" ? "light" : "dark"; tell(); } };
}
